"""Writing a token store: built beside its place, synced, renamed.

A build that is killed leaves ``<name>.tokens.tmp/``, which nothing takes for a store and which the
next build removes.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .encoding import Documents
from .tokens import StaleStore, StoreKey, TokenStore, describe_source, open_store, write_manifest

try:
    import fcntl
except ImportError:  # Windows: two builds of one store at once are not kept apart there
    fcntl = None

SHARD_TOKENS = 2**28  # 512 MiB a file
HELD_OUT_MODULUS, HELD_OUT_MAX = 200, 2000


def write_store(
    folder: str | Path,
    key: StoreKey,
    documents: Iterable[Documents],
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenStore:
    """Write ``documents`` as the store ``folder``, in place of any that is there, and open it.

    Memory is constant. Until the last file is on the disk the store does not exist under its name.
    Of the documents whose hash is a multiple of HELD_OUT_MODULUS, at most HELD_OUT_MAX are recorded
    as held out.

    Args:
        folder: ``<name>.tokens``, see :func:`~model.tokens.store_folder`.
        key: what the documents are made from.
        documents: batches of them, see :func:`~model.encoding.encode_documents`.
        shard_tokens: a shard ends after the document that reaches this many tokens.

    Raises:
        FileNotFoundError: a source that is not there.
        ValueError: an id outside the vocabulary, no documents, a source that changed meanwhile.
        OSError: the disk is too small, told before or while writing; nothing is left behind.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder):
        return _write_store(folder, key, lambda: documents, shard_tokens)


def ensure_store(
    folder: str | Path,
    key: StoreKey,
    make_documents: Callable[[], Iterable[Documents]],
    *,
    log: Callable[[str], None] = print,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenStore:
    """Open the store of ``key``, building it first where there is none or a stale one.

    A second process that asks at the same time waits for the first and opens its result. Raises as
    :func:`write_store`.
    """
    folder = Path(folder)
    try:
        return open_store(folder, key)
    except StaleStore:
        folder.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(folder.parent, os.W_OK):
        raise PermissionError(
            f"{folder} is to be made beside its source, but {folder.parent} cannot be written to: "
            "copy the source to a folder of yours"
        )
    with _exclusive(folder):
        try:
            return open_store(folder, key)
        except StaleStore as reason:
            is_there = (folder / "manifest.json").exists()
            log(f"building {folder}" + (f" anew: {reason}" if is_there else ""))
        return _write_store(folder, key, make_documents, shard_tokens)


def _write_store(
    folder: Path,
    key: StoreKey,
    make_documents: Callable[[], Iterable[Documents]],
    shard_tokens: int,
) -> TokenStore:
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)  # of a build that was killed
    for path in key.sources:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: name the source with --data_path")
    _require_space(folder, key)
    before = [_size_and_time(path) for path in key.sources]
    writer = None
    try:
        with _disk_errors(folder):
            building.mkdir()
            writer = _Writer(building, key.vocab_size, shard_tokens)
            for batch in make_documents():
                writer.add(batch)
            if not writer.n_documents:
                names = ", ".join(map(str, key.sources)) or "the source"
                raise ValueError(f"{names}: no documents in it, so there is nothing to train on")
            counts = writer.finish()
            sources = [describe_source(path) for path in key.sources]
            for path, was in zip(key.sources, before, strict=True):
                if _size_and_time(path) != was:
                    raise ValueError(
                        f"{path} changed while it was tokenised: start again when it is complete"
                    )
            write_manifest(building, key.described() | {"sources": sources} | counts)
            _sync(building)
    except BaseException:
        if writer is not None:
            writer.abandon()
        shutil.rmtree(building, ignore_errors=True)
        raise
    _replace_folder(building, folder)
    return TokenStore(folder)


def _size_and_time(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class _Shards:
    """Files ``<name>-00000.bin``, …; the caller says where one ends."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.number, self.file = folder, name, 0, None

    def write(self, values: np.ndarray) -> None:
        if self.file is None:
            self.file = open(self.folder / f"{self.name}-{self.number:05d}.bin", "wb")
        self.file.write(np.ascontiguousarray(values).data)

    def roll(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file, self.number = None, self.number + 1


class _Writer:
    """The files of a store under construction, but for its manifest."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int) -> None:
        self.folder, self.vocab_size, self.shard_tokens = folder, vocab_size, shard_tokens
        self.n_documents = self.n_tokens = self.n_trained = self.text_bytes = 0
        self.shards = [0]  # tokens in each
        self.tokens, self.masks = _Shards(folder, "tokens"), _Shards(folder, "mask")
        self.has_mask: bool | None = None  # unknown before the first batch
        self.offsets = open(folder / "offsets.bin", "wb")
        self.offsets.write(np.zeros(1, "<u8").data)
        self.lengths_digest = hashlib.blake2b(digest_size=8)
        # (3, n): hash, number and text bytes of documents that may be held out
        self.candidates = [np.empty((3, 0), np.uint64)]

    def add(self, batch: Documents) -> None:
        lengths, ids = np.asarray(batch.lengths, np.int64), np.asarray(batch.ids)
        if not len(lengths):
            return
        stops = np.cumsum(lengths)
        mask = None if batch.mask is None else np.asarray(batch.mask, bool).astype(np.uint8)
        self._check(ids, stops, mask)
        ids = ids.astype("<u2", copy=False)
        self._write_shards(ids, stops, mask)
        self.offsets.write((stops + self.n_tokens).astype("<u8").data)
        self.lengths_digest.update(lengths.astype("<i8").data)

        hashes = _hash_ids(ids, stops) if batch.hashes is None else batch.hashes.astype(np.uint64)
        text_bytes = np.asarray(batch.text_bytes, np.int64)
        found = np.flatnonzero((hashes % np.uint64(HELD_OUT_MODULUS) == 0) & (lengths > 0))
        columns = (hashes[found], found + self.n_documents, text_bytes[found])
        self.candidates.append(np.stack([column.astype(np.uint64) for column in columns]))

        self.n_documents += len(lengths)
        self.n_tokens += len(ids)
        self.n_trained += len(ids) if mask is None else int(mask.sum())
        self.text_bytes += int(text_bytes.sum())

    def _check(self, ids: np.ndarray, stops: np.ndarray, mask: np.ndarray | None) -> None:
        if stops[-1] != len(ids) or (mask is not None and len(mask) != len(ids)):
            n_mask = "no" if mask is None else len(mask)
            raise ValueError(
                "a batch of documents does not add up: "
                f"lengths sum to {stops[-1]}, {len(ids)} ids, {n_mask} mask values"
            )
        if self.has_mask is None:
            self.has_mask = mask is not None
        if self.has_mask != (mask is not None):
            raise ValueError("some batches of documents have a mask and some have none")
        if len(ids) and (ids.max() >= self.vocab_size or ids.min() < 0):
            where = int(np.argmax((ids >= self.vocab_size) | (ids < 0)))
            document = self.n_documents + int(np.searchsorted(stops, where, side="right"))
            raise ValueError(
                f"document {document} holds id {ids[where]}, but the vocabulary has "
                f"{self.vocab_size} ids: name the tokenizer that fits with --tokenizer"
            )

    def _write_shards(self, ids: np.ndarray, stops: np.ndarray, mask: np.ndarray | None) -> None:
        done = 0
        while done < len(ids):
            filling = int(np.searchsorted(stops, done + self.shard_tokens - self.shards[-1]))
            stop = int(stops[min(filling, len(stops) - 1)])
            self.tokens.write(ids[done:stop])
            if mask is not None:
                self.masks.write(mask[done:stop])
            self.shards[-1] += stop - done
            if self.shards[-1] >= self.shard_tokens:
                self.tokens.roll()
                self.masks.roll()
                self.shards.append(0)
            done = stop

    def finish(self) -> dict[str, Any]:
        """Close and sync the files; return what the manifest says of them."""
        for file in self._open_files():
            file.close()
        for path in self.folder.iterdir():
            _sync(path)
        return {
            "dtype": "uint16",
            "documents": self.n_documents,
            "tokens": self.n_tokens,
            "trained_tokens": self.n_trained,
            "text_bytes": self.text_bytes,
            "shards": [n for n in self.shards if n],
            "has_mask": bool(self.has_mask),
            "lengths_hash": self.lengths_digest.hexdigest(),
            "held_out": _choose_held_out(*np.concatenate(self.candidates, axis=1)),
        }

    def abandon(self) -> None:
        """Close the files, whatever becomes of their contents."""
        for file in self._open_files():
            with suppress(OSError):  # closing writes what is buffered: the disk may still be full
                file.close()

    def _open_files(self) -> list[BinaryIO]:
        files = (self.offsets, self.tokens.file, self.masks.file)
        return [file for file in files if file is not None]


def _hash_ids(ids: np.ndarray, stops: np.ndarray) -> np.ndarray:
    parts = np.split(np.ascontiguousarray(ids), stops[:-1])
    digests = b"".join(hashlib.blake2b(part.data, digest_size=8).digest() for part in parts)
    return np.frombuffer(digests, "<u8")


def _choose_held_out(
    hashes: np.ndarray, documents: np.ndarray, text_bytes: np.ndarray
) -> dict[str, list[int]]:
    """Choose at most HELD_OUT_MAX documents, smallest hash first, equal ones all or none."""
    order = np.lexsort((documents, hashes))
    groups = np.split(order, np.flatnonzero(np.diff(hashes[order])) + 1)
    chosen: list[int] = []
    for group in groups:
        if len(chosen) + len(group) <= HELD_OUT_MAX:
            chosen.extend(group.tolist())
    chosen.sort(key=documents.__getitem__)
    return {"documents": documents[chosen].tolist(), "text_bytes": text_bytes[chosen].tolist()}


# ---------------------------------------------------------------- folders, locks, the disk


def _require_space(folder: Path, key: StoreKey) -> None:
    # measured on Chinese text: 0.69 bytes of ids per byte of text; a mask adds half of that
    source_bytes = sum(path.stat().st_size for path in key.sources)
    needed = int(source_bytes * (0.7 if key.kind == "pretrain" else 1.0))
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(
            f"{folder} will need about {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: "
            "free some space, or move the source to another disk"
        )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # EFBIG: the disk's format or the user's limit allows no file of this size
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{folder} does not fit on the disk ({error.strerror}): "
            "free some space and start again; what was written of it is removed"
        ) from error


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time build ``folder``; the lock of a killed process is gone with it."""
    if fcntl is None:
        yield
        return
    path = folder.with_name(folder.name + ".lock")
    while True:
        file = open(path, "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        except FileNotFoundError:
            pass
        file.close()  # who held it before us removed this file: lock the one that is there now
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _replace_folder(new: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)  # a folder cannot be renamed over one that has files
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # only POSIX opens folders
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
