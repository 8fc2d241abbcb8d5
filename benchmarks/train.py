"""How fast it trains, and in how much memory: python benchmarks/train.py [--quick] [--only ours …]

Positions a second of one update after another on the same batches (packed rows of random tokens, or
of a corpus), for our engine in fp32 and bf16, with and without --compile, and its mixture of
experts; and for a Llama of the same shape of transformers: in a plain loop with fused AdamW, eager
and compiled, and under transformers.Trainer; and for litgpt, where it is installed.

Each is in a process of its own, which gives its peak memory; one at a time is at work, in turns. A
share of the peak is PaLM's count of the arithmetic (arXiv:2204.02311, appendix B) over the fastest
matrix product of the same round: of torch.mm, and on a CPU of oneDNN's too. Prints medians and
ranges over the rounds, and of the ratios within a round. Writes JSON.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from contenders import CONFIGS, CONTENDERS, GPU_ROWS, ROWS, WARM_UP, missing
from goals import spread, verdict
from machine import describe, machine
from servers import end

HERE = Path(__file__).resolve().parent
QUICK = {
    "cpu": [
        "ours fp32",
        "ours bf16",
        "ours Muon bf16",
        "Llama fp32",
        "Llama bf16",
        "ours MoE fp32",
    ],
    "cuda": ["ours bf16", "ours bf16 --compile", "Llama bf16", "Llama bf16 compiled", "MoE bf16"],
}
Report = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    usual_rows = ", ".join(f"{model}: {rows}" for model, rows in ROWS.items())
    add("--quick", action="store_true", help="one round, of the contenders that the goals name")
    add("--rounds", type=int, default=5)
    add("--model", nargs="+", choices=CONFIGS, default=["small"], help="26 M, 108 M, the demo's")
    add("--only", nargs="+", metavar="TEXT", help="contenders by name or part of it")
    add("--batch_rows", type=int, help=f"default {usual_rows} on a CPU, {GPU_ROWS} on a GPU")
    add("--row_tokens", type=int, help="default 512, of the demo's model 128")
    add("--corpus", type=Path, help="train on these documents (default: on random tokens)")
    add("--padded", action="store_true", help="one document of the corpus a row, as v1 did")
    add("--threads", type=int, help="default: as torch likes it")
    add("--turn_s", type=float, default=6.0, help="a contender's turn lasts about so long")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--json", type=Path, default="train.json", help="where to write the figures")
    args = parser.parse_args()
    if args.padded and args.corpus is None:
        parser.error("--padded needs documents: name some with --corpus")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.quick:
        args.rounds, args.only = 1, args.only or QUICK[args.device]
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = machine()
    print(describe(facts))
    if args.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        print(facts["gpu"])
    names = [name for name in CONTENDERS if not args.only or any(is_meant(name, args.only))]
    result = {"machine": facts, "threads": torch.get_num_threads(), "models": {}}
    goals = []
    for model in args.model:
        bench = Bench(model, names, args)
        bench.run()
        print("\n".join(bench.table()), flush=True)
        goals += bench.goals()
        result["models"][model] = bench.as_json()
    result["load_at_end"] = os.getloadavg()[0]
    print("", *goals, sep="\n")
    args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def is_meant(name: str, texts: list[str]) -> Iterator[bool]:
    """Say of each text whether it is a contender's name, or, being nobody's, a part of it."""
    return (text == name or (text not in CONTENDERS and text in name) for text in texts)


class Bench:
    """One model's contenders and what they reached.

    Attributes:
        reports: of each contender and round.
        peaks: FLOP/s of each kind of product, of each round.
        first: each contender's first update.
    """

    def __init__(self, model: str, names: list[str], args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.row_tokens = args.row_tokens or (128 if model == "demo" else 512)
        usual = GPU_ROWS if args.device == "cuda" else ROWS[model]
        self.rows = args.batch_rows or usual
        self.reports: dict[str, list[Report]] = defaultdict(list)
        self.peaks: dict[str, list[float]] = defaultdict(list)
        self.first: dict[str, Report] = {}
        self.left_out = {name: why for name in names if (why := missing(name))}
        self.names = [name for name in names if name not in self.left_out]

    def run(self) -> None:
        """Start all, then let them take turns."""
        print(f"\n{self.model}: {self.rows} x {self.row_tokens} positions an update")
        for name, why in self.left_out.items():
            print(f"  left out: {name}: {why}")
        with contextlib.ExitStack() as stack:
            workers = {}
            for name in list(self.names):
                try:
                    workers[name] = self.start(name, stack)
                except RuntimeError as error:
                    self.left_out[name] = str(error)
                    self.names.remove(name)
                    print(f"  left out: {name}: {error}", flush=True)
            for number in range(self.args.rounds):
                # to and fro, so that a machine that grows slower hits the first as much as the last
                order = self.names if number % 2 == 0 else self.names[::-1]
                for kind, flops in measured_peaks(self.args.device).items():
                    self.peaks[kind].append(flops)
                for name in order:
                    worker, n_updates = workers[name]
                    print(n_updates, file=worker.stdin, flush=True)
                    report = answer(worker)
                    self.reports[name].append(report)
                    speed = report["positions"] / report["seconds"]
                    print(f"  round {number + 1}, {name}: {speed:,.0f} positions/s", flush=True)

    def start(self, name: str, stack: contextlib.ExitStack) -> tuple[subprocess.Popen, int]:
        """Start a worker; return it when it has warmed up, and how many updates are a turn."""
        command = [sys.executable, HERE / "contenders.py", name, "--model", self.model]
        command += ["--rows", self.rows, "--row_tokens", self.row_tokens]
        command += ["--device", self.args.device]
        command += ["--corpus", self.args.corpus] if self.args.corpus else []
        command += ["--padded"] if self.args.padded else []
        command += ["--threads", self.args.threads] if self.args.threads else []
        worker = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        stack.callback(end, worker)
        self.first[name], *_, report = [answer(worker) for _ in range(WARM_UP)]
        return worker, max(1, round(self.args.turn_s / report["seconds"]))

    # ---- results ----

    def speeds(self, name: str, unit: str = "positions") -> list[float]:
        """Return a contender's positions (or tokens, padding not counted) a second, by round."""
        return [report[unit] / report["seconds"] for report in self.reports[name]]

    def flops(self, name: str) -> list[float]:
        """Return a contender's FLOP/s, by round."""
        per_position = self.first[name]["flops_per_position"]
        return [per_position * speed for speed in self.speeds(name)]

    def ratios(self, one: list[float], other: list[float]) -> list[float]:
        return [a / b for a, b in zip(one, other, strict=True)]

    def peak_mb(self, name: str) -> float:
        return self.reports[name][-1]["peak_mb"]

    def peak_kinds(self, name: str) -> list[str]:
        """Return the products that a contender's precision is held against."""
        precision = "bf16" if "bf16" in name else "fp32"
        return [kind for kind in self.peaks if precision in kind]

    def table(self) -> list[str]:
        """Return the lines of a Markdown table."""
        unit = "FLOP/s, 10^9"
        lines = ["", f"| product | {unit} |", "|---|---:|"]
        for kind, flops in self.peaks.items():
            lines.append(f"| {kind} | {spread([value / 1e9 for value in flops])} |")
        lines += ["", f"| {self.model} | positions/s | useful tokens/s | {unit} | share of peak | "]
        lines[-1] += "peak memory, MB (of it before the model) | first update, s |"
        lines.append("|---|---:|---:|---:|---|---:|---:|")
        for name in self.names:
            shares = [
                f"{spread(self.ratios(self.flops(name), self.peaks[kind]), '.0%')} of {kind}"
                for kind in self.peak_kinds(name)
            ]
            cells = [spread(self.speeds(name)), spread(self.speeds(name, "tokens"))]
            cells += [spread([value / 1e9 for value in self.flops(name)]), "; ".join(shares)]
            cells += [f"{self.peak_mb(name):,.0f} ({self.first[name]['base_mb']:,.0f})"]
            cells += [f"{self.first[name]['seconds']:.1f}"]
            lines.append(f"| {' | '.join([name, *cells])} |")
        return lines

    def goals(self) -> list[str]:
        """Return what became of the goals, of those whose contenders were there."""
        there, lines = set(self.names), []
        for precision in ("fp32", "bf16"):
            base, dense, moe = f"Llama {precision}", f"ours {precision}", f"ours MoE {precision}"
            for own in (dense, f"{dense} --compile"):
                if {own, base} <= there:
                    title = f"{self.model}: positions/s, {own} to eager {base}"
                    ratios = self.ratios(self.speeds(own), self.speeds(base))
                    lines.append(verdict(title, ratios, 1.12, 1.25))
                    title = f"{self.model}: peak memory, {own} to eager {base}"
                    ratio = self.peak_mb(own) / self.peak_mb(base)
                    lines.append(verdict(title, [ratio], 0.6, 0.4, at_least=False))
                if own in there and precision == "fp32":  # the goal's sgemm
                    peaks = [self.peaks[kind] for kind in self.peak_kinds(own)]
                    fastest = [max(of_round) for of_round in zip(*peaks, strict=True)]
                    shares = self.ratios(self.flops(own), fastest)
                    title = f"{self.model}: {own}, share of the faster sgemm"
                    lines.append(verdict(title, shares, 0.82, 0.92, ".0%"))
            if {moe, dense} <= there:
                title = f"{self.model}: FLOP/s, {moe} to {dense}"
                ratios = self.ratios(self.flops(moe), self.flops(dense))
                lines.append(verdict(title, ratios, 0.80, 0.95, ".0%"))
        if self.args.device == "cuda":
            lines += self.gpu_goals()
        return lines

    def gpu_goals(self) -> list[str]:
        """Return what became of the goals for a card like the H200, useful tokens a second."""
        limits = {"small": (1.0e6, 1.5e6), "v1": (4.0e5, 5.4e5)}
        own = [name for name in self.names if name.startswith("ours bf16")]
        lines = []
        goals = [(own, *limits[self.model])] if self.model in limits else []
        goals += [(["ours MoE bf16"], 3.5e5, 6e5)] if self.model == "small" else []
        for names, must, aim in goals:
            if there := [name for name in names if name in self.names]:
                best = max(there, key=lambda name: statistics.median(self.speeds(name, "tokens")))
                title = f"{self.model}: {best}, useful tokens/s"
                lines.append(verdict(title, self.speeds(best, "tokens"), must, aim, ",.0f"))
        return lines

    def as_json(self) -> dict[str, object]:
        return {
            "rows": self.rows,
            "row_tokens": self.row_tokens,
            "left_out": self.left_out,
            "flops_of_products": self.peaks,
            "first_update": self.first,
            "turns": self.reports,
        }


def answer(worker: subprocess.Popen) -> Report:
    """Return a worker's next report.

    Raises:
        RuntimeError: it has ended.
    """
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"ended with status {worker.wait()}, see above")
    return json.loads(line)


# ---- peaks ----


def measured_peaks(device: str) -> dict[str, float]:
    """Return the FLOP/s of square matrix products, the best of some, by their kind."""
    return {
        f"{way} {precision}": product_flops(multiply, device, dtype)
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for way, multiply in ways_to_multiply(device, dtype).items()
    }


def ways_to_multiply(device: str, dtype: torch.dtype) -> dict[str, Callable]:
    """Return torch.mm and, where a CPU has it beside another library's, oneDNN's product."""
    ways: dict[str, Callable] = {"torch.mm": torch.mm}
    if device == "cpu" and dtype == torch.float32:
        try:
            linear = torch.ops.mkldnn._linear_pointwise
            small = torch.ones(16, 16)
            linear(small, small, None, "none", [], "")
        except (AttributeError, RuntimeError):
            return ways
        ways["oneDNN"] = lambda x, w: linear(x, w, None, "none", [], "")
    return ways


def product_flops(multiply: Callable, device: str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of several products of one to two seconds together."""
    n = 8192 if device == "cuda" else 2048
    x, w = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    multiply(x, w)
    while len(times) < 3 or (sum(times) < 1.0 and len(times) < 50):
        if device == "cuda":
            begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            multiply(x, w)
            finish.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(finish) / 1000)
        else:
            started = time.perf_counter()
            multiply(x, w)
            times.append(time.perf_counter() - started)
    return 2 * n**3 / min(times)


if __name__ == "__main__":
    main()
