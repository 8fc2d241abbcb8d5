"""Raw files to training tables: python data_process.py [pretrain|sft|rl --input FILE --output FILE]

Without --input it looks in dataset/ for the raw files below and makes what it can.

  pretrain  dataset/mobvoi_seq_monkey_general_open_corpus.jsonl -> dataset/pretrain_data.csv
  sft       dataset/sft_data_zh.jsonl -> dataset/sft_data_single.csv (conversations of one turn)
                                     and dataset/sft_data.csv (all conversations)
  rl        dataset/dpo/*.json, *.jsonl but train_data.json -> dataset/dpo/train_data.json

Any of them may be packed as .xz or .gz. With --input, other names and forms:

  pretrain  .jsonl with {"text": ...}, .csv with a column text, .txt with one document a line
  sft       .jsonl or .json with instruction/input/output/history, messages, or ShareGPT
            conversations; .csv with columns history,q,a and optionally system
  rl        .json or .jsonl with prompt/chosen/rejected (or reject), conversations/chosen/rejected,
            instruction/chosen/rejected, or instruction and in output the answers, best first

Nothing well-formed is left out for its length or language unless you ask. What is left out, skipped
or changed is counted by reason, with the first lines. An output gets its name when it is complete.
pandas reads the CSVs unchanged with pd.read_csv(FILE, keep_default_na=False).
"""

import argparse
import dataclasses
import signal
import sys
import time
from pathlib import Path

from model.tables import STAGES, TURNS, V1_FILTERS, Filters, Job, Progress, convert

RAW_NAMES = {
    "pretrain": ("mobvoi_seq_monkey_general_open_corpus.jsonl",),
    "sft": ("sft_data_zh.jsonl",),
    "rl": ("dpo/*.json", "dpo/*.jsonl"),
}
TABLES = {
    "pretrain": {"all": "pretrain_data.csv"},
    "sft": {"single": "sft_data_single.csv", "all": "sft_data.csv"},
    "rl": {"all": "dpo/train_data.json"},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", nargs="?", choices=tuple(STAGES), help="default: all")
    parser.add_argument("--input", nargs="+", metavar="FILE", help="raw files, read in this order")
    parser.add_argument("--output", metavar="FILE", help="the table to write (.csv; rl: .json)")
    parser.add_argument("--data_dir", default="dataset", help="where raw files are looked for")
    parser.add_argument(
        "--turns", choices=TURNS, help="sft with --output: which conversations (default: all)"
    )
    parser.add_argument("--min_chars", type=int, help="leave out shorter texts")
    parser.add_argument("--max_chars", type=int, help="leave out longer texts")
    parser.add_argument(
        "--min_chinese_ratio", type=float, help="leave out texts with a smaller share of Chinese"
    )
    parser.add_argument(
        "--recipe",
        choices=("v1",),
        help="filter as v1 did: documents up to 512 characters; questions of 10-512, answers of "
        "5-512, both more than half Chinese; preference texts up to 520 (other flags go first)",
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if bool(args.input) != bool(args.output):
        parser.error("--input and --output belong together: name both, or neither")
    if args.input and not args.stage:
        parser.error("--input needs a stage: data_process.py pretrain|sft|rl --input FILE …")
    if args.turns and not (args.stage == "sft" and args.output):
        parser.error("--turns is for sft with --input and --output")
    if args.output:
        suffix = STAGES[args.stage].suffix
        if not args.output.endswith(suffix):
            parser.error(f"--output {args.output}: the {args.stage} table ends in {suffix}")
        if Path(args.output).resolve() in {Path(path).resolve() for path in args.input}:
            parser.error(f"--output {args.output} is also an input: choose another name")
    for name, least in (("workers", 1), ("min_chars", 0), ("max_chars", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: expected {least} or more")
    if args.min_chinese_ratio is not None and not 0 <= args.min_chinese_ratio <= 1:
        parser.error(f"--min_chinese_ratio {args.min_chinese_ratio}: expected 0 to 1")


def find_raw(data_dir: Path, stage: str) -> list[Path]:
    """Return the stage's raw files in the data folder; of a name, plain goes before packed."""
    found: dict[str, Path] = {}
    for pattern in RAW_NAMES[stage]:
        for packing in ("", ".xz", ".gz"):
            for path in sorted(data_dir.glob(pattern + packing)):
                found.setdefault(str(path).removesuffix(packing), path)
    return [path for name, path in sorted(found.items()) if Path(name).name != "train_data.json"]


def filters_of(args: argparse.Namespace, stage: str) -> Filters:
    filters = V1_FILTERS[stage] if args.recipe == "v1" else Filters()
    given = {
        "min_question": args.min_chars,
        "min_answer": args.min_chars,
        "max_chars": args.max_chars,
        "min_chinese_ratio": args.min_chinese_ratio,
    }
    return dataclasses.replace(filters, **{k: v for k, v in given.items() if v is not None})


def make(
    args: argparse.Namespace, stage: str, inputs: list[Path], outputs: dict[str, Path]
) -> None:
    """Write one stage's tables and print the counts."""
    job = Job(stage, filters_of(args, stage), tuple(outputs))
    begin = time.monotonic()
    progress = Progress(sum(path.stat().st_size for path in inputs if path.is_file()), stage)
    try:
        tally, n_rows = convert(
            inputs, list(outputs.values()), job, workers=args.workers, progress=progress
        )
    finally:
        progress.close()
    for path, n in zip(outputs.values(), n_rows, strict=True):
        print(f"{path}: {n:,} rows, {path.stat().st_size / 1e6:,.1f} MB")
    print(f"{stage}: {time.monotonic() - begin:.1f} s; {tally.report()}")


def make_found(args: argparse.Namespace) -> None:
    """Make every table whose raw files are in the data folder; say what is missing."""
    data_dir = Path(args.data_dir)
    stages = [args.stage] if args.stage else list(STAGES)
    found = {stage: find_raw(data_dir, stage) for stage in stages}
    for stage, paths in found.items():
        names = " or ".join(str(data_dir / name) for name in RAW_NAMES[stage])
        print(f"{stage}: found {', '.join(map(str, paths)) if paths else f'nothing ({names})'}")
    if not any(found.values()):
        raise FileNotFoundError(
            "no raw files: put them under the names above, or name yours: "
            "data_process.py pretrain|sft|rl --input FILE … --output FILE"
        )
    for stage, paths in found.items():
        if paths:
            outputs = {turns: data_dir / name for turns, name in TABLES[stage].items()}
            make(args, stage, paths, outputs)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up, as after Ctrl-C
    try:
        if args.input:
            turns = args.turns or "all"
            make(args, args.stage, [Path(path) for path in args.input], {turns: Path(args.output)})
        else:
            make_found(args)
    except KeyboardInterrupt:
        sys.exit("stopped: tables that were not complete have not been written; run it again")
    except (OSError, ValueError) as error:
        sys.exit(f"data_process.py: {error}")


if __name__ == "__main__":
    main()
