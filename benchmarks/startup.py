"""What a training start costs as its corpus grows: python benchmarks/startup.py --corpus FILE.jsonl

Repeats FILE up to each size, starts 1-pretrain.py on it twice for one update of a tiny model, and
prints the time until the process has made that update and its peak memory: once with the token
store still to be built, once with the store there. Neither memory may grow with the corpus, nor
the second time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = "--dim 64 --n_layers 2 --n_heads 4 --n_kv_heads 2 --batch_size 4 --max_steps 1".split()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help='{"text": …} a line')
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000], help="MB")
    parser.add_argument("--work_dir", type=Path, help="where there is room (default: the system's)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.corpus.name}")
    print(f"{'corpus':>9} {'store':>9} {'seconds':>8} {'peak MB':>8}")
    figures = []
    for size in args.sizes:
        folder = Path(tempfile.mkdtemp(dir=args.work_dir))
        try:
            corpus = repeat(args.corpus, folder / "corpus.jsonl", size * 1_000_000)
            for store in ("built", "there"):
                seconds, peak = start(corpus, folder / "out")
                figures.append({"mb": size, "store": store, "seconds": seconds, "peak_mb": peak})
                print(f"{size:>6} MB {store:>9} {seconds:>8.1f} {peak:>8.0f}", flush=True)
        finally:
            shutil.rmtree(folder)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def repeat(source: Path, target: Path, n_bytes: int) -> Path:
    """Write whole lines of ``source``, over and over, up to ``n_bytes``."""
    written = 0
    with open(target, "wb") as out:
        while written < n_bytes:
            with open(source, "rb") as lines:
                for line in lines:
                    if written >= n_bytes:
                        break
                    out.write(line)
                    written += len(line)
    return target


def start(corpus: Path, out_dir: Path) -> tuple[float, float]:
    """Run one update; return its wall seconds, start of Python included, and the peak in MB."""
    command = [sys.executable, "1-pretrain.py", "--data_path", str(corpus), "--overwrite"]
    begin = time.monotonic()
    process = subprocess.Popen(
        [*command, "--out_dir", str(out_dir), *TINY], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} ended with status {status}")
    return time.monotonic() - begin, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
