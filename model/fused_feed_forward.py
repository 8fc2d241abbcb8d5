"""Feed-forward blocks, dense and mixture of experts, with their backward written by hand."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .fused_pieces import joined, joined_backward, normed, normed_backward, product, weight_gradient

ROWS = 256  # gated at once, so that what lies between stays in a core's cache


def gated(hidden: Tensor, out: Tensor) -> Tensor:
    """Write ``silu(a) * b`` to ``out`` (N, M) for ``hidden`` (N, 2 M), a beside b; return it."""
    for part, into in zip(hidden.split(ROWS), out.split(ROWS), strict=True):
        a, b = part.chunk(2, dim=1)
        torch.mul(F.silu(a), b, out=into)
    return out


def gated_backward(grad: Tensor, hidden: Tensor) -> Tensor:
    """Return the gradient for ``hidden``; ``grad`` (N, M) becomes what :func:`gated` gives."""
    hidden_grad = torch.empty_like(hidden)
    for part, of_hidden, into in zip(
        grad.split(ROWS), hidden.split(ROWS), hidden_grad.split(ROWS), strict=True
    ):
        a, b = of_hidden.chunk(2, dim=1)
        a_grad, b_grad = into.chunk(2, dim=1)
        activated = F.silu(a)
        torch.mul(part, activated, out=b_grad)
        a_grad.copy_(torch.ops.aten.silu_backward(part.mul_(b), a))
        torch.mul(activated, b, out=part)
    return hidden_grad


def swiglu(
    x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, norm_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the feed-forward network's result (N, D) for ``x`` (N, D), and what backward needs."""
    hidden = product(x, joined([w1, w3], norm_weight, x.dtype))
    out = gated(hidden, hidden.new_empty(len(x), w2.shape[1]))
    return product(out, w2.to(x.dtype)), hidden


def swiglu_backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    norm_weight: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Return the gradients for ``x``, for w1, w3 and w2, and for a norm's weight."""
    out = product(grad, w2.to(x.dtype).T)  # the gradient of what was gated, then what was gated
    hidden_grad = gated_backward(out, hidden)
    w2_grad = weight_gradient(grad, out).to(w2.dtype)
    x_grad = product(hidden_grad, joined([w1, w3], norm_weight, x.dtype).T)
    joined_grad = weight_gradient(hidden_grad, x)
    weight_grads, norm_grad = joined_backward(joined_grad, [w1, w3], norm_weight)
    return x_grad, [*weight_grads, w2_grad], norm_grad


class FeedForwardBlock(Function):
    """``x + feed_forward(norm(x))``, see :class:`model.model.FeedForward`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        x_normed, scale = normed(x.reshape(-1, x.shape[-1]), eps, dtype)
        out, hidden = swiglu(x_normed, w1, w3, w2, norm_weight)
        ctx.save_for_backward(x_normed, scale, hidden, w1, w3, w2, norm_weight)
        return out.view_as(x) + x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_normed, scale, hidden, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        flat = grad.view(-1, grad.shape[-1]).to(x_normed.dtype)
        x_normed_grad, weight_grads, norm_grad = swiglu_backward(flat, x_normed, hidden, *weights)
        x_grad = normed_backward(x_normed_grad.float(), x_normed, scale)
        return x_grad.view_as(grad).add_(grad), norm_grad, *weight_grads, None, None


class FeedForwardLayer(Function):
    """:class:`model.model.FeedForward` alone, for what is beside the routed experts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, dtype: torch.dtype
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        out, hidden = swiglu(flat, w1, w3, w2)
        ctx.save_for_backward(flat, hidden, w1, w3, w2)
        return out.view_as(x).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        x_grad, weight_grads, _ = swiglu_backward(flat, x, *others)
        return x_grad.view_as(grad).to(grad.dtype), *weight_grads, None


class Experts(Function):
    """The routed experts' part of :class:`model.model.MOEFeedForward`.

    A token has k places, one with each of its experts; in the order of experts each one's places
    lie together. Going there and back are two gathers, in backward too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shares: Tensor,
        expert_ids: Tensor,
        dtype: torch.dtype,
        *weights: Tensor,
    ) -> Tensor:
        """Mix ``x`` (B, T, D) passed through the experts ``expert_ids`` (B, T, k) by ``shares``;
        ``weights`` are w1, w3 and w2 of one expert after another.
        """
        k, n_experts = expert_ids.shape[-1], len(weights) // 3
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        order = expert_ids.flatten().argsort(stable=True)  # (N * k,)
        counts = expert_ids.flatten().bincount(minlength=n_experts).tolist()
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        outs, hidden = [], []
        for i, rows in enumerate(flat[order // k].split(counts)):
            of_expert = swiglu(rows, *weights[3 * i : 3 * i + 3])
            outs.append(of_expert[0])
            hidden.append(of_expert[1])
        out = torch.cat(outs)[back].view(-1, k, x.shape[-1])
        ctx.counts = counts
        ctx.save_for_backward(flat, shares, order, back, out, *hidden, *weights)
        y = x.new_zeros(flat.shape)
        for j, share in enumerate(shares.flatten(0, 1).unbind(1)):
            y.addcmul_(out[:, j], share[:, None])
        return y.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shares, order, back, out, *others = ctx.saved_tensors
        hidden, weights = others[: len(ctx.counts)], others[len(ctx.counts) :]
        k = shares.shape[-1]
        flat = grad.reshape(-1, grad.shape[-1])
        places = [torch.linalg.vecdot(flat, part.to(flat.dtype)) for part in out.unbind(1)]
        shares_grad = torch.stack(places, 1).view_as(shares)
        sorted_shares = shares.flatten()[order][:, None].to(x.dtype)
        out_grads = (flat.to(x.dtype)[order // k] * sorted_shares).split(ctx.counts)
        rows = x[order // k].split(ctx.counts)
        x_grads, weight_grads = [], []
        for i, (out_grad, part) in enumerate(zip(out_grads, rows, strict=True)):
            of_expert = swiglu_backward(out_grad, part, hidden[i], *weights[3 * i : 3 * i + 3])
            x_grads.append(of_expert[0])
            weight_grads += of_expert[1]
        x_grad = torch.cat(x_grads)[back].view(-1, k, x.shape[-1]).sum(1, dtype=grad.dtype)
        return x_grad.view_as(grad), shares_grad, None, None, *weight_grads
