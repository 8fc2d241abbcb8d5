"""Packing: which pieces of which documents stand in which row, a pure function of the lengths.

:func:`open_plan` packs the documents of a token store into rows and keeps the plan in the store's
folder; :func:`read_rows` gives the tokens of any rows.
"""

import hashlib
import os
import shutil
import time
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PLAN_VERSION = 1
LENGTH_BITS = 20  # a piece is one uint64: its position << 20 | its length
MAX_ROW_TOKENS = 2**LENGTH_BITS - 1
WINDOW_DOCUMENTS = 1 << 17  # packed together: bounds the memory of planning, costs < 0.1 % of a row
HEADER = np.dtype(
    [("magic", "S8"), ("key", "<u8"), ("n_rows", "<u8"), ("n_pieces", "<u8"), ("n_tokens", "<u8")]
)
MAGIC = b"MINIPLAN"


# ---------------------------------------------------------------- packing


def cut_documents(
    lengths: np.ndarray, row_tokens: int, *, cut: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pieces of documents: (document, start, length), each (n_pieces,) int64.

    A document that fits a row is one piece. A longer one is cut into pieces of ``row_tokens`` and a
    tail; each piece begins with the last token of the one before, because the first token of a
    piece is no target: so each token but a document's first is a target exactly once. Documents of
    length 0 give nothing.

    Raises:
        ValueError: a document is longer than a row and ``cut`` is false.
    """
    lengths = np.asarray(lengths, np.int64)
    step = row_tokens - 1
    counts = np.where(lengths > row_tokens, -(-(lengths - 1) // step), lengths > 0)
    if not cut and (counts > 1).any():
        longest = int(lengths.max())
        raise ValueError(
            f"a document has {longest} tokens, but a row {row_tokens}: "
            "fit documents before they go into the store, or let them be cut"
        )
    documents = np.repeat(np.arange(len(lengths)), counts)
    starts = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts *= step
    return documents, starts, np.minimum(lengths[documents] - starts, row_tokens)


def pack(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces into rows, each filled with the longest pieces that still fit.

    First-fit decreasing (Johnson, 1973) on the histogram of lengths: the filling of a row is
    repeated as long as there are pieces for it, so the work grows with the number of different
    fillings.

    Args:
        lengths: (n,) tokens of each piece, 1 … ``row_tokens``.
        row_tokens: tokens of a row.

    Returns:
        ``order`` (n,): piece numbers row by row; ``sizes`` (n_rows,): how many each row holds.
    """
    lengths = np.asarray(lengths)
    small = lengths.astype(np.uint16) if row_tokens < 2**16 else lengths
    by_length = np.argsort(small, kind="stable")  # a radix sort for uint16
    present, first, counts = np.unique(small[by_length], return_index=True, return_counts=True)
    present = present.tolist()
    left = dict(zip(present, counts.tolist(), strict=True))
    taken = dict(zip(present, first.tolist(), strict=True))
    blocks: list[np.ndarray] = []
    sizes: list[tuple[int, int]] = []  # (pieces in a row, number of such rows)
    while present:
        filling: list[tuple[int, int]] = []  # (length, how many of it)
        room, high = row_tokens, len(present)
        while high := bisect_right(present, room, 0, high):
            length = present[high - 1]
            n = min(room // length, left[length])
            filling.append((length, n))
            room -= n * length
            high -= 1
        n_rows = min(left[length] // n for length, n in filling)
        columns = []
        for length, n in filling:
            begin = taken[length]
            columns.append(by_length[begin : begin + n * n_rows].reshape(n_rows, n))
            taken[length] += n * n_rows
            left[length] -= n * n_rows
            if not left[length]:
                del present[bisect_right(present, length) - 1]
        block = np.concatenate(columns, axis=1) if len(columns) > 1 else columns[0]
        blocks.append(block.ravel())
        sizes.append((block.shape[1], n_rows))
    if not blocks:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(blocks), np.repeat(*np.array(sizes, np.int64).T)


def _windows(
    store: Any, skip: np.ndarray, row_tokens: int, cut: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (positions, lengths) of pieces, those of a window of documents at a time."""
    for begin in range(0, store.n_documents, WINDOW_DOCUMENTS):
        bounds = store.bounds(begin, min(begin + WINDOW_DOCUMENTS, store.n_documents))
        positions, lengths = bounds[:-1], np.diff(bounds)
        left_out = skip[slice(*np.searchsorted(skip, (begin, begin + WINDOW_DOCUMENTS)))]
        lengths[left_out - begin] = 0
        # giant documents have many pieces: then the window is split
        n_pieces = np.cumsum(lengths // (row_tokens - 1) + 1)
        edges = np.flatnonzero(np.diff(n_pieces // (2 * WINDOW_DOCUMENTS))) + 1
        for part in np.split(np.arange(len(lengths)), edges):
            documents, starts, piece_lengths = cut_documents(lengths[part], row_tokens, cut=cut)
            yield positions[part][documents] + starts, piece_lengths


# ---------------------------------------------------------------- the plan and its file


class Plan:
    """Which pieces of which documents each row holds, read from a file in the store's folder.

    ``n_rows``, ``n_pieces``, ``n_tokens`` (positions in use) and ``row_tokens`` are its size.

    Raises:
        ValueError: the file is damaged or not the plan of this ``key``.
    """

    def __init__(self, store: Any, path: Path, row_tokens: int, key: int) -> None:
        self._arguments = store, path, row_tokens, key
        with open(path, "rb") as file:
            header = file.read(HEADER.itemsize).ljust(HEADER.itemsize, b"\0")
        magic, found_key, *counts = np.frombuffer(header, HEADER)[0].tolist()
        if magic != MAGIC or found_key != key:
            raise ValueError(f"{path} is not the plan asked for")
        self.path, self.row_tokens = path, row_tokens
        self.n_rows, self.n_pieces, self.n_tokens = counts
        n_values = self.n_pieces + self.n_rows + 1
        self._file = store.piece_file(path.name, "<u8", n_values, header_bytes=HEADER.itemsize)

    def __reduce__(self) -> tuple:
        return Plan, self._arguments

    @property
    def utilisation(self) -> float:
        """Share of the rows' positions that hold a token."""
        return self.n_tokens / max(1, self.n_rows * self.row_tokens)

    def pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the pieces of ``rows``: token positions, lengths, and how many in each row."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (0 <= rows.min() and rows.max() < self.n_rows):
            raise IndexError(f"rows {rows.min()} … {rows.max()} of a plan that has {self.n_rows}")
        two = np.full(len(rows), 2)
        bounds = self._read(rows + self.n_pieces, two).reshape(len(rows), 2)  # row starts, two each
        counts = bounds[:, 1] - bounds[:, 0]
        packed = self._read(bounds[:, 0], counts)
        return packed >> LENGTH_BITS, packed & MAX_ROW_TOKENS, counts

    def _read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        ends = np.cumsum(lengths)
        out = np.empty(ends[-1] if len(ends) else 0, np.uint64)
        self._file.gather(starts, lengths, ends - lengths, out)
        return out.astype(np.int64)


def open_plan(
    store: Any,
    row_tokens: int,
    *,
    cut: bool = True,
    alone: bool = False,
    hold_out: bool = True,
) -> Plan:
    """Return the packing plan of a store, made and kept in the store's folder when first asked for.

    The plan is a function of the documents' lengths and these arguments alone.

    Args:
        store: a ``TokenStore``.
        row_tokens: tokens of a row, ``max_seq_len + 1``.
        cut: cut documents that are longer than a row; if false, they are an error.
        alone: one piece a row, padded, as in v1; by default rows are packed.
        hold_out: leave the store's held-out documents out.

    Raises:
        ValueError: ``row_tokens`` out of range, or a document longer than a row with ``cut=False``.
        OSError: the plan cannot be written.
    """
    if not 2 <= row_tokens <= MAX_ROW_TOKENS:
        raise ValueError(
            f"row_tokens={row_tokens}: a row has 2 … {MAX_ROW_TOKENS} tokens (max_seq_len + 1)"
        )
    skip = np.sort(store.held_out) if hold_out else np.empty(0, np.int64)
    decisive = [PLAN_VERSION, store.manifest["lengths_hash"], skip.tolist()]
    decisive += [row_tokens, cut, alone, WINDOW_DOCUMENTS]
    digest = hashlib.blake2b(repr(decisive).encode(), digest_size=8)
    key = int.from_bytes(digest.digest(), "little")
    path = store.folder / f"plan-{row_tokens}-{digest.hexdigest()}.bin"
    if path.is_file():
        try:
            return Plan(store, path, row_tokens, key)
        except ValueError:
            pass  # damaged: made anew below
    _write_plan(path, _windows(store, skip, row_tokens, cut), row_tokens, alone, key)
    return Plan(store, path, row_tokens, key)


def _write_plan(
    path: Path,
    windows: Iterator[tuple[np.ndarray, np.ndarray]],
    row_tokens: int,
    alone: bool,
    key: int,
) -> None:
    """Stream a plan to ``path``; it appears there complete or not at all."""
    for leftover in path.parent.glob("plan-*.tmp"):
        if time.time() - leftover.stat().st_mtime > 3600:  # of a killed process
            leftover.unlink(missing_ok=True)
    pieces_path = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # other ranks may write the same
    rows_path = path.with_name(f"{path.name}.{os.getpid()}.rows.tmp")
    n_rows = n_pieces = n_tokens = 0
    try:
        with open(pieces_path, "wb") as pieces_file, open(rows_path, "w+b") as rows_file:
            pieces_file.write(np.zeros(1, HEADER).data)
            rows_file.write(np.zeros(1, "<u8").data)
            for positions, lengths in windows:
                if alone:
                    order, sizes = np.arange(len(lengths)), np.ones(len(lengths), np.int64)
                else:
                    order, sizes = pack(lengths, row_tokens)
                packed = (positions << LENGTH_BITS) | lengths
                pieces_file.write(packed[order].astype("<u8").data)
                rows_file.write((np.cumsum(sizes) + n_pieces).astype("<u8").data)
                n_pieces += len(order)
                n_rows += len(sizes)
                n_tokens += int(lengths.sum())
            rows_file.seek(0)
            shutil.copyfileobj(rows_file, pieces_file, 1 << 20)
            pieces_file.seek(0)
            pieces_file.write(np.array([(MAGIC, key, n_rows, n_pieces, n_tokens)], HEADER).data)
            pieces_file.flush()
            os.fsync(pieces_file.fileno())
        os.replace(pieces_path, path)
    except OSError as error:
        raise OSError(
            f"cannot write {path} ({error.strerror}), about 10 bytes a document: "
            "free some space, or make the folder writable"
        ) from error
    finally:
        pieces_path.unlink(missing_ok=True)
        rows_path.unlink(missing_ok=True)


class Rows(NamedTuple):
    """Rows of a plan. ``T1`` is ``row_tokens``: T inputs and T targets, shifted by one."""

    tokens: np.ndarray  # (B, T1) int64; 0 on padding
    segments: np.ndarray  # (B, T1) int32: number of the piece within its row, from 0; -1 on padding
    mask: np.ndarray | None  # (B, T1) bool: trained, as stored; None if the store has no mask


def read_rows(store: Any, plan: Plan, rows: np.ndarray) -> Rows:
    """Return the given rows. The first token of a segment is no target of the segment before it."""
    B, T1 = len(rows), plan.row_tokens
    positions, lengths, counts = plan.pieces(rows)
    n = len(positions)
    ends = np.cumsum(lengths)
    last = np.cumsum(counts) - 1  # of each row, its last piece
    used = np.diff(ends[last], prepend=0)  # (B,) tokens of each row
    row = np.repeat(np.arange(B), counts)
    within = np.arange(n) - np.repeat(last + 1 - counts, counts)
    destinations = ends - lengths + row * T1 - np.repeat(np.cumsum(used) - used, counts)

    tokens = np.zeros(B * T1, np.uint16)
    mask = np.zeros(B * T1, np.uint8) if store.has_mask else None
    store.gather(positions, lengths, destinations, tokens, mask)
    # each row's padding as one more piece, so that all pieces together fill the rows exactly
    numbers = np.insert(within, last + 1, -1).astype(np.int32)
    segments = np.repeat(numbers, np.insert(lengths, last + 1, T1 - used))
    shape = (B, T1)
    return Rows(
        tokens.astype(np.int64).reshape(shape),
        segments.reshape(shape),
        None if mask is None else mask.view(bool).reshape(shape),
    )
