"""Is the memory estimate right? python benchmarks/memory.py [--quick] [--only TEXT]

Starts two updates of each configuration as a user would, in one process or as the ranks of one run,
and compares the peak of the process that took most (as the system counts it) with what the run said
before its first step. Prints a table, writes JSON.

The last column is the same without what every process takes before it trains: Python, torch, data.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN, LORA, DPO = "1-pretrain.py", "4-lora_sft.py", "5-dpo_train.py"
LIVE = "--reference live --batch_size 2 --dtype float32"
# name: script, ranks, flags
CASES = {
    "26 M, 4 x 512, fp32": (PRETRAIN, 1, "--batch_size 4 --dtype float32"),
    "26 M, 16 x 512, fp32": (PRETRAIN, 1, "--batch_size 16 --dtype float32"),
    "26 M, 16 x 512, bf16": (PRETRAIN, 1, "--batch_size 16 --dtype bfloat16"),
    "26 M, 4 x 2048, fp32": (PRETRAIN, 1, "--batch_size 4 --max_seq_len 2048 --dtype float32"),
    "MoE, 4 x 512, fp32": (PRETRAIN, 1, "--use_moe --batch_size 4 --dtype float32"),
    "108 M, 4 x 512, fp32": (PRETRAIN, 1, "--model minimind-v1 --batch_size 4 --dtype float32"),
    "26 M, adapter, 4 x 512, fp32": (LORA, 1, "--batch_size 4 --dtype float32"),
    "26 M, adapter, 4 x 512, bf16": (LORA, 1, "--batch_size 4 --dtype bfloat16"),
    "26 M, DPO, live, 2 x 512, fp32": (DPO, 1, LIVE),
    "26 M, DDP, 4 x 512, fp32": (PRETRAIN, 2, "--batch_size 4 --dtype float32"),
    "26 M, ZeRO 1, 4 x 512, fp32": (PRETRAIN, 2, "--zero_stage 1 --batch_size 4 --dtype float32"),
    "26 M, ZeRO 2, 4 x 512, fp32": (PRETRAIN, 2, "--zero_stage 2 --batch_size 4 --dtype float32"),
    "26 M, ZeRO 3, 4 x 512, fp32": (PRETRAIN, 2, "--zero_stage 3 --batch_size 4 --dtype float32"),
    "26 M, ZeRO 2, 4 x 512, bf16": (PRETRAIN, 2, "--zero_stage 2 --batch_size 4 --dtype bfloat16"),
    "26 M, DDP, DPO, live, 2 x 512, fp32": (DPO, 2, LIVE),
    "26 M, DDP, adapter, 4 x 512, fp32": (LORA, 2, "--batch_size 4 --dtype float32"),
    "MoE, DDP, 2 x 512, fp32": (PRETRAIN, 2, "--use_moe --batch_size 2 --dtype float32"),
    "MoE, ZeRO 2, 2 x 512, fp32": (
        PRETRAIN,
        2,
        "--use_moe --zero_stage 2 --batch_size 2 --dtype float32",
    ),
    "108 M, ZeRO 3, 2 x 512, fp32": (
        PRETRAIN,
        2,
        "--model minimind-v1 --zero_stage 3 --batch_size 2 --dtype float32",
    ),
    "MoE, 16 x 512, fp32": (PRETRAIN, 1, "--use_moe --batch_size 16 --dtype float32"),
    "MoE, 16 x 512, bf16": (PRETRAIN, 1, "--use_moe --batch_size 16 --dtype bfloat16"),
    "108 M, 16 x 512, bf16": (PRETRAIN, 1, "--model minimind-v1 --batch_size 16 --dtype bfloat16"),
    "108 M, 16 x 512, fp32": (PRETRAIN, 1, "--model minimind-v1 --batch_size 16 --dtype float32"),
}
QUICK = ("26 M, 4 x 512, fp32", "26 M, DDP, 4 x 512, fp32", "26 M, ZeRO 2, 4 x 512, fp32")


def write_data(folder: Path) -> dict[str, Path]:
    """Write a table for each script; return them by the script's name."""
    text = "长江发源于青藏高原，全长六千三百多公里。" * 40
    tables = {
        PRETRAIN: {"text": text},
        LORA: {"instruction": "长江？", "input": "", "output": text[:400]},
        DPO: {"prompt": "长江？", "chosen": text[:400], "rejected": text[20:400]},
    }
    paths = {}
    for number, (script, row) in enumerate(tables.items()):
        paths[script] = folder / f"{number}.jsonl"
        line = json.dumps(row, ensure_ascii=False)
        paths[script].write_text(f"{line}\n" * 400, "utf-8")
    return paths


def start(command: list[str], n_ranks: int, folder: Path, launched: bool) -> list[subprocess.Popen]:
    """Start the ranks of a run with the environment that a launcher sets; one thread each."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    ranks = []
    for rank in range(n_ranks):
        own = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} if launched else {}
        with open(folder / f"rank{rank}.txt", "w") as log:
            ranks.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env | own)
            )
    return ranks


def measure(script: str, n_ranks: int, flags: str, data: Path, folder: Path) -> dict[str, float]:
    """Return what a run said it takes, the part of it that is no training, and the peak, in MB."""
    command = [sys.executable, ROOT / script, "--data_path", data, "--out_dir", folder / "out"]
    command += ["--max_steps", "2", "--device", "cpu", "--overwrite", "--init_from", "none"]
    launched = n_ranks > 1 or "--zero_stage" in flags
    ranks = start([*map(str, command), *flags.split()], n_ranks, folder, launched)
    peaks, codes = [], []
    for rank in ranks:
        _, status, usage = os.wait4(rank.pid, 0)
        rank.returncode = os.waitstatus_to_exitcode(status)
        codes.append(rank.returncode)
        peaks.append(usage.ru_maxrss * 1024 / 1e6)
    shown = (folder / "rank0.txt").read_text("utf-8")
    if any(codes):
        raise SystemExit(f"{script} {flags}: {codes} {shown}")
    found = re.search(r"memory +about ([\d.]+) ([MG])B.*?, ([\d.]+) ([MG])B of it beside", shown)
    number, unit, taken, taken_unit = found.groups()
    in_mb = {"M": 1, "G": 1000}
    return {
        "estimate_mb": float(number) * in_mb[unit],
        "beside_mb": float(taken) * in_mb[taken_unit],
        "peak_mb": max(peaks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three configurations")
    parser.add_argument("--only", metavar="TEXT", help="configurations with this in their name")
    parser.add_argument("--json", default="memory.json", help="where to write the figures")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        print(f"{'configuration':<36} {'estimate':>10} {'peak':>10}  ratio  of training")
        for name in QUICK if args.quick else CASES:
            if args.only and args.only not in name:
                continue
            script, n_ranks, flags = CASES[name]
            found = measure(script, n_ranks, flags, data[script], Path(folder))
            results[name] = found
            estimate, peak, beside = (found[f"{key}_mb"] for key in ("estimate", "peak", "beside"))
            print(
                f"{name:<36} {estimate:>7,.0f} MB {peak:>7,.0f} MB  {estimate / peak:.2f}   "
                f"{(estimate - beside) / (peak - beside):.2f}",
                flush=True,
            )
    Path(args.json).write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
