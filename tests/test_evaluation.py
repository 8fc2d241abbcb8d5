"""Validation, likelihood and bits per byte against transformers' loss; intervals of shares."""

import math
from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
from test_losses import random_batch
from test_reference import llama_of

from model.evaluation import (
    Share,
    batches_by_length,
    evaluate,
    measure_text,
    next_token_logprobs,
    option_logprobs,
    wilson_interval,
    windows_of,
)
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


# ---- shares ----


@pytest.mark.parametrize(
    ("n_yes", "n", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, p. 857), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(
    n_yes: int, n: int, low: float, high: float
) -> None:
    assert wilson_interval(n_yes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("n_yes", "n"), [(1, 3), (330, 1346), (24, 24), (0, 4)])
def test_a_bound_is_the_share_from_which_what_was_seen_is_z_deviations_away(
    n_yes: int, n: int
) -> None:
    z = NormalDist().inv_cdf(0.975)
    for bound in wilson_interval(n_yes, n):
        deviation = math.sqrt(bound * (1 - bound) / n)
        assert abs(n_yes / n - bound) == pytest.approx(z * deviation, abs=1e-12)


def test_shares_add_up_and_nothing_seen_tells_nothing() -> None:
    assert Share(1, 4) + Share(3, 4) == Share(4, 8)
    assert str(Share(81, 263)) == "30.8 % (25.5 to 36.6)"
    assert Share(0, 0).value == 0 and Share(0, 0).interval == (0, 1)
    with pytest.raises(ValueError, match="5 of 4 is no share"):
        wilson_interval(5, 4)


# ---- likelihood ----


def ids(n: int, seed: int) -> list[int]:
    """Return ``n`` token ids."""
    return torch.randint(3, 100, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def loss_sum(model: torch.nn.Module, tokens: list[int], n_scored: int) -> float:
    """Return transformers' loss of the last ``n_scored`` tokens, in nats, as a sum."""
    labels = torch.tensor([tokens])
    labels[0, : len(tokens) - n_scored] = -100
    with torch.no_grad():
        return float(model(torch.tensor([tokens]), labels=labels).loss) * n_scored


@pytest.mark.parametrize("max_positions", (1, 40, 10_000))
def test_batches_hold_everything_once_and_no_more_than_they_may(max_positions: int) -> None:
    lengths = [7, 3, 9, 9, 1, 30, 4, 4]
    groups = list(batches_by_length(lengths, max_positions))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        padded_size = len(group) * max(lengths[index] for index in group)
        assert len(group) == 1 or padded_size <= max_positions
    assert list(batches_by_length([], 10)) == []


@pytest.mark.parametrize("fields", ({}, {"use_moe": True}))
def test_the_next_token_of_a_batch_is_that_of_each_prompt_alone(build: Build, fields: dict) -> None:
    model = build(**fields)
    prompts = [ids(n, seed=n) for n in (5, 1, 17, 9, 17)]
    candidates = [35, 3, 60]
    done: list[int] = []
    found = next_token_logprobs(model, prompts, candidates, max_positions=40, progress=done.append)
    assert sum(done) == len(prompts) and len(done) > 1
    for prompt, row in zip(prompts, found, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[candidates]
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("peer", (True, False))
@pytest.mark.parametrize("max_positions", (60, 10_000))
def test_an_option_costs_what_transformers_loss_says(
    build: Build, peer: bool, max_positions: int
) -> None:
    model = build()
    prompts = [ids(n, seed=n) for n in (6, 1, 20)]
    options = [[ids(n, seed=50 + n) for n in lengths] for lengths in ((1, 4, 2, 4), (3,), (1, 9))]
    found = option_logprobs(model, prompts, options, max_positions=max_positions)
    judge = llama_of(model) if peer else model
    for prompt, texts, sums in zip(prompts, options, found, strict=True):
        expected = [-loss_sum(judge, prompt + text, len(text)) for text in texts]
        assert sums == pytest.approx(expected, abs=1e-4)  # nine log probabilities of about 5 nats


def test_an_option_does_not_see_the_others(build: Build) -> None:
    model, prompt, option = build(), ids(6, 1), ids(5, 2)
    (alone,) = option_logprobs(model, [prompt], [[option]])
    (beside,) = option_logprobs(model, [prompt], [[ids(7, 3), option, ids(3, 4)]])
    assert beside[1] == pytest.approx(alone[0], abs=1e-5)


# ---- bits per byte ----


class Letters:
    """A tokenizer of one id a byte."""

    @staticmethod
    def encode_document(text: str) -> list[int]:
        return [1, *(3 + byte % 90 for byte in text.encode()), 2]


@pytest.mark.parametrize("n_tokens", (1, 2, 16, 17, 18, 24, 25, 90))
@pytest.mark.parametrize("stride", (1, 8, 16))
def test_windows_score_each_token_once_with_a_past(n_tokens: int, stride: int) -> None:
    context = 16
    windows = list(windows_of(n_tokens, context, stride))
    scored = [i for w in windows for i in range(w.first, w.stop)]
    assert scored == list(range(1, n_tokens))
    for w in windows:
        assert 0 < w.stop - w.start - 1 <= context
        assert w.first - w.start >= min(w.first, context - stride + 1)


def test_bits_of_short_documents_are_transformers_loss(build: Build) -> None:
    model, texts = build(), ["长江", "the river", "a", "黄河之水天上来。"]
    nats = sum(
        loss_sum(llama_of(model), tokens, len(tokens) - 1)
        for tokens in map(Letters.encode_document, texts)
    )
    score = measure_text(model, Letters, texts, max_positions=32)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert (score.n_bytes, score.n_documents) == (n_bytes, 4)
    assert score.n_tokens == n_bytes + 4  # each end is predicted, each beginning given
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_bits_of_a_long_document_are_those_of_overlapping_passes(build: Build) -> None:
    model = build()
    text = "abcdefg hij klmnop " * 6
    tokens = Letters.encode_document(text)
    context, nats = 16, 0.0
    end = 1
    while end < len(tokens):  # transformers' way: every pass has labels on what is new alone
        n_new = min(len(tokens) - end, context if end == 1 else context // 2)
        end += n_new
        nats += loss_sum(llama_of(model), tokens[max(0, end - context - 1) : end], n_new)
    score = measure_text(model, Letters, [text], context=context)
    assert score.bits == pytest.approx(nats / math.log(2), rel=1e-5)
    whole = measure_text(model, Letters, [text], context=1000)
    assert whole.bits != pytest.approx(score.bits, rel=1e-4)


@pytest.mark.parametrize("context", (2, 5, 64))
def test_a_uniform_model_pays_the_same_for_every_token_wherever_it_is_cut(
    build: Build, context: int
) -> None:
    model = build()
    torch.nn.init.zeros_(model.tok_embeddings.weight)
    texts = ["x" * n for n in (1, 5, 63, 64, 200)]
    score = measure_text(model, Letters, texts, context=context, max_positions=100)
    assert score.bits == pytest.approx(math.log2(100) * (sum(map(len, texts)) + 5), rel=1e-6)


def test_no_text_has_no_bits_per_byte(build: Build) -> None:
    score = measure_text(build(), Letters, [])
    assert score.bits == 0 and math.isnan(score.bits_per_byte)
