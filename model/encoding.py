"""Text to ids, in bulk: all cores, constant memory, the way into a token store."""

import hashlib
import os
import string
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np

# Enough for all cores, but no more: with eight times as much the tokenizer's bookkeeping (150 bytes
# a token) goes back to the system after each batch and is faulted in again, a tenth of the time.
BATCH_CHARS = min(os.cpu_count() or 1, 16) << 16
BATCH_PIECES = 4096
PIECE_CHARS = 1 << 14  # a longer text is encoded in pieces: on all cores, and without much memory
BATCHES_IN_FLIGHT = 3
ASCII_LETTERS, ASCII_DIGITS = frozenset(string.ascii_letters), frozenset(string.digits)
WORD_BREAKS = frozenset(" \n.,，。、；：？！")


@dataclass
class Documents:
    """A batch of tokenised documents on its way into a store.

    Args:
        ids: (n_tokens,) integers, document after document.
        lengths: (n_documents,) tokens of each; 0 keeps a document's number but trains nothing.
        text_bytes: (n_documents,) UTF-8 bytes of the text whose tokens are trained.
        hashes: (n_documents,) uint64 :func:`content_hash`, which decides what is held out; if None,
            the ids are hashed, so that another tokenizer holds out other documents.
        mask: (n_tokens,) true where a token is trained, or None where all are.
    """

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    hashes: np.ndarray | None = None
    mask: np.ndarray | None = None


class BatchEncoder(Protocol):
    """What :func:`encode_documents` needs of a tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


def content_hash(text: str) -> int:
    """Return a 64-bit hash of a text, the same on every machine: BLAKE2b of its UTF-8 bytes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Yield consecutive pieces of at most ``max_chars`` characters; their ids join to the whole's.

    The regular expression of byte-level BPE always starts a new word at a space or line break after
    a letter or digit, and at punctuation after a letter; a cut there changes nothing. Only a
    stretch of ``max_chars`` / 2 characters without such a place is cut anywhere: it still decodes
    to its text.
    """
    start = 0
    while len(text) - start > max_chars:
        stop = start + max_chars
        for cut in range(stop, stop - max_chars // 2, -1):
            before, after = text[cut - 1], text[cut]
            is_letter = before in ASCII_LETTERS or "\u4e00" <= before <= "\u9fa5"
            if (is_letter and after in WORD_BREAKS) or (before in ASCII_DIGITS and after in " \n"):
                stop = cut
                break
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text


@dataclass
class _TextBatch:
    """Pieces of texts to encode together; the last text may go on in the next batch."""

    pieces: list[str] = field(default_factory=list)
    begins: list[bool] = field(
        default_factory=list
    )  # of each piece: is it the first of its document
    ends: list[bool] = field(default_factory=list)  # of each piece: is it the last
    text_bytes: list[int] = field(default_factory=list)  # of each document that ends in this batch
    hashes: list[int] = field(default_factory=list)


def _text_batches(texts: Iterable[str]) -> Iterator[_TextBatch]:
    batch, n_chars = _TextBatch(), 0
    for number, text in enumerate(texts):
        digest, n_bytes, begins = hashlib.blake2b(digest_size=8), 0, True
        pieces = split_text(text, PIECE_CHARS)
        piece = next(pieces)
        while piece is not None:
            following = next(pieces, None)
            try:
                data = piece.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"document {number} holds half a surrogate pair ({error.reason}): "
                    "clean the source with data_process.py"
                ) from None
            digest.update(data)
            n_bytes += len(data)
            batch.pieces.append(piece)
            batch.begins.append(begins)
            batch.ends.append(following is None)
            n_chars += len(piece)
            if following is None:
                batch.text_bytes.append(n_bytes)
                batch.hashes.append(int.from_bytes(digest.digest(), "little"))
            if n_chars >= BATCH_CHARS or len(batch.pieces) >= BATCH_PIECES:
                yield batch
                batch, n_chars = _TextBatch(), 0
            piece, begins = following, False
    if batch.pieces:
        yield batch


def encode_documents(
    texts: Iterable[str],
    tokenizer: BatchEncoder,
    *,
    bos_id: int,
    eos_id: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Documents]:
    """Yield ``texts`` as documents ``bos text eos``, in order, encoded on all cores.

    Reading (this thread), encoding (the tokenizer's threads, without the GIL) and what the consumer
    does with the batches overlap. Memory does not grow with the number of texts; a giant text costs
    a few times its own size.

    Args:
        texts: whole documents.
        tokenizer: has ``encode_batch``; ``RAYON_NUM_THREADS`` limits its threads.
        bos_id, eos_id: ids put before and after each text.
        progress: called after each batch with the documents and UTF-8 bytes that it completed.

    Raises:
        ValueError: a text that is not valid Unicode (half a surrogate pair).
    """

    def encode(batch: _TextBatch) -> tuple[_TextBatch, np.ndarray, np.ndarray]:
        encoded = tokenizer.encode_batch(batch.pieces)
        before = [[bos_id] if begins else [] for begins in batch.begins]
        after = [[eos_id] if ends else [] for ends in batch.ends]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        lengths += np.add(batch.begins, batch.ends, dtype=np.int64)
        parts = chain.from_iterable(zip(before, encoded, after, strict=True))
        ids = np.fromiter(chain.from_iterable(parts), np.uint16, int(lengths.sum()))
        return batch, ids, lengths

    open_ids: list[np.ndarray] = []  # what there is of a document that has not ended
    queue: deque[Future] = deque()
    batches = _text_batches(texts)
    pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")
    try:
        exhausted = False
        while queue or not exhausted:
            while not exhausted and len(queue) < BATCHES_IN_FLIGHT:
                batch = next(batches, None)
                exhausted = batch is None
                if batch is not None:
                    queue.append(pool.submit(encode, batch))
            if not queue:
                break
            batch, ids, piece_lengths = queue.popleft().result()
            piece_stops = np.cumsum(piece_lengths)
            stops = piece_stops[np.asarray(batch.ends)]
            if not len(stops):
                open_ids.append(ids)
                continue
            n_complete = stops[-1]
            lengths = np.diff(stops, prepend=0)
            lengths[0] += sum(map(len, open_ids))
            complete = ids[:n_complete]
            if open_ids:
                complete = np.concatenate([*open_ids, complete])
            open_ids = [ids[n_complete:]] if n_complete < len(ids) else []
            text_bytes = np.array(batch.text_bytes, np.int64)
            yield Documents(complete, lengths, text_bytes, np.array(batch.hashes, np.uint64))
            if progress is not None:
                progress(len(lengths), int(text_bytes.sum()))
    finally:
        pool.shutdown(cancel_futures=True)
