"""The engine: against transformers and the full forward, alone, under load, and under accidents."""

import itertools
import math
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from talkers import GREEDY, PROMPT, V, ids_of, tiny_model
from torch import Tensor, nn

from model.engine_thread import EngineThread, apart
from model.generation import Answer, Engine, Piece, QueueFull, generate
from model.model import MiniMindForCausalLM
from model.sampling import SamplingOptions, Token
from model.tokenizer import Tokenizer

KINDS = [{}, {"use_moe": True}, {"rope_scaling": "yarn:4"}]


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def talker(tokenizer: Tokenizer) -> MiniMindForCausalLM:
    return tiny_model(vocab_size=tokenizer.vocab_size)


def run(engine: Engine) -> list[tuple[Answer, Piece]]:
    """Step until nothing is left."""
    pieces = []
    while engine.has_work:
        pieces += engine.step()
    return pieces


def token_ids(answer: Answer) -> list[int]:
    return [token.id for token in answer.tokens]


def random_requests(
    seed: int, n: int = 24, **options: object
) -> list[tuple[list[int], SamplingOptions]]:
    """Return prompts of which many begin alike, and options of all kinds, seeded."""
    rng = random.Random(seed)
    stems = [[rng.randrange(3, V) for _ in range(length)] for length in (3, 9, 20)]
    requests = []
    for i in range(n):
        ending = [rng.randrange(3, V) for _ in range(rng.randrange(1, 12))]
        requests.append(
            (
                rng.choice(stems)[: rng.randrange(0, 21)] + ending,
                SamplingOptions(
                    max_new_tokens=rng.randrange(1, 20),
                    temperature=rng.choice([0, 0.7, 1.3]),
                    top_k=rng.choice([0, 5, 40]),
                    top_p=rng.choice([1.0, 0.8]),
                    min_p=rng.choice([0.0, 0.05]),
                    repetition_penalty=rng.choice([1.0, 1.2]),
                    frequency_penalty=rng.choice([0.0, 0.5]),
                    logit_bias=rng.choice([{}, {7: 3.0, 8: -2.0}]),
                    seed=i,
                    logprobs=0,
                ),
            )
        )
    return requests


def answer_under_load(
    model: MiniMindForCausalLM, seed: int, n: int = 24, **settings: object
) -> tuple[Engine, list[Answer]]:
    """Let requests come in at random between steps."""
    engine = Engine(model, None, max_queue=100, **settings)
    rng, waiting, answers = random.Random(seed), random_requests(seed, n), []
    while waiting or engine.has_work:
        while waiting and rng.random() < 0.4:
            answers.append(engine.submit(*waiting.pop(0)))
        engine.step()
    return engine, answers


# ---- what is computed ----


@pytest.mark.parametrize("fields", KINDS)
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


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_under_load_every_token_has_the_probability_of_the_full_forward(
    seed: int, fields: dict
) -> None:
    """Batches, chunks of prompts, reused beginnings, moved slots: none may be seen in a logit."""
    model = tiny_model(seed, **fields)
    engine, answers = answer_under_load(model, seed, max_batch=4, prefill_chunk=6)
    assert engine.counters.n_cached_tokens > 50  # reuse took place
    for answer in answers:
        ids = token_ids(answer)
        with torch.no_grad():
            logits = model(torch.tensor([answer.prompt_ids + ids])).logits[0]
        expected = logits.log_softmax(dim=-1)[len(answer.prompt_ids) - 1 : -1]
        expected = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
        found = torch.tensor([token.logprob for token in answer.tokens])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("fields", KINDS)
def test_under_load_the_text_is_the_text_alone(fields: dict) -> None:
    model = tiny_model(5, **fields)
    _, answers = answer_under_load(model, 5, max_batch=5)
    alone = [ids_of(model, answer.options, answer.prompt_ids) for answer in answers]
    different = sum(token_ids(a) != ids for a, ids in zip(answers, alone, strict=True))
    assert different <= 1  # one may lie within rounding of another decision


@pytest.mark.parametrize("fields", KINDS)
def test_deterministic_is_the_same_bit_for_bit(fields: dict) -> None:
    model = tiny_model(1, **fields)
    settings = dict(max_batch=6, prefill_chunk=5, deterministic=True)
    engine, answers = answer_under_load(model, 1, **settings)
    assert engine.counters.n_cached_tokens == 0
    for answer in answers:
        alone = Engine(model, None, **settings)
        same = alone.submit(answer.prompt_ids, answer.options)
        run(alone)
        assert same.tokens == answer.tokens  # the log probabilities too


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


def test_lower_precision_answers_too() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert len(ids_of(tiny_model().to(dtype), SamplingOptions(seed=1, max_new_tokens=8))) == 8


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
    engine = Engine(model, None)
    with pytest.raises(ValueError, match=expected):
        engine.submit(prompt, GREEDY)
    assert not engine.has_work


def test_a_bias_on_an_id_that_is_not_there_is_refused(model: MiniMindForCausalLM) -> None:
    with pytest.raises(ValueError, match="logit_bias has the id 300, the model has vocab_size=300"):
        Engine(model, None).submit(PROMPT, SamplingOptions(logit_bias={300: 1.0}))


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        generate(tiny_model().train(), PROMPT, GREEDY)


@pytest.mark.parametrize("wrong", ["max_batch", "max_queue", "prefill_chunk"])
def test_sizes_of_zero_are_refused(model: MiniMindForCausalLM, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong}=0.* must be at least 1"):
        Engine(model, None, **{wrong: 0})


# ---- text ----


def test_pieces_join_to_the_text_and_the_last_one_says_why(
    talker: MiniMindForCausalLM, tokenizer: Tokenizer
) -> None:
    heard: dict[Answer, list[Piece]] = {}
    engine = Engine(talker, tokenizer, max_batch=3)
    for n in (1, 5, 20, 30):
        options = SamplingOptions(seed=n, max_new_tokens=n)
        engine.submit(PROMPT, options, lambda a, p: heard.setdefault(a, []).append(p))
    stepped = run(engine)
    assert len(heard) == 4
    for answer, pieces in heard.items():
        assert [p for a, p in stepped if a is answer] == pieces
        assert "".join(p.text for p in pieces) == answer.text
        assert answer.text == tokenizer.decode(token_ids(answer))
        assert [p.token for p in pieces] == answer.tokens
        assert [p.is_last for p in pieces] == [False] * (len(pieces) - 1) + [True]
        assert pieces[-1].finish_reason == answer.finish_reason == "length"


def test_a_stop_string_ends_an_answer_and_frees_its_slot(
    talker: MiniMindForCausalLM, tokenizer: Tokenizer
) -> None:
    engine = Engine(talker, tokenizer, max_batch=1)
    first = engine.submit(PROMPT, GREEDY)
    whole = "".join(engine.stream(first))
    assert whole == first.text and engine.n_active == 0
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    second = engine.submit(
        PROMPT, SamplingOptions(temperature=0, max_new_tokens=24, stop=[stop, "never"])
    )
    assert "".join(engine.stream(second)) == whole[: whole.index(stop)]
    assert second.finish_reason == "stop" and len(second.tokens) < 24 and engine.n_active == 0


def test_what_was_held_back_for_a_stop_string_comes_with_the_last_piece(
    talker: MiniMindForCausalLM, tokenizer: Tokenizer
) -> None:
    engine = Engine(talker, tokenizer, max_batch=1)
    for n in range(1, 20):
        options = SamplingOptions(temperature=0, max_new_tokens=n)
        whole = "".join(engine.stream(engine.submit(PROMPT, options)))
        held = SamplingOptions(temperature=0, max_new_tokens=n, stop=[whole[-2:] + "never"])
        assert "".join(engine.stream(engine.submit(PROMPT, held))) == whole


def test_an_answer_tells_how_it_went(talker: MiniMindForCausalLM, tokenizer: Tokenizer) -> None:
    engine = Engine(talker, tokenizer, max_batch=1)
    answer = engine.submit(PROMPT, SamplingOptions(temperature=0, max_new_tokens=20))
    assert answer.time_to_first_token_s is None
    assert "".join(engine.stream(answer)) == answer.text
    assert 0 <= answer.queued_s < answer.time_to_first_token_s and answer.decode_s > 0
    assert answer.queued_s + answer.prefill_s == pytest.approx(answer.time_to_first_token_s)
    assert answer.speed.startswith("prompt 5 tokens, ") and "answer 20 tokens, " in answer.speed
    again = engine.submit(PROMPT, SamplingOptions(temperature=0, max_new_tokens=2))
    run(engine)
    assert again.speed.startswith("prompt 5 tokens (4 of them known), ")


# ---- reuse ----


@pytest.mark.parametrize("max_batch", [1, 3])
def test_the_next_turn_computes_only_what_is_new(
    model: MiniMindForCausalLM, max_batch: int
) -> None:
    engine = Engine(model, None, max_batch=max_batch)
    first = engine.submit(PROMPT, GREEDY)
    run(engine)
    said = token_ids(first)
    turn = [*PROMPT, *said, 50, 51, 52]
    second = engine.submit(turn, GREEDY)
    run(engine)
    # the last token of the first answer was chosen, but never computed on
    assert second.n_cached == len(PROMPT) + len(said) - 1
    assert token_ids(second) == ids_of(model, GREEDY, turn)
    third = engine.submit(turn, GREEDY)
    run(engine)
    assert third.n_cached == len(turn) - 1  # the last one's logits are what is wanted
    assert token_ids(third) == token_ids(second)
    assert engine.counters.n_cached_tokens == second.n_cached + third.n_cached


def test_a_beginning_is_shared_with_a_request_under_way(model: MiniMindForCausalLM) -> None:
    engine = Engine(model, None, max_batch=4)
    system = list(range(60, 90))
    long = SamplingOptions(temperature=0, max_new_tokens=20)
    answers = [engine.submit([*system, i], long) for i in (5, 6, 7)]
    run(engine)
    assert [answer.n_cached for answer in answers] == [0, 30, 30]
    for i, answer in zip((5, 6, 7), answers, strict=True):
        assert token_ids(answer) == ids_of(model, long, [*system, i])


def test_conversations_that_begin_alike_keep_what_is_their_own(model: MiniMindForCausalLM) -> None:
    """Everyone's prompt begins with the same system text; a newcomer takes nobody's slot."""
    engine = Engine(model, None, max_batch=4)
    options = SamplingOptions(temperature=0, max_new_tokens=2)
    system = list(range(60, 70))
    talks = {user: [*system, *range(user, user + 8)] for user in (100, 150, 200)}
    cached: dict[int, list[int]] = {user: [] for user in talks}
    for turn in range(3):
        for user, talk in talks.items():
            (answer,) = engine.answer_all([talk], options)
            assert token_ids(answer) == ids_of(model, options, talk)
            cached[user].append(answer.n_cached)
            talk += [*token_ids(answer), 80 + turn, 90 + turn]
    assert cached == {100: [0, 19, 23], 150: [10, 19, 23], 200: [10, 19, 23]}


def test_a_new_branch_of_a_conversation_goes_on_from_where_it_parts(
    model: MiniMindForCausalLM,
) -> None:
    engine = Engine(model, None, max_batch=1)
    talk = list(range(60, 90))
    for prompt in ([*talk, 5, 6, 7], [*talk, 8, 9], talk[:10] + [4, 3]):
        (answer,) = engine.answer_all([prompt], GREEDY)
        assert token_ids(answer) == ids_of(model, GREEDY, prompt)
    assert answer.n_cached == 10  # the only slot: what it holds is worth more than nothing


def test_what_was_used_longest_ago_gives_way(model: MiniMindForCausalLM) -> None:
    engine = Engine(model, None, max_batch=2)

    def cached(start: int) -> int:
        answer = engine.submit(
            list(range(start, start + 10)), SamplingOptions(temperature=0, max_new_tokens=2)
        )
        run(engine)
        return answer.n_cached

    assert [cached(100), cached(200), cached(100), cached(30)] == [0, 0, 9, 0]
    assert [cached(100), cached(200)] == [9, 0]  # 200 made room for 30


def test_many_prompts_are_answered_in_their_order(
    talker: MiniMindForCausalLM, tokenizer: Tokenizer
) -> None:
    engine = Engine(talker, tokenizer, max_batch=3, max_queue=2)
    prompts = [[i, i + 1, 9] for i in range(20, 31)]
    answers = engine.answer_all(prompts, GREEDY)
    assert [answer.prompt_ids for answer in answers] == prompts
    assert [token_ids(answer) for answer in answers] == [
        ids_of(talker, GREEDY, prompt) for prompt in prompts
    ]


# ---- side by side ----


class Watch:
    """Counts the tokens of each forward of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        self._hook = model.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.shapes.append(tuple(args[0].shape))

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()


def test_a_long_prompt_does_not_hold_up_the_others(model: MiniMindForCausalLM) -> None:
    engine = Engine(model, None, max_batch=3, prefill_chunk=4)
    others = [engine.submit([9, i], GREEDY) for i in (3, 4)]
    engine.step()
    long = engine.submit(list(range(100, 130)), GREEDY)
    n_before = [len(other.tokens) for other in others]
    n_steps = 0
    with Watch(model) as watch:
        while not long.tokens:
            engine.step()
            n_steps += 1
            n_now = [len(other.tokens) for other in others]
            assert n_now == [n + n_steps for n in n_before]  # a token each in every step
    assert n_steps == 8
    assert all(T <= 4 for _, T in watch.shapes)


def test_short_prompts_share_a_step(model: MiniMindForCausalLM) -> None:
    engine = Engine(model, None, max_batch=8, prefill_chunk=20)
    answers = [engine.submit([i, i + 1, i + 2], GREEDY) for i in range(10, 15)]
    engine.step()
    assert [len(answer.tokens) for answer in answers] == [2] * 5  # the prompt's, then a step's


def test_a_batch_is_as_large_as_the_requests_are_many(model: MiniMindForCausalLM) -> None:
    engine = Engine(model, None, max_batch=6)
    for n in (2, 4, 12):
        engine.submit([n, 5], SamplingOptions(temperature=0, max_new_tokens=n))
    with Watch(model) as watch:
        run(engine)
    batches = [B for B, T in watch.shapes if T == 1]
    assert batches == [3] + [2] * 2 + [1] * 8


def test_requests_beyond_the_slots_wait_and_beyond_the_queue_are_refused(
    model: MiniMindForCausalLM,
) -> None:
    engine = Engine(model, None, max_batch=2, max_queue=3)
    # two can start at once and three wait, whether or not a step has come between
    answers = [engine.submit([i + 3], GREEDY) for i in range(5)]
    with pytest.raises(QueueFull, match="3 requests wait already"):
        engine.submit([9], GREEDY)
    engine.step()
    with pytest.raises(QueueFull, match="3 requests wait already"):
        engine.submit([9], GREEDY)
    assert (engine.n_active, engine.n_queued) == (2, 3)
    run(engine)
    assert [answer.finish_reason for answer in answers] == ["length"] * 5
    assert [token_ids(a) for a in answers] == [ids_of(model, GREEDY, a.prompt_ids) for a in answers]
    counters = engine.counters
    assert (counters.n_requests, counters.n_finished) == (5, 5)
    assert (counters.n_prompt_tokens, counters.n_new_tokens) == (5, 5 * 24)


@pytest.mark.parametrize("seed", range(4))
def test_whoever_gives_up_leaves_the_others_alone(model: MiniMindForCausalLM, seed: int) -> None:
    """Cancelled in the queue, in the prompt, and in the answer, at random."""
    rng = random.Random(seed)
    engine = Engine(model, None, max_batch=3, prefill_chunk=4)
    answers = [engine.submit(*request) for request in random_requests(seed)]
    while engine.has_work:
        if rng.random() < 0.3:
            given_up = rng.choice(answers)
            engine.cancel(given_up)
            engine.step()
            assert given_up.is_done  # its slot is free within one step
        engine.step()
        assert engine.n_active <= 3
    assert all(answer.is_done for answer in answers)
    reasons = {answer.finish_reason for answer in answers}
    assert "cancelled" in reasons and "length" in reasons
    for answer in answers:
        alone = ids_of(model, answer.options, answer.prompt_ids)
        assert token_ids(answer) == alone[: len(answer.tokens)]
    counters = engine.counters
    assert counters.n_finished + counters.n_cancelled == counters.n_requests == len(answers)


def test_a_reader_that_breaks_off_frees_the_slot(
    talker: MiniMindForCausalLM, tokenizer: Tokenizer
) -> None:
    engine = Engine(talker, tokenizer, max_batch=1)
    answer = engine.submit(PROMPT, GREEDY)
    reader = engine.stream(answer)
    first = next(reader)
    reader.close()
    assert answer.finish_reason == "cancelled" and answer.text.startswith(first)
    assert not engine.has_work


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc (Linux)")
def test_a_slot_takes_memory_only_as_it_is_filled() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    model = tiny_model(max_seq_len=100_000)
    engine = Engine(model, None, max_batch=16)
    before = resident()
    engine.answer_all([PROMPT] * 3, GREEDY)
    reserved = sum(t.nbytes for pair in engine._cache._layers.values() for t in pair)
    assert reserved > 800e6 and resident() - before < 0.1 * reserved


# ---- accidents ----


def test_broken_weights_are_reported() -> None:
    model = tiny_model()
    model.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        next(generate(model, PROMPT, GREEDY))


def test_one_request_with_broken_numbers_ends_alone(model: MiniMindForCausalLM) -> None:
    engine = Engine(model, None)
    good = engine.submit(PROMPT, GREEDY)
    bad = engine.submit([7, 8, 9], GREEDY)
    engine.step()

    def spoil(module: nn.Module, args: object, out: Tensor) -> Tensor:
        out[bad_row] = math.nan
        return out

    bad_row = 1
    hook = model.output.register_forward_hook(spoil)
    engine.step()
    hook.remove()
    run(engine)
    assert isinstance(bad.error, ValueError) and bad.finish_reason is None
    assert token_ids(good) == ids_of(model, GREEDY)
    assert engine.counters.n_failed == 1


def test_an_error_in_the_model_ends_those_under_way_and_no_others(
    model: MiniMindForCausalLM,
) -> None:
    engine = Engine(model, None, max_batch=2)
    answers = [engine.submit([i, 8, 9], GREEDY) for i in (3, 4, 5, 6)]
    engine.step()

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    hook = model.layers[1].register_forward_pre_hook(fail)
    pieces = engine.step()
    hook.remove()
    assert [str(piece.error) for _, piece in pieces] == ["out of memory"] * 2
    run(engine)
    assert [answer.error is None for answer in answers] == [False, False, True, True]
    for answer in answers[2:]:
        assert token_ids(answer) == ids_of(model, GREEDY, answer.prompt_ids)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(engine.stream(answers[0]))


def test_ctrl_c_in_a_step_comes_through_and_the_engine_goes_on(model: MiniMindForCausalLM) -> None:
    engine = Engine(model, None)
    answer = engine.submit(PROMPT, GREEDY)
    engine.step()

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    hook = model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    hook.remove()
    assert answer.is_done and not engine.has_work
    again = engine.submit(PROMPT, GREEDY)
    run(engine)
    assert token_ids(again) == ids_of(model, GREEDY) and again.n_cached == 0


def test_an_error_in_one_answers_text_is_its_own(
    talker: MiniMindForCausalLM, tokenizer: Tokenizer
) -> None:
    class Broken:
        """Cannot decode one id."""

        def decode(self, ids: list[int]) -> str:
            if bad_id in ids:
                raise KeyError(bad_id)
            return tokenizer.decode(ids)

    options = [SamplingOptions(seed=i, max_new_tokens=12) for i in range(3)]
    expected = [ids_of(talker, o) for o in options]
    others = {i for ids in (expected[0], expected[2]) for i in ids}
    bad_id = next(i for i in expected[1] if i not in others)
    engine = Engine(talker, Broken(), max_batch=3)
    answers = [engine.submit(PROMPT, o) for o in options]
    run(engine)
    assert [type(answer.error) for answer in answers] == [type(None), KeyError, type(None)]
    assert [token_ids(answers[i]) for i in (0, 2)] == [expected[0], expected[2]]


def test_an_error_on_the_way_into_a_slot_ends_that_request(
    model: MiniMindForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, None)
    engine.answer_all([PROMPT], GREEDY)

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._cache, "swap", fail)
    answer = engine.submit([7, 8, 9], GREEDY)
    run(engine)
    assert str(answer.error) == "out of memory" and engine.counters.n_failed == 1


# ---- a thread of its own ----


@pytest.fixture
def thread(talker: MiniMindForCausalLM, tokenizer: Tokenizer) -> Iterator[EngineThread]:
    thread = EngineThread(Engine(talker, tokenizer, max_batch=3, max_queue=100))
    thread.start()
    yield thread
    thread.close()
    assert not thread.is_alive


def test_many_threads_read_their_own_answers(
    thread: EngineThread, talker: MiniMindForCausalLM
) -> None:
    said: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        answer = thread.submit([i, 40], SamplingOptions(seed=i, max_new_tokens=20))
        tokens = [piece.token for piece in thread.iterate(answer)]
        said[i] = [token.id for token in tokens if isinstance(token, Token)]

    askers = [threading.Thread(target=ask, args=(i,)) for i in range(3, 15)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(60)
    for i in range(3, 15):
        assert said[i] == ids_of(talker, SamplingOptions(seed=i, max_new_tokens=20), [i, 40])
    assert thread._inboxes == {}


def test_a_reader_in_another_thread_may_break_off(tokenizer: Tokenizer) -> None:
    endless = tiny_model(vocab_size=tokenizer.vocab_size, max_seq_len=100_000)
    thread = EngineThread(Engine(endless, tokenizer, max_batch=1))
    thread.start()
    answer = thread.submit(
        PROMPT, SamplingOptions(seed=1, logit_bias={2: -1000}, max_new_tokens=5000)
    )
    for _ in thread.iterate(answer):
        break
    after = thread.submit(PROMPT, SamplingOptions(max_new_tokens=1))  # waits for the only slot
    assert [piece.is_last for piece in thread.iterate(after)][-1]
    assert answer.finish_reason == "cancelled"
    thread.close()


def test_closing_ends_every_reader(talker: MiniMindForCausalLM, tokenizer: Tokenizer) -> None:
    thread = EngineThread(Engine(talker, tokenizer, max_batch=1))
    thread.start()
    answers = [thread.submit(PROMPT, SamplingOptions(seed=i)) for i in range(5)]
    thread.close()
    for answer in answers:
        assert list(thread.iterate(answer))[-1].is_last
    with pytest.raises(QueueFull, match="being stopped"):
        thread.submit(PROMPT, GREEDY)


def test_what_is_done_apart_leaves_no_thread() -> None:
    before = threading.enumerate()
    found = apart(lambda: (threading.current_thread(), torch.ones(3).sum()))
    assert found[0] not in before and not found[0].is_alive() and found[1] == 3
    assert threading.enumerate() == before
    with pytest.raises(FileNotFoundError, match="gone"):
        apart(lambda: open("gone"))


def test_one_delivery_a_step(talker: MiniMindForCausalLM, tokenizer: Tokenizer) -> None:
    deliveries: list[list[tuple[Answer, Piece]]] = []
    done = threading.Event()

    def deliver(pieces: list[tuple[Answer, Piece]]) -> None:
        deliveries.append(pieces)
        if sum(piece.is_last for pieces in deliveries for _, piece in pieces) == 4:
            done.set()

    thread = EngineThread(Engine(talker, tokenizer, max_batch=4), deliver)
    answers = [thread.submit([i, 5], SamplingOptions(seed=i, max_new_tokens=12)) for i in range(4)]
    thread.start()
    assert done.wait(60)
    thread.close()
    assert max(map(len, deliveries)) == 8  # the first step: a prompt's token and a next one each
    assert len(deliveries) == 11
    for answer in answers:
        pieces = [p for pieces in deliveries for a, p in pieces if a is answer]
        assert "".join(piece.text for piece in pieces) == answer.text


def test_a_thread_that_fails_says_why(talker: MiniMindForCausalLM, tokenizer: Tokenizer) -> None:
    raised: list[str] = []

    def deliver(pieces: Sequence[object]) -> None:
        raise RuntimeError("no one takes this")

    before, threading.excepthook = threading.excepthook, lambda args: raised.append(str(args[1]))
    try:
        thread = EngineThread(Engine(talker, tokenizer), deliver)
        thread.start()
        thread.submit(PROMPT, GREEDY)
        thread._thread.join(60)
    finally:
        threading.excepthook = before
    assert not thread.is_alive and raised == ["no one takes this"]
    with pytest.raises(QueueFull, match="the engine has failed: no one takes this"):
        thread.submit(PROMPT, GREEDY)
