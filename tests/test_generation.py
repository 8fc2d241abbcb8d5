"""Cache, sampling, streaming and prompt cutting: against transformers, formulas, and laws."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.generation import (
    Answer,
    KVCache,
    Sampler,
    SamplingOptions,
    TextStream,
    Token,
    count_penalty,
    draw,
    fit_messages,
    fit_text,
    generate,
    keep_likely,
    next_logits,
    prompt_limit,
    repetition_penalty,
    stream_text,
)
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import Tokenizer

PROMPT = [1, 40, 41, 42, 43]
GREEDY = SamplingOptions(temperature=0, max_new_tokens=24)
V = 300


def tiny_model(seed: int = 0, **fields: object) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": V}
    model = MiniMindForCausalLM(LMConfig(**{**shape, "max_seq_len": 64, **fields})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # at the usual 0.02 every answer repeats its first token
            parameter.data.mul_(6)
    return model


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def ids_of(
    model: MiniMindForCausalLM, options: SamplingOptions, prompt: Sequence[int] = PROMPT
) -> list[int]:
    return [token.id for token in generate(model, prompt, options)]


# ---- the cache ----


@pytest.mark.parametrize("fields", [{}, {"use_moe": True}, {"rope_scaling": "yarn:4"}])
def test_greedy_equals_transformers_generate(fields: dict) -> None:
    for seed in range(3):
        model = tiny_model(seed, **fields)
        theirs = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=24)
        assert ids_of(model, GREEDY) == theirs[0, len(PROMPT) :].tolist()


def test_greedy_with_repetition_penalty_equals_transformers(model: MiniMindForCausalLM) -> None:
    options = SamplingOptions(temperature=0, repetition_penalty=1.5, max_new_tokens=24)
    theirs = model.generate(
        torch.tensor([PROMPT]), do_sample=False, repetition_penalty=1.5, max_new_tokens=24
    )
    assert ids_of(model, options) == theirs[0, len(PROMPT) :].tolist()
    assert ids_of(model, options) != ids_of(model, GREEDY)


@pytest.mark.parametrize("rope_scaling", [None, "linear:4"])
def test_cached_equals_uncached(rope_scaling: str | None) -> None:
    model = tiny_model(rope_scaling=rope_scaling)
    cache, ids = KVCache(32), list(PROMPT)
    logits = next_logits(model, ids, cache)
    for _ in range(20):
        with torch.no_grad():
            full = model(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)  # same terms, other sums
        ids.append(int(full.argmax()))
        logits = next_logits(model, ids[-1:], cache)


def test_a_prompt_in_chunks_equals_the_whole(model: MiniMindForCausalLM) -> None:
    prompt = list(range(3, 33))
    expected = next_logits(model, prompt, KVCache(30))
    cache = KVCache(30)
    for chunk in (prompt[:7], prompt[7:8], prompt[8:]):
        logits = next_logits(model, chunk, cache)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 30


def test_the_cache_holds_all_that_came_and_stays_in_place() -> None:
    cache = KVCache(20)
    parts = [torch.randn(2, 4, 3, n, 8, generator=torch.Generator()) for n in (5, 1, 1, 9)]
    places = set()
    for i in range(4):  # parts: (keys or values, layer, K, T, Dh)
        assert cache.get_seq_length() == sum(p.shape[3] for p in parts[:i])
        for layer in range(4):
            k, v = (part[layer][None] for part in parts[i])
            k, v = cache.update(k, v, layer)
            places |= {k.data_ptr(), v.data_ptr()}
            so_far = torch.cat([p[:, layer] for p in parts[: i + 1]], dim=2)
            assert torch.equal(torch.cat((k, v)), so_far)
    assert len(places) == 8  # keys and values, a tensor a layer, never moved
    with pytest.raises(ValueError, match="21 positions do not fit a cache of 20"):
        cache.update(parts[0][0, :1], parts[0][1, :1], 0)


def test_answers_side_by_side_do_not_meet(model: MiniMindForCausalLM) -> None:
    options = SamplingOptions(seed=5, frequency_penalty=1, max_new_tokens=20)
    prompts = [PROMPT, [7, 8], list(range(100, 130))]
    alone = [ids_of(model, options, prompt) for prompt in prompts]
    together: list[list[int]] = [[], [], []]
    for step in itertools.zip_longest(*(generate(model, prompt, options) for prompt in prompts)):
        for ids, token in zip(together, step, strict=True):
            ids += [token.id] if token else []
    assert together == alone
    abandoned = generate(model, prompts[2], options)
    next(abandoned)
    assert ids_of(model, options, prompts[0]) == alone[0]


def test_between_tokens_torch_is_as_it_was(model: MiniMindForCausalLM) -> None:
    for _ in generate(model, PROMPT, GREEDY):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert not next_logits(model, PROMPT, KVCache(5)).requires_grad


# ---- sampling ----


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
    assert [repeat(flat).id, repeat(flat).id] == [20, 10]  # 10 is in the prompt, then both are seen
    for name in ("presence_penalty", "frequency_penalty"):
        sampler = Sampler(SamplingOptions(temperature=0, **{name: 0.5}), [10], V)
        assert [sampler(flat).id, sampler(flat).id] == [10, 20]  # the answer alone counts


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
    single = [sampler(logits).id for _ in range(300)]
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
    ],
)
def test_options_outside_their_range_are_refused(wrong: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SamplingOptions(**wrong)


# ---- the answer's length ----


@pytest.mark.parametrize("n", [1, 2, 17])
def test_max_new_tokens_counts_new_tokens(model: MiniMindForCausalLM, n: int) -> None:
    tokens = list(generate(model, PROMPT, SamplingOptions(temperature=0, max_new_tokens=n)))
    assert len(tokens) == n
    assert [token.finish_reason for token in tokens] == [None] * (n - 1) + ["length"]


def test_prompt_and_answer_fill_the_context_and_no_more(model: MiniMindForCausalLM) -> None:
    for limit in (None, 1000):
        tokens = list(
            generate(model, [5] * 60, SamplingOptions(temperature=0, max_new_tokens=limit))
        )
        assert len(tokens) == 4 and tokens[-1].finish_reason == "length"


def test_the_end_token_ends_the_answer() -> None:
    model = tiny_model()
    answer = ids_of(model, GREEDY)
    n = answer.index(answer[5]) + 1
    model.config.eos_token_id = answer[5]
    tokens = list(generate(model, PROMPT, GREEDY))
    assert [token.id for token in tokens] == answer[:n]
    assert [token.finish_reason for token in tokens] == [None] * (n - 1) + ["stop"]
    last = list(generate(model, PROMPT, SamplingOptions(temperature=0, max_new_tokens=n)))
    assert last[-1].finish_reason == "stop"  # ended by itself just in time


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([], "the prompt is empty"),
        ([5] * 64, "64 tokens leaves no room .* max_seq_len=64"),
        ([1, 300], "ids from 1 to 300, the model has vocab_size=300"),
        ([-1], "ids from -1"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_at_once(
    model: MiniMindForCausalLM, prompt: list[int], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        generate(model, prompt, GREEDY)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        generate(tiny_model().train(), PROMPT, GREEDY)


def test_broken_weights_are_reported() -> None:
    model = tiny_model()
    model.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        next(generate(model, PROMPT, GREEDY))


def test_lower_precision_answers_too() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert len(ids_of(tiny_model().to(dtype), SamplingOptions(seed=1, max_new_tokens=8))) == 8


# ---- text ----

PIECES = st.lists(st.text("ab好😀é </s>\ufffd\n", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab好 </s>\n\ufffd", min_size=1, max_size=5), max_size=3)
BYTES = st.lists(st.integers(0, 6399) | st.integers(0, 260), max_size=40)  # ids 3..258 are bytes


# GPT-2's table: bytes that are visible characters stand for themselves and come first
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = VISIBLE + [byte for byte in range(256) if byte not in VISIBLE]
BYTE_IDS = {byte: i for i, byte in enumerate(BYTE_ORDER, start=3)}
LAW = settings(deadline=None)  # a busy machine is not a failure


def as_tokens(ids: Sequence[int]) -> Iterator[Token]:
    return (Token(token_id) for token_id in ids)


@LAW
@given(ids=BYTES)
@example(ids=[BYTE_IDS[0xE4], 1, 1, 0, BYTE_IDS[0xBD], 2, BYTE_IDS[0xA0]])
def test_streamed_pieces_join_to_the_whole_answer(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Any ids: broken bytes, halves of characters, special tokens."""
    assert "".join(stream_text(tokenizer, as_tokens(ids))) == tokenizer.decode(ids)


@LAW
@given(text=st.text("好中😀é𠮷a ", min_size=1))
def test_whole_characters_stream_at_once(tokenizer: Tokenizer, text: str) -> None:
    """Each byte a token: a character comes with its last byte, never half of it before."""
    stream, sent = TextStream(tokenizer), ""
    for n, byte in enumerate(text.encode(), start=1):
        sent += stream.push(BYTE_IDS[byte])
        assert sent == text.encode()[:n].decode(errors="ignore")
    assert sent == text and stream.finish() == ""


def cut_letter_by_letter(text: str, stop: Sequence[str]) -> str:
    for end in range(1, len(text) + 1):
        longest = max((len(s) for s in stop if text[:end].endswith(s)), default=0)
        if longest:
            return text[: end - longest]
    return text


@settings(LAW, max_examples=200)
@given(
    pieces=PIECES, stop=st.lists(st.text("ab好 </s>\n\ufffd", min_size=1, max_size=5), max_size=3)
)
def test_stop_strings_split_anyhow_never_leak(
    tokenizer: Tokenizer, pieces: list[str], stop: list[str]
) -> None:
    ids = [token_id for piece in pieces for token_id in tokenizer.encode(piece)]
    answer = Answer(tokenizer, as_tokens(ids), stop)
    text = tokenizer.decode(ids)
    assert "".join(answer) == answer.text == cut_letter_by_letter(text, stop)
    assert (answer.finish_reason == "stop") == (answer.text != text)


def test_the_stop_string_that_is_complete_first_counts(tokenizer: Tokenizer) -> None:
    """As if letter by letter, although the whole word is one token."""
    texts = ((i, tokenizer.decode([i])) for i in range(259, tokenizer.vocab_size))
    token_id, word = next((i, t) for i, t in texts if t.isalpha() and len(set(t)) == len(t) == 3)
    assert "".join(stream_text(tokenizer, as_tokens([token_id]), [word, word[1]])) == word[0]
    assert "".join(stream_text(tokenizer, as_tokens([token_id]), [word[1:], word])) == ""


def test_a_stop_string_may_come_with_the_last_broken_byte(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("ab"), BYTE_IDS[0xE4]]
    answer = Answer(tokenizer, as_tokens(ids), ["b\ufffd"])
    assert ("".join(answer), answer.finish_reason) == ("a", "stop")


@LAW
@given(pieces=PIECES)
def test_text_is_held_back_only_where_a_stop_string_may_begin(
    tokenizer: Tokenizer, pieces: list[str]
) -> None:
    stop, sent = "</s>好", ""
    stream = TextStream(tokenizer, [stop])
    ids = [i for piece in pieces for i in tokenizer.encode(piece.replace("\ufffd", ""))]
    for n, token_id in enumerate(ids, start=1):
        sent += stream.push(token_id)
        if stream.stopped:
            break
        held = tokenizer.decode(ids[:n]).removesuffix("\ufffd").removeprefix(sent)
        assert held == "" or (stop.startswith(held) and held != stop)


def test_work_per_token_does_not_grow(tokenizer: Tokenizer) -> None:
    class Watched:
        longest = 0

        def decode(self, ids: list[int]) -> str:
            self.longest = max(self.longest, len(ids))
            return tokenizer.decode(ids)

    watched = Watched()
    ids = [BYTE_IDS[byte] for byte in b"\xe5\x80\xf0\x9f\x98"] * 200  # never a character
    assert len("".join(stream_text(watched, as_tokens(ids)))) >= 400
    assert watched.longest <= 4


def test_an_answer_tells_how_it_went(tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    options = SamplingOptions(temperature=0, max_new_tokens=20)
    ids = ids_of(model, options)
    answer = Answer(tokenizer, generate(model, PROMPT, options), n_prompt=len(PROMPT))
    assert "".join(answer) == answer.text == tokenizer.decode(ids)
    assert [token.id for token in answer.tokens] == ids
    assert answer.finish_reason == "length"
    assert answer.prefill_s > 0 and answer.decode_s > 0
    assert answer.speed.startswith("prompt 5 tokens, ") and "answer 20 tokens, " in answer.speed
    broken_off = Answer(tokenizer, generate(model, PROMPT, options))
    first = next(iter(broken_off))
    assert broken_off.text == first and answer.text.startswith(first)


def test_a_stop_string_ends_generation(tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    whole = tokenizer.decode(ids_of(model, GREEDY))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    answer = Answer(tokenizer, generate(model, PROMPT, GREEDY), [stop])
    assert "".join(answer) == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop" and len(answer.tokens) < 24


# ---- prompts that are too long ----

TURNS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), st.text("好a b", max_size=12)), max_size=7
)


@settings(LAW, max_examples=200)
@given(turns=TURNS, system=st.none() | st.text("规则", max_size=5), limit=st.integers(1, 80))
def test_messages_are_cut_from_the_oldest(
    tokenizer: Tokenizer, turns: list[tuple[str, str]], system: str | None, limit: int
) -> None:
    head = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": role, "content": text} for role, text in [*turns, ("user", "问")]]

    def fits(kept: list[dict]) -> bool:
        return len(tokenizer.encode_chat(head + kept, add_generation_prompt=True)) <= limit

    starts = [0] + [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    start = next((i for i in starts if fits(turns[i:])), None)
    if start is None:
        with pytest.raises(ValueError, match=f"newest message takes .* may take {limit}"):
            fit_messages(tokenizer, head + turns, limit)
    else:
        assert fit_messages(tokenizer, head + turns, limit) == (head + turns[start:], start)


def test_a_newest_message_that_is_too_long_is_refused_with_its_length(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": text} for text in ("你好", "长城" * 50)]
    n = len(tokenizer.encode_chat(messages[1:], add_generation_prompt=True))
    with pytest.raises(ValueError, match=f"takes {n} tokens, a prompt may take 40: shorten it"):
        fit_messages(tokenizer, messages, 40)
    assert fit_messages(tokenizer, messages, n) == (messages[1:], 1)
    with pytest.raises(ValueError, match="messages is empty"):
        fit_messages(tokenizer, [], 40)


def test_a_text_to_continue_keeps_its_end(tokenizer: Tokenizer) -> None:
    text = "秋天来了，树叶黄了。" * 5
    ids = tokenizer.encode(text)
    assert fit_text(tokenizer, text, 500) == ([1, *ids], 0)
    assert fit_text(tokenizer, text, 11) == ([1, *ids[-10:]], len(ids) - 10)
    assert fit_text(tokenizer, "", 11) == ([1], 0)


def test_prompt_and_answer_share_the_context() -> None:
    assert prompt_limit(512, 100) == 412
    assert prompt_limit(512, 1000) == prompt_limit(512) == 384
    assert all(1 <= prompt_limit(n, m) < n for n in range(2, 40) for m in (1, 7, None))
