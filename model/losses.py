"""What a loss is computed from, and the losses: masked cross-entropy, preferences (DPO)."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

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
        return type(self)(**moved)


@dataclass
class PairBatch(Batch):
    """Preference pairs: two sequences each, a prompt with the answer chosen (sequences 0, 2, 4 …)
    and the same prompt with the one rejected (1, 3, 5 …). Only the answers are trained.

    Attributes:
        sequence_ids: the sequence that each position belongs to (B, T); -1 on padding.
        reference_logps: log probability of each sequence's answer under the reference model
            (2 * n_units,); None: not known.
        n_units: how many pairs there are.
    """

    sequence_ids: Tensor | None = None
    reference_logps: Tensor | None = None


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


def language_model_loss(model: nn.Module, batch: Batch) -> LossSums:
    """Return the loss of pretraining and of fine-tuning: next-token cross-entropy."""
    out = run_model(model, batch, targets=batch.targets)
    return LossSums(out.loss, out.aux_loss)


def run_model(model: nn.Module, batch: Batch, **kwargs: Any) -> Any:
    """Return the model's output for a batch."""
    return model(
        input_ids=batch.inputs,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        token_mask=batch.token_mask,
        use_cache=False,
        **kwargs,
    )


# ----------------------------------------------------------------------------- preferences


def answer_logps(logits: Tensor, targets: Tensor, sequence_ids: Tensor, n_sequences: int) -> Tensor:
    """Return the log probability of each sequence's answer, the sum over its tokens, in nats:
    (n_sequences,) fp32.

    Args:
        logits: (B, T, V).
        targets: (B, T), ids or ``IGNORED``.
        sequence_ids: (B, T), from 0; -1 on padding.
    """
    flat = logits.flatten(0, 1).float()
    # 0 where the target is IGNORED
    logps = -F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="none")
    places = sequence_ids.flatten().clamp(min=0)  # what is padding adds 0 somewhere
    return logps.new_zeros(n_sequences).index_add(0, places, logps)


def pair_logps(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor | None]:
    """Return the log probability of each answer of a batch, (2 * n_units,), chosen and rejected by
    turns, and an MoE's balance loss.
    """
    out = run_model(model, batch)
    logps = answer_logps(out.logits, batch.targets, batch.sequence_ids, 2 * batch.n_units)
    return logps, out.aux_loss


def dpo_loss(
    logps: Tensor, reference_logps: Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the loss and the reward margin of each pair, (P,) both.

    The reward of an answer is beta * log(policy / reference); the loss is -log sigmoid of the
    margin between chosen and rejected (DPO, arXiv:2305.18290, equation 7). ``label_smoothing`` is
    the share of pairs that are believed to be labelled the wrong way round; each pair then counts
    that much in the other direction.

    Args:
        logps, reference_logps: (2 * P,), chosen and rejected by turns.
    """
    rewards = beta * (logps - reference_logps)
    margins = rewards[0::2] - rewards[1::2]
    losses = (
        -F.logsigmoid(margins) * (1 - label_smoothing) - F.logsigmoid(-margins) * label_smoothing
    )
    return losses, margins


class PreferenceLoss:
    """The loss function of DPO, with what is logged of it.

    Args:
        reference: the frozen model that the policy is compared with where a batch does not bring
            its log probabilities; in eval mode.
    """

    def __init__(
        self, beta: float, label_smoothing: float = 0.0, reference: nn.Module | None = None
    ) -> None:
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing={label_smoothing} is not in [0, 0.5): from one half on the pairs "
                "would say the opposite"
            )
        self.beta, self.label_smoothing, self.reference = beta, label_smoothing, reference

    def __call__(self, model: nn.Module, batch: PairBatch) -> LossSums:
        logps, balance = pair_logps(model, batch)
        reference_logps = batch.reference_logps
        if reference_logps is None:
            with torch.no_grad():
                reference_logps, _ = pair_logps(self.reference, batch)
        losses, margins = dpo_loss(logps, reference_logps, self.beta, self.label_smoothing)
        metrics = {
            # of two equal rewards each is right half the time: 0.5 where nothing is learnt yet
            "accuracy": ((margins > 0).float() + 0.5 * (margins == 0)).sum(),
            "margin": margins.sum(),
            "chosen_logp": logps[0::2].sum(),
            "rejected_logp": logps[1::2].sum(),
        }
        metrics = {name: value.detach() for name, value in metrics.items()}
        return LossSums(losses.sum(), balance, metrics)
