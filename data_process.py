"""Raw files to training tables: python data_process.py [STAGE [--input FILE... --output FILE]]

Without --input it looks in dataset/ for the raw files below and makes what it can.

  pretrain  dataset/mobvoi_seq_monkey_general_open_corpus.jsonl -> dataset/pretrain_data.csv
  sft       dataset/sft_data_zh.jsonl -> dataset/sft_data_single.csv (conversations of one turn)
                                     and dataset/sft_data.csv (all conversations)
  rl        dataset/dpo/*.json, *.jsonl but train_data.json -> dataset/dpo/train_data.json
  tokens    the CSVs above -> NAME.tokens/ beside each; training makes these by itself as well

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

from model.flags import non_negative, positive, quick_imports, run_main
from model.rows import holds_documents
from model.script_parser import ScriptParser
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
    parser = ScriptParser(__doc__)
    add = parser.add_argument
    add("stage", nargs="?", choices=(*STAGES, "tokens"), help="default: the first three")
    add("--input", nargs="+", metavar="FILE", help="read these, in this order")
    add("--output", metavar="FILE", help="the table to write (.csv; rl: .json)")
    add("--data_dir", default="dataset", help="where files are looked for (default: dataset)")
    add("--turns", choices=TURNS, help="sft with --output: which conversations (default: all)")
    add("--min_chars", type=non_negative(int), help="leave out shorter texts")
    add("--max_chars", type=positive(int), help="leave out longer texts")
    add(
        "--min_chinese_ratio",
        type=non_negative(float),
        help="leave out texts with a smaller share of Chinese characters (0 to 1)",
    )
    add(
        "--recipe",
        choices=("v1",),
        help="filter as v1 did: documents up to 512 characters; questions of 10-512, answers of "
        "5-512, both more than half Chinese; preference texts up to 520 (the flags above go first)",
    )
    add("--workers", type=positive(int), help="processes (default: one per core)")
    add("--tokenizer", metavar="DIR", help="tokens: default model/minimind_tokenizer")
    add("--max_seq_len", type=positive(int), default=512, help="tokens of chats (default: 512)")
    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.input and not args.stage:
        parser.error("--input needs a stage: data_process.py pretrain|sft|rl|tokens --input FILE …")
    if args.stage == "tokens":
        for name in ("output", "turns", "min_chars", "max_chars", "min_chinese_ratio", "workers"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} is not for tokens: each table gets its store beside it")
        return
    if bool(args.input) != bool(args.output):
        parser.error("--input and --output belong together: name both, or neither")
    if args.turns and not (args.stage == "sft" and args.output):
        parser.error("--turns is for sft with --input and --output")
    if args.output:
        suffix = STAGES[args.stage].suffix
        if not args.output.endswith(suffix):
            parser.error(f"--output {args.output}: the {args.stage} table ends in {suffix}")
        if Path(args.output).resolve() in {Path(path).resolve() for path in args.input}:
            parser.error(f"--output {args.output} is also an input: choose another name")
    if (args.min_chinese_ratio or 0) > 1:
        parser.error(f"--min_chinese_ratio {args.min_chinese_ratio}: expected 0 to 1")


def find_raw(data_dir: Path, stage: str) -> list[Path]:
    """Return the stage's raw files in the data folder; of one name, plain goes before packed."""
    found: dict[str, Path] = {}
    for pattern in RAW_NAMES[stage]:
        for packing in ("", ".xz", ".gz"):
            for path in sorted(data_dir.glob(pattern + packing)):
                if path.is_file():
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


def make_tables(
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
    except KeyboardInterrupt:
        print(f"\n{stage}: stopped, nothing written; run it again", file=sys.stderr)
        raise
    finally:
        progress.close()
    for path, n in zip(outputs.values(), n_rows, strict=True):
        print(f"{path}: {n:,} rows, {path.stat().st_size / 1e6:,.1f} MB")
    print(f"{stage}: {time.monotonic() - begin:.1f} s; {tally.report()}", flush=True)


def make_found_tables(args: argparse.Namespace) -> None:
    """Make every table whose raw files are in the data folder; say what is missing."""
    data_dir = Path(args.data_dir)
    found = {stage: find_raw(data_dir, stage) for stage in ([args.stage] if args.stage else STAGES)}
    for stage, paths in found.items():
        names = " or ".join(str(data_dir / name) for name in RAW_NAMES[stage])
        print(f"{stage}: found {', '.join(map(str, paths)) if paths else f'nothing ({names})'}")
    if not any(found.values()):
        raise FileNotFoundError(
            "no raw files: put them under the names above, or name yours: "
            "data_process.py pretrain|sft|rl --input FILE … --output FILE"
        )
    failed = []
    for stage, paths in found.items():
        if not paths:
            continue
        outputs = {turns: data_dir / name for turns, name in TABLES[stage].items()}
        try:
            make_tables(args, stage, paths, outputs)
        except ValueError as error:  # an unusable file; the other tables can be made all the same
            print(f"error: {stage}: {error}", file=sys.stderr)
            failed.append(stage)
    if failed:
        raise ValueError(f"not made: {', '.join(failed)}; see above")


def make_tokens(args: argparse.Namespace) -> None:
    """Make the token store beside each table, unless it is there and fits."""
    names = [name for stage in ("pretrain", "sft") for name in TABLES[stage].values()]
    known = [Path(args.data_dir, name) for name in names]
    inputs = [Path(p) for p in args.input or ()] or [path for path in known if path.exists()]
    if not inputs:
        tried = ", ".join(map(str, known))
        raise FileNotFoundError(f"no tables ({tried}): make them with data_process.py")
    with quick_imports():
        from model.dataset import V1_MAX_CHARS, pretrain_store, sft_store
        from model.tokenizer import DEFAULT_TOKENIZER, Tokenizer

    tokenizer = Tokenizer(args.tokenizer or DEFAULT_TOKENIZER)
    for path in inputs:
        if holds_documents(path):
            max_chars = V1_MAX_CHARS if args.recipe == "v1" else None
            store = pretrain_store(path, tokenizer, max_chars=max_chars)
        else:
            store = sft_store(path, tokenizer, max_tokens=args.max_seq_len + 1)
        print(f"{store.folder}: {store.n_documents:,} documents, {store.n_tokens:,} tokens")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up, as after Ctrl-C
    if args.stage == "tokens":
        make_tokens(args)
    elif args.input:
        outputs = {args.turns or "all": Path(args.output)}
        make_tables(args, args.stage, [Path(path) for path in args.input], outputs)
    else:
        make_found_tables(args)


if __name__ == "__main__":
    run_main(main)
