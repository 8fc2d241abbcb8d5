"""Draw what a model is made of: python images/make/structure.py

Every shape and count is read from the module itself, built without memory on PyTorch's meta device;
the names are those of the parameters. Writes images/structure.svg (minimind-v1-small) and
images/structure_moe.svg (minimind-v1-moe).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Circle, Rectangle  # noqa: E402
from style import BLUE, FAINT, GREEN, INK, ORANGE, PAPER, PURPLE, RED, arrow, box, drawing, save  # noqa: E402, I001
from torch import nn  # noqa: E402

from model.LMConfig import MODELS, LMConfig  # noqa: E402
from model.model import MiniMindForCausalLM  # noqa: E402

SMALL = 9
MODEL_X, BLOCK_X, PART_X = 2, 26, 51  # left edges of the three columns
PART_WIDTH = 31


def build(name: str) -> MiniMindForCausalLM:
    """Return a named model without memory for its weights."""
    with torch.device("meta"):
        return MiniMindForCausalLM(LMConfig(**MODELS[name]))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shape(module: nn.Module) -> str:
    """Return the shape of a module's weight as the drawing writes it."""
    return " × ".join(f"{n:,}" for n in module.weight.shape)


def label(axes: Axes, x: float, y: float, text: str, **options: object) -> None:
    axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": SMALL, **options})


def line(axes: Axes, *points: tuple[float, float], colour: str = INK) -> None:
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, solid_capstyle="round")


def plus(axes: Axes, x: float, y: float, sign: str = "+") -> None:
    axes.add_patch(Circle((x, y), 1.3, facecolor=PAPER, edgecolor=INK, linewidth=1.1, zorder=3))
    label(axes, x, y - 0.05, sign, fontsize=11, zorder=4)


def frame(axes: Axes, y: float, height: float, title: str, note: str, colour: str) -> None:
    """Draw the frame of one part in the right column, its lower edge at ``y``."""
    box(axes, PART_X, y, PART_WIDTH, height, "", colour, filled=False)
    top = y + height - 1.7
    label(axes, PART_X + 1.2, top, title, ha="left", fontweight="bold", color=colour)
    label(axes, PART_X + PART_WIDTH - 1.2, top, note, ha="right", fontsize=8)


def whole(
    axes: Axes, name: str, model: MiniMindForCausalLM, top: float, block: tuple[float, float]
) -> None:
    """Draw the left column, from ids to logits, and lines to the ``block`` that shows a layer."""
    config = model.config
    centre, width = MODEL_X + 10, 20
    label(axes, centre, top, name, fontweight="bold", fontsize=11)
    label(axes, centre, top - 2.5, f"{count(model):,} parameters")
    if config.use_moe:
        moe = model.layers[0].feed_forward
        resting = len(moe.experts) - config.num_experts_per_tok
        active = count(model) - config.n_layers * resting * count(moe.experts[0])
        label(axes, centre, top - 4.6, f"{active:,} at work on a token", fontsize=8)
    n = config.n_layers
    rows = (
        ("input_ids (B, T)", None, 0),
        (f"tok_embeddings\n{shape(model.tok_embeddings)}", GREEN, 6.5),
        (f"layers.0 … layers.{n - 1}\n{n} blocks of\n{count(model.layers[0]):,}", BLUE, 12),
        (f"norm  (RMSNorm)\n{shape(model.norm)}", ORANGE, 5),
        (f"output\n{shape(model.output)}", GREEN, 6.5),
        (f"logits (B, T, {config.vocab_size:,})", None, 0),
    )
    y = top - 6.5
    edges = {}
    for n_row, (text, colour, height) in enumerate(rows):
        if colour is None:
            label(axes, centre, y - 1, text)
            y -= 2.2
        else:
            box(axes, MODEL_X, y - height, width, height, text, colour, size=SMALL)
            edges[text.split("\n")[0]] = (y, y - height)
            y -= height
        if n_row < len(rows) - 1:
            arrow(axes, (centre, y), (centre, y - 3.3))
            y -= 3.3
    upper, lower = sum(edges["tok_embeddings"]) / 2, sum(edges["output"]) / 2
    if model.config.tie_word_embeddings:
        x = MODEL_X - 1.1
        line(axes, (MODEL_X, upper), (x, upper), (x, lower), (MODEL_X, lower), colour=GREEN)
        label(axes, x + 0.7, (edges["norm  (RMSNorm)"][1] + edges["output"][0]) / 2 + 0.2,
              "one tensor", ha="left", fontsize=8, color=GREEN)  # fmt: skip
    blocks = edges[f"layers.0 … layers.{n - 1}"]
    for end, start in zip(block, blocks, strict=True):
        line(axes, (MODEL_X + width, start), (BLOCK_X, end), colour=FAINT)


def block(axes: Axes, layer: nn.Module, top: float, bottom: float) -> dict[str, float]:
    """Draw the middle column: one block and its two residual paths; return where the parts are."""
    width = 21
    box(axes, BLOCK_X, bottom, width, top - bottom, "", BLUE, filled=False)
    label(axes, BLOCK_X + 1.2, top - 1.7, "TransformerBlock", ha="left", fontweight="bold",
          color=BLUE)  # fmt: skip
    centre, left, inner = BLOCK_X + 12.5, BLOCK_X + 5.5, 14
    kind = "mixture of experts" if hasattr(layer.feed_forward, "gate") else "SwiGLU"
    parts = (
        (f"attention_norm\n{shape(layer.attention_norm)}", ORANGE, 5),
        (f"attention\n{count(layer.attention):,}", PURPLE, 6.5),
        (f"ffn_norm\n{shape(layer.ffn_norm)}", ORANGE, 5),
        (f"feed_forward\n{kind}\n{count(layer.feed_forward):,}", RED, 8),
    )
    room = top - bottom - 3.4 - 4 - sum(p[2] for p in parts) - 2 * 2.6
    gap = room / 6  # below the start and below each part and sum but the last
    label(axes, centre, top - 4.6, "x (B, T, D)", fontsize=8)
    y = top - 5.6
    places = {}
    for n_part, (text, colour, height) in enumerate(parts):
        if n_part % 2 == 0:
            fork = y - gap * 0.35
        arrow(axes, (centre, y), (centre, y - gap))
        y -= gap
        box(axes, left, y - height, inner, height, text, colour, size=SMALL)
        places[text.split("\n")[0]] = y - height / 2
        y -= height
        if n_part % 2 == 1:
            arrow(axes, (centre, y), (centre, y - gap * 0.8))
            y -= gap * 0.8 + 1.3
            plus(axes, centre, y)
            side = BLOCK_X + 2.6
            line(axes, (centre, fork), (side, fork), (side, y))
            arrow(axes, (side, y), (centre - 1.3, y))
            y -= 1.3
    arrow(axes, (centre, y), (centre, bottom - 2.2))
    return places


def attention(axes: Axes, part: nn.Module, y: float, height: float) -> None:
    """Draw attention in the right column: projections, rotation, grouped heads, output."""
    config = part.config
    heads, kv_heads = config.n_heads, config.n_kv_heads
    frame(axes, y, height, "attention", "GQA, causal", PURPLE)
    top = y + height - 4
    columns = [PART_X + 1.5 + 9.7 * n for n in range(3)]
    for x, name in zip(columns, ("wq", "wk", "wv"), strict=True):
        box(axes, x, top - 5, 8.6, 5, f"{name}\n{shape(getattr(part, name))}", PURPLE, size=8.5)
    for x in columns[:2]:
        arrow(axes, (x + 4.3, top - 5), (x + 4.3, top - 7.2))
        box(axes, x, top - 10.2, 8.6, 3, "rotate", GREEN, size=8.5)
    row = top - 14.6
    for x, n, colour in zip(columns, (heads, kv_heads, kv_heads), (BLUE, RED, RED), strict=True):
        arrow(axes, (x + 4.3, top - (5 if x == columns[2] else 10.2)), (x + 4.3, row + 1.5))
        each = 8.6 / n
        for head in range(n):
            patch = (x + head * each + 0.06, row - 0.1), each - 0.12, 1.3
            tone = "b0" if (head * kv_heads // n) % 2 == 0 else "50"
            axes.add_patch(Rectangle(*patch, facecolor=colour + tone, edgecolor="none"))
    for x, text in zip(columns, (f"q: {heads} heads", f"k: {kv_heads}", f"v: {kv_heads}"),
                       strict=True):  # fmt: skip
        label(axes, x + 4.3, row - 1.5, text, fontsize=8)
    middle = PART_X + PART_WIDTH / 2
    share = f"heads of {config.head_dim}; {heads // kv_heads} of q share one of k and v"
    label(axes, middle, row - 3.6, share, fontsize=8)
    arrow(axes, (middle, row - 4.7), (middle, row - 6.6))
    text = f"softmax(q kᵀ / √{config.head_dim} + mask) v"
    box(axes, PART_X + 1.5, row - 10, 28, 3.4, text, BLUE, size=SMALL)
    arrow(axes, (middle, row - 10), (middle, row - 11.9))
    box(axes, PART_X + 1.5, row - 15.4, 28, 3.5, f"wo   {shape(part.wo)}", PURPLE, size=8.5)


def swiglu(axes: Axes, part: nn.Module, y: float, height: float) -> None:
    """Draw SwiGLU in the right column: w2(silu(w1 x) * w3 x)."""
    frame(axes, y, height, "feed_forward", "SwiGLU", RED)
    top = y + height - 4
    left, right, middle = PART_X + 1.5, PART_X + 16.5, PART_X + PART_WIDTH / 2
    box(axes, left, top - 4.5, 13, 4.5, f"w1\n{shape(part.w1)}", RED, size=8.5)
    box(axes, right, top - 4.5, 13, 4.5, f"w3\n{shape(part.w3)}", RED, size=8.5)
    arrow(axes, (left + 6.5, top - 4.5), (left + 6.5, top - 6.5))
    box(axes, left + 3, top - 9.5, 7, 3, "silu", GREEN, size=8.5)
    product = top - 8
    arrow(axes, (left + 10, product), (middle - 1.3, product))
    line(axes, (right + 6.5, top - 4.5), (right + 6.5, product))
    arrow(axes, (right + 6.5, product), (middle + 1.3, product))
    plus(axes, middle, product, "×")
    arrow(axes, (middle, product - 1.3), (middle, product - 4))
    box(axes, left, product - 7.5, 28, 3.5, f"w2   {shape(part.w2)}", RED, size=8.5)


def mixture(axes: Axes, part: nn.Module, config: LMConfig, y: float, height: float) -> None:
    """Draw the mixture of experts in the right column."""
    n, k = len(part.experts), config.num_experts_per_tok
    frame(axes, y, height, "feed_forward", "mixture of experts", RED)
    top = y + height - 4
    left, middle = PART_X + 1.5, PART_X + PART_WIDTH / 2
    label(axes, middle, top - 0.3, "x", fontsize=SMALL)
    gate = f"gate   {shape(part.gate)}\nsoftmax, top {k} of {n}"
    box(axes, left, top - 8, 17.5, 5, gate, GREEN, size=8.5)
    arrow(axes, (middle - 1, top - 0.9), (left + 10, top - 3))
    each = 17.5 / n
    row, meet = top - 18.5, top - 26
    for expert in range(n):
        x = left + expert * each
        chosen = expert in (0, n // 2)  # the drawing's example of k = 2
        box(axes, x + 0.2, row, each - 0.4, 6.5, str(expert), RED if chosen else FAINT, size=9)
        if chosen:
            arrow(axes, (left + 8.75, top - 8), (x + each / 2, row + 6.5))
            arrow(axes, (x + each / 2, row), (middle - 1.2, meet + 0.7))
    shared, x = part.shared_experts, left + 19
    text = f"shared_\nexperts\n\nw1, w3\n{shape(shared.w1)}\n\nw2\n{shape(shared.w2)}"
    box(axes, x, row, 9.5, 15.5, text, PURPLE, size=8)
    arrow(axes, (middle + 1, top - 0.9), (x + 4.5, top - 3))
    arrow(axes, (x + 4.75, row), (middle + 1.2, meet + 0.7))
    plus(axes, middle, meet)
    inside = part.experts[0]
    text = (
        f"Each of experts.0 … {n - 1} is a SwiGLU:\n"
        f"w1, w3 {shape(inside.w1)}; w2 {shape(inside.w2)}.\n"
        f"A token passes the {k} likeliest of them, weighted\n"
        "by the gate, and the shared ones."
    )
    label(axes, middle, meet - 5.5, text, fontsize=8.5, linespacing=1.4)
    scope = "sequence" if config.seq_aux else "batch"
    loss = (
        f"balance loss, in training, per {scope}\n"
        f"{config.aux_loss_alpha:g} · Σ load × mean probability\n"
        "over the routed experts"
    )
    box(axes, left, y + 1.5, 28, 7.4, loss, GREEN, size=8.5, filled=False)


def draw(name: str, path: str) -> None:
    model = build(name)
    layer, config = model.layers[0], model.config
    figure, axes = drawing(8.4, 6.5)
    whole(axes, name, model, 60.5, (60.7, 6.8))
    places = block(axes, layer, 61.5, 6)
    if config.use_moe:
        mixture(axes, layer.feed_forward, config, 6, 48.5)
        label(axes, PART_X + PART_WIDTH / 2, 60, "attention: as in the dense model,\n"
              "the same shapes", fontsize=8.5, color=PURPLE)  # fmt: skip
        starts = {"feed_forward": (54.5, 6)}
    else:
        attention(axes, layer.attention, 26.5, 35)
        swiglu(axes, layer.feed_forward, 2, 22)
        starts = {"attention": (61.5, 26.5), "feed_forward": (24, 2)}
    for part, (upper, lower) in starts.items():
        height = 6.5 if part == "attention" else 8
        for end, start in zip((upper - 1, lower + 1), (1, -1), strict=True):
            edge = places[part] + start * height / 2
            line(axes, (BLOCK_X + 19.5, edge), (PART_X, end), colour=FAINT)
    save(figure, path)


if __name__ == "__main__":
    draw("minimind-v1-small", "structure")
    draw("minimind-v1-moe", "structure_moe")
