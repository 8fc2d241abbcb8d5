"""What a run is about to cost: parameters, arithmetic, memory, the device's speed."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .fused_pieces import LOGIT_ROWS, product
from .LMConfig import LMConfig
from .model import MiniMindForCausalLM

# Dense bf16/fp16 tensor-core peaks with fp32 accumulation, from the vendors' data sheets, FLOP/s
GPU_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "T4": 65e12,
    "V100": 125e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
GAPS = 1.3  # what the allocator holds beside large tensors of many sizes, measured


@dataclass
class Cost:
    """Sizes of a model.

    Attributes:
        n_params: all parameters, the tied head once.
        n_active: those a token is multiplied with.
        flops_per_token: of one training step, PaLM's count (arXiv:2204.02311, appendix B).
    """

    n_params: int
    n_active: int
    flops_per_token: float


def model_cost(model: MiniMindForCausalLM, seq_len: int) -> Cost:
    """Count parameters and the arithmetic of one token in a row of ``seq_len``."""
    config: LMConfig = model.config
    n_params = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = routed * (1 - config.num_experts_per_tok / config.n_routed_experts) if routed else 0
    n_active = round(n_params - idle)
    return Cost(n_params, n_active, 6 * n_active + 12 * config.n_layers * config.dim * seq_len)


def training_memory(
    model: MiniMindForCausalLM,
    tokens_per_batch: int,
    dtype: torch.dtype,
    n_ranks: int = 1,
    *,
    zero_stage: int = 0,
    offload: bool = False,
    reference: nn.Module | None = None,
    fused: bool = False,
    whole_logits: bool = False,
) -> int:
    """Estimate the bytes that training takes at its peak on each rank, beside the process itself.

    The constants were counted in the code of :mod:`model.model` and of DeepSpeed 0.19.8 and fit the
    measured peaks (``benchmarks/memory.py``).

    Args:
        n_ranks: with more than one the gradients have buckets of their own.
        zero_stage: of DeepSpeed; 0 is without it.
        offload: the optimizer is elsewhere, at stage 3 the weights too.
        reference: a second model that is held beside it.
        fused: the blocks are those of :mod:`model.fused`.
        whole_logits: the loss is computed from the logits of all tokens.
    """
    if fused:
        kept = kept_by_fused_blocks(model, tokens_per_batch, dtype)
        if whole_logits:
            kept += tokens_per_batch * model.config.vocab_size * (dtype.itemsize + 8)
    else:
        kept = kept_for_backward(model, tokens_per_batch, dtype)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = parameter_bytes(model) + parameter_bytes(reference) - trained
    if zero_stage == 0:
        # a gradient comes where what was kept for it goes, but not where buckets are made for all
        gradients = max(kept, trained) if n_ranks == 1 else kept + trained
        return frozen + 3 * trained + gradients  # weights, Adam's two moments
    # the own part of what the optimizer updates, fp32 weights and two moments, and of the gradients
    part = trained // n_ranks
    states = part + (0 if offload else 3 * part)
    if zero_stage < 3:
        # in the backward pass all gradients in a bucket, and the copy of it that is summed; in a
        # save weights and moments of all ranks
        return frozen + trained + states + max(kept + 2 * trained, 3 * trained)
    # the own part of the weights, and what they took before they were divided: the allocator keeps
    # it
    weights = trained + (0 if offload else part)
    # in the backward pass the weights gathered anew, the gradients in a bucket, in the ranks'
    # order, and summed; in a save weights, moments, a model with them, its weights being gathered
    return frozen + weights + states + max(kept + 4 * trained, 5 * trained)


def kept_for_backward(model: MiniMindForCausalLM, tokens_per_batch: int, dtype: torch.dtype) -> int:
    """Return the bytes that a micro-batch keeps for its backward pass.

    In fp32 13 rows of ``dim`` and 4 of the feed-forward's width a token and layer; under autocast
    the residual stream stays fp32 beside bf16 copies. Attention keeps nothing quadratic under the
    fused kernels.
    """
    config = model.config
    width, rows = config.hidden_dim, 13.0
    if config.use_moe:
        width *= config.num_experts_per_tok + config.n_shared_experts
        rows += 6 * config.num_experts_per_tok  # tokens sorted by expert, and back
    is_half = dtype.itemsize == 2
    per_layer = (58 / 13 if is_half else 4) * rows * config.dim + 4 * dtype.itemsize * width
    logits = config.vocab_size * (dtype.itemsize + 8)  # as computed, in fp32, their gradient
    return round(tokens_per_batch * (config.n_layers * per_layer + logits))


def kept_by_fused_blocks(
    model: MiniMindForCausalLM, tokens_per_batch: int, dtype: torch.dtype
) -> int:
    """Return the bytes that a micro-batch keeps for the backward pass of :mod:`model.fused`.

    Of a block two normed inputs, q, k, v, what attention gave, and w1's and w3's results; the
    gradients of what is being gone back through, of the head's weight, of some rows' logits.
    """
    config = model.config
    width = config.hidden_dim
    rows = 4.0 * config.dim + 2 * config.n_kv_heads * config.head_dim
    if config.use_moe:
        width *= config.num_experts_per_tok + config.n_shared_experts
        rows += (config.num_experts_per_tok + 4) * config.dim
    per_layer = dtype.itemsize * (rows + 2 * width)
    passing = 4 * 4 * config.dim + 3 * dtype.itemsize * width
    head = config.vocab_size * (4 * config.dim + min(tokens_per_batch, LOGIT_ROWS) * 10)
    return round(GAPS * tokens_per_batch * (config.n_layers * per_layer + passing) + head)


def parameter_bytes(model: nn.Module | None) -> int:
    """Return the size of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) if model else 0


def process_memory(*models: nn.Module | None) -> int:
    """Return the bytes that this process has beside the models: Python, torch, data; 0 where the
    system does not tell.
    """
    path = Path("/proc/self/statm")
    if not path.is_file():
        return 0
    resident = int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return max(0, resident - sum(map(parameter_bytes, models)))


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """Return the device's matrix-product peak in FLOP/s, and where the figure is from.

    A GPU's is in a table; a CPU's is measured here on a product of 1024 x 1024 matrices in
    ``dtype``.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, peak in GPU_PEAKS.items():
            if key in name:
                return peak, f"data sheet of {name}"
        return None, f"{name} is not in the table"
    if device.type != "cpu":
        return None, f"not known for {device.type}"
    n = 1024
    a = torch.randn(n, n).to(dtype)
    times: list[float] = []
    while len(times) < 2 or (len(times) < 10 and sum(times) < 0.2):
        start = time.perf_counter()
        product(a, a)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times), f"measured, {n} x {n} in {str(dtype).removeprefix('torch.')}"
