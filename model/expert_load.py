"""How evenly a mixture's routers use their experts while it trains."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .model import MoEGate


class ExpertLoad:
    """Counts the tokens that each layer's router sends to each of its experts, in training.

    Attributes:
        counts: tokens since they were last taken (layers, experts); without layers for a dense
            model.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        gates = [module for module in model.modules() if isinstance(module, MoEGate)]
        n_experts = gates[0].config.n_routed_experts if gates else 0
        self.counts = torch.zeros(len(gates), n_experts, dtype=torch.float64, device=device)
        for layer, gate in enumerate(gates):
            gate.register_forward_hook(partial(self._count, layer))

    @torch.compiler.disable  # the experts' sizes break the graph there anyway
    def _count(self, layer: int, gate: MoEGate, inputs: tuple[Any, ...], output: Any) -> None:
        if not gate.training:
            return
        token_mask, expert_ids = inputs[1], output[1]  # (B, T), (B, T, k)
        if token_mask is None:
            token_mask = torch.ones(expert_ids.shape[:2], device=expert_ids.device)
        weights = token_mask[..., None].expand_as(expert_ids).flatten().double()
        n_experts = self.counts.shape[1]
        self.counts[layer] += expert_ids.flatten().bincount(weights, minlength=n_experts)

    def take(self) -> list[float]:
        """Return the counts, row after row, and begin anew."""
        taken = self.counts.flatten().tolist() if self.counts.numel() else []
        self.counts.zero_()
        return taken


def spread(counts: list[float], n_layers: int) -> dict[str, float]:
    """Return the least and the greatest load of an expert in any layer, where 1 is an even share.

    Args:
        counts: as :meth:`ExpertLoad.take` gives them, or sums of those.
    """
    if not counts:
        return {}
    per_layer = Tensor(counts).view(n_layers, -1)
    shares = per_layer / per_layer.mean(dim=1, keepdim=True).clamp(min=1)
    return {
        "expert_load_min": round(float(shares.min()), 4),
        "expert_load_max": round(float(shares.max()), 4),
    }
