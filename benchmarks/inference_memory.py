"""In how much memory it answers: python benchmarks/inference_memory.py [--quick]

The peak resident memory of what 2-eval.py does on a CPU, for each of the three named models with
random weights in float32, bfloat16 and int8: imports, loading, a prompt of 100 tokens, 64 tokens
more. Each in a fresh process. What torch and transformers alone take, with the base classes of
models that they import when asked, is told apart. Prints medians and ranges over the rounds, writes
JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

DTYPES = ("float32", "bfloat16", "int8")
N_PROMPT, N_NEW = 100, 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: all three")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--json", type=Path, default="inference_memory.json", help="where to write the figures"
    )
    parser.add_argument("--answer", nargs=2, help=argparse.SUPPRESS)  # the child: weights, dtype
    args = parser.parse_args()
    if args.answer is not None:
        print(json.dumps(answer(*args.answer)))
        return
    from machine import describe, machine
    from servers import random_weights

    from model.LMConfig import MODELS

    if unknown := set(args.models or ()) - set(MODELS):
        parser.error(f"--models {unknown.pop()}: expected some of {', '.join(MODELS)}")
    facts = machine()
    print(describe(facts), flush=True)
    figures: dict[str, list[dict[str, float]]] = defaultdict(list)
    for model in args.models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            weights = random_weights(Path(folder), **MODELS[model])
            for _ in range(1 if args.quick else args.rounds):
                for dtype in args.dtypes:
                    command = [sys.executable, __file__, "--answer", str(weights), dtype]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    found = json.loads(done.stdout.splitlines()[-1])
                    figures[f"{model} {dtype}"].append(found)
                    print(f"  {model} {dtype}: {found['peak_mb']:,.0f} MB", flush=True)
    print("\n".join(table(figures)))
    result = {"machine": facts, "load_at_end": os.getloadavg()[0], "processes": figures}
    args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def answer(weights: str, dtype: str) -> dict[str, float]:
    """Answer once in this process; return MB: the most so far after the imports of others, after
    loading and at the end; what is held then; and what the file's weights take in ``dtype``.
    """
    from model.flags import quick_imports, weights_flags

    with quick_imports():
        import torch
        from machine import memory_mb
        from transformers import GenerationMixin, PreTrainedModel  # noqa: F401

        imports_mb = memory_mb()
        from model.checkpoint import load_for_inference
        from model.estimate import process_memory
        from model.generation import Engine
        from model.sampling import SamplingOptions
        from model.tokenizer import EOS_ID
    parser = argparse.ArgumentParser()
    weights_flags(parser)
    flags = ["--weights", weights, "--device", "cpu", "--dtype", dtype]
    loaded = load_for_inference(parser.parse_args(flags), purpose="chat")
    engine = Engine(loaded.model, loaded.tokenizer, max_batch=1)
    loaded_mb = memory_mb()
    prompt = [3 + 7 * i % 6000 for i in range(N_PROMPT)]  # any ids will do
    endless = {EOS_ID: -1000.0}
    options = SamplingOptions(
        max_new_tokens=N_NEW, temperature=0.7, top_k=16, seed=0, logit_bias=endless
    )
    reply = engine.submit(prompt, options)
    for _ in engine.stream(reply):
        pass
    if len(reply.tokens) != N_NEW:
        raise RuntimeError(f"the answer has {len(reply.tokens)} tokens, expected {N_NEW}")
    weights_mb = loaded.n_params * getattr(torch, dtype).itemsize / 1e6
    return {
        "imports_mb": imports_mb,
        "loaded_mb": loaded_mb,
        "peak_mb": memory_mb(),
        "held_mb": process_memory() / 1e6,
        "weights_mb": weights_mb,
    }


def table(figures: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return the lines of a Markdown table."""
    from goals import spread

    imports = [run["imports_mb"] for runs in figures.values() for run in runs]
    lines = [f"torch and transformers alone: {spread(imports)} MB", ""]
    lines.append("| resident memory, MB | weights | peak | beyond the imports | held at the end |")
    lines.append("|---|---:|---:|---:|---:|")
    for name, runs in figures.items():
        weights_mb = statistics.median(run["weights_mb"] for run in runs)
        peak, held = ([run[key] for run in runs] for key in ("peak_mb", "held_mb"))
        beyond = [run["peak_mb"] - run["imports_mb"] for run in runs]
        cells = [f"{weights_mb:,.0f}", *map(spread, (peak, beyond, held))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
