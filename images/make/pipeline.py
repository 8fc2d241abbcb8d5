"""Draw the way from text to answers: python images/make/pipeline.py

Scripts, and between them the files that one writes and the next one reads, under the names they
have by default. Writes images/pipeline.svg.
"""

from matplotlib.axes import Axes
from style import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, arrow, box, drawing, save

WIDTH, GAP, MARGIN = 15.3, 1.25, 1.3
TABLES = (
    "dataset/\npretrain_data.csv",
    "dataset/\nsft_data_single.csv",
    "dataset/\nsft_data.csv",
    "dataset/dpo/\ntrain_data.json",
    "my.jsonl\nyour own chats",
)
STAGES = (
    "1-pretrain.py",
    "3-full_sft.py\nsingle turns",
    "3-full_sft.py\nmany turns",
    "5-dpo_train.py",
    "4-lora_sft.py",
)
WEIGHTS = (
    "out/\npretrain_512.pth",
    "out/single_chat/\nfull_sft_512.pth",
    "out/multi_chat/\nfull_sft_512.pth",
    "out/\nrl_512.pth",
    "out/lora_512/\nan adapter",
)
USES = (
    ("2-eval.py", "answers and chats\non the terminal"),
    ("eval_ceval.py", "accuracy with\nintervals, a chart"),
    ("export_model.py", "transformers, Llama,\nGGUF for llama.cpp"),
    ("my_openai_api.py", "OpenAI's API\non port 8000"),
    ("fast_inference.py", "the chat page\non port 8501"),
)
SIZE = 8.6


def left(column: int) -> float:
    return MARGIN + column * (WIDTH + GAP)


def centre(column: int) -> float:
    return left(column) + WIDTH / 2


def across(axes: Axes, y: float, height: float, texts: tuple[str, ...], colour: str) -> None:
    for column, text in enumerate(texts):
        box(axes, left(column), y, WIDTH, height, text, colour, size=SIZE)


def line(axes: Axes, *points: tuple[float, float], colour: str = INK) -> None:
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, solid_capstyle="round")


def main() -> None:
    figure, axes = drawing(8.4, 6.3)
    y = 56
    box(axes, left(0), y, WIDTH, 5, "text\n.txt .jsonl .csv .json", GREEN, size=SIZE)
    box(axes, left(1), y, WIDTH, 5, "train_tokenizer.py", BLUE, size=SIZE)
    box(axes, left(2), y, WIDTH, 5, "model/\nminimind_tokenizer", PURPLE, size=SIZE)
    note = "6,400 tokens; one ships with the project.\nTraining and answering read it."
    axes.text(left(3) + 0.3, y + 2.5, note, va="center", fontsize=SIZE)

    y = 47.5
    raw = "raw data in dataset/\ndocuments · conversations\npreferences"
    box(axes, left(0), y, WIDTH + 3, 6, raw, GREEN, size=SIZE)
    box(axes, left(1) + 5, y, WIDTH, 6, "data_process.py", BLUE, size=SIZE)
    note = (
        "Tables; their tokens are stored beside them\n(NAME.tokens/) when training first reads one."
    )
    axes.text(left(1) + 5 + WIDTH + 2, y + 3, note, va="center", fontsize=SIZE)
    arrow(axes, (left(0) + WIDTH + 3, y + 3), (left(1) + 5, y + 3))
    for column in range(2):
        arrow(axes, (left(column) + WIDTH, 58.5), (left(column + 1), 58.5))

    tables, stages, weights, uses = 38.5, 30.5, 20.5, 3
    bus = 45.6
    line(axes, (left(1) + 5 + WIDTH / 2, y), (left(1) + 5 + WIDTH / 2, bus))
    line(axes, (centre(0), bus), (centre(3), bus))
    for column in range(4):
        arrow(axes, (centre(column), bus), (centre(column), tables + 5))
    across(axes, tables, 5, TABLES, GREEN)
    across(axes, stages, 5, STAGES, BLUE)
    across(axes, weights, 5, WEIGHTS, ORANGE)
    for column in range(5):
        arrow(axes, (centre(column), tables), (centre(column), stages + 5))
        arrow(axes, (centre(column), stages), (centre(column), weights + 5))

    # which weights a stage starts from
    start = left(1) - GAP / 2
    line(axes, (left(0) + WIDTH, weights + 2.5), (start, weights + 2.5), (start, 28), colour=ORANGE)
    line(axes, (start, 28), (left(1) + 4, 28), colour=ORANGE)
    tips = [(left(1) + 4, 28)]
    start = left(2) - GAP / 2
    line(axes, (left(1) + WIDTH, weights + 2.5), (start, weights + 2.5), (start, 28), colour=ORANGE)
    line(axes, (start, 28), (left(4) + 4, 28), colour=ORANGE)
    tips += [(left(column) + 4, 28) for column in (2, 3, 4)]
    for x, low in tips:
        arrow(axes, (x, low), (x, stages))

    box(axes, MARGIN - 0.8, uses - 0.6, 5 * WIDTH + 4 * GAP + 1.6, 13.7, "", FAINT, filled=False)
    note = "the best weights there are, or any by name (--weights FILE), with or without an adapter"
    axes.text(42, uses + 11.3, note, ha="center", va="center", fontsize=SIZE)
    line(axes, (centre(0), weights), (centre(0), 18), (centre(4), 18), (centre(4), weights),
         colour=ORANGE)  # fmt: skip
    for column in (1, 2, 3):
        line(axes, (centre(column), weights), (centre(column), 18), colour=ORANGE)
    arrow(axes, (42, 18), (42, uses + 13.1))
    across(axes, uses + 5, 4.4, tuple(name for name, _ in USES), BLUE)
    for column, (_, what) in enumerate(USES):
        axes.text(centre(column), uses + 2, what, ha="center", va="center", fontsize=SIZE)
    save(figure, "pipeline")


if __name__ == "__main__":
    main()
