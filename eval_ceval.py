"""Sit the C-Eval exam: python eval_ceval.py [--data_dir dataset/ceval-exam] [--shots 5]

Asks every question of the 52 subjects in two ways: v1's (the most probable of the tokens A B C D)
and by option text (the likeliest of the four answers, per byte). Prints right/asked and accuracy by
subject, category and in all, with 95 % intervals and the chance level, and writes a CSV a subject,
summary.json and a chart to out/ceval/<weights>/. --split test has no answers and writes the
submission to test/ in there instead; --results FOLDER shows an earlier run again, v1's too.
"""

import argparse
import sys
from pathlib import Path

from model.flags import non_negative, quick_imports, run_main, weights_flags
from model.script_parser import ScriptParser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    add = parser.add_argument
    add("--data_dir", default="dataset/ceval-exam", help="holds dev/ val/ test/ (%(default)s)")
    add("--split", choices=("val", "dev", "test"), default="val", help="default: %(default)s")
    add(
        "--shots",
        type=non_negative(int),
        default=0,
        metavar="N",
        help="solved examples of the subject, from dev, before each question (default 0)",
    )
    add("--results", metavar="FOLDER", help="show the results in a folder again; no model is asked")
    weights_flags(parser)
    args = parser.parse_args(argv)
    if args.shots and args.split == "dev":
        parser.error("--shots takes its examples from dev: --split dev would show the answers")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from model import ceval_report as report

    if args.results:
        print(report.table(report.summarize(report.read_replies(args.results))))
        return

    from tqdm import tqdm

    with quick_imports():
        from model.ceval import ask, load_exam
        from model.checkpoint import load_for_inference
        from model.states import write_json
        from model.terminal import introduce

    exam = load_exam(args.data_dir, args.split, args.shots)  # first: it takes no time to be wrong
    loaded = load_for_inference(args, purpose="chat")
    introduce(loaded)
    print(f"{args.split}: {len(exam.questions):,} questions of {len(exam.subjects)} subjects")
    if exam.tally.n_skipped or exam.tally.changed:
        print(exam.tally.report())
    for path in exam.empty:
        print(f"{path} holds no usable question: its subject is left out")
    with tqdm(total=2 * len(exam.questions), unit="answer", disable=None) as bar:
        replies, counts = ask(loaded.model, loaded.tokenizer, exam, bar.update)
    for what, count in sorted(counts.items()):
        print(f"{what}: {count:,}, the context has {loaded.model.config.max_seq_len} tokens")

    lora = getattr(args, "lora", None)
    name = report.results_name(loaded.path, Path(args.out_dir), lora, args.shots)
    folder = Path(args.out_dir) / "ceval" / name
    if args.split != "val":
        folder /= args.split
    report.write_replies(replies, folder, args.split)
    if args.split == "test":
        for path in report.write_submission(replies, folder):
            print(f"wrote {path}: hand it in at https://cevalbenchmark.com")
        return
    facts = {"weights": str(loaded.path), "lora": lora, "data_dir": args.data_dir}
    facts |= {"split": args.split, "shots": args.shots, "skipped": exam.tally.n_skipped}
    summary = {**facts, "did_not_fit": dict(counts), **report.summarize(replies)}
    write_json(summary, folder / "summary.json")
    print(f"\n{report.table(summary)}\n")
    if not report.draw(summary, folder / "accuracy.png", f"C-Eval {args.split}, {name}"):
        print("no chart is drawn: pip install matplotlib", file=sys.stderr)
    print(f"wrote {folder}/")


if __name__ == "__main__":
    run_main(main)
