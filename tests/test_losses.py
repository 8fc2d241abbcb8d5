"""The loss: a sum over trained tokens, against transformers' Llama and a loop by hand."""

import math
from collections.abc import Callable

import torch
from test_reference import llama_of

from model.losses import IGNORED, Batch, language_model_loss
from model.model import MiniMindForCausalLM, masked_cross_entropy

Build = Callable[..., MiniMindForCausalLM]


def random_batch(seed: int, B: int = 3, T: int = 12, vocab_size: int = 100) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (B, T + 1), generator=generator)
    is_trained = torch.rand(B, T, generator=generator) < 0.6
    targets = tokens[:, 1:].masked_fill(~is_trained, IGNORED)
    return Batch(tokens[:, :-1], targets, n_units=int(is_trained.sum()), n_tokens=B * T)


def test_loss_is_the_sum_over_trained_targets_in_nats() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, IGNORED, 4], [IGNORED, 2, 0]])
    expected = 0.0
    for row, column, target in ((0, 0, 0), (0, 2, 4), (1, 1, 2), (1, 2, 0)):  # id 0 is a token
        scores = logits[row, column].tolist()
        expected += math.log(sum(math.exp(score) for score in scores)) - scores[target]
    torch.testing.assert_close(masked_cross_entropy(logits, targets), torch.tensor(expected))


def test_nothing_to_learn_is_a_loss_of_zero() -> None:
    logits = torch.randn(1, 4, 5, requires_grad=True)
    loss = masked_cross_entropy(logits, torch.full((1, 4), IGNORED))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_half_precision_logits_are_summed_in_single() -> None:
    """In bf16 a sum of 4,000 terms near log 8 would be off by whole units."""
    logits = torch.zeros(1, 4000, 8, dtype=torch.bfloat16)
    loss = masked_cross_entropy(logits, torch.zeros(1, 4000, dtype=torch.int64))
    assert loss.dtype == torch.float32
    # fp32 of 4,000 equal terms: 4,000 roundings of at most 2**-24 of the sum
    torch.testing.assert_close(float(loss), 4000 * math.log(8), rtol=1e-4, atol=0)


def test_loss_and_gradients_are_llamas(build: Build) -> None:
    model = build()
    llama = llama_of(model)
    batch = random_batch(0)
    (language_model_loss(model, batch).loss / batch.n_units).backward()
    labels = torch.cat((torch.full((3, 1), IGNORED), batch.targets), dim=1)
    inputs = torch.cat((batch.inputs, torch.zeros(3, 1, dtype=torch.int64)), dim=1)
    theirs = llama(input_ids=inputs, labels=labels).loss
    theirs.backward()
    ours = language_model_loss(model, batch).loss / batch.n_units
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model.tok_embeddings.weight.grad, llama.lm_head.weight.grad, rtol=0, atol=1e-5
    )


def test_what_is_not_trained_does_not_enter_the_loss(build: Build) -> None:
    model = build()
    batch = random_batch(1)
    was = language_model_loss(model, batch).loss
    others = torch.where(batch.targets == IGNORED, IGNORED, (batch.targets + 1) % 100)
    assert language_model_loss(model, Batch(batch.inputs, others)).loss != was
    last = int((batch.targets[0] != IGNORED).nonzero()[-1])
    batch.inputs[0, last + 1 :] = 7  # inputs after the last target of a row, as padding is
    assert torch.equal(language_model_loss(model, batch).loss, was)


def test_positions_and_mask_of_the_batch_reach_the_model(build: Build) -> None:
    model, batch = build(), random_batch(4)
    plain = language_model_loss(model, batch).loss
    spread = 3 * torch.arange(12).expand(3, 12)
    mask = torch.eye(12, dtype=torch.bool).expand(3, 1, 12, 12)
    for places in (dict(position_ids=spread), dict(attention_mask=mask)):
        given = Batch(batch.inputs, batch.targets, **places)
        logits = model(input_ids=batch.inputs, **places).logits
        loss = language_model_loss(model, given).loss
        assert loss != plain and torch.equal(loss, masked_cross_entropy(logits, batch.targets))


def test_only_a_mixture_in_training_has_a_balance_loss(build: Build) -> None:
    batch = random_batch(2)
    assert language_model_loss(build().train(), batch).balance is None
    mixture = build(use_moe=True)
    assert language_model_loss(mixture, batch).balance is None
    assert language_model_loss(mixture.train(), batch).balance > 0


def test_a_batch_moves_with_all_it_holds() -> None:
    batch = random_batch(3)
    batch.position_ids, batch.n_bytes = batch.inputs.clone(), 7
    moved = batch.to(torch.device("meta"))
    assert (moved.n_units, moved.n_tokens, moved.n_bytes) == (batch.n_units, batch.n_tokens, 7)
    assert moved.attention_mask is None
    assert {
        moved.inputs.device.type,
        moved.targets.device.type,
        moved.position_ids.device.type,
    } == {"meta"}
