"""The data of the stages: files -> rows -> token store -> packed batches."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from .encoding import Documents, content_hash, encode_documents
from .losses import IGNORED, Batch
from .order import Sampler
from .packing import Plan, open_plan, read_rows
from .rows import read_conversations, read_documents
from .store_writer import ensure_store
from .tally import Tally
from .tokenizer import BOS_ID, EOS_ID, ROLES, Message, Tokenizer
from .tokens import StoreKey, TokenStore, store_folder

V1_MAX_CHARS = 512  # longer documents were dropped
CONVERSATIONS_A_BATCH = 512
EVAL_POSITIONS = 8192  # of a validation batch, padding included
MAX_EVAL_DOCUMENTS = 2000

Log = Callable[[str], None]


# ----------------------------------------------------------------------------- token stores


def pretrain_store(
    path: Path, tokenizer: Tokenizer, *, max_chars: int | None = None, log: Log = print
) -> TokenStore:
    """Return the token store of a pretraining file (.csv, .jsonl, .txt), built where it is missing.

    Args:
        max_chars: leave longer documents out, as v1 did; such a store lies beside the other.

    Raises:
        FileNotFoundError: neither the file nor a store of it.
        ValueError: a file of another format, or without documents.
    """
    settings = {} if max_chars is None else {"max_chars": max_chars}
    key = StoreKey("pretrain", (path,), tokenizer.sha256, tokenizer.vocab_size, settings)
    tally = Tally()

    def texts() -> Iterator[str]:
        n_long = 0
        for text in read_documents(path, tally):
            if max_chars is not None and len(text) > max_chars:
                n_long += 1
                continue
            yield text
        log(tally.report())
        if n_long:
            log(f"  left out {n_long:,} documents of more than {max_chars} characters")

    def documents() -> Iterator[Documents]:
        progress = Progress(f"tokenising {path.name}", path, log)
        yield from encode_documents(
            texts(), tokenizer, bos_id=BOS_ID, eos_id=EOS_ID, progress=progress.add
        )
        progress.close()

    return ensure_store(source_folder(path, "v1" if max_chars else ""), key, documents, log=log)


def sft_store(path: Path, tokenizer: Tokenizer, *, max_tokens: int, log: Log = print) -> TokenStore:
    """Return the token store of conversations, each fitted to ``max_tokens``; see :func:`fit`.

    Raises:
        FileNotFoundError: neither the file nor a store of it.
        ValueError: a file of another format, or without conversations.
    """
    settings = {"max_tokens": max_tokens}
    key = StoreKey("sft", (path,), tokenizer.sha256, tokenizer.vocab_size, settings)

    def documents() -> Iterator[Documents]:
        tally, counts = Tally(), Counter()
        progress = Progress(f"tokenising {path.name}", path, log)
        conversations = read_conversations(path, tally)
        while batch := list(islice(conversations, CONVERSATIONS_A_BATCH)):
            encoded = _encode_conversations(batch, tokenizer, max_tokens, counts)
            yield encoded
            progress.add(
                len(batch), sum(len(m["content"].encode()) for messages in batch for m in messages)
            )
        progress.close()
        log(tally.report())
        for reason, count in counts.most_common():
            log(f"  {count:>11,}  {reason}")

    return ensure_store(source_folder(path), key, documents, log=log)


def source_folder(path: Path, variant: str = "") -> Path:
    """Return the folder of a source's token store.

    Raises:
        FileNotFoundError: neither the source nor its store is there.
        ValueError: the source is a folder.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if not path.exists() and not store_folder(path).exists():
        raise FileNotFoundError(
            f"{path} does not exist: make the tables with data_process.py, or name a file that is "
            "there (--data_path, --val_data_path)"
        )
    folder = store_folder(path)
    return folder.with_name(f"{path.stem}.{variant}{folder.suffix}") if variant else folder


def _encode_conversations(
    conversations: Sequence[list[Message]],
    tokenizer: Tokenizer,
    max_tokens: int,
    counts: Counter[str],
) -> Documents:
    """Encode a batch of conversations, all their contents at once on all cores."""
    encoded = iter(
        tokenizer.encode_batch([m["content"] for messages in conversations for m in messages])
    )
    ids: list[int] = []
    mask: list[bool] = []
    lengths, n_bytes, hashes = [], [], []
    for messages in conversations:
        contents = [next(encoded) for _ in messages]
        kept = fit(messages, contents, tokenizer, max_tokens, counts)
        chat_ids, chat_mask = tokenizer.encode_chat_masked(*kept) if kept else ([], [])
        ids += chat_ids
        mask += chat_mask
        lengths.append(len(chat_ids))
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        n_bytes.append(sum(len(text.encode()) for text in answers))
        hashes.append(content_hash("\x1e".join(m["content"] for m in messages)))
    return Documents(
        np.array(ids, np.uint16),
        np.array(lengths, np.int64),
        np.array(n_bytes, np.int64),
        np.array(hashes, np.uint64),
        np.array(mask, bool),
    )


def fit(
    messages: Sequence[Message],
    contents: Sequence[list[int]],
    tokenizer: Tokenizer,
    max_tokens: int,
    counts: Counter[str],
) -> tuple[list[Message], list[list[int]]] | None:
    """Return the part of a conversation that fits ``max_tokens``, None if not even its end does.

    The oldest turns go first, then the system text, then the end of the last question; the last
    answer and its end token never. Every loss is counted by reason in ``counts``.
    """
    frame = {role: len(tokenizer.encode_chat([{"role": role, "content": ""}])) for role in ROLES}
    sizes = [frame[m["role"]] + len(c) for m, c in zip(messages, contents, strict=True)]
    n_system = int(messages[0]["role"] == "system")
    total, first = sum(sizes), n_system
    while total > max_tokens and first + 2 < len(messages):
        total -= sum(sizes[first : first + 2])
        first += 2
    if first > n_system:
        counts[f"conversations lost their oldest turns to fit {max_tokens} tokens"] += 1
    head = list(range(n_system))
    if total > max_tokens and n_system:
        total -= sizes[0]
        head = []
        counts[f"system texts left out to fit {max_tokens} tokens"] += 1
    chosen = [*head, *range(first, len(messages))]
    kept_messages = [messages[i] for i in chosen]
    kept_contents = [list(contents[i]) for i in chosen]
    if total > max_tokens:
        question = kept_contents[-2]
        room = len(question) - (total - max_tokens)
        if room < 1:
            counts[
                f"conversations dropped: their last answer alone exceeds {max_tokens} tokens"
            ] += 1
            return None
        kept_contents[-2] = question[:room]
        counts[f"questions lost their end to fit {max_tokens} tokens"] += 1
    return kept_messages, kept_contents


class Progress:
    """A bar over the bytes of text on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, title: str, path: Path, log: Log) -> None:
        self.title, self.log = title, log
        self.documents = self.bytes = 0
        self.start = self.last = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            size = path.stat().st_size if path.suffix not in (".xz", ".gz") else None
            self.bar = tqdm(desc=title, total=size, unit="B", unit_scale=True, leave=False)

    def add(self, documents: int, n_bytes: int) -> None:
        """Count what was done."""
        self.documents += documents
        self.bytes += n_bytes
        if self.bar is not None:
            self.bar.update(n_bytes)
        elif time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            self.log(f"{self.title}: {self.documents:,} documents, {self.bytes / 1e6:,.0f} MB")

    def close(self) -> None:
        """Take the bar away and say how fast it was."""
        if self.bar is not None:
            self.bar.close()
        elapsed_s = max(1e-9, time.monotonic() - self.start)
        self.log(
            f"{self.title}: {self.documents:,} documents, {self.bytes / 1e6:,.1f} MB of text in "
            f"{elapsed_s:.1f} s ({self.bytes / 1e6 / elapsed_s:.1f} MB/s)"
        )


# ----------------------------------------------------------------------------- batches


@dataclass
class TrainingData:
    """Packed rows of a store, and what is held out of it.

    Pretraining rows are read through: attention and positions run on from document to document. In
    fine-tuning each conversation is alone: attention stays within it and its positions start at 0.

    Attributes:
        held_out: the store with the validation documents, and their numbers.
    """

    store: TokenStore
    plan: Plan
    tokenizer: Tokenizer
    held_out: tuple[TokenStore, np.ndarray]

    @property
    def n_rows(self) -> int:
        """Rows of an epoch."""
        return self.plan.n_rows

    @property
    def row_positions(self) -> int:
        """Inputs of a row."""
        return self.plan.row_tokens - 1

    @property
    def n_kept(self) -> int:
        """Documents that are not empty, of a store in which none is cut."""
        store, numbers = self.held_out
        held_out = np.count_nonzero(store.lengths(numbers)) if store is self.store else 0
        return self.plan.n_pieces + int(held_out)

    @property
    def is_chat(self) -> bool:
        """Whether rows hold conversations, of which only the answers are trained."""
        return self.store.has_mask

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """What a resumed run must find again."""
        manifest = self.store.manifest
        return {
            "data": "+".join(source["blake2b"] for source in manifest["sources"]),
            "plan": self.plan.path.name,
            "tokenizer": self.tokenizer.sha256,
        }

    def batch(self, rows: np.ndarray) -> Batch:
        """Return rows as a batch; B rows of ``row_tokens - 1`` inputs and targets."""
        tokens, segments, mask = read_rows(self.store, self.plan, rows)
        follows = segments[:, 1:] == segments[:, :-1]  # a document's first token is no target
        learnt = follows & (segments[:, 1:] >= 0)
        if mask is not None:
            learnt &= mask[:, 1:]
        targets = np.where(learnt, tokens[:, 1:], IGNORED)
        is_token = segments[:, :-1] >= 0
        batch = Batch(
            torch.from_numpy(tokens[:, :-1].copy()),
            torch.from_numpy(targets),
            token_mask=torch.from_numpy(is_token),
            n_units=int(learnt.sum()),
            n_tokens=int(is_token.sum()),
        )
        # a matter of the plan, not of these rows: the split into batches must change nothing
        if self.is_chat and self.plan.n_pieces > self.plan.n_rows:
            batch.attention_mask, batch.position_ids = separate(torch.from_numpy(segments[:, :-1]))
        return batch

    def held_out_batches(self) -> list[Batch]:
        """Return the held-out documents, each alone, of a document too long for a row its
        beginning.

        Sorted by length and padded on the right, where causal attention never looks.
        """
        store, numbers = self.held_out
        groups = length_groups(store, numbers, self.plan.row_tokens)
        batches = [self._alone(store, group) for group in groups]
        return [batch for batch in batches if batch.n_units]

    def _alone(self, store: TokenStore, numbers: list[int]) -> Batch:
        row_tokens = self.plan.row_tokens
        documents = [
            (store.document(number)[:row_tokens], store.mask(number)[:row_tokens])
            for number in numbers
        ]
        inputs, targets, lengths = padded(documents)
        learnt = targets[targets != IGNORED]
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            n_units=len(learnt),
            n_tokens=int(lengths.sum()),
            n_bytes=int(self.tokenizer.token_bytes[learnt].sum()),
        )

    def describe(self) -> str:
        """Return the data's size in a line for people."""
        manifest = self.store.manifest
        n_documents = manifest["documents"]
        if self.is_chat:  # fitted to a row when they were tokenised, so never cut
            what, detail = "conversations", f"{manifest['trained_tokens']:,} of them trained"
            n_documents = self.n_kept
        else:
            left_out = len(self.held_out[1]) if self.held_out[0] is self.store else 0
            n_cuts = self.plan.n_pieces - (manifest["documents"] - left_out)
            what, detail = "documents", f"{n_cuts:,} cuts where one is longer than a row"
        return (
            f"{n_documents:,} {what}, {manifest['tokens']:,} tokens, {detail}; "
            f"{self.n_rows:,} rows of {self.row_positions} positions, "
            f"{100 * self.plan.utilisation:.2f} % of them in use; held out: "
            f"{len(self.held_out[1]):,}"
        )

    def show(self, n: int, seed: int) -> str:
        """Return the first ``n`` rows of training as text, trained stretches between ⟦ and ⟧."""
        rows = Sampler(self.n_rows, seed).rows(np.arange(min(n, self.n_rows)))
        shown = []
        tokens, segments, mask = read_rows(self.store, self.plan, rows)
        for row, number in enumerate(rows):
            shown.append(f"--- row {number}")
            for segment in range(segments[row].max() + 1):
                here = np.flatnonzero(segments[row] == segment)
                trained = np.ones(len(here), bool) if mask is None else mask[row][here]
                trained[0] = False
                edges = np.flatnonzero(np.diff(trained)) + 1
                text = ""
                for part in np.split(np.arange(len(here)), edges):
                    ids = tokens[row][here[part]].tolist()
                    piece = self.tokenizer.decode(ids, skip_special_tokens=False)
                    text += f"⟦{piece}⟧" if trained[part[0]] else piece
                shown.append(text)
        return "\n".join(shown)


def length_groups(
    store: TokenStore, numbers: np.ndarray, max_tokens: int | None = None
) -> Iterator[list[int]]:
    """Yield document numbers in groups of similar length, each a batch; empty documents go.

    ``max_tokens`` is what is used of a longer document.
    """
    lengths = store.lengths(numbers)
    if max_tokens is not None:
        lengths = np.minimum(lengths, max_tokens)
    order = np.argsort(lengths, kind="stable")
    group: list[int] = []
    for index in order[lengths[order] >= 2]:
        if (len(group) + 1) * (lengths[index] - 1) > EVAL_POSITIONS and group:
            yield group
            group = []
        group.append(int(numbers[index]))
    if group:
        yield group


def padded(
    sequences: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sequences (ids, trained) as rows padded on the right, where causal attention never
    looks: inputs and targets (B, T), and how many inputs each row has (B,), all int64.
    """
    lengths = np.array([len(ids) - 1 for ids, _ in sequences])
    shape = (len(sequences), int(lengths.max()))
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for row, ((ids, mask), n) in enumerate(zip(sequences, lengths, strict=True)):
        inputs[row, :n] = ids[:-1]
        targets[row, :n] = np.where(mask[1:].astype(bool), ids[1:].astype(np.int64), IGNORED)
    return inputs, targets, lengths


def separate(segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mask (B, 1, T, T) and positions (B, T) that keep segments of a row apart.

    Args:
        segments: (B, T) number of the segment at each position, -1 on padding.
    """
    B, T = segments.shape
    places = torch.arange(T)
    same = segments[:, :, None] == segments[:, None, :]
    mask = (same & (places[None, :] <= places[:, None]))[:, None]
    begins = torch.ones(B, T, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = torch.where(begins, places, 0).cummax(dim=1).values
    return mask, places - starts


# ----------------------------------------------------------------------------- stages


def pretrain_data(
    path: Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    *,
    val_path: Path | None = None,
    recipe: str = "best",
    log: Log = print,
) -> TrainingData:
    """Return the rows of pretraining; recipe ``v1`` pads each document and drops long ones."""
    max_chars = V1_MAX_CHARS if recipe == "v1" else None

    def store_of(source: Path) -> TokenStore:
        return pretrain_store(source, tokenizer, max_chars=max_chars, log=log)

    return _training_data(store_of, path, val_path, tokenizer, max_seq_len, recipe)


def sft_data(
    path: Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    *,
    val_path: Path | None = None,
    recipe: str = "best",
    log: Log = print,
) -> TrainingData:
    """Return the rows of fine-tuning; recipe ``v1`` pads each conversation."""

    def store_of(source: Path) -> TokenStore:
        return sft_store(source, tokenizer, max_tokens=max_seq_len + 1, log=log)

    return _training_data(store_of, path, val_path, tokenizer, max_seq_len, recipe)


def _training_data(
    store_of: Callable[[Path], TokenStore],
    path: Path,
    val_path: Path | None,
    tokenizer: Tokenizer,
    max_seq_len: int,
    recipe: str,
) -> TrainingData:
    store = store_of(path)
    held_out = (store, store.held_out)
    if val_path is not None:
        val_store = store_of(val_path)
        held_out = (val_store, np.arange(min(val_store.n_documents, MAX_EVAL_DOCUMENTS)))
    plan = open_plan(
        store,
        max_seq_len + 1,
        cut=not store.has_mask,  # conversations are fitted, not cut
        alone=recipe == "v1",
        hold_out=val_path is None,
    )
    if not plan.n_rows:
        raise ValueError(f"{path}: nothing in it can be trained on; see the counts above")
    return TrainingData(store, plan, tokenizer, held_out)
