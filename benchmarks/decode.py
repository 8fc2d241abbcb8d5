"""How fast it decodes: python benchmarks/decode.py [--quick] [--llama_python PYTHON]

Tokens a second after the prompt, 26 M random weights, greedy, on the CPU: the engine with weights
in fp32, bf16 and int8 at 1 to 64 rows and contexts of 64 to 1,024 tokens; beside it, with the same
weights, `generate` of transformers' LlamaForCausalLM, and llama.cpp (F32, F16, Q8_0) at one row.

Everything is measured with one thread and with one a core, and the faster counts. The measured
take turns within a round; prints medians and ranges over the rounds, and the goals' ratios within
a round. llama-cpp-python may be in this environment or in that of --llama_python; a peer that is
not installed is left out. Writes JSON. One at a time is at work, the others wait.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from goals import spread, verdict
from machine import describe, machine
from servers import end, random_weights

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from model.packed import can_pack  # noqa: E402 (the line above finds it)

BATCHES, CONTEXTS = (1, 4, 16, 64), (64, 256, 1024)
USUAL = 256  # the context at which rivals are compared
OURS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
FULL = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
PEER = "transformers fp32"
GGUF = ("F32", "F16", "Q8_0")
BATCHED_PEER = (16, 64)  # rows and context at which transformers is measured, too
Cell = tuple[str, int, int]  # name, batch, context


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one round, answers of 24 tokens")
    add("--rounds", type=int, help="default 5, with --quick 1")
    add("--batches", type=int, nargs="+", choices=BATCHES, default=list(BATCHES))
    add("--new_tokens", type=int, help="default 64, with --quick 24")
    add("--llama_python", default=sys.executable, help="a Python that has llama-cpp-python")
    add("--json", type=Path, default="decode.json", help="where to write the figures")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.new_tokens = args.new_tokens or (24 if args.quick else 64)
    facts = machine()
    print(describe(facts))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(args, folder, stack)
        for number in range(args.rounds):
            bench.round(number)
    lines, goals = bench.tables()
    print("\n".join([*lines, *goals, *bench.notes]))
    print(f"load at end {os.getloadavg()[0]:.2f}")
    result = {"machine": facts, "load_at_end": os.getloadavg()[0], "notes": bench.notes}
    result |= {"settings": {"rounds": args.rounds, "new_tokens": args.new_tokens}}
    result |= {"tokens_s": {" ".join(map(str, c)): v for c, v in bench.figures.items()}}
    result |= {"summary": lines + goals}
    args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


class Worker:
    """A decoder in its process."""

    def __init__(
        self, stack: contextlib.ExitStack, python: str, kind: str, *args: str | int
    ) -> None:
        self.name = f"{kind} {args[1]}"
        self._process = subprocess.Popen(
            [python, str(HERE / "decoders.py"), kind, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(n_cores())},
        )
        stack.callback(end, self._process)
        if self._line() != "ready":
            sys.exit(f"{self.name} did not start: see above")

    def _line(self) -> str:
        for line in self._process.stdout:  # libraries may say something, too
            if line.startswith(("ready", '{"seconds"')):
                return line.strip()
        return ""

    def seconds(self, **job: int) -> float:
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer = self._line()
        if not answer:
            sys.exit(f"{self.name} ended: see above")
        return json.loads(answer)["seconds"]


class Bench:
    """All that is measured, and the figures so far."""

    def __init__(self, args: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> None:
        self.args = args
        self.figures: dict[Cell, list[float]] = defaultdict(list)
        self.notes: list[str] = []
        self.workers: dict[str, Worker] = {}
        longest = max(CONTEXTS) + args.new_tokens + 8
        weights = random_weights(folder, max_seq_len=longest)
        for name, dtype in OURS.items():
            if can_pack(dtype):
                worker = Worker(stack, sys.executable, "ours", str(weights), FULL[dtype], longest)
                self.workers[f"ours {name}"] = worker
            else:
                self.notes.append(f"ours {name}: no such kernels here, left out")
        llama = export(weights, folder / "llama", "--format", "llama")
        for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
            worker = Worker(stack, sys.executable, "transformers", str(llama), dtype, longest)
            self.workers[f"transformers {name}"] = worker
        if has_llama_cpp(args.llama_python):
            for kind in GGUF:
                flags = {"F32": ["--dtype", "float32"], "F16": ["--dtype", "float16"]}
                flags = flags.get(kind, ["--quantize", kind.lower()])
                path = export(weights, folder / f"{kind}.gguf", "--format", "gguf", *flags)
                worker = Worker(stack, args.llama_python, "llama.cpp", str(path), kind, longest)
                self.workers[f"llama.cpp {kind}"] = worker
        else:
            self.notes.append("llama.cpp: llama-cpp-python is not installed, left out")
        for worker in self.workers.values():  # the first is slower, and none of the figures
            worker.seconds(batch=1, context=64, n_new=8, n_threads=1)

    def round(self, number: int) -> None:
        """Measure everything once; every second round in the opposite order."""
        grid = [(batch, context) for batch in self.args.batches for context in CONTEXTS]
        cells = [(name, *place) for place in grid for name in self.workers]
        cells = [cell for cell in cells if is_measured(*cell)]
        for cell in cells if number % 2 == 0 else cells[::-1]:
            name, batch, context = cell
            n_new = self.args.new_tokens
            job = dict(batch=batch, context=context, n_new=n_new)
            counts = sorted({1, n_cores()})
            seconds = [self.workers[name].seconds(**job, n_threads=n) for n in counts]
            self.figures[cell].append(batch * n_new / min(seconds))
            shown = ", ".join(f"{batch * n_new / s:,.0f}" for s in seconds)
            print(f"  {name}, {batch} x {context}: {shown} tokens/s", flush=True)

    # ---- results ----

    def tables(self) -> tuple[list[str], list[str]]:
        """Return the table, and what became of the goals."""
        lines = ["", "| who | rows x context | tokens/s, median (range) |", "|---|---:|---:|"]
        order = list(self.workers)
        for cell in sorted(self.figures, key=lambda cell: (cell[1:], order.index(cell[0]))):
            name, batch, context = cell
            lines.append(f"| {name} | {batch} x {context} | {spread(self.figures[cell])} |")
        goals = [""]

        def goal(title: str, over: Cell, under: Cell, must: float, aim: float, **how: bool) -> None:
            if self.figures[over] and self.figures[under]:
                pairs = zip(self.figures[over], self.figures[under], strict=True)
                goals.append(verdict(title, [a / b for a, b in pairs], must, aim, **how))

        if 1 in self.args.batches:
            one = {name: (name, 1, USUAL) for name in (*order, "llama.cpp F16", "llama.cpp Q8_0")}
            ours = [name for name in order if name.startswith("ours")]
            best = max(ours, key=lambda name: statistics.median(self.figures[one[name]]))
            goal(f"ours fp32 to {PEER}", one["ours fp32"], one[PEER], 1.7, 3)
            # the goal's peer, and the faster one
            for peer in (PEER, "transformers bf16"):
                goal(f"{best} to {peer}", one[best], one[peer], 4.5, 8)
            for kind in ("F16", "Q8_0"):  # F16 must be reached, Q8_0 is the aim
                goal(f"{best} to llama.cpp {kind}", one[best], one[f"llama.cpp {kind}"], 1, 1)
            for name in ("ours fp32", best):
                title = f"{name}, a token's time at context 1,024 to that at 64"
                goal(title, (name, 1, 64), (name, 1, 1024), 1.3, 1.1, at_least=False)
        for context in (64, USUAL):
            title = f"ours fp32, 16 rows to one, context {context}"
            goal(title, ("ours fp32", 16, context), ("ours fp32", 1, context), 5, 8)
        return lines, goals


def is_measured(name: str, batch: int, context: int) -> bool:
    """Peers are measured where they are compared."""
    if name.startswith("ours") or batch == 1:
        return True
    return name.startswith("transformers") and (batch, context) == BATCHED_PEER


def n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def export(weights: Path, output: Path, *flags: str) -> Path:
    command = [sys.executable, str(ROOT / "export_model.py"), "--weights", str(weights)]
    subprocess.run(
        [*command, *flags, "--output", str(output)], check=True, stdout=subprocess.DEVNULL
    )
    return output


def has_llama_cpp(python: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec("llama_cpp") is not None
    return not subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode


if __name__ == "__main__":
    main()
