"""An attention block with its backward written by hand.

Attention goes by blocks of queries, and backward computes the weights again: FlashAttention
(arXiv:2205.14135, section 3.1), but in blocks as large as a core's cache, and with the library's
products: torch's own kernel for CPUs takes two to three times as long (benchmarks/LOG.md).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .fused_pieces import joined, joined_backward, normed, normed_backward, product, weight_gradient

QUERIES = 128  # of a block of attention
SCORES = 1 << 20  # computed at once, 2 or 4 MB: what stays in a core's second-level cache


def turned(x: Tensor, angles: Tensor, out: Tensor) -> None:
    """Write neighbouring pairs of ``x`` (B, T, H, Dh) turned by complex ``angles`` (B or 1, T, 1,
    Dh / 2) to ``out``, of the same shape.
    """
    pairs = x.float().unflatten(-1, (-1, 2)).contiguous()
    out.copy_(torch.view_as_real(torch.view_as_complex(pairs) * angles).flatten(-2))


def blocks(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yield the blocks that attention goes through: which rows of the batch (n of them), which
    queries (``size``); these queries (n * K, G * size, Dh), the keys and values (n * K, keys, Dh)
    up to them, and what is added to the scores of the last keys (n or 1, size, that many).

    Args:
        q: (B, K, G, T, Dh).
        k, v: (B, K, T, Dh).
        hidden: (B or 1, T, T), true where a query does not see a key; None: causal.
    """
    B, K, G, T, head_dim = q.shape
    usual = min(QUERIES, T)
    n_rows = max(1, SCORES // (K * G * usual * T))
    future = torch.ones(1, usual, usual, dtype=torch.bool).triu_(1)
    causal = as_bias(future, q.dtype)
    for row in range(0, B, n_rows):
        rows = slice(row, min(row + n_rows, B))
        for start in range(0, T, usual):
            end = min(start + usual, T)
            size = end - start
            if hidden is None:
                added = causal[:, :size, :size]
            else:
                of_rows = hidden[rows] if len(hidden) > 1 else hidden
                added = as_bias(of_rows[:, start:end, :end], q.dtype)
            q_part = q[rows, :, :, start:end].reshape(-1, G * size, head_dim)
            k_part, v_part = (x[rows].flatten(0, 1)[:, :end] for x in (k, v))
            yield rows, slice(start, end), q_part, k_part, v_part, added


def as_bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what hides the scores where ``hidden`` is true; not -inf: a row without any key would
    be NaN.
    """
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)


def attention_weights(q: Tensor, k: Tensor, added: Tensor, n_heads: int) -> Tensor:
    """Return what part each key has in each query's answer (n * K, G * size, keys).

    Args:
        q, k, added: scaled queries, keys and what is added, of one of the :func:`blocks`.
        n_heads: K * G.
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    view = scores.view(-1, n_heads, added.shape[1], k.shape[1])
    view[..., -added.shape[-1] :] += added[:, None]
    return scores.softmax(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """Return causal attention's result (B, T, D) for scaled ``q`` (B, K, G, T, Dh) and ``k``, ``v``
    (B, K, T, Dh).
    """
    B, K, G, T, head_dim = q.shape
    out = q.new_empty(B, T, K, G, head_dim)
    for rows, queries, q_part, k_part, v_part, added in blocks(q, k, v, hidden):
        weights = attention_weights(q_part, k_part, added, K * G)
        found = torch.bmm(weights, v_part).view(-1, K, G, added.shape[1], head_dim)
        out[rows, queries] = found.permute(0, 3, 1, 2, 4)
    return out.flatten(2)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`attend` for (B, T, D) ``grad``, those of k and v in fp32."""
    B, K, G, T, head_dim = q.shape
    grad = grad.view(B, T, K, G, head_dim).permute(0, 2, 3, 1, 4)
    q_grad = torch.empty_like(q)
    k_grad = torch.zeros(k.shape)
    v_grad = torch.zeros(v.shape)
    for rows, queries, q_part, k_part, v_part, added in blocks(q, k, v, hidden):
        part = grad[rows, :, :, queries].reshape(q_part.shape)
        weights = attention_weights(q_part, k_part, added, K * G)
        v_grad[rows].flatten(0, 1)[:, : queries.stop] += torch.bmm(weights.transpose(1, 2), part)
        weights_grad = torch.bmm(part, v_part.transpose(1, 2))
        scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
        k_grad[rows].flatten(0, 1)[:, : queries.stop] += torch.bmm(
            scores_grad.transpose(1, 2), q_part
        )
        q_part_grad = torch.bmm(scores_grad, k_part)
        q_grad[rows, :, :, queries] = q_part_grad.view(-1, K, G, added.shape[1], head_dim)
    return q_grad, k_grad, v_grad


class AttentionBlock(Function):
    """``x + attention(norm(x))``, see :class:`model.model.Attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        wo: Tensor,
        angles: Tensor,
        hidden: Tensor | None,
        head_dim: int,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        B, T, D = x.shape
        H, K = wq.shape[0] // head_dim, wk.shape[0] // head_dim
        x_normed, scale = normed(x.reshape(-1, D), eps, dtype)
        qkv = product(x_normed, joined([wq, wk, wv], norm_weight, dtype))
        heads = qkv.view(B, T, H + 2 * K, head_dim)
        q = qkv.new_empty(B, K, H // K, T, head_dim)
        k, v = qkv.new_empty(B, K, T, head_dim), qkv.new_empty(B, K, T, head_dim)
        turned(heads[:, :, :H], angles * head_dim**-0.5, q.flatten(1, 2).transpose(1, 2))
        turned(heads[:, :, H : H + K], angles, k.transpose(1, 2))
        v.transpose(1, 2).copy_(heads[:, :, H + K :])
        attended = attend(q, k, v, hidden).view(-1, wo.shape[1])
        ctx.save_for_backward(
            x_normed, scale, q, k, v, attended, norm_weight, wq, wk, wv, wo, angles, hidden
        )
        return product(attended, wo.to(dtype)).view(B, T, D) + x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_normed, scale, q, k, v, attended, norm_weight, *weights, wo, angles, hidden = (
            ctx.saved_tensors
        )
        B, K, G, T, head_dim = q.shape
        H, dtype = K * G, x_normed.dtype
        grad = grad.contiguous()
        part = grad.view(-1, grad.shape[-1]).to(dtype)
        wo_grad = weight_gradient(part, attended).to(wo.dtype)
        attended_grad = product(part, wo.to(dtype).T).view(B, T, -1)
        q_grad, k_grad, v_grad = attend_backward(attended_grad, q, k, v, hidden)
        qkv_grad = part.new_empty(B, T, H + 2 * K, head_dim)
        back = angles.conj().resolve_conj()
        turned(q_grad.flatten(1, 2).transpose(1, 2), back * head_dim**-0.5, qkv_grad[:, :, :H])
        turned(k_grad.transpose(1, 2), back, qkv_grad[:, :, H : H + K])
        qkv_grad[:, :, H + K :] = v_grad.transpose(1, 2)
        qkv_grad = qkv_grad.flatten(0, 1).flatten(1)  # (N, (H + 2 K) Dh)
        x_normed_grad = product(qkv_grad, joined(weights, norm_weight, dtype).T).float()
        joined_grad = weight_gradient(qkv_grad, x_normed)
        weight_grads, norm_grad = joined_backward(joined_grad, weights, norm_weight)
        x_grad = normed_backward(x_normed_grad, x_normed, scale).view_as(grad).add_(grad)
        return x_grad, norm_grad, *weight_grads, wo_grad, None, None, None, None, None
