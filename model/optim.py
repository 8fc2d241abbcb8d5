"""Parameter groups, optimizers, learning-rate schedules."""

import math

import torch
from torch import nn

COOLDOWN_SHARE = (
    0.6  # of the run, in the "linear" schedule: long cool-downs measure best at this size
)
COSINE_FLOOR = 0.1  # v1 ends at a tenth of the peak


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return the trainable parameters in two groups: matrices decay, embeddings and norms do
    not.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    ids = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in ids], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return ``adamw`` (arXiv:1711.05101; betas 0.9, 0.98 as small batches want) or v1's ``adam``.

    Raises:
        ValueError: another name.
    """
    groups = [g for g in parameter_groups(model, weight_decay) if g["params"]]
    device_types = {p.device.type for g in groups for p in g["params"]}
    fused = device_types <= {"cpu", "cuda", "mps"}
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=fused)
    if name == "adam":
        return torch.optim.Adam(groups, lr=learning_rate, fused=fused)
    raise ValueError(f'optimizer={name!r} is unknown: use "adamw" or "adam"')


def learning_rate_at(
    step: int, n_steps: int, peak: float, schedule: str, warmup_steps: int
) -> float:
    """Return the rate of update ``step`` (from 0) of ``n_steps``.

    All schedules rise linearly over ``warmup_steps``. ``linear`` stays, then falls to 0 over the
    last 60 % of the run; ``cosine`` falls from the peak to a tenth of it; ``constant`` stays.

    Raises:
        ValueError: another schedule.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, n_steps - warmup_steps)
        floor = COSINE_FLOOR * peak
        return floor + (peak - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    if schedule == "linear":
        left = (n_steps - step) / max(1.0, COOLDOWN_SHARE * n_steps)
        return peak * max(0.0, min(1.0, left))
    raise ValueError(f'schedule={schedule!r} is unknown: use "linear", "cosine" or "constant"')
