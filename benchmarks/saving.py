"""What a save costs: python benchmarks/saving.py [--quick] [--out FOLDER]

Builds a pretraining run of each model as 1-pretrain.py does, makes an update, so that the
optimizer's states are there, and saves again and again as the loop does: state, weights, curve.
Training stands still meanwhile, so the whole time is lost. Prints medians of the parts' seconds,
the bytes, the memory that a save needs on top, and the share of a run that saves after every 250
updates of 8,192 tokens, here and with a graphics card that does 20 TFLOP/s. Writes JSON.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import describe, machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model import states  # noqa: E402 (the line above finds it)
from model.checkpoint import start_model  # noqa: E402
from model.dataset import pretrain_data  # noqa: E402
from model.engine import Engine  # noqa: E402
from model.losses import language_model_loss  # noqa: E402
from model.metrics import RunLog  # noqa: E402
from model.runtime import setup  # noqa: E402
from model.trainer import Run  # noqa: E402

MODELS = {"26 M": "minimind-v1-small", "108 M": "minimind-v1", "MoE": "minimind-v1-moe"}
# a save's parts, in their order; the rest is renames, folders, small files
PARTS = "collect write sync hash remove weights_write weights_sync curve".split()
INTERVAL, UPDATE_TOKENS = 250, 8192
GPU_FLOPS = 20e12  # a second, of which training makes use


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="26 M, two saves")
    parser.add_argument("--saves", type=int, default=5, help="measured for each model")
    parser.add_argument("--lines", type=int, default=10_000, help="of the record, in the curve")
    parser.add_argument(
        "--out", type=Path, help="a folder on the disk to measure (default: /tmp's)"
    )
    parser.add_argument("--json", type=Path, default="saving.json", help="where to write figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    print(describe(facts))
    print(f"1 thread, medians of {2 if args.quick else args.saves} saves, seconds")
    header = ["model", "save", *PARTS, "rest", "state MB", "weights MB", "memory MB"]
    header += ["of a run here", "at 20 TFLOP/s"]
    print(f"| {' | '.join(header)} |\n|---|{'---:|' * (len(header) - 1)}", flush=True)
    results = {}
    for name in ["26 M"] if args.quick else MODELS:
        with tempfile.TemporaryDirectory(dir=args.out) as folder:
            found = measure(MODELS[name], Path(folder), 2 if args.quick else args.saves, args.lines)
        results[name] = found
        cells = [f"{found['seconds'][part]:.2f}" for part in ("save", *PARTS, "rest")]
        cells += [f"{found[key]:,.0f}" for key in ("state_mb", "weights_mb", "memory_mb")]
        cells += [f"{100 * found[key]:.2f} %" for key in ("share", "share_gpu")]
        print(f"| {' | '.join([name, *cells])} |", flush=True)
    result = {"machine": facts, "load_at_end": os.getloadavg()[0], "models": results}
    args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def measure(model: str, folder: Path, n_saves: int, n_lines: int) -> dict[str, Any]:
    """Return a save's medians."""
    run, update_s = start(model, folder)
    for step in range(n_lines):
        run.log.write({"step": step, "tokens": step * UPDATE_TOKENS, "loss": 9 - step / n_lines})
    taken, memory = [], []
    with timing() as seconds:
        # the first ones bring in matplotlib, and remove no older states yet
        for number in range(run.args.keep_last + 1 + n_saves):
            progress = replace(run.progress, step=number + 1)
            seconds.clear()
            before = reset_peak()
            begin = time.perf_counter()
            run.saves.save(progress, must=True)
            seconds["save"] = time.perf_counter() - begin
            seconds["rest"] = seconds["save"] - sum(seconds[part] for part in PARTS)
            memory.append(status_mb("VmHWM") - before)
            taken.append(Counter(seconds))
    measured = taken[-n_saves:]
    medians = {key: statistics.median(t[key] for t in measured) for key in ("save", *PARTS, "rest")}
    update_flops = UPDATE_TOKENS * run.cost.flops_per_token
    newest = run.saves.states.folder / f"step_{run.saves.states.steps()[0]}"
    return {
        "seconds": medians,
        "lowest": min(t["save"] for t in measured),
        "highest": max(t["save"] for t in measured),
        "state_mb": (newest / states.STATE_FILE).stat().st_size / 1e6,
        "weights_mb": run.saves.weights.stat().st_size / 1e6,
        "memory_mb": statistics.median(memory[-n_saves:]),
        "update_s": update_s,
        "share": share(medians["save"], INTERVAL * update_s),
        "share_gpu": share(medians["save"], update_flops / GPU_FLOPS * INTERVAL),
    }


def start(model: str, folder: Path) -> tuple[Run, float]:
    """Return a run that has made an update, and the seconds that one of 8,192 tokens takes."""
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "1-pretrain.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    corpus = folder / "text.jsonl"
    line = json.dumps({"text": "长江发源于青藏高原，全长六千三百多公里。" * 40}, ensure_ascii=False)
    corpus.write_text(f"{line}\n" * 40, "utf-8")
    flags = f"--model {model} --batch_size 1 --max_steps 1000000 --device cpu --dtype float32"
    args = script.parse_args([*flags.split(), "--data_path", str(corpus), "--out_dir", str(folder)])
    runtime = setup(args.device, args.dtype, args.seed)
    loaded = start_model(args, after=None)
    length = loaded.model.config.max_seq_len
    data = pretrain_data(
        corpus,
        loaded.tokenizer,
        length,
        val_path=None,
        recipe=args.recipe,
        log=lambda line: None,
    )
    run = Run(loaded, data, args, runtime, "pretrain", language_model_loss, None)
    run.start_log(resumed=False)
    run.engine.prepare()
    updates = run.updates()
    for _ in range(3):  # the last is timed: of one row, and an update has sixteen
        begin = time.perf_counter()
        run.update(next(updates), 1e-4)
        taken = time.perf_counter() - begin
    return run, taken * UPDATE_TOKENS / length


@contextlib.contextmanager
def timing() -> Iterator[Counter[str]]:
    """Yield the seconds of a save's parts, added up while it goes on."""
    seconds: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:

        def watch(owner: Any, name: str, part_of: Callable[..., str]) -> None:
            function = getattr(owner, name)

            @functools.wraps(function)
            def timed(*args: Any, **kwargs: Any) -> Any:
                begin = time.perf_counter()
                try:
                    return function(*args, **kwargs)
                finally:
                    seconds[part_of(*args)] += time.perf_counter() - begin

            setattr(owner, name, timed)
            stack.callback(setattr, owner, name, function)

        def kind(path: Path) -> str:  # of what lies in a state's folder, or in the folder of all
            if path.suffix == ".tmp" and "pth" in path.name:
                return "weights_"
            return "" if any(p.name == "checkpoints" for p in path.parents) else "other_"

        watch(Engine, "state", lambda *_: "collect")
        watch(torch, "save", lambda value, path: f"{kind(path)}write")
        watch(states, "sync", lambda path: f"{kind(path)}sync")
        watch(states, "fingerprint", lambda path: "hash")
        watch(shutil, "rmtree", lambda *_: "remove")
        watch(RunLog, "draw", lambda *_: "curve")
        yield seconds


def share(save_s: float, training_s: float) -> float:
    return save_s / (save_s + training_s)


def reset_peak() -> float:
    """Let the system count the peak of memory anew; return what is in use, in MB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_mb("VmRSS")


def status_mb(name: str) -> float:
    """Return a figure of this process's memory."""
    text = Path("/proc/self/status").read_text("utf-8")
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
