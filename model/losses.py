"""What a loss is computed from, and the losses: masked cross-entropy."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the only label that is not learnt


@dataclass
class Batch:
    """Rows of tokens with what is to be learnt from them.

    Attributes:
        inputs: ids (B, T).
        targets: the id that follows each input, or ``IGNORED`` (B, T).
        attention_mask: which keys each query sees (B, 1, T, T); None: all before it.
        position_ids: (B, T); None: 0, 1, 2 …
        token_mask: which inputs are tokens and not padding (B, T); None: all.
        n_units: how many trained targets there are.
        n_tokens: how many inputs are tokens and not padding.
        n_bytes: UTF-8 bytes that the trained targets spell, where it was asked for.
    """

    inputs: Tensor
    targets: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    token_mask: Tensor | None = None
    n_units: int = 0
    n_tokens: int = 0
    n_bytes: int = 0

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        return Batch(**moved)


@dataclass
class LossSums:
    """A batch's loss as a sum over its units, so that parts of an update add up.

    ``balance`` is the mean over positions of an MoE's balance loss, ``metrics`` are further sums
    over units that a stage wants logged as means.
    """

    loss: Tensor
    balance: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


LossFn = Callable[[nn.Module, Batch], LossSums]


def masked_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats over the targets that are not ``IGNORED``.

    A sum and not a mean: the caller divides by the number of trained tokens of the whole update, so
    that neither micro-batches nor accumulation nor ranks change the mathematics.

    Args:
        logits: (B, T, V), any float type; the sum is taken in fp32.
        targets: (B, T), ids or ``IGNORED``.
    """
    flat = logits.flatten(0, 1).float()
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def language_model_loss(model: nn.Module, batch: Batch) -> LossSums:
    """Return the loss of pretraining and of fine-tuning: next-token cross-entropy."""
    out = model(
        input_ids=batch.inputs,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        token_mask=batch.token_mask,
        use_cache=False,
    )
    return LossSums(masked_cross_entropy(out.logits, batch.targets), out.aux_loss)
