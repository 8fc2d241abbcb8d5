"""Speed and memory of the token store: python benchmarks/data.py [--corpus FILE] [--json FILE]

1. Tokenising a corpus into a store, against the bare ``tokenizers`` library on the same texts, in
   turns: from texts in memory, and from a CSV (reading and checking its rows included).
2. Utilisation of the packed rows of that corpus.
3. A store of 35 million documents, 10 billion tokens (its shards are holes, which take no disk):
   time to open it, to plan its rows, to open the plan, to read a batch; loading speed; memory.
"""

import argparse
import csv
import json
import lzma
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
ROW_TOKENS, ROWS_A_BATCH = 513, 128


def parse_args() -> argparse.Namespace:
    shared = ROOT.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--corpus", type=Path, default=shared / "pretrain" / "seq_monkey_format_00.jsonl.xz"
    )
    parser.add_argument("--tokenizer", type=Path, help="default: the shipped one")
    parser.add_argument("--documents", type=int, default=35_000_000, help="of the synthetic store")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # the child that reads a store
    return parser.parse_args()


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def tokenising(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    import tokenizers

    from model.dataset import pretrain_store
    from model.encoding import encode_documents
    from model.store_writer import write_store
    from model.tokenizer import BOS_ID, DEFAULT_TOKENIZER, EOS_ID, Tokenizer
    from model.tokens import StoreKey

    open_text = lzma.open if args.corpus.suffix == ".xz" else open
    with open_text(args.corpus, "rt", encoding="utf-8", newline="\n") as file:
        texts = [json.loads(line)["text"] for line in file]
    table = folder / "corpus.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text"], *([text] for text in texts)])
    n_bytes = sum(len(text.encode()) for text in texts)
    tokenizer = Tokenizer(args.tokenizer or DEFAULT_TOKENIZER)
    bpe = tokenizers.Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    key = StoreKey("pretrain", (), tokenizer.sha256, tokenizer.vocab_size)

    def bare() -> None:
        for start in range(0, len(texts), 2000):
            bpe.encode_batch_fast(texts[start : start + 2000], add_special_tokens=False)

    def from_memory() -> None:
        documents = encode_documents(texts, tokenizer, bos_id=BOS_ID, eos_id=EOS_ID)
        write_store(folder / "memory.tokens", key, documents)

    def from_table() -> None:
        (folder / "corpus.tokens" / "manifest.json").unlink(missing_ok=True)
        pretrain_store(table, tokenizer, log=lambda _: None)

    ways = {"bare": bare, "texts -> store": from_memory, "CSV -> store": from_table}
    bare()  # warm up
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, work in ways.items():
            seconds[name].append(timed(work))
    figures = {}
    for name, pairs in seconds.items():
        turns = list(zip(seconds["bare"], pairs, strict=True))
        wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        figures[name] = {
            "mb_per_s": n_bytes / 1e6 / wall,
            "mb_per_cpu_s": n_bytes / 1e6 / cpu,
            "speed_vs_bare": statistics.median(bare[0] / own[0] for bare, own in turns),
            "speed_vs_bare_per_cpu_s": statistics.median(bare[1] / own[1] for bare, own in turns),
        }
    print(f"\nTokenising {len(texts):,} documents, {n_bytes / 1e6:.1f} MB")
    print(f"{'':24}{'MB/s':>8}{'MB/cpu-s':>10}{'x bare':>8}{'x bare by cpu':>15}")
    for name, row in figures.items():
        print(f"{name:24}" + "{:8.2f}{:10.2f}{:8.2f}{:15.2f}".format(*row.values()))
    return figures


def utilisation(folder: Path) -> dict[int, float]:
    from model.packing import open_plan
    from model.tokens import open_store

    store = open_store(folder / "corpus.tokens")
    figures = {T: open_plan(store, T + 1).utilisation for T in (128, 256, 512, 1024, 2048)}
    print("\nPositions in use, by max_seq_len")
    print("  ".join(f"{T}: {100 * share:.2f} %" for T, share in figures.items()))
    return figures


def make_synthetic_store(folder: Path, n_documents: int) -> None:
    """Write a store of documents like short web texts, whose tokens are all 0."""
    import numpy as np

    from model.tokens import FORMAT_VERSION

    folder.mkdir()
    generator = np.random.default_rng(0)
    shards, n_tokens = [], 0
    with open(folder / "offsets.bin", "wb") as file:
        file.write(np.zeros(1, "<u8").data)
        for start in range(0, n_documents, 1_000_000):
            n = min(1_000_000, n_documents - start)
            lengths = np.minimum(generator.lognormal(5.3, 0.85, n), 20_000).astype("<u8") + 2
            file.write((np.cumsum(lengths) + np.uint64(n_tokens)).data)
            shards.append(int(lengths.sum()))
            n_tokens += shards[-1]
    for number, n in enumerate(shards):
        with open(folder / f"tokens-{number:05d}.bin", "wb") as file:
            file.truncate(2 * n)
    manifest = {
        "format": FORMAT_VERSION,
        "documents": n_documents,
        "tokens": n_tokens,
        "has_mask": False,
        "shards": shards,
        "lengths_hash": "synthetic",
        "held_out": {"documents": [], "text_bytes": []},
        "sources": [],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def read_store(folder: Path) -> dict[str, float]:
    """Open, plan and read a store; in a process of its own, so that its memory can be told."""
    import numpy as np

    from model.order import Sampler
    from model.packing import open_plan, read_rows
    from model.tokens import open_store

    def memory_mb(field: str) -> float:
        """Return VmRSS, what the process holds now, or VmHWM, the most it has held."""
        status = Path("/proc/self/status").read_text().split()
        return int(status[status.index(f"{field}:") + 1]) / 1024

    def load(plan, sampler: Sampler, n_batches: int, first: int) -> None:
        for number in range(first, first + n_batches):
            read_rows(store, plan, sampler.share(number * ROWS_A_BATCH, ROWS_A_BATCH))

    figures: dict[str, float] = {}
    resident = memory_mb("VmRSS")
    start = time.perf_counter()
    store = open_store(folder)
    figures["open_store_s"] = time.perf_counter() - start
    start = time.perf_counter()
    open_plan(store, ROW_TOKENS)
    figures["make_plan_s"] = time.perf_counter() - start
    figures["planning_peak_mb"] = memory_mb("VmHWM") - resident
    resident = memory_mb("VmRSS")
    start = time.perf_counter()
    plan = open_plan(store, ROW_TOKENS)
    figures["open_plan_s"] = time.perf_counter() - start
    sampler = Sampler(plan.n_rows, 0)
    start = time.perf_counter()
    load(plan, sampler, 1, 0)
    figures["first_batch_s"] = time.perf_counter() - start
    rows = np.arange(ROWS_A_BATCH)  # the same rows over and over: in the cache after the first time
    n_batches, n_tokens = 300, 300 * ROWS_A_BATCH * ROW_TOKENS
    for name, work in {
        "warm": lambda: [read_rows(store, plan, rows) for _ in range(n_batches)],
        "random": lambda: load(plan, sampler, n_batches, 1),
    }.items():
        wall, cpu = timed(work)
        figures[f"{name}_mtok_per_s"] = n_tokens / 1e6 / wall
        figures[f"{name}_mtok_per_cpu_s"] = n_tokens / 1e6 / cpu
    figures["reading_growth_mb"] = memory_mb("VmRSS") - resident
    figures["tokens"] = store.n_tokens
    figures["rows"] = plan.n_rows
    figures["utilisation"] = plan.utilisation
    figures["plan_mb"] = plan.path.stat().st_size / 1e6
    return figures


def main() -> None:
    args = parse_args()
    if args.read is not None:
        print(json.dumps(read_store(args.read)))
        return
    if not args.corpus.is_file():
        raise SystemExit(f"{args.corpus} does not exist: name a .jsonl of texts with --corpus")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.2f} at the start"
    )
    figures: dict[str, object] = {"load_average": os.getloadavg()[0], "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures["tokenising"] = tokenising(args, folder)
        figures["utilisation"] = utilisation(folder)
        large = folder / "large.tokens"
        make_synthetic_store(large, args.documents)
        child = subprocess.run(
            [sys.executable, __file__, "--read", str(large)], stdout=subprocess.PIPE, check=True
        )
        figures["synthetic"] = json.loads(child.stdout)
    print(f"\nA store of {args.documents:,} documents")
    for name, value in figures["synthetic"].items():
        print(f"{name:24}{value:16,.3f}")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
