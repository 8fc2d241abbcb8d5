"""Draw how rotary positions turn, what a score then depends on, and where the parameters are:
python images/make/course_model.py

All by model/model.py: its RotaryEmbedding, its rotate, its parameters.
"""

import sys
from pathlib import Path

import torch
from matplotlib.colors import LinearSegmentedColormap
from style import BLUE, FAINT, GREEN, ORANGE, PAPER, PURPLE, chart, save

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.LMConfig import LMConfig  # noqa: E402
from model.model import MiniMindForCausalLM, RotaryEmbedding, rotate  # noqa: E402

PARTS = {  # parameters whose names hold one of these, the first that fits
    "embedding = head": ("tok_embeddings", BLUE),
    "attention": (".attention.", ORANGE),
    "shared expert": (".shared_experts.", PURPLE),
    "feed-forward, routed": (".feed_forward.", GREEN),
}


def draw_turning(axes, rotary: RotaryEmbedding) -> None:
    """Draw the cosine of each pair's angle at each position."""
    cos, _ = rotary(torch.arange(128)[None])  # (1, T, 1, Dh / 2)
    colours = LinearSegmentedColormap.from_list("turning", [BLUE, PAPER, ORANGE])
    image = cos[0, :, 0].T.numpy()
    axes.imshow(image, cmap=colours, aspect="auto", interpolation="none", vmin=-1, vmax=1)
    axes.set_title("cosine of the angle", fontsize=10)
    axes.set_xlabel("position")
    axes.set_ylabel("pair of a head")
    axes.grid(False)


def draw_scores(axes, rotary: RotaryEmbedding, head_dim: int) -> None:
    """Draw the score of one query with one key, at distances from two positions."""
    same = torch.ones(1, 512, 1, head_dim)  # query and key are the same vector everywhere
    turned = rotate(same, rotary(torch.arange(512)[None]))[0, :, 0]  # (T, Dh)
    distances = torch.arange(0, 121)
    for position, style in ((500, {"color": BLUE, "linewidth": 4, "alpha": 0.35}), (130, {})):
        scores = turned[position - distances] @ turned[position] / head_dim**0.5
        axes.plot(distances, scores, **({"color": ORANGE, "linewidth": 1.3} | style))
        axes.plot([], [], label=f"query at {position}", **({"color": ORANGE} | style))
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.set_title("score of equal q and k", fontsize=10)
    axes.set_xlabel("positions between them")
    axes.legend(fontsize=9)


def draw_parameters(axes) -> None:
    """Draw how many parameters each part has, dense and as a mixture of experts."""
    for place, config in enumerate((LMConfig(), LMConfig(use_moe=True))):
        with torch.device("meta"):  # shapes alone
            model = MiniMindForCausalLM(config)
        counts = dict.fromkeys(PARTS, 0)
        for name, parameter in model.named_parameters():
            part = next((part for part, (text, _) in PARTS.items() if text in name), None)
            if part:  # norms: too few to see
                counts[part] += parameter.numel()
        bottom = 0.0
        for part, (_, colour) in PARTS.items():
            label = part if place else None
            axes.bar(place, counts[part] / 1e6, 0.6, bottom, color=colour + "c0", label=label)
            bottom += counts[part] / 1e6
        axes.text(place, bottom + 2, f"{bottom:.1f} M", ha="center", fontsize=9)
    axes.set_title("parameters, millions", fontsize=10)
    axes.set_xticks([0, 1], ["dense", "experts 2 + 4"])
    axes.set_ylim(0, 175)  # room for the legend
    axes.set_yticks(range(0, 101, 25))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="upper left", borderpad=0)
    axes.grid(False, axis="x")


def main() -> None:
    config = LMConfig()
    rotary = RotaryEmbedding(config)
    figure, (turning, scores, parameters) = chart(7.6, 3.2, columns=3)
    draw_turning(turning, rotary)
    draw_scores(scores, rotary, config.head_dim)
    draw_parameters(parameters)
    save(figure, "course/model")


if __name__ == "__main__":
    main()
