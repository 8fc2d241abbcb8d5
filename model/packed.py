"""Linear layers for inference on CPUs: weights laid out as the kernels read them, in fp32, bf16 or
int8, and layers that share their input as one.

The usual layer hands rows of weights to a general matrix product, which on few tokens is far from
what memory and vector units allow, and on processors that the product's library does not know well,
on many tokens too (benchmarks/LOG.md has the figures). Whatever the weights are in, the rest of the
model and its cache stay in fp32: they are small, and on a CPU no slower.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .model import FeedForward, RMSNorm, TransformerBlock

FEW_TOKENS = 8  # how many at a time the layout is made for; it serves other numbers nearly as well
Product = Callable[[Tensor], Tensor]


class PackedLinear(nn.Module):
    """``nn.Linear`` layers without bias, one under another, for inference: fp32 in and out; the
    weights cannot be trained or saved.

    Args:
        gain: (D,), multiplies what comes in: a norm's weight.
        dtype: of the weights: ``torch.float32``, ``bfloat16`` or ``int8``.
    """

    def __init__(
        self, *linears: nn.Linear, gain: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self.widths = [linear.out_features for linear in linears]
        self.out_features = sum(self.widths)
        weight = torch.cat([linear.weight.detach().float() for linear in linears])
        # no parameter and no buffer: nothing but this layer can read it
        self.product = PRODUCTS[dtype](weight if gain is None else weight * gain.detach())

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "this model's weights are packed to answer and cannot be read or saved: load it with "
            "packed=False"
        )

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # an expert without tokens
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self.product(x.float())


def float_product(weight: Tensor) -> Product:
    """Return ``x -> x @ weight.T`` for a weight (N, D) in fp32."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, FEW_TOKENS)
    linear = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x, packed, None, "none", [], "")


def bfloat16_product(weight: Tensor) -> Product:
    """Return the same with weight and input in bf16, the sums in fp32."""
    product = float_product(weight.bfloat16())
    return lambda x: product(x.bfloat16()).float()


def int8_product(weight: Tensor) -> Product:
    """Return the same with a weight of 8 bits, symmetric in each row, and an input of 8 bits (7
    where the processor's sums would overflow), with a scale for each token.
    """
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float).tiny) / 127
    packed = int8_packed(weight, scale)
    linear = torch.ops.quantized.linear_dynamic.default
    is_narrow = sums_overflow()

    def product(x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            return linear(x, packed, is_narrow)
        # the kernel has one scale for all rows, so they get the same range before it
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30)
        return linear(x / largest, packed, is_narrow).mul_(largest)

    return product


def int8_packed(weight: Tensor, scale: Tensor) -> Any:
    """Return a weight (N, D) as ``quantized.linear_dynamic`` takes it: integers, each row's times
    its ``scale`` (N,).
    """
    with warnings.catch_warnings():  # these constructors are to go: `can_pack` will say when
        warnings.filterwarnings("ignore", "torch.quantize_per", UserWarning)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        quantized = torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(quantized, None)


@cache
def sums_overflow() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits: without VNNI, x86 does."""
    packed = int8_packed(torch.ones(16, 64), torch.full((16,), 1 / 127))
    return bool((torch.ops.quantized.linear_dynamic(torch.ones(1, 64), packed) < 63).any())


PRODUCTS: dict[torch.dtype, Callable[[Tensor], Product]] = {
    torch.float32: float_product,
    torch.bfloat16: bfloat16_product,
    torch.int8: int8_product,
}


class Part(nn.Module):
    """One of the layers that are packed together, in the place of the one it was.

    The first that is asked computes all, and the others find theirs if they are asked for the same
    input; so the model's code stays as it is. Several threads may ask.
    """

    def __init__(self, joined: PackedLinear, index: int, held: list[Any]) -> None:
        super().__init__()
        self.joined, self.index, self.held = joined, index, held

    def forward(self, x: Tensor) -> Tensor:
        of, parts = self.held[0]
        if of is not x:
            parts = self.joined(x).split(self.joined.widths, dim=-1)
        is_last = self.index == len(parts) - 1
        self.held[0] = (None, ()) if is_last else (x, parts)
        return parts[self.index]


class UnitNorm(nn.Module):
    """RMSNorm whose weight went into the layers behind it: makes the length 1, but for epsilon."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.least = torch.tensor((norm.eps * len(norm.weight)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        # three operations where the formula takes six: sqrt(D * (mean(x^2) + eps))
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(self.least)


def gain_of(norm: RMSNorm) -> Tensor:
    """Return (D,), what is left to multiply by when the length is 1."""
    return norm.weight.detach().float() * len(norm.weight) ** 0.5


def pack(model: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Make a model ready to answer and for nothing else: its linear layers are replaced, and with
    weights in ``dtype`` (None: the model's) all else is in fp32; return whether it was done.

    Nothing happens on other devices than CPUs, in precisions without such kernels, and where this
    build of torch has none. The model keeps the weights that other layers share, such as an
    embedding.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    dtype = dtype or weights[0].dtype
    if any(p.device.type != "cpu" for p in weights) or not can_pack(dtype):
        return False
    model.float()
    for block in model.modules():
        if isinstance(block, TransformerBlock):
            block.attention_norm = pack_behind(
                block.attention_norm, block.attention, ("wq", "wk", "wv"), dtype
            )
            if type(block.feed_forward) is FeedForward:  # a router needs the norm as it is
                block.ffn_norm = pack_behind(
                    block.ffn_norm, block.feed_forward, ("w1", "w3"), dtype
                )
    for module in list(model.modules()):
        if type(module) is FeedForward and type(module.w1) is nn.Linear:  # an expert
            join(module, ("w1", "w3"), dtype)
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.bias is None:
                setattr(module, name, PackedLinear(child, dtype=dtype))
    return True


def pack_behind(
    norm: RMSNorm, module: nn.Module, names: tuple[str, ...], dtype: torch.dtype
) -> UnitNorm:
    """Join the layers that read a norm, its weight within; return what is left of the norm."""
    join(module, names, dtype, gain_of(norm))
    return UnitNorm(norm)


def join(
    module: nn.Module, names: tuple[str, ...], dtype: torch.dtype, gain: Tensor | None = None
) -> None:
    """Pack the layers of that name as one and put its parts in their places."""
    joined = PackedLinear(*(getattr(module, name) for name in names), gain=gain, dtype=dtype)
    held: list[Any] = [(None, ())]
    for index, name in enumerate(names):
        setattr(module, name, Part(joined, index, held))


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine's torch has the kernels, and they are right."""
    if dtype not in PRODUCTS or not torch.backends.mkldnn.is_available():
        return False
    linear = nn.Linear(64, 32, bias=False)
    x = torch.linspace(-1, 1, 5 * 64).view(5, 64)
    try:
        with torch.inference_mode():
            found, expected = PackedLinear(linear, dtype=dtype)(x), linear(x)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.int8: 0.03}[dtype]
    return torch.allclose(found, expected, atol=tolerance)
