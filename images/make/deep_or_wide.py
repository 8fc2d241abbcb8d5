"""Draw what benchmarks/deep_or_wide.py measured: python images/make/deep_or_wide.py [FILE…]

Without files it draws the figures in deep_or_wide.json beside it; with the JSON files of a
benchmark it writes them there first.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from style import COLOURS, chart, save

FIGURES = Path(__file__).with_suffix(".json")


def main() -> None:
    if sys.argv[1:]:
        runs = [run for file in sys.argv[1:] for run in json.loads(Path(file).read_text())["runs"]]
        for run in runs:
            run["bpb"] = round(run["bpb"], 4)
            run["curve"] = [(tokens, round(bpb, 4)) for tokens, bpb in run["curve"]]
        lines = ",\n ".join(json.dumps(run) for run in runs)
        FIGURES.write_text(f"[{lines}]\n", "utf-8")
    runs = json.loads(FIGURES.read_text("utf-8"))
    figure, (by_depth, by_tokens) = chart(9.0, 3.4, columns=2)
    shortest = min(run["steps"] for run in runs)
    sizes = sorted({run["size"] for run in runs}, key=lambda size: int(size[:-1]))
    for size, colour in zip(sizes, COLOURS, strict=False):
        found: dict[int, list[float]] = defaultdict(list)
        for run in runs:
            if run["size"] == size and run["steps"] == shortest:
                found[run["n_layers"]].append(run["bpb"])
        depths = sorted(found)
        middle = [statistics.mean(found[depth]) for depth in depths]
        by_depth.plot(depths, middle, color=colour, label=f"{size} parameters")
        for depth in depths:
            by_depth.plot(
                [depth] * len(found[depth]), found[depth], "o", color=colour, markersize=4
            )
    by_depth.set_xscale("log", base=2)
    by_depth.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    by_depth.set_xlabel("layers")
    by_depth.set_ylabel("held-out bits per byte")
    by_depth.set_title("equal parameters, 1 M tokens; a dot is a seed", fontsize=10)
    by_depth.legend()
    longest = max(run["steps"] for run in runs)
    for run, colour in zip([r for r in runs if r["steps"] == longest], COLOURS, strict=False):
        tokens, values = zip(*run["curve"], strict=True)
        label = f"{run['dim']} × {run['n_layers']}"
        by_tokens.plot(
            [n / 1e6 for n in tokens], values, "o-", color=colour, label=label, markersize=3
        )
    by_tokens.set_xlabel("million tokens")
    by_tokens.set_title("3M parameters, 4 M tokens; one seed", fontsize=10)
    by_tokens.legend()
    save(figure, "deep_or_wide")


if __name__ == "__main__":
    main()
