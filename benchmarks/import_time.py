"""How soon a script answers: python benchmarks/import_time.py [--quick]

1. ``--help`` of each script: seconds from the start of the process to its end.
2. From there to a model that is ready to chat, 26 M of random weights: what 2-eval.py imports and
   loads, stage by stage in a fresh process; torch and transformers, which no change here makes
   faster, are told apart. ``import transformers`` alone imports next to nothing; what it brings
   when its base class of models is first asked for (its quantisation, torch's distributed tensors
   and compiler) is a stage of its own.

In turns, five rounds; prints medians and ranges, writes JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BASE_CLASS = "PreTrainedModel of transformers"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default="import_time.json", help="where to write")
    parser.add_argument("--stages", type=Path, help=argparse.SUPPRESS)  # the child that loads
    args = parser.parse_args()
    if args.stages is not None:
        print(json.dumps(stages(args.stages)))
        return
    from goals import spread, verdict
    from machine import describe, machine
    from servers import random_weights  # torch comes in here: a child must not have it yet

    facts = machine()
    print(describe(facts), flush=True)
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    figures: dict[str, dict[str, list[float]]] = {"help": defaultdict(list)}
    figures["stages"] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        weights = random_weights(Path(folder))
        for number in range(1 if args.quick else args.rounds):
            for script in scripts if number % 2 == 0 else scripts[::-1]:
                figures["help"][script].append(help_time(script))
            command = [sys.executable, __file__, "--stages", str(weights)]
            shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            for stage, seconds in json.loads(shown.splitlines()[-1]).items():
                figures["stages"][stage].append(seconds)
    print("\n| `--help` of | seconds |\n|---|---:|")
    for script in scripts:
        print(f"| {script} | {spread(figures['help'][script], '.3f')} |")
    print("\n| until a model can chat | seconds |\n|---|---:|")
    for stage, seconds in figures["stages"].items():
        print(f"| {stage} | {spread(seconds, '.2f')} |")
    slowest = max(scripts, key=lambda script: statistics.median(figures["help"][script]))
    title = f"--help, the slowest ({slowest}), s"
    print("", verdict(title, figures["help"][slowest], 1, 0.4, at_least=False), sep="\n")
    runs = [
        dict(zip(figures["stages"], row, strict=True))
        for row in zip(*figures["stages"].values(), strict=True)
    ]
    after = [sum(run.values()) - run["torch"] - run["transformers"] for run in runs]
    title = "ready to chat after import transformers, s"
    print(verdict(title, after, 3, 1.5, at_least=False))
    own = [seconds - run[BASE_CLASS] for seconds, run in zip(after, runs, strict=True)]
    print(f"         of it ours, without {BASE_CLASS}: {spread(own, '.2f')} s")
    args.json.write_text(json.dumps({"machine": facts, **figures}, indent=1) + "\n", "utf-8")


def help_time(script: str) -> float:
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / script), "--help"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def stages(weights: Path) -> dict[str, float]:
    """Return the seconds of each stage until this process has a model that can chat."""
    from model.flags import quick_imports, weights_flags

    marks = {"": time.perf_counter()}
    with quick_imports():
        import torch  # noqa: F401

        marks["torch"] = time.perf_counter()
        import transformers

        marks["transformers"] = time.perf_counter()
        transformers.PreTrainedModel  # noqa: B018 (it is imported when it is asked for)
        marks[BASE_CLASS] = time.perf_counter()
        from model.checkpoint import load_for_inference
        from model.generation import Engine
        from model.prompts import fit_messages  # noqa: F401

    marks["our modules"] = time.perf_counter()
    parser = argparse.ArgumentParser()
    weights_flags(parser)
    loaded = load_for_inference(parser.parse_args(["--weights", str(weights)]))
    Engine(loaded.model, loaded.tokenizer, max_batch=1)
    marks["loading 26 M parameters"] = time.perf_counter()
    names = list(marks)
    return {now: marks[now] - marks[before] for before, now in zip(names, names[1:], strict=False)}


if __name__ == "__main__":
    main()
