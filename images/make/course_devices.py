"""Draw what a rank keeps and needs: python images/make/course_devices.py

Left by the definition of ZeRO (arXiv:1910.02054, section 5), right by the estimate that a run
prints before its first step (model/estimate.py). Writes images/course/devices.svg.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from style import BLUE, FAINT, GREEN, ORANGE, PURPLE, chart, save  # noqa: E402

from model.estimate import training_memory  # noqa: E402
from model.LMConfig import MODELS, LMConfig  # noqa: E402
from model.model import MiniMindForCausalLM  # noqa: E402

RANKS, TOKENS = 8, 4 * 512
WAYS = ("DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3")
COLOURS = (FAINT, BLUE, GREEN, PURPLE)
SHOWN = "minimind-v1"
GB = 1e9


def main() -> None:
    models = {}
    for name, fields in MODELS.items():
        with torch.device("meta"):  # shapes alone, without memory
            models[name] = MiniMindForCausalLM(LMConfig(**fields))
    figure, (left, right) = chart(8.4, 3.7, columns=2)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    n_params = sum(p.numel() for p in models[SHOWN].parameters())
    draw_states(left, n_params)
    for way, colour in enumerate(COLOURS):
        peaks = [
            training_memory(model, TOKENS, torch.bfloat16, RANKS, zero_stage=way) / GB
            for model in models.values()
        ]
        places = [place + 0.2 * (way - 1.5) for place in range(len(models))]
        right.bar(places, peaks, 0.18, color=colour, label=WAYS[way])
    right.set_xticks(range(len(models)), [name.removeprefix("minimind-") for name in models])
    right.set_title(f"estimated peak of each of {RANKS} ranks, bf16", fontsize=10)
    finish(right)
    save(figure, "course/devices")


def draw_states(axes, n_params: int) -> None:
    """Draw fp32 weights, gradients and Adam's two moments; a stage divides from the last one on."""
    bottoms = [0.0] * len(WAYS)
    parts = (("weights", 4, 3, BLUE), ("gradients", 4, 2, GREEN), ("Adam's moments", 8, 1, ORANGE))
    for label, n_bytes, divided_from, colour in parts:
        heights = [
            n_bytes * n_params / (RANKS if stage >= divided_from else 1) / GB
            for stage in range(len(WAYS))
        ]
        axes.bar(WAYS, heights, 0.6, bottom=bottoms, color=colour, label=label)
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    for place, total in enumerate(bottoms):
        axes.text(place, total + 0.03, f"{total:.2f}", ha="center", fontsize=9)
    axes.set_title(f"kept by each of {RANKS} ranks, {SHOWN}", fontsize=10)
    finish(axes)


def finish(axes) -> None:
    axes.set_ylabel("GB")
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    axes.legend(fontsize=9)


if __name__ == "__main__":
    main()
