"""Text as it completes: pieces join to the whole, characters and stop strings stay whole."""

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.sampling import Token
from model.text_stream import TextStream, stream_text
from model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


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
    stream = TextStream(tokenizer, stop)
    text = tokenizer.decode(ids)
    said = "".join([*map(stream.push, ids), stream.finish()])
    assert said == cut_letter_by_letter(text, stop)
    assert stream.stopped == (said != text)
    assert "".join(stream_text(tokenizer, as_tokens(ids), stop)) == said


def test_the_stop_string_that_is_complete_first_counts(tokenizer: Tokenizer) -> None:
    """As if letter by letter, although the whole word is one token."""
    texts = ((i, tokenizer.decode([i])) for i in range(259, tokenizer.vocab_size))
    token_id, word = next((i, t) for i, t in texts if t.isalpha() and len(set(t)) == len(t) == 3)
    assert "".join(stream_text(tokenizer, as_tokens([token_id]), [word, word[1]])) == word[0]
    assert "".join(stream_text(tokenizer, as_tokens([token_id]), [word[1:], word])) == ""


def test_a_stop_string_may_come_with_the_last_broken_byte(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["b\ufffd"])
    said = [stream.push(i) for i in [*tokenizer.encode("ab"), BYTE_IDS[0xE4]]]
    assert "".join([*said, stream.finish()]) == "a" and stream.stopped


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
