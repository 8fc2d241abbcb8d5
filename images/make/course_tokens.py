"""Draw documents in padded and in packed rows, and the order of rows: python
images/make/course_tokens.py

The documents are the first of dataset/demo/pretrain.jsonl, the rows those of model/packing.py, the
order that of model/order.py.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
from style import BLUE, COLOURS, FAINT, ORANGE, chart, save

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from model.order import Sampler  # noqa: E402
from model.packing import pack  # noqa: E402
from model.tokenizer import Tokenizer  # noqa: E402

ROW_TOKENS = 129
N_SHOWN = 36


def lengths_of(n_documents: int | None) -> np.ndarray:
    """Return the tokens of the demo's first documents, of all for None."""
    tokenizer = Tokenizer()
    with open(ROOT / "dataset/demo/pretrain.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in islice(file, n_documents)]
    return np.array([len(tokenizer.encode_document(text)) for text in texts])


def draw_rows(axes, lengths: np.ndarray, order: np.ndarray, sizes: np.ndarray) -> None:
    """Draw rows of documents, each in a colour that is the same in any arrangement."""
    n_rows = len(sizes)
    axes.barh(range(n_rows), ROW_TOKENS, 0.9, facecolor="none", edgecolor=FAINT, linewidth=0.4)
    for row, numbers in enumerate(np.split(order, np.cumsum(sizes)[:-1])):
        left = 0
        for number in numbers:
            colour = COLOURS[number % len(COLOURS)]
            axes.barh(row, lengths[number], 0.9, left, color=colour + "c0", edgecolor="white")
            left += lengths[number]
    used = lengths.sum() / (n_rows * ROW_TOKENS)
    axes.set_title(f"{n_rows} rows, {used:.0%} in use", fontsize=10)
    axes.set_xlim(0, ROW_TOKENS)
    axes.set_ylim(N_SHOWN - 0.4, -0.6)
    axes.set_xlabel("position in the row")
    axes.set_xticks([0, 64, 128])
    axes.grid(False)


def main() -> None:
    figure, (alone, packed, order_axes) = chart(7.4, 3.7, columns=3)
    lengths = lengths_of(N_SHOWN)
    draw_rows(alone, lengths, np.arange(N_SHOWN), np.ones(N_SHOWN, int))
    draw_rows(packed, lengths, *pack(lengths, ROW_TOKENS))
    alone.set_ylabel("row")

    n_rows = len(pack(lengths_of(None), ROW_TOKENS)[1])
    sampler = Sampler(n_rows, seed=1, epochs=2)
    samples = np.arange(sampler.n_samples)
    for epoch, colour in enumerate((BLUE, ORANGE)):
        here = samples // n_rows == epoch
        order_axes.plot(samples[here], sampler.rows(samples[here]), ".", color=colour, markersize=3)
        order_axes.axvline((epoch + 1) * n_rows, color=FAINT, linewidth=0.8)
    order_axes.set_title(f"{n_rows} rows, two epochs", fontsize=10)
    order_axes.set_xlabel("number of the sample")
    order_axes.set_ylabel("row")
    order_axes.set_xticks([0, n_rows, 2 * n_rows])
    save(figure, "course/tokens")


if __name__ == "__main__":
    main()
