"""Show what each stage changed: python eval_stages.py --text FILE --quiz FILE --ceval_dir DIR

Measures all weights that the stages left in --out_dir, or those that --weights names (one is
enough): bits per byte of a text, a quiz, C-Eval, and the same prompts answered greedily, with how
much the answers repeat themselves. Prints one table; writes out/stages/report.md and report.json.
For example, after `make demo`:

  python eval_stages.py --out_dir out/demo --text dataset/demo/pretrain.jsonl \\
      --quiz dataset/demo/quiz.jsonl --ceval_dir dataset/demo/ceval-exam
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from model.flags import device_flags, model_flags, non_negative, positive, quick_imports, run_main
from model.script_parser import ScriptParser

PROMPTS = (
    "你好",
    "你是谁？",
    "法国的首都是哪里？",
    "水的化学式是什么？",
    "请介绍一下长江。",
    "怎样才能睡得更好？",
    "写一首关于秋天的短诗。",
    "What is the capital of France?",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    group = parser.add_argument_group("weights")
    add = group.add_argument
    add(
        "--weights",
        nargs="+",
        metavar="PATH",
        help=".pth files, folders of adapters (LoRA) or exported folders, in the order to show "
        "(default: all stages found in --out_dir)",
    )
    add("--out_dir", default="out", help="where the stages left their weights (%(default)s)")
    device_flags(group)
    add = parser.add_argument_group("measures").add_argument
    add("--text", metavar="FILE", help="documents for bits per byte: .txt, .jsonl or .csv")
    add(
        "--max_bytes",
        type=non_negative(int),
        default=500_000,
        help="of --text, in whole documents from its beginning (default %(default)s; 0: all)",
    )
    add("--quiz", nargs="+", default=[], metavar="FILE", help="such as dataset/demo/quiz.jsonl")
    add("--ceval_dir", metavar="DIR", help="C-Eval's val split, such as dataset/ceval-exam")
    add("--prompt", action="append", metavar="TEXT", help="to answer; repeatable (default: eight)")
    add("--max_new_tokens", type=positive(int), default=128, help="longest answer (%(default)s)")
    model_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with quick_imports():
        from model.ceval import load_exam
        from model.checkpoint import expected_config, load_for_inference, width_name
        from model.quiz import load_quizzes
        from model.stages import Tasks, find_stages, measure, read_texts, report, stage_at
        from model.states import write_json
        from model.tally import Tally

    out_dir = Path(args.out_dir)
    if args.weights:
        stages = [stage_at(Path(path), out_dir) for path in args.weights]
    else:
        is_one_width = args.dim or args.model or args.use_moe
        stages = find_stages(out_dir, width_name(expected_config(args)) if is_one_width else None)
    tally = Tally()
    tasks = Tasks(
        prompts=args.prompt or PROMPTS,
        max_new_tokens=args.max_new_tokens,
        texts=read_texts(args.text, args.max_bytes, tally) if args.text else (),
        quizzes=load_quizzes(args.quiz),
        exam=load_exam(args.ceval_dir) if args.ceval_dir else None,
    )
    if tally.n_skipped or tally.changed:
        print(tally.report(), file=sys.stderr)
    folder = out_dir / "stages"
    facts = {"text": args.text, "quiz": args.quiz, "ceval_dir": args.ceval_dir}
    results: list[dict[str, Any]] = []
    failed = 0
    for number, stage in enumerate(stages, 1):
        head = f"[{number}/{len(stages)}] {stage.name}"
        where = {"weights": stage.weights, "lora": stage.lora, "load_from": None}
        try:
            loaded = load_for_inference(argparse.Namespace(**{**vars(args), **where}))
            log = partial(print, head, sep=": ", file=sys.stderr, flush=True)
            measured = measure(loaded, tasks, log)
        except (ValueError, OSError) as error:  # the other stages are worth their time
            print(f"{head}: left out, {error}", file=sys.stderr)
            failed += 1
            continue
        known = {"stage": stage.name, "weights": str(loaded.path)}
        known |= {"lora": str(stage.lora)} if stage.lora else {}
        results.append(known | measured)
        # after each stage, so that Ctrl-C loses one and not all
        write_json({**facts, "stages": results}, folder / "report.json")
        (folder / "report.md").write_text(report(results), encoding="utf-8")
    if not results:
        raise ValueError("none of the weights could be measured")
    print(report(results))
    print(f"wrote {folder / 'report.md'} and report.json")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
