"""Draw the exam: python images/make/ceval.py

Right answers of all asked, with the 95 % interval of model/evaluation.py: wilson_interval and the
line of pure chance. The counts are in images/make/ceval.json, each with the command that measured
it; writes images/ceval.svg.
"""

import json
import sys
from pathlib import Path

from style import BLUE, FAINT, ORANGE, chart, save

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.ceval import CHANCE  # noqa: E402
from model.evaluation import Share  # noqa: E402

COUNTS = Path(__file__).with_suffix(".json")
WAYS = (("by letters", BLUE, 0.15), ("by option text", ORANGE, -0.15))


def main() -> None:
    exams = json.loads(COUNTS.read_text(encoding="utf-8"))
    figure, (axes,) = chart(8.0, 3.6)
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12)
    for way, colour, offset in WAYS:
        points = [(n, Share(*exam[way])) for n, exam in enumerate(reversed(exams)) if way in exam]
        values = [100 * share.value for _, share in points]
        ends = [[100 * end for end in share.interval] for _, share in points]
        spread = [
            [value - low for value, (low, _) in zip(values, ends, strict=True)],
            [high - value for value, (_, high) in zip(values, ends, strict=True)],
        ]
        rows = [n + offset for n, _ in points]
        axes.errorbar(values, rows, xerr=spread, fmt="o", color=colour, capsize=3, label=way)
        for row, value, (low, high) in zip(rows, values, ends, strict=True):
            text = f"{value:.1f} ({low:.1f} to {high:.1f})"
            left = high < 80
            axes.annotate(
                text,
                (high if left else low, row),
                xytext=(7 if left else -7, 0),
                textcoords="offset points",
                ha="left" if left else "right",
                va="center",
                fontsize=9,
            )
    axes.axvline(100 * CHANCE, color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2, zorder=0)
    axes.text(100 * CHANCE - 1, len(exams) - 0.45, "chance", ha="right", va="center", fontsize=9)
    axes.set_yticks(range(len(exams)), [f"{e['model']}\n{e['exam']}" for e in reversed(exams)])
    axes.set_ylim(-0.6, len(exams) - 0.3)
    axes.set_xlim(0, 102)
    axes.set_xlabel("right answers, % (95 % interval)")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right")
    save(figure, "ceval")


if __name__ == "__main__":
    main()
