"""Validation: means over trained tokens and bytes, whatever the batches."""

import math
from collections.abc import Callable

import pytest
import torch
from test_losses import random_batch

from model.evaluation import evaluate
from model.losses import Batch, LossSums, language_model_loss
from model.model import MiniMindForCausalLM

Build = Callable[..., MiniMindForCausalLM]
CPU = torch.device("cpu")


def batches_of(*seeds: int) -> list[Batch]:
    """Batches of different sizes; each target is said to spell two bytes."""
    batches = [random_batch(seed, B=seed, T=4 * seed) for seed in seeds]
    for batch in batches:
        batch.n_bytes = 2 * batch.n_units
    return batches


def test_means_are_over_tokens_and_bytes_not_over_batches(build: Build) -> None:
    model, batches = build(), batches_of(1, 2, 4)
    nats = sum(float(language_model_loss(model, batch).loss.detach()) for batch in batches)
    n_units = sum(batch.n_units for batch in batches)
    result = evaluate(model, batches, language_model_loss, CPU)
    assert result == pytest.approx(
        {"val_loss": nats / n_units, "val_bpb": nats / math.log(2) / (2 * n_units)}
    )
    means = [evaluate(model, [batch], language_model_loss, CPU)["val_loss"] for batch in batches]
    assert sum(means) / 3 != pytest.approx(result["val_loss"], rel=1e-3)


def test_a_uniform_model_needs_log_v_nats_a_token(build: Build) -> None:
    model = build()
    torch.nn.init.zeros_(model.tok_embeddings.weight)
    result = evaluate(model, batches_of(3), language_model_loss, CPU)
    assert result["val_loss"] == pytest.approx(math.log(100), rel=1e-6)
    assert result["val_bpb"] == pytest.approx(math.log2(100) / 2, rel=1e-6)


@pytest.mark.parametrize("training", (True, False))
def test_dropout_is_off_and_the_mode_stays(build: Build, training: bool) -> None:
    model = build(dropout=0.5, use_moe=True).train(training)
    before = torch.get_rng_state()

    def loss_fn(model: torch.nn.Module, batch: Batch) -> LossSums:
        assert not model.training and not torch.is_grad_enabled()
        return language_model_loss(model, batch)

    results = [evaluate(model, batches_of(2), loss_fn, CPU) for _ in range(2)]
    assert results[0] == results[1]
    assert model.training is training and model.layers[0].training is training
    assert torch.equal(torch.get_rng_state(), before)  # a run goes on as if nothing had been


def test_a_stages_own_sums_are_reported_as_means(build: Build) -> None:
    def loss_fn(model: torch.nn.Module, batch: Batch) -> LossSums:
        return LossSums(torch.tensor(2.0 * batch.n_units), None, {"wins": torch.tensor(3.0)})

    batches = batches_of(1, 2)
    n_units = sum(batch.n_units for batch in batches)
    result = evaluate(build(), batches, loss_fn, CPU)
    assert result["val_loss"] == pytest.approx(2.0) and result["val_wins"] == pytest.approx(
        6 / n_units
    )


def test_nothing_to_measure_on_is_no_result(build: Build) -> None:
    assert evaluate(build(), [], language_model_loss, CPU) == {}


def test_bytes_unknown_means_no_bits_per_byte(build: Build) -> None:
    assert set(evaluate(build(), [random_batch(1)], language_model_loss, CPU)) == {"val_loss"}


def test_a_request_to_stop_does_not_wait(build: Build) -> None:
    model = build().train()
    seen: list[int] = []

    def loss_fn(model: torch.nn.Module, batch: Batch) -> LossSums:
        seen.append(batch.n_units)
        return language_model_loss(model, batch)

    result = evaluate(model, batches_of(1, 2, 3, 4), loss_fn, CPU, lambda: len(seen) == 2)
    assert result is None and len(seen) == 2 and model.training
