"""Prompts that are too long: whole messages leave, oldest first."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.prompts import fit_messages, fit_text, prompt_limit
from model.tokenizer import Tokenizer

LAW = settings(deadline=None)  # a busy machine is not a failure


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


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
