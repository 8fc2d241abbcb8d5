"""Let a pretrained model continue texts: python 0-eval_pretrain.py [--interactive | --prompt TEXT]

Without either it continues a list of beginnings. It takes out/pretrain_512.pth, then the demo's
weights, or what --weights or --load_from names.
"""

import argparse

from model.flags import run_main, weights_flags
from model.terminal import ask, introduce, sampling_flags, sampling_options, show

BEGINNINGS = (
    "万里长城是",
    "长江发源于",
    "水的化学式是",
    "太阳系中最大的行星是",
    "中国古代的四大发明包括",
    "李白是唐代",
    "机器学习是一种",
    "秋天到了，",
    "从前有一个",
    "The capital of France is",
    "Once upon a time",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--interactive", action="store_true", help="type beginnings; exit ends")
    what.add_argument("--prompt", action="append", metavar="TEXT", help="a beginning; repeatable")
    weights_flags(parser)
    sampling_flags(parser, max_new_tokens=256, temperature=0.7, top_k=8)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from model.checkpoint import load_for_inference
    from model.generation import Answer, fit_text, generate, prompt_limit

    loaded = load_for_inference(args, purpose="pretrain")
    introduce(loaded)
    model, tokenizer, options = loaded.model, loaded.tokenizer, sampling_options(args)
    limit = prompt_limit(model.config.max_seq_len, options.max_new_tokens)
    for text in ask("开头: ") if args.interactive else args.prompt or BEGINNINGS:
        prompt_ids, n_dropped = fit_text(tokenizer, text, limit)
        if n_dropped:
            print(f"[left out its first {n_dropped} tokens: a prompt takes at most {limit} tokens]")
        tokens = generate(model, prompt_ids, options)
        answer = Answer(tokenizer, tokens, options.stop, n_prompt=len(prompt_ids))
        print(text, end="", flush=True)
        show(answer, interactive=args.interactive)


if __name__ == "__main__":
    run_main(main)
