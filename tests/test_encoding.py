"""Text to ids in bulk: the same ids as one text at a time, whatever the pieces and batches."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from model import encoding
from model.encoding import content_hash, encode_documents, split_text

BOS, EOS = 1, 2
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and they're running; it's 42 or 1,000 metres.",
    "人工智能是计算机科学的一个分支，它企图了解智能的实质。\n\n机器学习、深度学习：都是方法！",
    "def main():\n    return [x ** 2 for x in range(10)]  # 平方\n",
]


class Encoder:
    """A byte-level BPE trained here, with the part of model.tokenizer.Tokenizer that is needed."""

    def __init__(self) -> None:
        self.bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        self.bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=True
        )
        self.bpe.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        self.bpe.train_from_iterator(CORPUS * 10, trainer)
        self.bpe.encode_special_tokens = True

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self.bpe.encode_batch_fast(texts)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


word = st.text("abcXYZ019人工智能é'", max_size=6)
separator = st.sampled_from(
    [" ", "  ", "\n", " \n ", "，", "。", ". ", ",", "\t", "\u3000", "'s ", ""]
)
prose = st.lists(st.tuples(word, separator), max_size=60).map(lambda t: "".join(map("".join, t)))


@settings(deadline=None, max_examples=150)
@given(text=prose, max_chars=st.integers(16, 64))
def test_pieces_join_to_the_text_and_to_its_ids(
    encoder: Encoder, text: str, max_chars: int
) -> None:
    pieces = list(split_text(text, max_chars))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= max_chars for piece in pieces) or text == ""
    ids = [i for piece in encoder.encode_batch(pieces) for i in piece]
    # a piece of full length may have been cut for want of a safe place, all others must be exact
    if all(len(piece) < max_chars for piece in pieces[:-1]):
        assert ids == encoder.encode_batch([text])[0]
    assert encoder.bpe.decode(ids) == text


def test_cutting_real_prose_changes_no_id(encoder: Encoder) -> None:
    text = "".join(CORPUS[i % 3] for i in range(300))
    for max_chars in (100, 257, 1000):
        pieces = list(split_text(text, max_chars))
        assert len(pieces) >= len(text) // max_chars
        ids = [i for piece in encoder.encode_batch(pieces) for i in piece]
        assert ids == encoder.encode_batch([text])[0]


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(st.one_of(prose, st.text(max_size=200)), max_size=30))
def test_documents_are_those_of_one_text_at_a_time(encoder: Encoder, texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH_CHARS", 50)  # many batches
        patch.setattr(encoding, "BATCH_PIECES", 3)
        patch.setattr(encoding, "PIECE_CHARS", 10**9)  # pieces have their own tests
        batches = list(encode_documents(texts, encoder, bos_id=BOS, eos_id=EOS))
    expected = [[BOS, *encoder.encode_batch([text])[0], EOS] for text in texts]
    assert [i for batch in batches for i in batch.ids.tolist()] == [i for d in expected for i in d]
    assert [n for batch in batches for n in batch.lengths.tolist()] == [len(d) for d in expected]
    n_bytes = [len(text.encode()) for text in texts]
    assert [n for batch in batches for n in batch.text_bytes.tolist()] == n_bytes
    hashes = [content_hash(text) for text in texts]
    assert [h for batch in batches for h in batch.hashes.tolist()] == hashes
    assert all(batch.ids.dtype == np.uint16 for batch in batches)


def test_a_giant_document_among_small_ones(encoder: Encoder, monkeypatch) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARS", 200)
    monkeypatch.setattr(encoding, "BATCH_CHARS", 500)
    giant = "".join(CORPUS[i % 3] for i in range(200))
    texts = ["短", giant, "short", giant, ""]
    batches = list(encode_documents(texts, encoder, bos_id=BOS, eos_id=EOS))
    ids = np.concatenate([batch.ids for batch in batches])
    lengths = np.concatenate([batch.lengths for batch in batches])
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    for text, document in zip(texts, documents, strict=True):
        assert document.tolist() == [BOS, *encoder.encode_batch([text])[0], EOS]
    hashes = np.concatenate([batch.hashes for batch in batches])
    assert hashes.tolist() == [content_hash(text) for text in texts]


def test_hash_is_pinned() -> None:
    """Another value would hold out other documents than before."""
    assert content_hash("你好") == int.from_bytes(bytes.fromhex("551c5a762e8ccedc"), "little")


def test_progress_counts_every_document_and_byte(encoder: Encoder) -> None:
    seen = []
    texts = CORPUS * 50
    calls = encode_documents(
        texts, encoder, bos_id=BOS, eos_id=EOS, progress=lambda n, size: seen.append((n, size))
    )
    for _ in calls:
        pass
    assert np.sum(seen, axis=0).tolist() == [len(texts), sum(len(t.encode()) for t in texts)]


def test_reading_is_lazy(encoder: Encoder, monkeypatch) -> None:
    """Only a few batches of an endless source are ever read ahead."""
    monkeypatch.setattr(encoding, "BATCH_PIECES", 10)
    n_read = 0

    def endless() -> Iterator[str]:
        nonlocal n_read
        while True:
            n_read += 1
            yield CORPUS[0]

    batches = encode_documents(endless(), encoder, bos_id=BOS, eos_id=EOS)
    assert len(next(batches).lengths) == 10
    assert n_read <= 10 * (encoding.BATCHES_IN_FLIGHT + 1)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("encode")]


def test_errors_come_through(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="document 1 holds half a surrogate pair"):
        list(encode_documents(["fine", "half \ud800"], encoder, bos_id=BOS, eos_id=EOS))

    def broken() -> Iterator[str]:
        yield "fine"
        raise ValueError("line 2 is broken")

    with pytest.raises(ValueError, match="line 2 is broken"):
        list(encode_documents(broken(), encoder, bos_id=BOS, eos_id=EOS))
    assert list(encode_documents([], encoder, bos_id=BOS, eos_id=EOS)) == []
