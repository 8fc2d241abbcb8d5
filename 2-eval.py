"""Chat with a model: python 2-eval.py [--interactive | --prompt TEXT]

Without either it answers a list of questions. It takes out/rl_512.pth, then
out/multi_chat/full_sft_512.pth, then out/single_chat/full_sft_512.pth, then the demo's weights, or
what --weights or --load_from names.
"""

import argparse
from collections import deque

from model.flags import quick_imports, run_main, weights_flags
from model.script_parser import ScriptParser
from model.terminal import (
    ask,
    check_history,
    history_flag,
    introduce,
    sampling_flags,
    sampling_options,
    show,
)

QUESTIONS = (
    "你好",
    "你是谁？",
    "请介绍一下你自己。",
    "中国的首都是哪座城市？",
    "长江有多长？",
    "水的化学式是什么？",
    "为什么天空是蓝色的？",
    "推荐几道杭州的特色菜。",
    "怎样才能睡得更好？",
    "写一首关于秋天的短诗。",
    "Hello, who are you?",
    "What is the capital of France?",
    "Why do the seasons change?",
)


def parse_args() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--interactive", action="store_true", help="type questions; exit ends")
    what.add_argument("--prompt", action="append", metavar="TEXT", help="a question; repeatable")
    parser.add_argument("--system", metavar="TEXT", help="a system text before the conversation")
    history_flag(parser, " in --interactive")
    weights_flags(parser)
    sampling_flags(parser, max_new_tokens=512, temperature=0.7, top_k=16)
    args = parser.parse_args()
    check_history(parser, args)
    return args


def main() -> None:
    args = parse_args()
    with quick_imports():
        from model.checkpoint import load_for_inference
        from model.generation import Engine
        from model.prompts import fit_messages, prompt_limit

    loaded = load_for_inference(args, purpose="chat")
    introduce(loaded)
    model, tokenizer, options = loaded.model, loaded.tokenizer, sampling_options(args)
    limit = prompt_limit(model.config.max_seq_len, options.max_new_tokens)
    engine = Engine(model, tokenizer, max_batch=1)  # keeps the conversation's keys and values
    system = [{"role": "system", "content": args.system}] if args.system else []

    def answer(messages: list[dict[str, str]]) -> str:
        messages, n_dropped = fit_messages(tokenizer, messages, limit)
        if n_dropped:
            print(
                f"[left out the {n_dropped} oldest messages: a prompt has at most {limit} tokens]"
            )
        prompt_ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
        reply = engine.submit(prompt_ids, options)
        print("MiniMind: ", end="", flush=True)
        show(engine, reply, interactive=args.interactive)
        return reply.text

    if not args.interactive:
        for question in args.prompt or QUESTIONS:
            print(f"用户: {question}")
            answer([*system, {"role": "user", "content": question}])
        return

    history: deque[dict[str, str]] = deque(maxlen=args.history_cnt)
    for line in ask("用户: "):
        question = {"role": "user", "content": line}
        try:
            text = answer([*system, *history, question])
        except ValueError as error:  # a question that is too long; the next may not be
            print(f"error: {error}\n")
            continue
        history += [question, {"role": "assistant", "content": text}]


if __name__ == "__main__":
    run_main(main)
