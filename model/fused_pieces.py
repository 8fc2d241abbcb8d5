"""What fused blocks are made of: products, norms, weights joined and cast.

``x`` is (N, D), the B * T positions of a batch one after another; weights and the residual stream
are fp32, ``dtype`` is what matrices are multiplied in.
"""

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LOGIT_ROWS = 512  # whose logits exist at once; the memory estimate counts them too


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T``, (N, K) and (M, K) -> (N, M)."""
    if x.numel() == 0:  # an expert without tokens
        return x.new_zeros(len(x), len(weight))
    if x.dtype == torch.float32 and prefers_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return ``grad.T @ x``, (N, M) and (N, D) -> (M, D)."""
    if grad.dtype == torch.float32 and prefers_onednn() and grad.shape[1] > x.shape[1]:
        # the larger operand goes where it is laid out anew: up to half as fast again
        return product(x.T, grad.T).T.contiguous()
    return product(grad.T, x.T)


@cache
def prefers_onednn() -> bool:
    """Whether fp32 products go to oneDNN: torch takes MKL for them, which on processors with
    AVX-512 that Intel did not make leaves half of each vector idle (benchmarks/LOG.md).

    By what the processor is and not by the clock, so that a run gives the same bits each time.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.read_text("utf-8") if cpuinfo.is_file() else platform.processor()
    has_kernel = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    return has_kernel and "GenuineIntel" not in known


def normed(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``x`` (N, D) with a root mean square of 1, in ``dtype``, and the factors (N, 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = (norm.square_().div_(x.shape[-1]).add_(eps)).rsqrt_()
    return torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype)), scale


def normed_backward(grad: Tensor, x_normed: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient for what was normed; ``grad`` fp32, (N, D), is used up."""
    along = torch.linalg.vecdot(grad, x_normed.to(grad.dtype))[:, None].div_(grad.shape[-1])
    return grad.addcmul_(x_normed, along, value=-1).mul_(scale)


def joined(weights: list[Tensor], norm_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return weights (M_i, D) one below the other, a norm's weight (D,) folded in if given."""
    out = torch.empty(sum(map(len, weights)), weights[0].shape[1], dtype=dtype)
    parts = out.split([len(weight) for weight in weights])
    for part, weight in zip(parts, weights, strict=True):
        if norm_weight is None:
            part.copy_(weight)
        else:
            torch.mul(weight, norm_weight, out=part)
    return out


def joined_backward(
    grad: Tensor, weights: list[Tensor], norm_weight: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """Return the gradients for what :func:`joined` got."""
    parts = list(grad.to(weights[0].dtype).split([len(weight) for weight in weights]))
    if norm_weight is None:
        return parts, None
    norm_grad = torch.zeros_like(norm_weight)
    for part, weight in zip(parts, weights, strict=True):
        norm_grad += torch.linalg.vecdot(part, weight, dim=0)
        part *= norm_weight
    return parts, norm_grad
