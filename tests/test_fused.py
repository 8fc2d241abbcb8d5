"""Fused blocks give the loss and the gradients of plain ones, and of transformers' Llama."""

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from model import fused, fused_attention, fused_feed_forward, fused_pieces
from model.fused import fuse
from model.llama import peer_config, to_peer
from model.lora import LoRAConfig, add_adapter
from model.model import MiniMindForCausalLM
from model.packed import can_pack

Build = Callable[..., MiniMindForCausalLM]
MOE = dict(use_moe=True, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=2)


@pytest.fixture(params=["as they are", "small", "oneDNN", "MKL"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either library; and blocks that a tiny batch fills many of, the last ones not whole."""
    if request.param == "oneDNN" and not can_pack(torch.float32):
        pytest.skip("torch without oneDNN")
    if request.param in ("oneDNN", "MKL"):
        monkeypatch.setattr(fused_pieces, "prefers_onednn", lambda: request.param == "oneDNN")
    if request.param == "small":
        monkeypatch.setattr(fused_attention, "QUERIES", 16)
        monkeypatch.setattr(fused_attention, "SCORES", 1)
        monkeypatch.setattr(fused_feed_forward, "ROWS", 7)
        monkeypatch.setattr(fused, "LOGIT_ROWS", 7)


def batch(T: int = 40) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 100, (3, T + 1), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].masked_fill(torch.arange(T) % 5 == 0, -100)
    return ids[:, :-1], targets


def loss_and_gradients(
    model: MiniMindForCausalLM, dtype: torch.dtype = torch.float32, **more: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    inputs, targets = batch()
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(inputs, targets=targets, use_cache=False, **more)
    mean = out.loss / 100 + (out.aux_loss if out.aux_loss is not None else 0.0)
    mean.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return mean.detach(), gradients


def places(kind: str) -> dict[str, Tensor]:
    """Return what a packed row of several sequences, or a padded one, says of its positions."""
    if kind == "packed":
        return {"position_ids": (torch.arange(40) % 17).expand(3, -1)}
    if kind == "mask":
        seen = torch.rand(3, 1, 40, 40, generator=torch.Generator().manual_seed(3)) > 0.5
        return {"attention_mask": (seen | torch.eye(40, dtype=torch.bool)).tril()}
    if kind == "padded":
        mask = torch.ones(3, 40, dtype=torch.int64)
        mask[0, :9] = 0
        return {"attention_mask": mask}
    return {}


@pytest.mark.parametrize("kind", ["causal", "packed", "mask", "padded"])
@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": 4}, MOE], ids=["gqa", "mha", "moe"])
def test_loss_and_gradients_are_those_of_plain_blocks(
    build: Build, parts: None, fields: dict, kind: str
) -> None:
    model = build(**fields).train()
    expected = loss_and_gradients(model, **places(kind))
    fuse(model)
    found = loss_and_gradients(model, **places(kind))
    assert found[1].keys() == expected[1].keys()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_loss_and_gradients_are_llamas(build: Build, parts: None) -> None:
    model = build()
    llama = LlamaForCausalLM(peer_config(model.config)).eval()
    llama.load_state_dict(to_peer(model.state_dict(), model.config))
    inputs, targets = batch()
    logits = llama(inputs).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum") / 100
    expected.backward()
    fuse(model)
    loss, gradients = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    peers = {name: p.grad for name, p in llama.named_parameters()}
    torch.testing.assert_close(to_peer(gradients, model.config), peers, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, MOE], ids=["dense", "moe"])
def test_bf16_is_no_further_off_than_autocast_is(build: Build, fields: dict) -> None:
    ours, plains = [], []
    for seed in range(5):  # where a rounding sends a token to another expert, much is off
        model = build(seed, **fields).train()
        exact = loss_and_gradients(model)[1]
        plains.append(error(loss_and_gradients(model, torch.bfloat16)[1], exact))
        fuse(model)
        ours.append(error(loss_and_gradients(model, torch.bfloat16)[1], exact))
    # not zero: had bf16 not been used, nothing would be compared
    assert 1e-4 < statistics.median(ours) < 1.5 * statistics.median(plains)


def error(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    off = sum((gradients[name] - exact[name]).square().sum() for name in exact)
    return float((off / sum(g.square().sum() for g in exact.values())).sqrt())


def test_evaluation_keeps_nothing_and_gives_the_same_loss(build: Build) -> None:
    model = build()
    inputs, targets = batch()
    expected = model(inputs, targets=targets).loss
    fuse(model)
    with torch.no_grad():
        found = model(inputs, targets=targets).loss
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)


def test_an_improbable_target_has_its_whole_loss(build: Build) -> None:
    """A softmax in fp32 says 0 for it."""
    model = build()
    with torch.no_grad():
        model.norm.weight *= 400
    inputs, targets = batch()
    expected = model(inputs, targets=targets).loss
    assert expected > 100 * (targets != -100).sum()
    fuse(model)
    torch.testing.assert_close(model(inputs, targets=targets).loss, expected, rtol=1e-5, atol=0)


def test_nothing_to_learn_is_no_loss(build: Build) -> None:
    model = build().train()
    fuse(model)
    inputs, targets = batch()
    model(inputs, targets=torch.full_like(targets, -100)).loss.backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_an_idle_expert_has_gradients_of_zero(build: Build) -> None:
    model = build(**MOE).train()
    for layer in model.layers:
        with torch.no_grad():
            layer.feed_forward.gate.weight.zero_()  # the first experts tie, the others idle
    expected = loss_and_gradients(model)
    fuse(model)
    found = loss_and_gradients(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert any(name.endswith("w1.weight") and not grad.any() for name, grad in found[1].items())


def test_an_adapter_dropout_and_a_cache_take_the_plain_way(build: Build) -> None:
    adapted = build().train()
    add_adapter(adapted, LoRAConfig(rank=2))
    dropping = build(dropout=0.5).train()
    cached = build().eval()
    for model in (adapted, dropping, cached):
        inputs, targets = batch()
        torch.manual_seed(0)
        expected = model(inputs, use_cache=model is cached).logits
        fuse(model)
        torch.manual_seed(0)
        out = model(inputs, use_cache=model is cached)
        assert torch.equal(out.logits, expected)


def test_a_mask_that_is_not_causal_or_no_truth_takes_the_plain_way(build: Build) -> None:
    model = build()
    inputs, _ = batch()
    shown = torch.ones(40, 40, dtype=torch.bool).tril()
    shown[:10, :10] = True  # a prefix that sees itself whole
    added = torch.rand(3, 1, 40, 40).masked_fill(~torch.ones(40, 40).tril().bool(), -1e9)
    masks = shown.expand(3, 1, 40, 40), added
    expected = [model(inputs, attention_mask=mask).logits for mask in masks]
    fuse(model)
    for mask, logits in zip(masks, expected, strict=True):
        assert torch.equal(model(inputs, attention_mask=mask).logits, logits)


def test_a_frozen_head_gets_no_gradient_and_what_is_before_it_does(build: Build) -> None:
    model = build().train()
    model.tok_embeddings.weight.requires_grad_(False)
    expected = loss_and_gradients(model)
    fuse(model)
    found = loss_and_gradients(model)
    assert "tok_embeddings.weight" not in found[1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
