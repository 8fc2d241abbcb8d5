"""Draw which tokens each stage trains: python images/make/course_tuning.py

The same question and answer as pretraining, fine-tuning and preferences (DPO) encode it, by the
functions that the stages call. Writes images/course/tuning.svg.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from style import BLUE, FAINT, GREEN, INK, RED, box, drawing, save  # noqa: E402

from model.pairs import encode_pair  # noqa: E402
from model.tokenizer import Tokenizer  # noqa: E402

QUESTION, CHOSEN, REJECTED = (
    "What is the capital of Japan?",
    "The capital of Japan is Tokyo.",
    "Tokyo.",
)
MAX_TOKENS = 64
WIDTH, HEIGHT, LEFT, RIGHT = 84, 45, 2, 82  # tenths of an inch
LETTER, PADDING, ROW = 0.86, 0.9, 3.5  # of a box: width a letter, beside it, and height


def main() -> None:
    tokenizer = Tokenizer()
    asked = [{"role": "user", "content": QUESTION}]
    answered = [*asked, {"role": "assistant", "content": CHOSEN}]
    document = tokenizer.encode_document(f"{QUESTION} {CHOSEN}")
    pair, pair_mask = encode_pair(asked, CHOSEN, REJECTED, tokenizer, MAX_TOKENS, Counter())
    end = len(tokenizer.encode_chat(answered)) - 1  # without the line break after </s>
    chosen, rejected = pair[:end], pair[end:]
    chat, chat_mask = tokenizer.encode_chat_masked(answered)
    figure, axes = drawing(WIDTH / 10, HEIGHT / 10)
    y = HEIGHT - 4.0
    for title, rows in (
        ("pretraining: every token but the first", [(document, [False] + [True] * 99, BLUE)]),
        ("fine-tuning: what the assistant says, its </s> included", [(chat, chat_mask, BLUE)]),
        (
            "preferences: the answer chosen likelier, the one rejected less likely",
            [(chosen, pair_mask[:end], GREEN), (rejected, pair_mask[end:], RED)],
        ),
    ):
        axes.text(LEFT, y, title, fontsize=11, weight="bold", va="center")
        y -= 1.8
        for ids, mask, colour in rows:
            words = [word(tokenizer, token) for token in ids]
            y = tokens(axes, y, words, mask, colour) - 1.0
        y -= 1.6
    save(figure, "course/tuning")


def word(tokenizer: Tokenizer, token: int) -> str:
    """Return how a token is written in its box."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    return text.replace("\n", "\\n").replace(" ", "·")


def tokens(axes, y: float, words: Sequence[str], mask: Sequence[bool], colour: str) -> float:
    """Draw boxes, those trained in ``colour``, and return where the next row may begin."""
    x = LEFT
    for text, trained in zip(words, mask, strict=False):
        width = LETTER * len(text) + PADDING
        if x + width > RIGHT:
            x, y = LEFT, y - ROW
        box(axes, x, y - 2.9, width, 2.9, colour=colour if trained else FAINT, filled=trained)
        axes.text(
            x + width / 2,
            y - 1.5,
            text,
            ha="center",
            va="center",
            fontsize=8.5,
            family="monospace",
            color=INK if trained else FAINT,
        )
        x += width + 0.35
    return y - ROW


if __name__ == "__main__":
    main()
