"""Let a pretrained model continue texts: python 0-eval_pretrain.py [--interactive | --prompt TEXT]

Without either it continues a list of beginnings. It takes out/pretrain_512.pth, then the demo's
weights, or what --weights or --load_from names.
"""

import argparse

from model.flags import quick_imports, run_main, weights_flags
from model.script_parser import ScriptParser
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
    parser = ScriptParser(__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--interactive", action="store_true", help="type beginnings; exit ends")
    what.add_argument("--prompt", action="append", metavar="TEXT", help="a beginning; repeatable")
    weights_flags(parser)
    sampling_flags(parser, max_new_tokens=256, temperature=0.7, top_k=8)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with quick_imports():
        from model.checkpoint import load_for_inference
        from model.generation import Engine
        from model.prompts import fit_text, prompt_limit

    loaded = load_for_inference(args, purpose="pretrain")
    introduce(loaded)
    model, tokenizer, options = loaded.model, loaded.tokenizer, sampling_options(args)
    limit = prompt_limit(model.config.max_seq_len, options.max_new_tokens)
    engine = Engine(model, tokenizer, max_batch=1)
    for text in ask("开头: ") if args.interactive else args.prompt or BEGINNINGS:
        prompt_ids, n_dropped = fit_text(tokenizer, text, limit)
        if n_dropped:
            print(f"[left out its first {n_dropped} tokens: a prompt takes at most {limit} tokens]")
        print(text, end="", flush=True)
        show(engine, engine.submit(prompt_ids, options), interactive=args.interactive)


if __name__ == "__main__":
    run_main(main)
