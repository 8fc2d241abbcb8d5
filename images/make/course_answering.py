"""Draw how a token is chosen and what a cache saves: python images/make/course_answering.py

Left: which tokens follow a "1" in the chats of the demo: the logarithms of their counts under
three temperatures, and what top-p leaves of them, by model/sampling.py. Right: positions that pass
through the model for an answer to 100 tokens. Writes images/course/answering.svg.
"""

import json
import math
import sys
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from style import BLUE, GREEN, INK, ORANGE, chart, save  # noqa: E402

from model.sampling import keep_likely  # noqa: E402
from model.tokenizer import Tokenizer  # noqa: E402

BEFORE, TOP_P = "1", 0.7
TEMPERATURES = ((0.5, GREEN), (1.0, BLUE), (1.5, ORANGE))
PROMPT, LONGEST = 100, 400


def main() -> None:
    figure, (left, right) = chart(8.4, 3.7, columns=2)
    draw_choice(left)
    lengths = range(1, LONGEST + 1)
    without = list(accumulate(PROMPT + n - 1 for n in lengths))
    right.plot(lengths, without, color=ORANGE, label="without a cache")
    right.plot(lengths, [PROMPT + n - 1 for n in lengths], color=BLUE, label="with one")
    right.set_yscale("log")
    right.set_title(f"positions computed, prompt of {PROMPT} tokens", fontsize=10)
    right.set_xlabel("tokens of the answer")
    right.legend(fontsize=9)
    save(figure, "course/answering")


def draw_choice(axes) -> None:
    tokenizer = Tokenizer()
    counts = followers(tokenizer)
    logits = torch.tensor([math.log(count) for _, count in counts])
    for index, (temperature, colour) in enumerate(TEMPERATURES):
        probs = (logits / temperature).softmax(dim=-1).tolist()
        places = [place + 0.27 * (index - 1) for place in range(len(counts))]
        axes.bar(places, probs, 0.25, color=colour, label=f"temperature {temperature}")
    n_kept = int(keep_likely(logits, 0, TOP_P, 0.0).isfinite().sum())
    axes.axvline(n_kept - 0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(
        n_kept - 0.3,
        axes.get_ylim()[1] * 0.55,
        f"top-p {TOP_P} at\ntemperature 1.0\nkeeps {n_kept} of {len(counts)}",
        fontsize=9,
    )
    axes.set_xticks(range(len(counts)), [str(rank) for rank in range(1, len(counts) + 1)])
    axes.set_xlabel("tokens, the most frequent first")
    axes.set_title(f'probability of the token after "{BEFORE}"', fontsize=10)
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=9)


def followers(tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Return (token, how often it follows), the most frequent first."""
    (before,) = tokenizer.encode(BEFORE)
    counts: Counter[int] = Counter()
    with open(ROOT / "dataset/demo/sft_single.jsonl", encoding="utf-8") as file:
        answers = [json.loads(line)["output"] for line in file]
    for ids in tokenizer.encode_batch(answers):
        counts.update(after for token, after in pairwise(ids) if token == before)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


if __name__ == "__main__":
    main()
