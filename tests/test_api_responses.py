"""The objects and events of the API, held against the types of the openai package."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tokenizers import pre_tokenizers

from model.api_responses import (
    ChatForm,
    Chunks,
    CompletionForm,
    LogprobReader,
    TokenTable,
    byte_alphabet,
    event,
    to_json,
    tokens_of_text,
)
from model.generation import Answer, Engine, Piece
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.sampling import SamplingOptions, Token
from model.text_stream import TextStream
from model.tokenizer import EOS_ID, Tokenizer

PROMPT = [1, 40, 41, 42]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def table(tokenizer: Tokenizer) -> TokenTable:
    return TokenTable(tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    shape = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96)
    model = MiniMindForCausalLM(LMConfig(vocab_size=tokenizer.vocab_size, **shape)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    return model


@pytest.fixture(scope="module")
def answer(model, tokenizer) -> Callable[..., tuple[Answer, list[Piece]]]:
    """Return a function that answers a prompt and returns the answer with its pieces."""

    def make(**options: Any) -> tuple[Answer, list[Piece]]:
        engine = Engine(model, tokenizer, max_batch=1)
        pieces: list[Piece] = []
        wish = SamplingOptions(**{"max_new_tokens": 40, "temperature": 0, **options})
        made = engine.submit(PROMPT, wish, lambda _, piece: pieces.append(piece))
        while not made.is_done:
            engine.step()
        return made, pieces

    return make


def events_of(text: str) -> list[Any]:
    """Return the objects in events, read as the specification of server-sent events says."""
    blocks = text.split("\n\n")
    assert blocks.pop() == "" and all(block.startswith("data: ") for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def stream(form: Any, pieces: Sequence[Piece], table: Any, usage: bool = False) -> list[Any]:
    chunks = Chunks(form, 0, table, usage)
    return events_of(chunks.opening + "".join(chunks.of(piece) for piece in pieces))


# ----------------------------------------------------------------------------- JSON


@given(st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.floats(allow_nan=False)))
@example("a\u2028b\u2029c\x85d\n\r")
def test_json_is_one_line_for_every_reader(value: Any) -> None:
    text = to_json(value)
    assert json.loads(text) == value
    assert len(text.splitlines()) == 1


def test_json_is_readable() -> None:
    assert event({"a": "你好"}) == 'data: {"a":"你好"}\n\n'.encode()


# ----------------------------------------------------------------------------- token bytes


def test_the_alphabet_is_that_of_byte_level_tokenizers() -> None:
    assert byte_alphabet().keys() == set(pre_tokenizers.ByteLevel.alphabet())
    for text in ("Az09!~", "é你\u0000\n \u00ad🙂"):
        ((letters, _),) = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
        assert bytes(byte_alphabet()[letter] for letter in letters) == text.encode()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
@example(text="你好 world 🙂\n")
def test_the_bytes_of_tokens_join_to_the_text(tokenizer, table, text: str) -> None:
    ids = tokenizer.encode(text)
    assert b"".join(table.bytes_of(id) for id in ids) == text.encode()


def test_names_of_tokens_are_unique_in_a_completion(table: TokenTable, tokenizer) -> None:
    names = [table.key_of(id) for id in range(tokenizer.vocab_size)]
    assert len(set(names)) == len(names)


def test_special_tokens_have_a_name_and_no_bytes(table: TokenTable) -> None:
    assert table.entry(EOS_ID, -0.5) == {"token": "</s>", "logprob": -0.5, "bytes": None}
    assert table.entry(5, float("-inf"))["logprob"] == -9999.0  # JSON has no infinity


# ----------------------------------------------------------------------------- objects


def test_a_chat_is_what_openai_describes(answer, table) -> None:
    made, _ = answer(logprobs=3)
    form = ChatForm("m", "fp")
    logprobs = form.logprobs(table, tokens_of_text(table, made))
    body = json.loads(to_json(form.whole([form.choice(0, made, logprobs)], [made])))
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert parsed.choices[0].message.content == made.text
    assert body["choices"][0]["message"].keys() >= {"role", "content", "refusal"}
    assert parsed.usage.total_tokens == len(PROMPT) + len(made.tokens)
    top = parsed.choices[0].logprobs.content[0].top_logprobs
    assert len(top) == 3 and top[0].logprob >= top[1].logprob >= top[2].logprob


def test_a_completion_is_what_openai_describes(answer, table) -> None:
    made, _ = answer(logprobs=2)
    form = CompletionForm("m", "fp", echoed=["before"])
    logprobs = form.logprobs(table, tokens_of_text(table, made))
    body = json.loads(to_json(form.whole([form.choice(0, made, logprobs)], [made])))
    parsed = Completion.model_validate(body, strict=True)
    assert parsed.choices[0].text == "before" + made.text
    found = parsed.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset)


def test_a_prompt_counts_once_however_many_answers_it_has(answer) -> None:
    answers = [answer(seed=seed, temperature=1)[0] for seed in range(4)]
    body = ChatForm("m", "fp").whole([], answers)
    n_new = sum(len(a.tokens) for a in answers)
    assert body["usage"]["prompt_tokens"] == len(PROMPT)
    assert body["usage"]["completion_tokens"] == n_new
    two_prompts = CompletionForm("m", "fp").whole([], answers, n_prompts=2)
    assert two_prompts["usage"]["prompt_tokens"] == 2 * len(PROMPT)


# ----------------------------------------------------------------------------- streams


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("usage", [False, True])
def test_the_chunks_of_a_chat(answer, table, logprobs: int | None, usage: bool) -> None:
    made, pieces = answer(logprobs=logprobs, temperature=1, seed=1)
    form = ChatForm('a "model" 100%', "fp")
    chunks = stream(form, pieces, table if logprobs else None, usage)
    parsed = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    assert len({(c.id, c.created, c.model) for c in parsed}) == 1
    assert parsed[0].model == 'a "model" 100%'
    choices = [chunk.choices[0] for chunk in parsed]
    assert [c.delta.role for c in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert [c.finish_reason for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert "".join(c.delta.content or "" for c in choices) == made.text
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert all(("usage" in c) == usage and c.get("usage") is None for c in chunks)
    assert all("logprobs" in c["choices"][0] for c in chunks)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_the_chunks_of_a_completion(answer, table, logprobs: int | None) -> None:
    made, pieces = answer(logprobs=logprobs)
    form = CompletionForm("m", "fp", echoed=[] if logprobs else ["% before"])
    parsed = [
        Completion.model_validate({**chunk, "choices": [{**chunk["choices"][0], **end(chunk)}]})
        for chunk in stream(form, pieces, table if logprobs else None)
    ]
    text = "".join(chunk.choices[0].text for chunk in parsed)
    assert text == ("" if logprobs else "% before") + made.text
    if logprobs:
        offsets = [
            o for c in parsed if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset
        ]
        whole = form.logprobs(table, tokens_of_text(table, made))
        assert offsets == whole["text_offset"]


def end(chunk: dict[str, Any]) -> dict[str, Any]:
    """Return a finish reason: the package's type knows none of a chunk that is not the last."""
    return {"finish_reason": chunk["choices"][0]["finish_reason"] or "stop"}


def test_tokens_of_logprobs_spell_the_text_and_nothing_of_a_stop_string(answer, table) -> None:
    for seed in range(4):
        free, _ = answer(temperature=1, seed=seed)
        stop = free.text[len(free.text) // 2 :][:2]  # comes for sure, at whatever place in a token
        made, pieces = answer(temperature=1, seed=seed, stop=(stop,), logprobs=0)
        assert made.finish_reason == "stop" and stop not in made.text
        chunks = stream(ChatForm("m", "fp"), pieces, table)
        streamed = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
        entries = [entry for logprobs in streamed for entry in logprobs["content"]]
        tokens = tokens_of_text(table, made)
        assert [e["logprob"] for e in entries] == [token.logprob for token in tokens]
        spelled = [bytes(e["bytes"] or []) for e in entries]
        if "\ufffd" not in made.text:
            assert b"".join(spelled).startswith(made.text.encode())
            assert len(b"".join(spelled[:-1])) < len(made.text.encode()) or not made.text


SURROGATE = [172, 257, 35]  # the bytes ed a0, of which Python's decoder waits for a third
BYTES = st.lists(st.integers(3, 258) | st.integers(3, 6399), max_size=8)  # single ones come first


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=BYTES)
@example(ids=SURROGATE)
def test_offsets_are_those_in_the_text_even_where_bytes_are_no_text(tokenizer, table, ids) -> None:
    expected = [len(tokenizer.decode(ids[:i])) for i in range(len(ids))]
    tokens = [Token(id) for id in ids]
    assert CompletionForm("m", "fp").logprobs(table, tokens)["text_offset"] == expected
    chunks = stream(CompletionForm("m", "fp"), pieces_of(tokenizer, ids), table)
    given = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [offset for one in given for offset in one["text_offset"]] == expected


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int], stop: str = "") -> list[Piece]:
    text = TextStream(tokenizer, (stop,) if stop else ())
    pieces = [Piece(text.push(id), Token(id)) for id in ids]
    return [*pieces, Piece(text.finish(), finish_reason="stop")]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=BYTES)
def test_a_stop_string_after_bytes_that_are_no_text(tokenizer, table, ids: list[int]) -> None:
    stop = "STOP"
    pieces = pieces_of(tokenizer, [*ids, *tokenizer.encode(stop)], stop)
    reader = LogprobReader(table)
    assert [token.id for piece in pieces for token in reader.read(piece)] == ids


def test_the_end_token_is_not_part_of_an_answer(answer, table) -> None:
    made, pieces = answer(logprobs=1, logit_bias={EOS_ID: 100.0})
    assert made.finish_reason == "stop" and made.text == ""
    assert tokens_of_text(table, made) == []
    chunks = stream(ChatForm("m", "fp"), pieces, table)
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, "stop"]
