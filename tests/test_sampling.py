"""Choosing tokens: against transformers, formulas, and laws."""

import math
import random

import pytest
import torch
from talkers import GREEDY, PROMPT, V, ids_of, tiny_model
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model import sampling
from model.generation import generate
from model.model import MiniMindForCausalLM
from model.sampling import (
    Sampler,
    SamplingOptions,
    choose_tokens,
    count_penalty,
    draw,
    keep_likely,
    repetition_penalty,
)


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    return tiny_model()


def choose(sampler: Sampler, logits: Tensor) -> int:
    (token,) = choose_tokens([sampler], logits[None])
    return token.id


def random_logits(seed: int = 0, rows: int = 4) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("k", [1, 5, 299, 300])
def test_top_k_equals_transformers(k: int) -> None:
    logits = random_logits()
    assert torch.equal(keep_likely(logits, k, 1, 0), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_equals_transformers(p: float) -> None:
    logits = random_logits()
    assert torch.equal(keep_likely(logits, 0, p, 0), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_equals_transformers(p: float) -> None:
    logits = random_logits()
    assert torch.equal(keep_likely(logits, 0, 1, p), MinPLogitsWarper(p)(None, logits))


def test_filters_follow_one_another_as_in_transformers() -> None:
    logits = random_logits()
    theirs = logits
    for warper in (TopKLogitsWarper(20), TopPLogitsWarper(0.7), MinPLogitsWarper(0.2)):
        theirs = warper(None, theirs)
    assert torch.equal(keep_likely(logits, 20, 0.7, 0.2), theirs)


def test_each_row_can_have_filters_of_its_own() -> None:
    logits = random_logits()
    k, p, min_p = [0, 5, 40, 300], [0.8, 1.0, 0.5, 0.0], [0.0, 0.3, 0.0, 0.0]
    rows = [keep_likely(logits[i], k[i], p[i], min_p[i]) for i in range(4)]
    columns = (torch.tensor(values)[:, None] for values in (k, p, min_p))
    assert torch.equal(keep_likely(logits, *columns), torch.stack(rows))


@pytest.mark.parametrize("sharpness", [0.1, 3.0])
@pytest.mark.parametrize("is_even", [False, True])
def test_looking_at_the_likeliest_first_is_as_sorting_all(
    monkeypatch: pytest.MonkeyPatch, sharpness: float, is_even: bool
) -> None:
    """Rows that need few tokens, rows that need nearly all, and equals where a filter cuts."""
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(3)) * sharpness
    logits = (logits * 4).round() / 4 if is_even else logits
    for p, min_p in ((0.5, 0.0), (0.9, 0.0), (0.999, 0.01), (1.0, 0.1), (0.0, 0.0)):
        columns = [torch.full((6, 1), value) for value in (p, min_p)]
        found = keep_likely(logits, torch.zeros(6, 1, dtype=torch.long), *columns)
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "LIKELIEST", 3000)
            expected = keep_likely(logits, 0, p, min_p)
        assert torch.equal(found, expected)


def test_one_token_always_stays() -> None:
    kept = keep_likely(random_logits(), 1, 0.0, 1.0)
    assert torch.equal(kept.isfinite().sum(dim=-1), torch.ones(4, dtype=torch.long))
    assert torch.equal(kept.argmax(dim=-1), random_logits().argmax(dim=-1))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = random_logits()
    ids = torch.randint(V, (4, 30), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(4, V, dtype=torch.bool).scatter(1, ids, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(repetition_penalty(logits, seen, penalty), theirs)


def test_repetition_penalty_never_raises_a_logit() -> None:
    logits = torch.tensor([-3.0, 3.0])
    assert repetition_penalty(logits, torch.ones(2).bool(), 2.0).tolist() == [-6.0, 1.5]


def test_presence_and_frequency_follow_the_formula_of_openai() -> None:
    answer, logits = [3, 3, 3, 7], random_logits(rows=1)[0]
    counts = torch.bincount(torch.tensor(answer), minlength=V)
    ours = count_penalty(logits, counts, 0.4, 0.25)
    for j in range(V):  # mu[j] - c[j] * frequency - float(c[j] > 0) * presence
        c = answer.count(j)
        expected = float(logits[j]) - c * 0.25 - float(c > 0) * 0.4
        assert float(ours[j]) == pytest.approx(expected, abs=1e-6)


def test_what_the_penalties_count() -> None:
    flat = torch.zeros(V)
    flat[10], flat[20] = 1.0, 0.9
    repeat = Sampler(SamplingOptions(temperature=0, repetition_penalty=1.5), [10], V)
    # 10 is in the prompt, then both are seen
    assert [choose(repeat, flat), choose(repeat, flat)] == [20, 10]
    for name in ("presence_penalty", "frequency_penalty"):
        sampler = Sampler(SamplingOptions(temperature=0, **{name: 0.5}), [10], V)
        assert [choose(sampler, flat), choose(sampler, flat)] == [10, 20]  # the answer alone counts


def test_a_bias_may_be_on_an_id_of_a_large_vocabulary() -> None:
    biased = Sampler(SamplingOptions(temperature=0, logit_bias={151_642: 1.0}), [], 151_643)
    assert choose(biased, torch.zeros(151_643)) == 151_642


def test_a_bias_is_added_to_the_logits() -> None:
    logits = random_logits(rows=1)[0]
    likeliest = int(logits.argmax())
    for i, bias in ((3, 100.0), (likeliest, -100), (7, 2.5)):
        biased = Sampler(SamplingOptions(temperature=0, logit_bias={i: bias, 9: -0.5}), [], V)
        expected = logits.clone()
        expected[i] += bias
        expected[9] -= 0.5
        assert choose(biased, logits) == int(expected.argmax())
        assert torch.equal(biased.penalise(logits), expected)


def test_rows_with_options_of_their_own_choose_as_alone() -> None:
    """Greedy beside sampled, filters beside none, and two logits that nearly are the same."""
    logits = random_logits(7, rows=6)
    logits[0, [10, 20]] = torch.tensor([30.0, 30.000002])
    options = [
        SamplingOptions(temperature=0, top_k=3),
        SamplingOptions(seed=1),
        SamplingOptions(seed=2, temperature=2.0, top_k=40, top_p=0.9),
        SamplingOptions(seed=3, top_p=0.5, logprobs=2),
        SamplingOptions(seed=4, top_k=2, min_p=0.1, presence_penalty=1.0),
        SamplingOptions(temperature=0, logit_bias={5: 50.0}),
    ]
    together = [Sampler(o, [1, 2], V) for o in options]
    alone = [Sampler(o, [1, 2], V) for o in options]
    for _ in range(20):
        found = choose_tokens(together, logits)
        assert found == [choose_tokens([alone[i]], logits[i : i + 1])[0] for i in range(6)]
        assert (found[0].id, found[5].id) == (20, 5)


def test_samples_agree_with_the_softmax() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, -30.0, 1.0])
    n, temperature = 20_000, 1.7
    sampler = Sampler(SamplingOptions(temperature=temperature, seed=3), [], 6)
    uniform = torch.tensor([[sampler.random.random()] for _ in range(n)])
    counts = draw((logits / temperature).expand(n, -1), uniform).bincount(minlength=6).double()
    expected = n * (logits.double() / temperature).softmax(0)
    chi_squared = ((counts - expected)[:4] ** 2 / expected[:4]).sum()
    assert chi_squared < 23.5  # 4 degrees of freedom: one seed in 10,000 is above
    assert counts[4] <= 1
    single = [choose(sampler, logits) for _ in range(300)]
    assert abs(single.count(0) - 300 * float(expected[0]) / n) < 4 * math.sqrt(300) / 2


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([-math.inf, 0.25, -math.inf, 0.5, 0.25, -math.inf])
    logits[[1, 3, 4]] = logits[[1, 3, 4]].log()
    for uniform, expected in [
        (0.0, 1),
        (0.24, 1),
        (0.26, 3),
        (0.74, 3),
        (0.76, 4),
        (1 - 2**-53, 4),
    ]:
        assert int(draw(logits, uniform)) == expected


def test_the_seed_decides_and_nothing_else(model: MiniMindForCausalLM) -> None:
    options = SamplingOptions(seed=11, max_new_tokens=20)
    torch.manual_seed(1)
    random.seed(1)
    first = ids_of(model, options)
    states = torch.get_rng_state(), random.getstate()
    torch.rand(3)
    assert ids_of(model, options) == first
    assert ids_of(model, SamplingOptions(seed=12, max_new_tokens=20)) != first
    unseeded = SamplingOptions(max_new_tokens=20)
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    assert ids_of(model, unseeded) != ids_of(model, unseeded)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


@pytest.mark.parametrize(
    "off",
    [
        {"top_k": 0},
        {"top_k": V},
        {"top_k": 10 * V},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"min_p": 1e-30},
        {"repetition_penalty": 1.0},
        {"presence_penalty": 0.0},
        {"frequency_penalty": 0.0},
        {"temperature": 1.0},
        {"stop": ()},
        {"logprobs": 3},
    ],
)
def test_options_that_are_off_change_nothing(model: MiniMindForCausalLM, off: dict) -> None:
    plain = SamplingOptions(seed=7, max_new_tokens=20)
    assert ids_of(model, SamplingOptions(seed=7, max_new_tokens=20, **off)) == ids_of(model, plain)


@pytest.mark.parametrize(
    "on", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-300}]
)
def test_options_at_their_strongest_are_greedy(model: MiniMindForCausalLM, on: dict) -> None:
    for seed in range(3):
        options = SamplingOptions(seed=seed, max_new_tokens=24, **on)
        assert ids_of(model, options) == ids_of(model, GREEDY)


def test_log_probabilities_are_the_models_own(model: MiniMindForCausalLM) -> None:
    options = SamplingOptions(
        temperature=0.5, top_k=3, frequency_penalty=1, seed=2, logprobs=5, max_new_tokens=10
    )
    tokens = list(generate(model, PROMPT, options))
    ids = [token.id for token in tokens]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [i for i, _ in token.top_logprobs] == row.topk(5).indices.tolist()
        assert dict(token.top_logprobs).get(token.id, token.logprob) == token.logprob
    none = next(generate(model, PROMPT, SamplingOptions(logprobs=0)))
    assert none.logprob is not None and none.top_logprobs == ()
    assert next(generate(model, PROMPT, SamplingOptions())).logprob is None


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is not a number of at least 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1 is not a whole number"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_p": 1.01}, r"top_p=1.01 is not in 0\.\.1"),
        ({"min_p": -0.5}, "min_p=-0.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"presence_penalty": math.nan}, "presence_penalty=nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty=inf"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"stop": ("",)}, "stop=.* is not made of non-empty strings"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"logit_bias": {-1: 0.5}}, "logit_bias=.* is not made of ids"),
        ({"logit_bias": {3: math.nan}}, "logit_bias"),
    ],
)
def test_options_outside_their_range_are_refused(wrong: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SamplingOptions(**wrong)
