"""The token store: a corpus tokenised once, read from the disk in any order ever after.

A store is a folder ``<name>.tokens/`` beside its source, written by ``store_writer.py``:

====================  ===========================================================================
``tokens-00000.bin``  ids, uint16 little-endian, document after document; a new shard begins after
                      the document that fills one, so that no document spans two
``mask-00000.bin``    only where a mask was given (SFT): uint8 beside each id, 1 = trained
``offsets.bin``       uint64, ``n_documents + 1`` token positions: where each document begins
``manifest.json``     format, what the store was made from, counts, held-out documents
``plan-*.bin``        packing plans (``packing.py``), each made when it is first asked for
====================  ===========================================================================

A store that was made from anything else than what is asked for is stale: rebuilt, never used.
"""

import hashlib
import json
import os
import threading
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1
MANIFEST_KEYS = {"format", "documents", "tokens", "shards", "has_mask", "lengths_hash", "held_out"}
SOURCE_KEYS = {"name", "size", "mtime_ns", "sample", "blake2b"}
MAX_VOCAB_SIZE = 2**16  # ids are uint16


class StaleStore(ValueError):
    """No usable store: missing, broken or made from something else; the text says which."""


@dataclass(frozen=True)
class StoreKey:
    """What a store is made from. Two stores are interchangeable if their keys are equal.

    Args:
        kind: ``"pretrain"`` or ``"sft"``.
        sources: the files the documents come from, in order; compared by name and content.
        tokenizer_sha256: ``Tokenizer.sha256``.
        vocab_size: number of ids, at most 65,536.
        settings: whatever else decides the ids, say the length that conversations are fitted to;
            JSON values.

    Raises:
        ValueError: ``vocab_size`` does not fit uint16.
    """

    kind: str
    sources: tuple[Path, ...]
    tokenizer_sha256: str
    vocab_size: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(Path(source) for source in self.sources))
        if not 0 < self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size={self.vocab_size} does not fit the token store, whose ids are uint16: "
                f"use a tokenizer of at most {MAX_VOCAB_SIZE} ids"
            )

    def described(self) -> dict[str, Any]:
        """Return what is compared literally, as a manifest gives it back."""
        plain = {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "tokenizer_sha256": self.tokenizer_sha256,
            "vocab_size": self.vocab_size,
            "settings": self.settings,
        }
        return json.loads(json.dumps(plain))  # tuples become lists, as in a file


def store_folder(source: str | Path) -> Path:
    """Return where the store of a source lies: ``<name>.tokens`` beside it."""
    return Path(source).with_suffix(".tokens")


def _sample_hash(path: Path) -> str:
    """Hash 64 blocks of 64 KiB spread over a file, in milliseconds; all of it up to 4 MiB."""
    block, n_blocks = 1 << 16, 64
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= block * n_blocks:
            digest.update(file.read())
        else:
            for index in range(n_blocks):
                file.seek((size - block) * index // (n_blocks - 1))
                digest.update(file.read(block))
    return digest.hexdigest()


def _full_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def describe_source(path: Path) -> dict[str, Any]:
    """Return what a manifest records of a source; reads all of it, a second or two a gigabyte."""
    stat = path.stat()
    return {
        "name": path.name,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sample": _sample_hash(path),
        "blake2b": _full_hash(path),
    }


def _check_source(path: Path, recorded: dict[str, Any]) -> None:
    """Raise StaleStore if a file is not the one recorded.

    Size, time stamp and a sample of the content decide in milliseconds. The whole file is read only
    where nothing but the time stamp differs (a copy, a ``touch``, or an edit that the sample
    missed).
    """
    stat = path.stat()
    if stat.st_size != recorded["size"]:
        raise StaleStore(
            f"{path} has {stat.st_size:,} bytes, the store was made from {recorded['size']:,}"
        )
    is_same = _sample_hash(path) == recorded["sample"]
    if is_same and stat.st_mtime_ns != recorded["mtime_ns"]:
        is_same = _full_hash(path) == recorded["blake2b"]
    if not is_same:
        raise StaleStore(f"{path} has other content than the store was made from")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest.json``, one entry a line, complete or not at all."""
    temporary = folder / f"manifest.json.{os.getpid()}.tmp"
    lines = ",\n".join(
        f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in manifest.items()
    )
    with open(temporary, "w", encoding="utf-8") as file:
        file.write("{\n" + lines + "\n}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / "manifest.json")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StaleStore(f"{folder} does not exist or has no manifest.json") from None
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or not MANIFEST_KEYS <= manifest.keys():
        raise StaleStore(f"{path} is not the manifest of a token store")
    if manifest["format"] != FORMAT_VERSION:
        raise StaleStore(
            f"{folder} has format {manifest['format']!r}, this version reads {FORMAT_VERSION}"
        )
    _check_manifest(manifest, path)
    return manifest


def _check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Raise StaleStore for a manifest that is not of the shape that :func:`write_manifest` gets."""

    def are_counts(values: Any, below: float = 2**62) -> bool:
        return isinstance(values, list) and all(
            type(value) is int and 0 <= value < below for value in values
        )

    held_out = manifest["held_out"] if isinstance(manifest["held_out"], dict) else {}
    numbers, text_bytes = held_out.get("documents"), held_out.get("text_bytes")
    sources = manifest.get("sources", [])
    is_whole = (
        are_counts([manifest["documents"], manifest["tokens"]])
        and are_counts(manifest["shards"])
        and sum(manifest["shards"]) == manifest["tokens"]
        and are_counts(numbers, manifest["documents"])
        and are_counts(text_bytes)
        and len(numbers) == len(text_bytes)
        and isinstance(manifest["has_mask"], bool)
        and isinstance(sources, list)
        and all(isinstance(s, dict) and SOURCE_KEYS <= s.keys() for s in sources)
    )
    if not is_whole:
        raise StaleStore(f"{path} does not say of a token store what belongs together")


class PieceFile:
    """A file of numbers, read in small pieces from any place.

    With ``pread`` rather than a memory map: both come from the system's cache, but whatever a map
    has touched counts as this process's memory, and to hand those pages back costs five times what
    copying does (measured); a read waits for the disk without the GIL; a file that is cut off
    meanwhile is an error instead of a crash. Threads may share it.

    Raises:
        StaleStore: the file does not have ``n_values`` numbers.
    """

    def __init__(self, path: Path, dtype: str, n_values: int, *, header_bytes: int = 0) -> None:
        self.path, self.dtype, self.header_bytes = path, np.dtype(dtype), header_bytes
        expected = header_bytes + n_values * self.dtype.itemsize
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            size = "is missing" if found is None else f"has {found:,} bytes"
            raise StaleStore(f"{path} {size}, expected {expected:,} bytes")
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._fd)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the numbers [start, stop), a new array."""
        values = np.empty(stop - start, self.dtype)
        self.read_bytes(memoryview(values).cast("B"), start * self.dtype.itemsize)
        return values

    def gather(
        self, starts: np.ndarray, lengths: np.ndarray, destinations: np.ndarray, out: np.ndarray
    ) -> None:
        """Copy pieces: ``out[d : d + n] = numbers[s : s + n]`` for each s, n, d."""
        _gather([self], np.zeros_like(starts), starts, lengths, destinations, out)

    def read_bytes(self, out: memoryview, position: int) -> None:
        """Fill ``out`` with the bytes from ``position`` (of the first number: 0) on."""
        if _read_at(self._fd, out, self.header_bytes + position) != len(out):
            raise OSError(f"{self.path} was cut off while in use: build it again")


def _gather(
    files: Sequence[PieceFile],
    which: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    destinations: np.ndarray,
    out: np.ndarray,
) -> None:
    """Copy pieces: ``out[d : d + n] = files[w][s : s + n]`` for each w, s, n, d; (n_pieces,) each.

    ``out`` is one-dimensional, contiguous and of the files' type.
    """
    size, view = out.itemsize, memoryview(out).cast("B")
    begins, ends = destinations * size, (destinations + lengths) * size
    pieces = zip(
        which.tolist(), (starts * size).tolist(), begins.tolist(), ends.tolist(), strict=True
    )
    for number, position, begin, end in pieces:
        files[number].read_bytes(view[begin:end], position)


if hasattr(os, "preadv"):

    def _read_at(fd: int, out: memoryview, position: int) -> int:
        return os.preadv(fd, [out], position)

else:  # Windows
    _SEEK_LOCK = threading.Lock()

    def _read_at(fd: int, out: memoryview, position: int) -> int:
        with _SEEK_LOCK:
            os.lseek(fd, position, os.SEEK_SET)
            data = os.read(fd, len(out))
        out[: len(data)] = data
        return len(data)


class TokenStore:
    """A store opened for reading: any size opens in milliseconds and needs no memory.

    Safe to use from several threads, to send to another process (it opens the files anew) and to
    read while a newer store replaces it.

    Raises:
        StaleStore: no store there, another format, or files whose sizes do not match the manifest.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.n_documents: int = self.manifest["documents"]
        self.n_tokens: int = self.manifest["tokens"]
        self.has_mask: bool = self.manifest["has_mask"]
        shards: list[int] = self.manifest["shards"]
        self._first = np.cumsum([0, *shards])[:-1]  # position of each shard's first token
        self._offsets = PieceFile(self.folder / "offsets.bin", "<u8", self.n_documents + 1)
        self._tokens = [
            PieceFile(self.folder / f"tokens-{i:05d}.bin", "<u2", n) for i, n in enumerate(shards)
        ]
        self._masks = [
            PieceFile(self.folder / f"mask-{i:05d}.bin", "u1", n)
            for i, n in enumerate(shards if self.has_mask else [])
        ]

    def __reduce__(self) -> tuple:
        return TokenStore, (self.folder,)

    @property
    def held_out(self) -> np.ndarray:
        """Numbers of the held-out documents, ascending: validate on them, never train on them."""
        return np.array(self.manifest["held_out"]["documents"], np.int64)

    @property
    def held_out_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each held-out document's text, for bits per byte."""
        return np.array(self.manifest["held_out"]["text_bytes"], np.int64)

    @property
    def offsets(self) -> np.ndarray:
        """(n_documents + 1,) uint64: where each document begins; a memory map of the file."""
        return np.memmap(self._offsets.path, "<u8", "r")

    def bounds(self, start: int, stop: int) -> np.ndarray:
        """Return where the documents [start, stop) begin, and where the last ends: int64."""
        bounds = self._offsets.read(start, stop + 1).astype(np.int64)
        self._check_bounds(bounds, np.diff(bounds))
        return bounds

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Return the tokens of each document in ``numbers``: int64."""
        numbers = np.asarray(numbers, np.int64)
        places = np.arange(len(numbers))
        bounds = np.empty(2 * len(numbers), np.uint64)
        self._offsets.gather(numbers, np.full_like(numbers, 2), 2 * places, bounds)
        bounds = bounds.astype(np.int64).reshape(-1, 2)
        lengths = np.diff(bounds)[:, 0]
        self._check_bounds(bounds, lengths)
        return lengths

    def _check_bounds(self, bounds: np.ndarray, lengths: np.ndarray) -> None:
        """Raise ValueError for documents outside of the tokens."""
        if lengths.min(initial=0) < 0 or not (
            0 <= bounds.min(initial=0) and bounds.max(initial=0) <= self.n_tokens
        ):
            raise ValueError(
                f"{self._offsets.path} is damaged: a document of it does not lie within the "
                f"{self.n_tokens:,} tokens; remove {self.folder}, so that it is built again"
            )

    def _check_values(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Raise ValueError for ids that no tokenizer of the store gave, a mask that is none."""
        limit = self.manifest.get("vocab_size", MAX_VOCAB_SIZE)
        if ids.max(initial=0) >= limit or (mask is not None and mask.max(initial=0) > 1):
            raise ValueError(
                f"{self.folder} is damaged: it holds ids that its vocabulary of {limit} does not "
                "have, or a mask of other than 0 and 1; remove it, so that it is built again"
            )

    def piece_file(self, name: str, dtype: str, n_values: int, **options: int) -> PieceFile:
        """Open another file of this folder, see :class:`PieceFile`."""
        return PieceFile(self.folder / name, dtype, n_values, **options)

    def document(self, index: int) -> np.ndarray:
        """Return the ids of a document: (length,) uint16."""
        ids = self._read(self._tokens, index, np.uint16)
        self._check_values(ids)
        return ids

    def mask(self, index: int) -> np.ndarray:
        """Return which tokens of a document are trained: (length,) uint8 of 0 and 1."""
        if not self.has_mask:
            return np.ones(len(self.document(index)), np.uint8)
        return self._read(self._masks, index, np.uint8)

    def _read(self, files: list[PieceFile], index: int, dtype: type) -> np.ndarray:
        if not 0 <= index < self.n_documents:
            raise IndexError(f"document {index} of a store that has {self.n_documents}")
        start, stop = self.bounds(index, index + 1)
        if start == stop:
            return np.empty(0, dtype)
        shard = int(np.searchsorted(self._first, start, side="right")) - 1
        return files[shard].read(*(int(p - self._first[shard]) for p in (start, stop)))

    def document_at(self, position: int) -> int:
        """Return the number of the document that holds the token at ``position``."""
        numbers = range(self.n_documents + 1)
        return bisect_right(numbers, position, key=lambda i: self.bounds(i, i)[0]) - 1

    def gather(
        self,
        positions: np.ndarray,
        lengths: np.ndarray,
        destinations: np.ndarray,
        out: np.ndarray,
        out_mask: np.ndarray | None = None,
    ) -> None:
        """Copy pieces of documents: ``out[d : d + n] = tokens[p : p + n]`` for each p, n, d.

        Args:
            positions, lengths, destinations: (n_pieces,) int64; a piece lies within one document.
            out: 1-D contiguous uint16, receives the ids.
            out_mask: 1-D contiguous uint8, receives the mask; only for a store that has one.
        """
        shards = np.searchsorted(self._first, positions, side="right") - 1
        starts = positions - self._first[shards]
        _gather(self._tokens, shards, starts, lengths, destinations, out)
        if out_mask is not None:
            _gather(self._masks, shards, starts, lengths, destinations, out_mask)
        self._check_values(out, out_mask)


def open_store(folder: str | Path, key: StoreKey | None = None) -> TokenStore:
    """Open a store, if it is what ``key`` asks for; in milliseconds, whatever its size.

    A source that is not there any more cannot be newer than its store: the store is used. Where the
    time stamp of a source alone is new, the source is read once in full and its new time stamp
    recorded.

    Raises:
        StaleStore: no store there, or not from this key; the text says what differs.
    """
    store = TokenStore(folder)
    if key is None:
        return store
    manifest = store.manifest
    expected = key.described() | {"sources": [path.name for path in key.sources]}
    found = manifest | {"sources": [source["name"] for source in manifest["sources"]]}
    for name, value in expected.items():
        if found.get(name) != value:
            raise StaleStore(f"{folder} has {name} {found.get(name)!r}, expected {value!r}")
    is_touched = False
    for path, recorded in zip(key.sources, manifest["sources"], strict=True):
        if path.is_file():
            _check_source(path, recorded)
            is_touched |= recorded["mtime_ns"] != path.stat().st_mtime_ns
            recorded["mtime_ns"] = path.stat().st_mtime_ns
    if is_touched:
        with suppress(OSError):  # a read-only store: the source is read again next time
            write_manifest(store.folder, manifest)
    return store
