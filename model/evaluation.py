"""Measuring a model: loss in nats per token, bits per byte."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from .losses import Batch, LossFn


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Return means over held-out batches, None if told to stop; the model's mode stays as it was.

    ``val_loss`` is in nats per unit (trained token), ``val_bpb`` in bits per byte of UTF-8 text,
    which unlike the loss does not depend on the tokenizer. Empty where there is nothing to measure
    on.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {}
    n_units = n_bytes = 0
    for batch in batches:
        if should_stop():
            break
        out = loss_fn(model, batch.to(device))
        for name, value in {"val_loss": out.loss, **out.metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        n_units += batch.n_units
        n_bytes += batch.n_bytes
    model.train(was_training)
    if should_stop():
        return None
    if not n_units:
        return {}
    result = {name: value / n_units for name, value in sums.items()}
    if n_bytes:
        result["val_bpb"] = sums["val_loss"] / math.log(2) / n_bytes
    return result
