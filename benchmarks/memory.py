"""Is the memory estimate right? python benchmarks/memory.py [--quick]

Starts two updates of each configuration as a user would and compares the peak of the process (as
the system counts it) with what the run said before its first step. Prints a table, writes JSON.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "26 M, 4 x 512, fp32": "--batch_size 4 --dtype float32",
    "26 M, 16 x 512, fp32": "--batch_size 16 --dtype float32",
    "26 M, 16 x 512, bf16": "--batch_size 16 --dtype bfloat16",
    "26 M, 4 x 2048, fp32": "--batch_size 4 --max_seq_len 2048 --dtype float32",
    "MoE, 4 x 512, fp32": "--use_moe --batch_size 4 --dtype float32",
    "MoE, 16 x 512, fp32": "--use_moe --batch_size 16 --dtype float32",
    "108 M, 4 x 512, fp32": "--model minimind-v1 --batch_size 4 --dtype float32",
    "MoE, 16 x 512, bf16": "--use_moe --batch_size 16 --dtype bfloat16",
    "108 M, 16 x 512, bf16": "--model minimind-v1 --batch_size 16 --dtype bfloat16",
    "108 M, 16 x 512, fp32": "--model minimind-v1 --batch_size 16 --dtype float32",
}
QUICK = ("26 M, 4 x 512, fp32", "MoE, 4 x 512, fp32")


def measure(flags: str, corpus: Path, out: Path) -> dict[str, float]:
    """Return the estimate and the peak of one run, in MB."""
    command = [sys.executable, ROOT / "1-pretrain.py", "--data_path", corpus, "--out_dir", out]
    command += ["--max_steps", "2", "--device", "cpu", "--overwrite", *flags.split()]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    shown = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{flags}: {shown}")
    number, unit = re.search(r"memory +about ([\d.]+) ([MG])B", shown).groups()
    estimate = float(number) * {"M": 1, "G": 1000}[unit]
    return {"estimate_mb": estimate, "peak_mb": usage.ru_maxrss * 1024 / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two configurations")
    parser.add_argument("--json", default="memory.json", help="where to write the figures")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "text.jsonl"
        line = json.dumps(
            {"text": "长江发源于青藏高原，全长六千三百多公里。" * 40}, ensure_ascii=False
        )
        corpus.write_text(f"{line}\n" * 400, "utf-8")
        print(f"{'configuration':<24} {'estimate':>10} {'peak':>10}  ratio")
        for name in QUICK if args.quick else CASES:
            found = measure(CASES[name], corpus, Path(folder) / "out")
            results[name] = found
            estimate, peak = found["estimate_mb"], found["peak_mb"]
            print(f"{name:<24} {estimate:>7,.0f} MB {peak:>7,.0f} MB  {estimate / peak:.2f}")
    Path(args.json).write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
