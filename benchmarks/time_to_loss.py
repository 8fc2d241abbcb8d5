"""How soon a loss is reached: python benchmarks/time_to_loss.py [--quick] [--recipe_flags="…"]

Baselines train transformers' Llama (256 x 4, 8/4 heads) for --seconds of training, their schedules
drawn over that time; what each loses on 200 held-out documents is a target. Ours is 1-pretrain.py,
a process from start to end, start-up, compilation and last validation within: the fewest
--max_steps of a table of budgets, each a run of its own with its own cool-down, that reach the
target. What is in --recipe_flags goes to it as it is.

Both train on the same documents and are judged by the same evaluator on the same class: ours is
converted to it. Token stores are built before, and their time told apart. Writes JSON after each
run; --reuse takes the baselines from such a file, to try other recipes of ours.
"""

import argparse
import json
import lzma
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from goals import verdict
from machine import describe, machine
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.checkpoint import read_state_dict  # noqa: E402 (the line above finds it)
from model.dataset import TrainingData, pretrain_data  # noqa: E402
from model.estimate import peak_flops  # noqa: E402
from model.evaluation import measure_text  # noqa: E402
from model.llama import peer_config, to_peer  # noqa: E402
from model.LMConfig import LMConfig  # noqa: E402
from model.losses import IGNORED  # noqa: E402
from model.optim import learning_rate_at  # noqa: E402
from model.order import Sampler  # noqa: E402
from model.runtime import pick_device  # noqa: E402
from model.tokenizer import Tokenizer  # noqa: E402

SIZE = {"dim": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4}
SHARDS, HELD_OUT_SHARD = range(5), 5
N_HELD_OUT, SHORTEST, LONGEST = 200, 30, 380  # documents; characters
BUDGETS = tuple(
    map(int, "12 16 20 25 32 40 50 63 80 100 125 160 200 250 320 400 500 630 800".split())
)
TICKS = 10_000  # of the baselines' clock, which stands for their steps
TOLERANCE = 0.01  # nats between our own validation and this one: the precision's
Record = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a baseline trains, and how much faster ours must be and aims to be."""

    rows: int  # of 512 positions, an update
    lr: float
    optimizer: str
    schedule: str
    padded: bool
    must: float
    aim: float
    bf16: bool = False


RECIPES = {
    "padded, Adam 2e-4": Recipe(8, 2e-4, "adam", "cosine", True, 6, 12),
    "padded, tuned Adam": Recipe(2, 1e-3, "adam", "cosine", True, 2.5, 4),
    "packed, tuned AdamW": Recipe(2, 1e-3, "adamw", "linear", False, 1.2, 2),
    "packed, tuned AdamW, bf16": Recipe(2, 1e-3, "adamw", "linear", False, 1.2, 2, bf16=True),
}
QUICK = ("padded, Adam 2e-4", "packed, tuned AdamW")
WARMUP_STEPS = 20  # of the tuned AdamW


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help=f"60 s of {' and '.join(QUICK)}")
    add("--seconds", type=float, help="of training, of each baseline (default 240)")
    add("--seeds", type=int, nargs="+", default=[1337])
    add("--only", nargs="+", choices=RECIPES, help="baselines (default: all)")
    add("--budgets", type=int, nargs="+", default=list(BUDGETS), help="updates of ours")
    add("--recipe_flags", default="--batch_size 4", help="further flags of 1-pretrain.py")
    add("--reuse", type=Path, help="take the baselines of this file of figures")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data")
    add("--tokenizer", type=Path, help="default: original_tokenizer in --data")
    work_dir = Path(tempfile.gettempdir()) / "minimind_time_to_loss"
    add("--work_dir", type=Path, default=work_dir, help="for texts and stores, which stay there")
    add("--threads", type=int, help="default: as torch likes it")
    add("--device", default="auto")
    add("--json", type=Path, default="time_to_loss.json", help="where to write the figures")
    args = parser.parse_args()
    args.seconds = args.seconds or (60.0 if args.quick else 240.0)
    args.only = args.only or list(QUICK if args.quick else RECIPES)
    args.tokenizer = args.tokenizer or args.data / "original_tokenizer"
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of ours
    facts = machine()
    print(describe(facts))
    bench = Bench(args)
    bench.result = {"machine": facts, "threads": torch.get_num_threads(), **bench.result}
    for seed in args.seeds:
        for name in bench.names:
            bench.baseline(name, seed)
        # the lowest target first: what is tried for it serves the others
        for name in sorted(bench.names, key=lambda name: bench.target(name, seed)):
            bench.search(bench.target(name, seed), seed)
    bench.result["load_at_end"] = os.getloadavg()[0]
    bench.write()
    print("", *bench.table(), "", *bench.goals(), sep="\n")


class Bench:
    """The data, the baselines, and our runs.

    Attributes:
        result: all that is written down.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = pick_device(args.device)
        self.tokenizer = Tokenizer(args.tokenizer)
        self.config = LMConfig(**SIZE, vocab_size=self.tokenizer.vocab_size)
        self.train_path, self.val_path, self.held_out = write_texts(args.data, args.work_dir)
        self.names = list(args.only)
        for name in args.only:
            if RECIPES[name].bf16 and not is_fast_in_bf16(self.device):
                self.names.remove(name)
                print(f"left out: {name}: {self.device} is no faster in bf16")
        reused = json.loads(args.reuse.read_text("utf-8")) if args.reuse else {}
        if reused and reused["seconds"] != args.seconds:
            sys.exit(f"{args.reuse} has baselines of {reused['seconds']} s, not {args.seconds}")
        if reused and reused["threads"] != torch.get_num_threads():
            sys.exit(f"{args.reuse} has baselines of {reused['threads']} threads")
        began = time.perf_counter()
        self.data = {padded: self.open_data(padded) for padded in (False, True)}
        self.result: Record = {
            "seconds": args.seconds,
            "recipe_flags": args.recipe_flags,
            "store_s": time.perf_counter() - began,  # both stores, where they were not there
            "baselines": reused.get("baselines", {}),
            "ours": {},
        }
        print(f"token stores after {self.result['store_s']:.1f} s", flush=True)

    def open_data(self, padded: bool) -> TrainingData:
        """Return the rows of a recipe: packed, or a document each as v1 had them."""
        recipe = "v1" if padded else "best"
        place = self.train_path, self.tokenizer, self.config.max_seq_len
        return pretrain_data(*place, val_path=self.val_path, recipe=recipe, log=lambda _: None)

    def write(self) -> None:
        self.args.json.write_text(json.dumps(self.result, indent=1) + "\n", "utf-8")

    # ---- baselines ----

    def baseline(self, name: str, seed: int) -> None:
        """Train a baseline and note what it reaches, unless it is known."""
        found = self.result["baselines"].setdefault(str(seed), {})
        if name in found:
            when = found[name].get("at", "?")
            print(f"  {name}, seed {seed}: of {when}, {shown(found[name])}", flush=True)
            return
        recipe = RECIPES[name]
        torch.manual_seed(seed)
        model = self.llama()
        tokens = train_baseline(
            model, recipe, self.data[recipe.padded], self.args.seconds, seed, self.device
        )
        found[name] = {**tokens, **self.judge(model), "at": time.strftime("%Y-%m-%d %H:%M")}
        print(f"  {name}, seed {seed}: {shown(found[name])}", flush=True)
        self.write()

    def llama(self) -> nn.Module:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM(peer_config(self.config)).to(self.device)

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Return the mean loss, in nats, of the held-out documents' tokens, and bits per byte."""
        score = measure_text(model.eval(), self.tokenizer, self.held_out)
        loss = score.bits * math.log(2) / score.n_tokens
        return {"val_loss": loss, "val_bpb": score.bits / score.n_bytes}

    def target(self, name: str, seed: int) -> float:
        return self.result["baselines"][str(seed)][name]["val_loss"]

    # ---- ours ----

    def search(self, target: float, seed: int) -> None:
        """Try budgets until it is known which is the least of the table to reach a target."""
        runs = self.result["ours"].setdefault(str(seed), {})

        def is_enough(n_steps: int) -> bool:
            key = str(n_steps)
            if key not in runs:
                runs[key] = self.ours(n_steps, seed)
                print(f"  ours, {n_steps} updates, seed {seed}: {shown(runs[key])}", flush=True)
                self.write()
            # one that was cut off is of no use, and neither is a longer one
            return runs[key]["val_loss"] is None or runs[key]["val_loss"] <= target

        least(sorted(self.args.budgets), is_enough)

    def ours(self, n_steps: int, seed: int) -> Record:
        """Run 1-pretrain.py from start to end; cut it off where it takes longer than a baseline."""
        with tempfile.TemporaryDirectory(dir=self.args.work_dir) as folder:
            command = [sys.executable, ROOT / "1-pretrain.py", "--data_path", self.train_path]
            command += ["--val_data_path", self.val_path, "--tokenizer", self.args.tokenizer]
            for name, value in SIZE.items():
                command += [f"--{name}", value]
            command += ["--out_dir", folder, "--max_steps", n_steps, "--seed", seed]
            command += ["--device", self.args.device, *shlex.split(self.args.recipe_flags)]
            # a cache of its own, so that compiling takes what it takes a new user
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"}
            began = time.perf_counter()
            try:
                done = subprocess.run(
                    list(map(str, command)),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=env,
                    timeout=max(60.0, 1.1 * self.args.seconds),
                )
            except subprocess.TimeoutExpired:
                return {"wall_s": None, "val_loss": None, "val_bpb": None}
            wall_s = time.perf_counter() - began
            if done.returncode:
                sys.exit(f"{shlex.join(done.args)} ended with {done.returncode}:\n{done.stdout}")
            return {"wall_s": wall_s, **self.read_run(Path(folder))}

    def read_run(self, folder: Path) -> Record:
        """Return what a run reached by its record and by this evaluator, which must agree."""
        (log,) = folder.glob("logs/*/metrics.jsonl")
        records = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        stated = next(r["val_loss"] for r in reversed(records) if "val_loss" in r)
        last = next(r for r in reversed(records) if "tokens_per_s" in r)
        model = self.llama()
        state = read_state_dict(folder / f"pretrain_{self.config.dim}.pth")
        model.load_state_dict(to_peer({k: v.float() for k, v in state.items()}, self.config))
        judged = self.judge(model)
        if abs(judged["val_loss"] - stated) > TOLERANCE:
            print(f"  WARNING: the run says {stated:.4f}, this says {judged['val_loss']:.4f}")
        # in the loop: without start-up, and without the last validation and save
        loop = {"loop_s": last["elapsed_s"], "tokens": last["tokens"]}
        return {**judged, "stated_val_loss": stated, **loop}

    # ---- results ----

    def shortest(self, name: str, seed: int) -> tuple[int, float] | None:
        """Return the updates and the seconds of our shortest run that reaches a target."""
        runs = self.result["ours"][str(seed)].items()
        fit = [
            (run["wall_s"], int(n_steps))
            for n_steps, run in runs
            if run["val_loss"] is not None and run["val_loss"] <= self.target(name, seed)
        ]
        return min(fit)[::-1] if fit else None

    def table(self) -> list[str]:
        """Return the lines of a Markdown table."""
        lines = [f"| baseline after {self.args.seconds:.0f} s | seed | loss | bits/byte | "]
        lines[0] += "useful tokens/s | ours | updates | loss | ratio |"
        lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        for seed in self.args.seeds:
            for name in self.names:
                base = self.result["baselines"][str(seed)][name]
                speed = base["tokens"] / self.args.seconds
                cells = [name, seed, f"{base['val_loss']:.4f}", f"{base['val_bpb']:.3f}"]
                cells.append(f"{speed:,.0f}")
                if found := self.shortest(name, seed):
                    n_steps, wall_s = found
                    loss = self.result["ours"][str(seed)][str(n_steps)]["val_loss"]
                    cells += [f"{wall_s:.1f} s", n_steps, f"{loss:.4f}"]
                    cells.append(f"{self.args.seconds / wall_s:.2f}")
                else:
                    cells += ["not reached", "", "", ""]
                lines.append(f"| {' | '.join(map(str, cells))} |")
        return lines

    def goals(self) -> list[str]:
        """Return what became of the goals; a target that was not reached counts as 0 times."""
        lines = []
        for name in self.names:
            found = [self.shortest(name, seed) for seed in self.args.seeds]
            ratios = [self.args.seconds / each[1] if each else 0.0 for each in found]
            recipe = RECIPES[name]
            title = f"times faster than {name}, {self.args.seconds:.0f} s"
            lines.append(verdict(title, ratios, recipe.must, recipe.aim))
        return lines


def is_fast_in_bf16(device: torch.device) -> bool:
    """Say whether a device multiplies bf16 clearly faster than fp32."""
    if device.type == "cpu":
        half, full = (peak_flops(device, dtype)[0] for dtype in (torch.bfloat16, torch.float32))
        return half > 1.3 * full
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def shown(record: Record) -> str:
    """Return a line on a baseline or a run."""
    if record["val_loss"] is None:
        return "cut off, longer than the baselines"
    loss = f"loss {record['val_loss']:.4f}, {record['val_bpb']:.3f} bits/byte"
    if "wall_s" not in record:
        return f"{loss}, {record['steps']:,} updates, {record['tokens']:,} tokens"
    return f"{loss}, {record['wall_s']:.1f} s, of it {record['loop_s']:.1f} s of updates"


def least(values: Sequence[int], is_enough: Callable[[int], bool]) -> int | None:
    """Return the least of ascending values that is enough, trying few of them; None: none is."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if is_enough(values[middle]):
            high = middle
        else:
            low = middle + 1
    return values[low] if low < len(values) else None


# ---- data ----


def write_texts(source: Path, folder: Path) -> tuple[Path, Path, list[str]]:
    """Write training and held-out documents where they are not yet.

    Returns:
        the two files, and the held-out texts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train_path, val_path = folder / "train.jsonl", folder / "val.jsonl"
    if not train_path.is_file():
        unfinished = folder / "train.tmp"
        with open(unfinished, "wb") as file:
            for number in SHARDS:
                with lzma.open(shard(source, number), "rb") as lines:
                    file.writelines(lines)
        unfinished.replace(train_path)
    with lzma.open(shard(source, HELD_OUT_SHARD), "rt", encoding="utf-8", newline="\n") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    held_out = [text for text in texts if SHORTEST <= len(text) <= LONGEST][-N_HELD_OUT:]
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in held_out)
    if not val_path.is_file() or val_path.read_text("utf-8") != rows:
        val_path.write_text(rows, "utf-8")
    return train_path, val_path, held_out


def shard(source: Path, number: int) -> Path:
    path = source / "pretrain" / f"seq_monkey_format_{number:02d}.jsonl.xz"
    if not path.is_file():
        sys.exit(f"{path} does not exist: name the folder of the data with --data")
    return path


# ---- the baselines' loop ----


def train_baseline(
    model: nn.Module,
    recipe: Recipe,
    data: TrainingData,
    seconds: float,
    seed: int,
    device: torch.device,
) -> dict[str, int]:
    """Train a Llama in a plain loop for so long; return its updates and useful tokens.

    Where it is in its schedule is told by the clock, so that it ends when its time does.
    """
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), fused=True
        )
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    sampler = Sampler(data.n_rows, seed, epochs=100)
    model.train()
    step = n_tokens = 0
    began = time.perf_counter()
    while (share := (time.perf_counter() - began) / seconds) < 1:
        lr = learning_rate_at(int(share * TICKS), TICKS, recipe.lr, recipe.schedule, 0)
        if recipe.optimizer == "adamw":
            lr *= min(1.0, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = np.arange(step * recipe.rows, (step + 1) * recipe.rows)
        batch = data.batch(sampler.rows(rows)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            logits = model(input_ids=batch.inputs, use_cache=False).logits
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED
            )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        n_tokens += batch.n_tokens
        if device.type == "cuda":
            torch.cuda.synchronize()
    return {"steps": step, "tokens": n_tokens}


if __name__ == "__main__":
    main()
