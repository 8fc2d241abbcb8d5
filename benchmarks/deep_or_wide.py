"""Deep and narrow, or short and wide? python benchmarks/deep_or_wide.py [--sizes 3M] [--seeds 1 2]

Models of one number of parameters, embedding included, whose layers go from few wide to many narrow
ones, pretrained by 1-pretrain.py on the same rows in the same order; what is compared is held-out
bits per byte. A seed stands for first weights and order; shapes are compared within a seed. The
question and an answer for 125 M and 350 M are MobileLLM's (arXiv:2402.14905, section 2.2.1).

Runs that are in --work_dir are kept, so that it can be stopped, and sizes can run side by side;
at last the table of all that is there is printed and written by --json. --speed measures tokens/s
of the shapes instead, by turns; the machine should be idle.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from goals import spread
from machine import describe, machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.LMConfig import LMConfig  # noqa: E402 (the line above finds it)
from model.metrics import RunLog  # noqa: E402
from model.model import MiniMindForCausalLM  # noqa: E402

HEAD_DIM = 32  # minimind-v1-small's; the number of heads follows from the width
SIZES = {"3M": 3_000_000, "9M": 9_000_000}
SHAPES = {
    "3M": ((320, 1), (256, 2), (192, 4), (128, 12)),
    "9M": ((512, 2), (384, 4), (256, 10), (192, 19)),
}
STEPS, ROWS, N_VALIDATIONS = 500, 4, 4
SPEED_STEPS, SPEED_ROUNDS = 30, 3
Record = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model of a given width and depth whose feed-forward is as wide as the size has room for."""

    size: str
    dim: int
    n_layers: int

    @property
    def config(self) -> LMConfig:
        heads = self.dim // HEAD_DIM
        fields = {"dim": self.dim, "n_layers": self.n_layers, "n_heads": heads}
        fields["n_kv_heads"] = heads // 2
        attention = 2 * self.dim**2 + 2 * self.dim * (heads // 2) * HEAD_DIM
        norms = (2 * self.n_layers + 1) * self.dim
        room = SIZES[self.size] - LMConfig().vocab_size * self.dim - norms
        width = (room / self.n_layers - attention) / (3 * self.dim)
        return LMConfig(**fields, hidden_dim=8 * round(width / 8))

    @property
    def flags(self) -> list[str]:
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim")
        return [part for name in names for part in (f"--{name}", str(getattr(self.config, name)))]

    @property
    def n_params(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in MiniMindForCausalLM(self.config).parameters())

    def __str__(self) -> str:
        return f"{self.dim} x {self.n_layers}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", default="dataset/pretrain_data.csv", help="a table of pretraining text")
    add("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    add("--shapes", nargs="+", metavar="DIMxLAYERS", help="only these")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--steps", type=int, default=STEPS, help=f"updates of {ROWS} x 512 positions")
    add("--learning_rate", type=float, default=4e-3, help="Muon's peak rate")
    work_dir = Path(tempfile.gettempdir()) / "minimind_deep_or_wide"
    add("--work_dir", type=Path, default=work_dir, help="of the runs, which stay there")
    add("--speed", action="store_true", help="measure tokens/s instead")
    add("--json", type=Path, default="deep_or_wide.json", help="where to write the figures")
    args = parser.parse_args()
    facts = machine()
    print(describe(facts))
    shapes = [Shape(size, *shape) for size in args.sizes for shape in SHAPES[size]]
    if args.shapes:
        shapes = [shape for shape in shapes if f"{shape.dim}x{shape.n_layers}" in args.shapes]
    if args.speed:
        rounds = range(SPEED_ROUNDS)
        speeds = [{str(shape): speed(shape, args, n) for shape in shapes} for n in rounds]
        for shape in shapes:
            print(f"{shape.size} {shape!s:>9}: {spread([s[str(shape)] for s in speeds])} tokens/s")
        return
    for seed in args.seeds:  # all shapes of a seed first: what is there can be compared
        for shape in shapes:
            pretrain(shape, seed, args)
    runs = [record(shape, seed, args) for shape in shapes for seed in args.seeds]
    args.json.write_text(json.dumps({"machine": facts, "runs": runs}, indent=1) + "\n", "utf-8")
    for size in dict.fromkeys(shape.size for shape in shapes):
        show(size, runs)


def folder(shape: Shape, seed: int, args: argparse.Namespace) -> Path:
    name = f"{shape.dim}x{shape.n_layers}_{args.learning_rate:g}_{args.steps}_{seed}"
    return args.work_dir / name


def pretrain(shape: Shape, seed: int, args: argparse.Namespace) -> None:
    """Train one model, unless it is there."""
    out = folder(shape, seed, args)
    log = RunLog(out / "logs" / f"pretrain_{shape.dim}")
    if any(r["step"] == args.steps and r.get("val_bpb") for r in log.records()):
        return
    print(f"{shape.size} {shape} seed {seed}: training", flush=True)
    flags = "--resume --keep_last 1 --log_interval 25".split()
    flags += ["--eval_interval", str(args.steps // N_VALIDATIONS), "--max_steps", str(args.steps)]
    launch(shape, [*flags, "--seed", str(seed), "--out_dir", str(out)], args)


def launch(shape: Shape, flags: list[str], args: argparse.Namespace) -> None:
    command = [sys.executable, str(ROOT / "1-pretrain.py"), "--data_path", args.data_path]
    command += [*shape.flags, "--batch_size", str(ROWS), "--optimizer", "muon"]
    command += ["--learning_rate", str(args.learning_rate), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def record(shape: Shape, seed: int, args: argparse.Namespace) -> Record:
    """Return what a finished run reached, and on the way."""
    lines = RunLog(folder(shape, seed, args) / "logs" / f"pretrain_{shape.dim}").records()
    curve = [(line["tokens"], line["val_bpb"]) for line in lines if line.get("val_bpb")]
    facts = {**asdict(shape), "hidden_dim": shape.config.hidden_dim, "n_params": shape.n_params}
    return {
        **facts,
        "seed": seed,
        "rate": args.learning_rate,
        "steps": args.steps,
        "bpb": curve[-1][1],
        "curve": curve,
    }


def show(size: str, runs: list[Record]) -> None:
    """Print a size's table: shapes by depth, each against the best one of the same seed."""
    here = [run for run in runs if run["size"] == size]
    by_shape: dict[tuple[int, int], dict[int, float]] = {}
    for run in here:
        by_shape.setdefault((run["dim"], run["n_layers"]), {})[run["seed"]] = run["bpb"]
    best = min(by_shape.values(), key=lambda seeds: statistics.mean(seeds.values()))
    print(f"\n{size}, {here[0]['curve'][-1][0]:,} tokens")
    print("dim x layers | parameters | in the embedding | bits per byte | beyond the best")
    for (dim, n_layers), seeds in by_shape.items():
        shape = Shape(size, dim, n_layers)
        share = LMConfig().vocab_size * dim / shape.n_params
        gaps = [seeds[seed] - best[seed] for seed in seeds]
        print(
            f"{shape!s:>12} | {shape.n_params:,} | {share:.0%} | "
            f"{spread(list(seeds.values()), '.3f')} | {spread(gaps, '+.3f')}"
        )


def speed(shape: Shape, args: argparse.Namespace, n: int) -> float:
    """Return tokens/s of a short run's last ten updates, in which nothing is validated or saved."""
    out = args.work_dir / f"speed_{shape.dim}x{shape.n_layers}_{n}"
    flags = f"--max_steps {SPEED_STEPS} --log_interval 10 --eval_interval 1000 --overwrite"
    launch(shape, [*flags.split(), "--out_dir", str(out)], args)
    return RunLog(out / "logs" / f"pretrain_{shape.dim}").records()[-1]["tokens_per_s"]


if __name__ == "__main__":
    main()
