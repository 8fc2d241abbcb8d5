"""Draw how sure an exam is: python images/make/course_evaluation.py

Left: results whose 95 % interval holds a quarter, over the number of questions, with exams of the
README. Right: the same models by letters and by option text. The intervals are those of
model/evaluation.py. Writes images/course/evaluation.svg.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from style import BLUE, GREEN, INK, ORANGE, PURPLE, chart, save  # noqa: E402

from model.ceval import CHANCE  # noqa: E402
from model.evaluation import Share  # noqa: E402

# right, asked: README, the exam and what each stage changed (the demo after DPO)
DEMO_LETTERS, DEMO_TEXT = Share(22, 124), Share(118, 124)
SMALL_LETTERS, SMALL_TEXT = Share(339, 1346), Share(343, 1346)
ORIGINAL_LETTERS = Share(330, 1346)
NUMBERS = [4 * round(3 * 1.1**i) for i in range(62)]  # of which a quarter is whole


def main() -> None:
    figure, (left, right) = chart(8.4, 3.7, columns=2)
    bounds = [like_chance(n) for n in NUMBERS]
    low, high = ([100 * bound for bound in side] for side in zip(*bounds, strict=True))
    left.fill_between(NUMBERS, low, high, color=BLUE, alpha=0.18, linewidth=0, label="like chance")
    left.axhline(100 * CHANCE, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="chance")
    for share, marker, colour, label in (
        (DEMO_LETTERS, "o", ORANGE, "demo, letters"),
        (SMALL_LETTERS, "s", GREEN, "4.6 M, letters"),
        (SMALL_TEXT, "^", GREEN, "4.6 M, option text"),
        (ORIGINAL_LETTERS, "D", PURPLE, "the original, letters"),
    ):
        left.plot([share.n], [100 * share.value], marker, color=colour, label=label, markersize=5)
    for n in (DEMO_LETTERS.n, SMALL_LETTERS.n):
        left.axvline(n, ymax=0.55, color=INK, linewidth=0.6, alpha=0.4)
        left.text(n * 1.06, 2, f"{n:,}", fontsize=9)
    left.set_xscale("log")
    left.set_ylim(0, 80)
    left.set_xlabel("questions")
    left.set_ylabel("% right")
    left.set_title("results that chance explains", fontsize=10)
    left.legend(fontsize=8.5)
    compare(right)
    save(figure, "course/evaluation")


def like_chance(n: int) -> tuple[float, float]:
    """Return the least and the largest share of ``n`` questions whose interval holds chance."""
    shares = [Share(n_right, n) for n_right in range(n // 2 + 2)]
    held = [s.value for s in shares if s.interval[0] <= CHANCE <= s.interval[1]]
    return held[0], held[-1]


def compare(axes) -> None:
    rows = (("demo, 2.9 M\n124 questions", DEMO_LETTERS, DEMO_TEXT),) + (
        ("4.6 M\n1,346 of C-Eval", SMALL_LETTERS, SMALL_TEXT),
    )
    for offset, label, colour in ((0, "by letters", ORANGE), (1, "by option text", BLUE)):
        shares = [row[1 + offset] for row in rows]
        values = [100 * share.value for share in shares]
        errors = [
            [v - 100 * s.interval[0] for v, s in zip(values, shares, strict=True)],
            [100 * s.interval[1] - v for v, s in zip(values, shares, strict=True)],
        ]
        places = [place + 0.36 * (offset - 0.5) for place in range(len(rows))]
        axes.bar(places, values, 0.34, color=colour, label=label, yerr=errors, capsize=4)
    axes.axhline(100 * CHANCE, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xticks(range(len(rows)), [row[0] for row in rows])
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 108)
    axes.set_title("one exam, asked in two ways", fontsize=10)
    axes.legend(fontsize=9)


if __name__ == "__main__":
    main()
