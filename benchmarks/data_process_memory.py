"""Memory and speed of data_process.py by input: python benchmarks/data_process_memory.py

Repeats a corpus (``--corpus FILE...``, Seq-Monkey's form; without it, made-up Chinese text) until
there are 100 MB and 1 GB of it, runs the pretrain stage on each and prints a table. Needs Linux.
"""

import argparse
import json
import lzma
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(corpus: list[str]) -> Iterator[bytes]:
    """Yield whole lines of the corpus, or of random text of its kind, over and over."""
    rng = random.Random(0)
    while True:
        for name in corpus:
            with (lzma.open if name.endswith(".xz") else open)(name, "rb") as file:
                while lines := file.readlines(1 << 20):
                    yield b"".join(lines)
        if not corpus:
            texts = (
                "".join(chr(rng.randrange(0x4E00, 0x9FA6)) for _ in range(400)) for _ in range(500)
            )
            yield b"".join(
                json.dumps({"text": t}, ensure_ascii=False).encode() + b"\n" for t in texts
            )


def write_corpus(path: Path, corpus: list[str], n_bytes: int) -> None:
    with path.open("wb") as file:
        for block in blocks(corpus):
            file.write(block)
            if file.tell() >= n_bytes:
                return


def rss_of_tree(pid: int) -> list[int]:
    """Return the resident bytes of a process and its descendants, itself first (Linux)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    kib = next((line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")), "0")
    return [int(kib) * 1024, *(rss for child in children for rss in rss_of_tree(int(child)))]


def measure(source: Path, output: Path, workers: int) -> tuple[float, int, int]:
    """Return seconds, the peak of the first process and the peak of all together (bytes)."""
    command = [sys.executable, str(ROOT / "data_process.py"), "pretrain", "--workers", str(workers)]
    begin = time.monotonic()
    process = subprocess.Popen(
        [*command, "--input", str(source), "--output", str(output)], stdout=subprocess.DEVNULL
    )
    peak = peak_all = 0
    while process.poll() is None:
        rss = rss_of_tree(process.pid)
        peak, peak_all = max(peak, *rss[:1], 0), max(peak_all, sum(rss))
        time.sleep(0.02)
    if process.returncode:
        sys.exit("data_process.py failed")
    return time.monotonic() - begin, peak, peak_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--megabytes", nargs="+", type=int, default=[100, 1000])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    args = parser.parse_args()
    print(f"{'input MB':>9} {'workers':>8} {'MB/s':>7} {'peak MB, first process':>23} {'all':>6}")
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "raw.jsonl"), Path(folder, "out.csv")
        for megabytes in args.megabytes:
            write_corpus(source, args.corpus, megabytes * 1_000_000)
            for workers in args.workers:
                elapsed_s, peak, peak_all = measure(source, output, workers)
                speed = source.stat().st_size / 1e6 / elapsed_s
                print(
                    f"{megabytes:>9} {workers:>8} {speed:>7.1f} {peak / 1e6:>23.0f} "
                    f"{peak_all / 1e6:>6.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
