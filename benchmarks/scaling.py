"""What several ranks cost: python benchmarks/scaling.py [--quick] [--zero 1 2]

Trains the 26 M model for some updates of 8,192 tokens a rank (16 rows of 512), one thread a rank,
in three ways that take turns: one rank alone; several ranks under torchrun (DDP); and, to tell the
exchange of gradients from what ranks on one machine take from each other anyway, as many
independent runs at once. A run's figure is the median over its updates of tokens a second and
rank, by the clock (exchange, log line and optimizer within, saves and validation not); prints
medians and ranges over the rounds, and of the ratios within a round. Writes JSON.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from goals import spread
from machine import describe, machine

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2  # updates: after the first, DDP arranges its buckets anew
ALONE, DDP, APART = "alone", "ddp", "apart"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of 3 updates")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=6, help="measured in each run")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="of 512 tokens, a rank and update")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--zero", type=int, nargs="*", default=[], help="stages to try too")
    parser.add_argument("--json", type=Path, default="scaling.json", help="where to write figures")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.updates = 1, 3
    facts = machine()
    print(describe(facts))
    print(f"{args.ranks} ranks of one thread, {args.rows} x 512 tokens each an update", flush=True)
    ways = [ALONE, DDP, APART, *(f"zero {stage}" for stage in args.zero)]
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder))
        run(
            [sys.executable, *script(corpus, Path(folder), args, "--dry_run")]
        )  # makes the token store
        for dtype in args.dtype:
            rounds = []
            for number in range(args.rounds):
                # to and fro, so that a machine that grows slower hits the first as much as the last
                order = ways if number % 2 == 0 else ways[::-1]
                speeds = {}
                for way in order:
                    speeds[way] = measure(way, dtype, corpus, args)
                    print(f"  {dtype}, round {number + 1}, {way}: {speeds[way]:,.0f}", flush=True)
                rounds.append({way: speeds[way] for way in ways})
            figures[dtype] = rounds
    print("\n".join(table(figures)))
    result = {"machine": facts, "ranks": args.ranks, "rows": args.rows, "updates": args.updates}
    result |= {"load_at_end": os.getloadavg()[0], "tokens_per_s_and_rank": figures}
    args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def write_corpus(folder: Path) -> Path:
    """Write half a megabyte of text in documents of every length, which fill rows to the brim."""
    path = folder / "text.jsonl"
    texts = (
        "长江发源于青藏高原，全长六千三百多公里。" * (1 + number % 40) for number in range(400)
    )
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def measure(way: str, dtype: str, corpus: Path, args: argparse.Namespace) -> float:
    """Run in one of the ways; return the tokens a second of each rank."""
    with tempfile.TemporaryDirectory(dir=corpus.parent) as folder:
        n_runs = args.ranks if way == APART else 1
        outs = [Path(folder) / str(number) for number in range(n_runs)]
        n_ranks = 1 if way in (ALONE, APART) else args.ranks
        launcher = [] if n_ranks == 1 else ["-m", "torch.distributed.run", "--standalone"]
        launcher += [] if n_ranks == 1 else ["--nproc_per_node", n_ranks]
        zero = ["--zero_stage", way.split()[1]] if way.startswith("zero") else []
        flags = ["--dtype", dtype, *zero]
        run(*([sys.executable, *launcher, *script(corpus, out, args, *flags)] for out in outs))
        return statistics.mean(speed(out) / n_ranks for out in outs)


def script(corpus: Path, out: Path, args: argparse.Namespace, *flags: str) -> list[object]:
    """Return the command of a training run, without what launches it."""
    n_updates = WARM_UP + args.updates + 1  # the last of one run may be without the others'
    return [
        *[ROOT / "1-pretrain.py", "--data_path", corpus, "--out_dir", out, "--overwrite"],
        *["--device", "cpu", "--model", "minimind-v1-small", "--batch_size", args.rows],
        *["--max_steps", n_updates, "--log_interval", 1, "--eval_interval", 10**6],
        *["--save_interval", 10**6, *flags],
    ]


def run(*commands: list[object]) -> None:
    """Run commands at once, one thread each, to their ends."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    processes = [subprocess.Popen(list(map(str, command)), **options) for command in commands]
    for process in processes:
        shown, _ = process.communicate()
        if process.returncode:
            sys.exit(f"{process.args} ended with status {process.returncode}:\n{shown}")


def speed(out: Path) -> float:
    """Return the median tokens a second of a run's updates, over all its ranks."""
    (path,) = out.glob("logs/*/metrics.jsonl")
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    # by the clock: the record's own speed leaves out the ranks' last question whether to stop
    marks = [(r["tokens"], r["elapsed_s"]) for r in records if "tokens_per_s" in r]
    pairs = itertools.pairwise(marks[WARM_UP - 1 : -1])
    return statistics.median((after[0] - now[0]) / (after[1] - now[1]) for now, after in pairs)


def table(figures: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return the lines of a Markdown table: speeds, and ratios within a round."""
    lines = ["| precision | way | tokens/s a rank | to one alone | to as many apart |"]
    lines.append("|---|---|---:|---:|---:|")
    for dtype, rounds in figures.items():
        for way in rounds[0]:
            speeds = spread([speeds[way] for speeds in rounds], ",.0f")
            cells = [
                spread([100 * speeds[way] / speeds[base] for speeds in rounds], ".1f") + " %"
                for base in (ALONE, APART)
            ]
            lines.append(f"| {dtype} | {way} | {speeds} | {cells[0]} | {cells[1]} |")
    return lines


if __name__ == "__main__":
    main()
