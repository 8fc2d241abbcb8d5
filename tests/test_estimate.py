"""What a run is about to cost, counted by hand."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.estimate import model_cost, peak_flops, training_memory
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM

ROOT = Path(__file__).parents[1]
Build = Callable[..., MiniMindForCausalLM]


def test_a_dense_models_cost(build: Build) -> None:
    model = build()
    D, L, V, F = 64, 2, 100, model.config.hidden_dim
    attention = 2 * D * D + 2 * D * D // 2  # wq, wo; wk, wv of half the heads
    n_params = V * D + L * (attention + 3 * D * F + 2 * D) + D
    cost = model_cost(model, seq_len=32)
    assert cost.n_params == cost.n_active == n_params
    # 6 a parameter; attention's two products of L * T * D, forward and twice back: 12 L T D
    assert cost.flops_per_token == 6 * n_params + 12 * L * 32 * D


def test_of_a_mixture_only_the_chosen_experts_compute(build: Build) -> None:
    model = build(use_moe=True, n_routed_experts=4, num_experts_per_tok=1, n_shared_experts=2)
    cost = model_cost(model, seq_len=32)
    expert = 3 * 64 * model.config.hidden_dim
    assert cost.n_params - cost.n_active == 2 * 3 * expert  # two layers, three idle experts each


def test_v1s_small_model_has_the_documented_size() -> None:
    with torch.device("meta"):
        model = MiniMindForCausalLM(LMConfig())
    assert model_cost(model, 512).n_params == 26_878_464


def test_memory_is_weights_moments_and_what_backward_keeps(build: Build) -> None:
    model = build()
    n = sum(p.numel() for p in model.parameters())

    def memory(tokens: int, **more: int) -> int:
        return training_memory(model, tokens, torch.float32, **more)

    empty = memory(0)
    assert empty == 16 * n  # weights, two moments, gradients: 4 bytes each
    one, two, three = (memory(tokens) for tokens in (1000, 2000, 3000))
    assert three - two == two - one > 1000 * 100 * 4  # at least the logits
    assert one - 12 * n == two - one, "the gradients come where it goes"
    assert memory(1000, n_ranks=2) - one == 4 * n, "but ranks exchange them in buckets"
    model.tok_embeddings.weight.requires_grad_(False)
    assert empty - memory(0) == 12 * 6400


def test_zero_divides_over_the_ranks_what_its_stage_says(build: Build) -> None:
    model = build()
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def memory(stage: int, n_ranks: int, **more: object) -> int:
        given = dict(zero_stage=stage, **more)
        return training_memory(model, 10_000, torch.float32, n_ranks, **given)

    for stage, n_divided in ((1, 4), (2, 4), (3, 5)):  # optimizer, gradients; stage 3: weights
        saved = memory(stage, 1) - memory(stage, 4)
        assert saved == pytest.approx(n_divided * size * 3 / 4, rel=1e-6)
        assert memory(stage, 4) > memory(stage, 4, offload=True)
    for stage in range(4):
        assert memory(stage, 2, reference=build()) - memory(stage, 2) == size


@pytest.mark.parametrize(
    "case",
    (
        pytest.param("26 M, DDP, 4 x 512, fp32", marks=pytest.mark.slow),
        pytest.param("26 M, ZeRO 2, 4 x 512, fp32", marks=pytest.mark.soak),
        pytest.param("26 M, ZeRO 3, 4 x 512, fp32", marks=pytest.mark.soak),
        pytest.param("26 M, DPO, live, 2 x 512, fp32", marks=pytest.mark.soak),
        pytest.param("26 M, adapter, 4 x 512, bf16", marks=pytest.mark.soak),
    ),
)
def test_the_estimate_is_near_the_measured_peak_of_a_rank(case: str, tmp_path: Path) -> None:
    """In processes of their own, without what each takes before it trains."""
    command = [sys.executable, ROOT / "benchmarks/memory.py", "--only", case]
    command += ["--json", tmp_path / "found.json"]
    subprocess.run(command, check=True, timeout=300)
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))[case]
    estimate, peak = (found[f"{key}_mb"] - found["beside_mb"] for key in ("estimate", "peak"))
    assert 0.75 < estimate / peak < 1.25, found


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_cpus_peak_is_measured(dtype: torch.dtype) -> None:
    peak, source = peak_flops(torch.device("cpu"), dtype)
    assert 1e8 < peak < 1e15 and str(dtype).removeprefix("torch.") in source
    assert peak_flops(torch.device("mps"), dtype) == (None, "not known for mps")
