"""Schedules against PyTorch's, parameter groups, the optimizers' first step by hand."""

from collections.abc import Callable

import pytest
import torch

from model.model import MiniMindForCausalLM
from model.optim import learning_rate_at, make_optimizer, orthogonalized, parameter_groups

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


# ----------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", ((16, 16), (12, 40)))
def test_singular_values_become_one_and_their_vectors_stay(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    u_first, vt_first = u.clone(), vt.clone()
    matrices = u @ torch.diag_embed(torch.linspace(1.0, 0.05, shape[0]).expand_as(s)) @ vt
    found = u_first.mT @ orthogonalized(matrices) @ vt_first.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert 0.85 < values.min() and values.max() < 1.15
    # nothing turns: in the basis of the singular vectors what is not on the diagonal is rounding
    torch.testing.assert_close(found, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_muon_goes_where_torchs_goes(build: Build) -> None:
    """Theirs orthogonalises in bf16 by another polynomial, matrix by matrix."""
    model, peer = build(), build()
    names = [n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    theirs = torch.optim.Muon(
        [peer.get_parameter(name) for name in names],
        lr=0.01,
        weight_decay=0.1,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    ours = make_optimizer(model, "muon", 0.01, 0.1)
    start = {name: model.get_parameter(name).detach().clone() for name in names}
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for name in names:
            gradient = torch.randn(start[name].shape, generator=generator)
            model.get_parameter(name).grad = gradient
            peer.get_parameter(name).grad = gradient.clone()
        ours.step()
        theirs.step()
    for name in names:
        moved, expected = (m.get_parameter(name) - start[name] for m in (model, peer))
        cosine = torch.cosine_similarity(moved.flatten(), expected.flatten(), dim=0)
        assert cosine > 0.97, name
        # by theirs singular values end between 0.7 and 1.2
        assert 0.85 < moved.norm() / expected.norm() < 1.4, name


def test_muon_leaves_embedding_norms_and_gate_to_adamw(build: Build) -> None:
    muon, adamw = build(use_moe=True), build(use_moe=True)
    _, ours, _ = step_of(muon, "muon", 0.5)
    start, theirs, _ = step_of(adamw, "adamw", 0.5)
    # three tokens leave some experts without a gradient
    same = {n for n in ours if torch.equal(ours[n], theirs[n]) and ".experts." not in n}
    assert same == {n for n in ours if "norm" in n or "gate" in n or n == "tok_embeddings.weight"}
    assert all(not torch.equal(ours[name], start[name]) for name in ours)


def test_matrices_without_a_gradient_stay(build: Build) -> None:
    model = build()
    optimizer = make_optimizer(model, "muon", 0.01, 0.1)
    weight = model.layers[0].attention.wo.weight
    weight.grad = torch.ones_like(weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"layers.0.attention.wo.weight"}
    with pytest.raises(ValueError, match="Muon takes no closure"):
        optimizer.step(lambda: 0.0)


def test_embedding_and_norms_learn_faster_than_matrices(build: Build) -> None:
    model = build(use_moe=True)
    groups = make_optimizer(model, "muon", 0.01, 0.1).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    factors = {
        names[id(p)]: group.get("rate_factor", 1.0) for group in groups for p in group["params"]
    }
    assert set(factors) == set(names.values())
    fast = {name for name in factors if "norm" in name or name == "tok_embeddings.weight"}
    assert {name for name, factor in factors.items() if factor == 8.0} == fast
    assert {factors[name] for name in set(factors) - fast} == {1.0}


def test_every_group_says_whether_it_is_fused(build: Build) -> None:
    """Where it does not, ``load_state_dict`` leaves counts of steps beside a GPU on the CPU."""
    assert all(g["fused"] for g in make_optimizer(build(), "muon", 0.01, 0.1).param_groups)


def test_without_matrices_muon_says_so(build: Build) -> None:
    model = build()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.output:
            module.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="finds no matrix between hidden states"):
        make_optimizer(model, "muon", 0.01, 0.1)
