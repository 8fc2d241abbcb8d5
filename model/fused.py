"""Training on a CPU in fewer and larger pieces than :mod:`model.model`, by the same mathematics.

A norm's weight is folded into the products that follow, products of one input are one product,
attention goes block by block, and of the logits a few rows exist at a time. Each piece has its
backward written by hand and keeps for it only what is slow to make again.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from .fused_attention import AttentionBlock
from .fused_feed_forward import Experts, FeedForwardBlock, FeedForwardLayer
from .fused_pieces import LOGIT_ROWS, product, weight_gradient
from .model import (
    IGNORED,
    Attention,
    FeedForward,
    MaskFor,
    MiniMindForCausalLM,
    MOEFeedForward,
    Rotation,
    TransformerBlock,
)

TINY = 1e-30  # a probability that fp32 still has all digits of
KNOWN_MASKS = WeakIdKeyDictionary()  # masks -> what they hide, while they are in use


def fuse(model: MiniMindForCausalLM) -> None:
    """Let a model on a CPU compute its blocks and its loss as here, wherever that is possible."""
    for layer in model.layers:
        layer.forward = partial(block_forward, layer)
    model.summed_loss = partial(summed_loss, model)


def block_forward(
    layer: TransformerBlock,
    x: Tensor,
    rotation: Rotation,
    mask_for: MaskFor,
    token_mask: Tensor | None,
    fused: bool,
    past_key_values: Any = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As :meth:`TransformerBlock.forward`."""
    dtype = compute_dtype(x)
    is_usable = dtype is not None and past_key_values is None and fused and is_plain_block(layer)
    mask = mask_for(x.shape[1]) if is_usable else None
    if not is_usable or not is_causal(mask):
        return TransformerBlock.forward(
            layer, x, rotation, mask_for, token_mask, fused, past_key_values=past_key_values
        )
    with torch.autocast("cpu", enabled=False):
        x = AttentionBlock.apply(
            x,
            layer.attention_norm.weight,
            *(getattr(layer.attention, name).weight for name in ("wq", "wk", "wv", "wo")),
            torch.complex(*rotation),
            hidden_by(mask),
            layer.attention.config.head_dim,
            layer.attention_norm.eps,
            dtype,
        )
        if isinstance(layer.feed_forward, FeedForward):
            norm = layer.ffn_norm
            weights = swiglu_weights(layer.feed_forward)
            x = FeedForwardBlock.apply(x, norm.weight, *weights, norm.eps, dtype)
            return x, None, None, None
    return experts_forward(layer, x, token_mask, dtype)


def experts_forward(
    layer: TransformerBlock, x: Tensor, token_mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, None, Tensor]:
    """Add a mixture of experts to the residual stream, as :meth:`TransformerBlock.forward`."""
    of_layer, x_normed = layer.feed_forward, layer.ffn_norm(x)
    shares, expert_ids, balance, router_logits = of_layer.gate(x_normed, token_mask)
    with torch.autocast("cpu", enabled=False):
        weights = [weight for expert in of_layer.experts for weight in swiglu_weights(expert)]
        x = x + Experts.apply(x_normed, shares.float(), expert_ids, dtype, *weights)
        if of_layer.shared_experts is not None:
            weights = swiglu_weights(of_layer.shared_experts)
            x = x + FeedForwardLayer.apply(x_normed, *weights, dtype)
    return x, balance, None, router_logits


def swiglu_weights(module: FeedForward) -> list[Tensor]:
    return [module.w1.weight, module.w3.weight, module.w2.weight]


def summed_loss(model: MiniMindForCausalLM, x: Tensor, targets: Tensor) -> Tensor:
    """As :meth:`MiniMindForCausalLM.summed_loss`."""
    dtype = compute_dtype(x)
    if dtype is None or type(model.output) is not nn.Linear:
        return MiniMindForCausalLM.summed_loss(model, x, targets)
    with torch.autocast("cpu", enabled=False):
        return HeadLoss.apply(x, model.output.weight, targets, dtype, torch.is_grad_enabled())


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """Return what products of ``x`` are computed in; None: not in what is known here."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32
    dtype = torch.get_autocast_dtype("cpu")
    return dtype if dtype == torch.bfloat16 else None


def is_causal(mask: Tensor | None) -> bool:
    """Whether a mask is known here: who sees whom, of all heads, and nobody what comes later."""
    if mask is None:
        return True
    return mask.dtype == torch.bool and mask.shape[1] == 1 and hidden_by(mask) is not None


def hidden_by(mask: Tensor | None) -> Tensor | None:
    """Return (B or 1, T, T), true where ``mask`` hides a key; None too where it shows a later one.

    Made once for all layers, who get the same mask.
    """
    if mask is None:
        return None
    if mask not in KNOWN_MASKS:
        shows_later = bool(mask.triu(1).any())
        KNOWN_MASKS[mask] = None if shows_later else ~mask[:, 0]
    return KNOWN_MASKS[mask]


def is_plain_block(layer: TransformerBlock) -> bool:
    return is_plain(layer.attention) and is_plain(layer.feed_forward)


def can_fuse(model: MiniMindForCausalLM) -> bool:
    """Whether the blocks of a model in training will be those of here, on a CPU."""
    return model.config.flash_attn and all(map(is_plain_block, model.layers))


def is_plain(module: nn.Module) -> bool:
    """Whether attention or feed-forward is as :mod:`model.model` has it: without an adapter in it,
    and without dropout at work.
    """
    if isinstance(module, MOEFeedForward):
        return all(is_plain(child) for child in module.modules() if isinstance(child, FeedForward))
    if type(module) not in (Attention, FeedForward):
        return False
    for child in module.children():
        if isinstance(child, nn.Dropout):
            if child.p > 0 and child.training:
                return False
        elif type(child) is not nn.Linear:
            return False
    return True


class HeadLoss(Function):
    """The summed cross-entropy of ``x @ weight.T``, computed together with its gradient.

    Only a few rows' logits exist at a time (Cut Your Losses, arXiv:2411.09009, does so on a GPU).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, is_trained: bool
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        places = (targets.flatten() != IGNORED).nonzero()[:, 0]
        cast = weight.to(dtype)
        total = x.new_zeros(())
        # of an adapter's base the head is frozen
        x_grad, weight_grad = (
            torch.zeros_like(t) if is_trained and needed else None
            for t, needed in zip((flat, weight), ctx.needs_input_grad[:2], strict=True)
        )
        for part in places.split(LOGIT_ROWS):
            rows = flat[part].to(dtype)
            labels = targets.flatten()[part][:, None]
            logits = product(rows, cast)  # (n, V)
            probabilities = logits.softmax(-1, dtype=torch.float32)
            wanted = probabilities.gather(1, labels)
            if (wanted < TINY).any():  # its logarithm would be wrong
                total -= logits.log_softmax(-1, dtype=torch.float32).gather(1, labels).sum()
            else:
                total -= wanted.log().sum()
            if not is_trained:
                continue
            grad = probabilities.scatter_(1, labels, wanted - 1).to(dtype)
            if x_grad is not None:
                x_grad[part] = product(grad, cast.T).to(x_grad.dtype)
            if weight_grad is not None:
                weight_grad += weight_gradient(grad, rows)
        ctx.save_for_backward(x_grad, weight_grad)
        ctx.shape = x.shape
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weight_grad = ctx.saved_tensors
        return (
            None if x_grad is None else (x_grad * grad).view(ctx.shape),
            None if weight_grad is None else weight_grad * grad,
            None,
            None,
            None,
        )
