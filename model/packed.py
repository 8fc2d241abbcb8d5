"""Linear layers for inference on CPUs, their weights laid out as oneDNN's kernels read them.

The usual layer hands rows of weights to a general matrix product, which on few tokens is far from
what memory and vector units allow, and on processors that the product's library does not know well,
on many tokens too (benchmarks/LOG.md has the figures). What changes is the order of additions.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

FEW_TOKENS = 8  # how many at a time the layout is made for; it serves other numbers nearly as well


class PackedLinear(nn.Module):
    """``nn.Linear`` without bias, for inference: its weight cannot be trained or saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        # no parameter and no buffer: nothing but this layer can read it
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, FEW_TOKENS)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "this model's weights are packed to answer and cannot be read or saved: load it with "
            "packed=False"
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")


def pack(model: nn.Module) -> bool:
    """Replace the linear layers of a model that only answers from now on; return whether.

    Nothing happens on other devices than CPUs, in precisions without such kernels, and where this
    build of torch has none. The model keeps the weights that other layers share, such as an
    embedding.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    if not all(p.device.type == "cpu" and can_pack(p.dtype) for p in weights):
        return False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.bias is None:
                setattr(module, name, PackedLinear(child))
    return True


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine's torch has the kernels, and they are right."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    linear = nn.Linear(64, 32, bias=False, dtype=dtype)
    x = torch.linspace(-1, 1, 5 * 64).view(5, 64).to(dtype)
    try:
        with torch.inference_mode():
            found, expected = PackedLinear(linear)(x), linear(x)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(
        found.float(), expected.float(), atol=1e-5 if dtype.itemsize == 4 else 0.1
    )
