"""Schedules against PyTorch's, parameter groups, the optimizers' first step by hand."""

from collections.abc import Callable

import pytest
import torch

from model.model import MiniMindForCausalLM
from model.optim import learning_rate_at, make_optimizer, parameter_groups

Build = Callable[..., MiniMindForCausalLM]


@pytest.mark.parametrize("peak", (1e-4, 1e-5))
def test_v1s_cosine_is_pytorchs_and_ends_at_a_tenth(peak: float) -> None:
    n = 50
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=n, eta_min=peak / 10)
    for step in range(n + 1):
        ours = learning_rate_at(step, n, peak, "cosine", 0)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()
    assert learning_rate_at(0, n, peak, "cosine", 0) == peak
    assert learning_rate_at(n, n, peak, "cosine", 0) == pytest.approx(peak / 10)
    assert learning_rate_at(n + 9, n, peak, "cosine", 0) == pytest.approx(peak / 10)


def test_linear_stays_and_falls_to_nothing_over_the_last_sixty_percent() -> None:
    rates = [learning_rate_at(step, 100, 1.0, "linear", 0) for step in range(101)]
    assert rates[:41] == [1.0] * 41
    falls = [before - after for before, after in zip(rates[40:-1], rates[41:], strict=True)]
    assert falls == pytest.approx([1 / 60] * 60)
    assert rates[99] > 0 and rates[100] == 0  # the last update still moves


@pytest.mark.parametrize("schedule", ("linear", "cosine", "constant"))
def test_warm_up_rises_evenly_and_the_first_update_moves(schedule: str) -> None:
    rates = [learning_rate_at(step, 100, 2.0, schedule, 4) for step in range(5)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert learning_rate_at(0, 100, 2.0, schedule, 0) == 2.0


def test_constant_stays() -> None:
    assert {learning_rate_at(step, 10, 3.0, "constant", 0) for step in range(10)} == {3.0}


@pytest.mark.parametrize("schedule", ("linear", "cosine", "constant"))
def test_a_run_of_one_update_has_a_rate(schedule: str) -> None:
    assert learning_rate_at(0, 1, 1.0, schedule, 1) == 1.0


def test_unknown_names_are_told(build: Build) -> None:
    with pytest.raises(ValueError, match="schedule='quadratic' is unknown: use \"linear\""):
        learning_rate_at(5, 10, 1.0, "quadratic", 0)
    with pytest.raises(ValueError, match="optimizer='sgd' is unknown"):
        make_optimizer(build(), "sgd", 1.0, 0.0)


@pytest.mark.parametrize("use_moe", (False, True))
def test_matrices_decay_embeddings_and_norms_do_not(build: Build, use_moe: bool) -> None:
    model = build(use_moe=use_moe)
    model.layers[0].attention.wq.weight.requires_grad_(False)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    of_decayed = {names[id(p)] for p in decayed["params"]}
    of_kept = {names[id(p)] for p in kept["params"]}
    assert of_kept == {n for n in names.values() if "norm" in n or n == "tok_embeddings.weight"}
    frozen = "layers.0.attention.wq.weight"
    assert of_decayed == set(names.values()) - of_kept - {frozen}  # each trained one, once
    assert len(decayed["params"]) == len(of_decayed) and len(kept["params"]) == len(of_kept)


def step_of(model: MiniMindForCausalLM, name: str, weight_decay: float) -> tuple[dict, dict, dict]:
    """Make one update; return parameters before and after, and gradients."""
    optimizer = make_optimizer(model, name, 0.01, weight_decay)
    loss = model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    return before, {n: p.detach() for n, p in model.named_parameters()}, gradients


@pytest.mark.parametrize(
    ("name", "weight_decay"), (("adamw", 0.0), ("adamw", 0.5), ("adam", 0.0), ("adam", 0.5))
)
def test_first_step_is_the_sign_of_the_gradient(
    build: Build, name: str, weight_decay: float
) -> None:
    """Adam's first step is lr * g / (|g| + eps). Decay is a part of g there; AdamW takes lr * decay
    of the matrices beside it.
    """
    before, after, gradients = step_of(build(), name, weight_decay)
    for key, was in before.items():
        is_decayed = was.ndim == 2 and key != "tok_embeddings.weight"
        decay = weight_decay * is_decayed * was
        g = gradients[key] + (decay if name == "adam" else 0)
        expected = was - 0.01 * g / (g.abs() + 1e-8) - (0.01 * decay if name == "adamw" else 0)
        # m / sqrt(v) are fp32 products and quotients of bias corrections: a few 2**-24
        torch.testing.assert_close(after[key], expected, rtol=0, atol=1e-6)
