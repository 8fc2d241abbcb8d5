"""Draw how sure an exam is: python images/make/course_evaluation.py

Left: results whose 95 % interval holds a quarter, over the number of questions, with exams of the
README. Right: the same models by letters and by option text. The counts are those of
images/make/ceval.json, the intervals of model/evaluation.py. Writes images/course/evaluation.svg.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ceval import COUNTS, WAYS  # noqa: E402
from style import FAINT, INK, chart, save  # noqa: E402

from model.ceval import CHANCE  # noqa: E402
from model.evaluation import Share  # noqa: E402

DEMO, SMALL, ORIGINAL = (
    "the demo's, 2.9 M, after DPO",
    "4.6 M, an hour of one CPU core",
    "the original's recorded answers",
)
COLOURS = {way: colour for way, colour, _ in WAYS}
LETTERS, TEXT = COLOURS
NUMBERS = [4 * round(3 * 1.1**i) for i in range(62)]  # of which a quarter is whole


def main() -> None:
    exams = {exam["model"]: exam for exam in json.loads(COUNTS.read_text(encoding="utf-8"))}
    figure, (left, right) = chart(8.4, 3.7, columns=2)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    bounds = [like_chance(n) for n in NUMBERS]
    low, high = ([100 * bound for bound in side] for side in zip(*bounds, strict=True))
    left.fill_between(NUMBERS, low, high, color=FAINT, alpha=0.3, linewidth=0, label="like chance")
    left.axhline(100 * CHANCE, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="chance")
    for model, way, marker, beside, label in (
        (DEMO, LETTERS, "o", 1, "demo, letters"),
        (SMALL, LETTERS, "s", 0.8, "4.6 M, letters"),
        (SMALL, TEXT, "s", 1, "4.6 M, option text"),
        (ORIGINAL, LETTERS, "D", 1.25, "the original, letters"),
    ):
        share = Share(*exams[model][way])
        place, value = share.n * beside, 100 * share.value
        left.plot([place], [value], marker, color=COLOURS[way], label=label, markersize=5)
    for n in sorted({exams[model][LETTERS][1] for model in (DEMO, SMALL)}):
        left.axvline(n, ymax=0.55, color=INK, linewidth=0.6, alpha=0.4, zorder=0)
        left.text(n * 1.06, 2, f"{n:,}", fontsize=9)
    left.set_xscale("log")
    left.set_ylim(0, 80)
    left.set_xlabel("questions")
    left.set_ylabel("% right")
    left.set_title("results that chance explains", fontsize=10)
    left.legend(fontsize=8.5)
    compare(right, exams)
    save(figure, "course/evaluation")


def like_chance(n: int) -> tuple[float, float]:
    """Return the least and the largest share of ``n`` questions whose interval holds chance."""
    shares = [Share(n_right, n) for n_right in range(n // 2 + 2)]
    held = [s.value for s in shares if s.interval[0] <= CHANCE <= s.interval[1]]
    return held[0], held[-1]


def compare(axes, exams: dict[str, dict]) -> None:
    rows = {DEMO: "demo, 2.9 M\n{:,} questions", SMALL: "4.6 M\n{:,} of C-Eval"}
    for offset, (way, colour) in enumerate(COLOURS.items()):
        shares = [Share(*exams[model][way]) for model in rows]
        values = [100 * share.value for share in shares]
        errors = [
            [v - 100 * s.interval[0] for v, s in zip(values, shares, strict=True)],
            [100 * s.interval[1] - v for v, s in zip(values, shares, strict=True)],
        ]
        places = [place + 0.36 * (offset - 0.5) for place in range(len(rows))]
        axes.bar(places, values, 0.34, color=colour, label=way, yerr=errors, capsize=4)
    axes.axhline(100 * CHANCE, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    names = [name.format(exams[model][LETTERS][1]) for model, name in rows.items()]
    axes.set_xticks(range(len(rows)), names)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 108)
    axes.set_title("one exam, asked in two ways", fontsize=10)
    axes.legend(fontsize=9)


if __name__ == "__main__":
    main()
