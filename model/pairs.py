"""The data of preference tuning: pairs -> token store -> packed batches, and what the reference
model thinks of them.

A document of the store is a pair: the prompt with the answer chosen, then the prompt with the one
rejected. The mask is true on the two answers and their end tokens, so each sequence ends where a
masked stretch does, and nothing else needs to be stored.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .dataset import (
    CONVERSATIONS_A_BATCH,
    Log,
    TrainingData,
    fit,
    length_groups,
    padded,
    separate,
    source_folder,
)
from .encoding import Documents, content_hash
from .losses import IGNORED, PairBatch, pair_logps
from .packing import open_plan, read_rows
from .rows import read_preferences
from .states import atomic_write
from .store_writer import ensure_store
from .tally import Tally
from .tokenizer import Message, Tokenizer
from .tokens import StoreKey, TokenStore

TELL_EVERY_S = 15
ROWS_AT_ONCE = 4  # in which the reference is measured


def pair_store(
    path: Path, tokenizer: Tokenizer, *, max_tokens: int, log: Log = print
) -> TokenStore:
    """Return the token store of preference pairs, each sequence fitted to ``max_tokens``.

    Both sequences of a pair keep the same prompt: as much as the longer answer leaves room for.

    Raises:
        FileNotFoundError: neither the file nor a store of it.
        ValueError: a file of another format, or without pairs.
    """
    settings = {"max_tokens": max_tokens}
    key = StoreKey("dpo", (path,), tokenizer.sha256, tokenizer.vocab_size, settings)

    def documents() -> Iterator[Documents]:
        tally, counts = Tally(), Counter()
        pairs = read_preferences(path, tally)
        while batch := list(islice(pairs, CONVERSATIONS_A_BATCH)):
            yield _encode_pairs(batch, tokenizer, max_tokens, counts)
        log(tally.report())
        for reason, count in counts.most_common():
            log(f"  {count:>11,}  {reason}")

    return ensure_store(source_folder(path), key, documents, log=log)


def _encode_pairs(
    pairs: list[dict[str, Any]], tokenizer: Tokenizer, max_tokens: int, counts: Counter[str]
) -> Documents:
    ids: list[int] = []
    mask: list[bool] = []
    lengths, hashes = [], []
    for pair in pairs:
        prompt = pair["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        encoded = encode_pair(
            prompt, pair["chosen"], pair["rejected"], tokenizer, max_tokens, counts
        )
        lengths.append(len(encoded[0]))
        ids += encoded[0]
        mask += encoded[1]
        # by the question alone: no pair that is trained on asks what a held-out one does
        hashes.append(content_hash("\x1e".join(m["content"] for m in prompt)))
    return Documents(
        np.array(ids, np.uint16),
        np.array(lengths, np.int64),
        np.zeros(len(pairs), np.int64),
        np.array(hashes, np.uint64),
        np.array(mask, bool),
    )


def encode_pair(
    prompt: list[Message],
    chosen: str,
    rejected: str,
    tokenizer: Tokenizer,
    max_tokens: int,
    counts: Counter[str],
) -> tuple[list[int], list[bool]]:
    """Return the ids of both sequences, one after the other, and which of them are the answers'.

    Nothing where an answer is longer than ``max_tokens``; what is lost is counted, see
    :func:`model.dataset.fit`.
    """
    answers = [tokenizer.encode(text) for text in (chosen, rejected)]
    longer = {"role": "assistant", "content": max(chosen, rejected, key=len)}
    contents = [*(tokenizer.encode(m["content"]) for m in prompt), max(answers, key=len)]
    kept = fit([*prompt, longer], contents, tokenizer, max_tokens, counts)
    ids: list[int] = []
    mask: list[bool] = []
    for answer in answers if kept else ():
        messages, fitted = kept
        sequence, said = tokenizer.encode_chat_masked(messages, [*fitted[:-1], answer])
        end = len(said) - said[::-1].index(True)  # the line break after </s> says nothing
        n_answer = len(answer) + 1  # with its </s>; earlier answers belong to the prompt
        ids += sequence[:end]
        mask += [False] * (end - n_answer) + [True] * n_answer
    return ids, mask


class PairData(TrainingData):
    """Packed rows of preference pairs; each sequence is alone: attention stays within it.

    Attributes:
        reference: log probability of each answer of the store under the reference model,
            (n_documents, 2) fp32, chosen and rejected; None: not known.
        held_out_reference: the same of the store with the held-out pairs.
        reference_digest: of the reference's weights.
    """

    reference: np.ndarray | None = None
    held_out_reference: np.ndarray | None = None
    reference_digest: str = ""

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """What a resumed run must find again."""
        return {**super().fingerprint, "reference": self.reference_digest}

    def batch(self, rows: np.ndarray) -> PairBatch:
        """Return rows as a batch; a row of ``row_tokens - 1`` inputs holds as many pairs as fit."""
        tokens, segments, mask = read_rows(self.store, self.plan, rows)
        positions, _, counts = self.plan.pieces(rows)
        sequences = number_sequences(segments, mask)
        first = 2 * (np.cumsum(counts) - counts)  # of each row: sequences in the rows before it
        sequences = np.where(sequences >= 0, sequences + first[:, None], -1)
        is_token = segments[:, :-1] >= 0
        targets = np.where(mask[:, 1:], tokens[:, 1:], IGNORED)
        # the tokens of a sequence are neighbours, so within a row its number tells it apart
        attention_mask, position_ids = separate(torch.from_numpy(sequences[:, :-1]))
        reference = None
        if self.reference is not None:
            reference = torch.from_numpy(self.reference[self.numbers_at(positions)].reshape(-1))
        return PairBatch(
            torch.from_numpy(tokens[:, :-1].copy()),
            torch.from_numpy(targets),
            attention_mask,
            position_ids,
            token_mask=torch.from_numpy(is_token),
            n_units=len(positions),
            n_tokens=int(is_token.sum()),
            sequence_ids=torch.from_numpy(sequences[:, 1:].astype(np.int64)),
            reference_logps=reference,
        )

    def numbers_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the document numbers of the pairs that stand at these token positions."""
        return np.searchsorted(self.store.offsets, positions, side="right") - 1

    def _alone(self, store: TokenStore, numbers: list[int]) -> PairBatch:
        reference = self.held_out_reference
        known = None if reference is None else torch.from_numpy(reference[numbers].reshape(-1))
        return padded_pairs(store, numbers, known)

    def describe(self) -> str:
        """Return the data's size in a line for people."""
        manifest = self.store.manifest
        return (
            f"{self.n_kept:,} pairs, {manifest['tokens']:,} tokens, "
            f"{manifest['trained_tokens']:,} of them in answers; {self.n_rows:,} rows of "
            f"{self.row_positions} positions, {100 * self.plan.utilisation:.2f} % of them in use; "
            f"held out: {len(self.held_out[1]):,}"
        )

    def measure_reference(self, model: nn.Module, runtime: Any) -> None:
        """Fill ``reference`` and ``held_out_reference``, measured once and kept in the stores.

        They are measured in the very rows that are trained and validated on: in bf16 another
        layout rounds differently, by as much as the margins of the first updates.

        Args:
            model: the one of ``reference_digest``, on the runtime's device.
        """
        was_training = model.training
        model.eval()
        with runtime.main_first():
            rows = np.array_split(np.arange(self.n_rows), max(1, self.n_rows // ROWS_AT_ONCE))
            parts = (
                (self.numbers_at(self.plan.pieces(part)[0]), partial(self.batch, part))
                for part in rows
            )
            name = self.plan.path.stem
            self.reference = self._measured(self.store, name, parts, model, runtime)
            store, numbers = self.held_out
            groups = length_groups(store, numbers, self.plan.row_tokens)
            parts = ((np.array(group), partial(self._alone, store, group)) for group in groups)
            self.held_out_reference = self._measured(store, "held-out", parts, model, runtime)
        model.train(was_training)

    def _measured(
        self,
        store: TokenStore,
        layout: str,
        parts: Iterable[tuple[np.ndarray, Callable[[], PairBatch]]],
        model: nn.Module,
        runtime: Any,
    ) -> np.ndarray:
        """Return the log probabilities of the answers of ``parts``, (n_documents, 2) fp32, read
        from the store's folder where they have been measured before: the same weights, precision
        and layout. They go when the store goes.
        """
        precision = str(runtime.dtype).removeprefix("torch.")
        path = store.folder / f"reference-{self.reference_digest}-{precision}-{layout}.npy"
        shape = (store.n_documents, 2)
        if path.is_file():
            try:
                # a map: takes no memory for a shape that the header alone claims, and no pickle
                known = np.lib.format.open_memmap(path, mode="r")
                if known.shape == shape and known.dtype == np.float32:
                    return np.array(known)
            except (ValueError, OverflowError):  # damaged: measured anew below
                pass
        values, n_done = np.zeros(shape, np.float32), 0
        begin = told = time.monotonic()
        for numbers, make_batch in parts:
            batch = make_batch().to(runtime.device)
            with torch.no_grad(), runtime.autocast():
                logps, _ = pair_logps(model, batch)
            values[numbers] = logps.view(-1, 2).float().cpu().numpy()
            n_done += len(numbers)
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                runtime.log(f"reference   {n_done:,} of at most {len(values):,} pairs measured")
        elapsed_s = time.monotonic() - begin
        try:
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.save(file, values)
            kept = f"kept in {path}"
        except OSError as error:
            kept = f"not kept ({error}), so to be measured again at the next start"
        runtime.log(f"reference   {n_done:,} pairs in {elapsed_s:.1f} s, {kept}")
        return values


def number_sequences(segments: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the number within its row of the sequence at each position: (B, T1) int64, -1 on
    padding.

    A sequence ends with the last token of its answer; see the module's text.
    """
    ends = mask & ~np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    numbers = np.cumsum(ends, axis=1) - ends
    return np.where(segments >= 0, numbers, -1)


def split_pair(store: TokenStore, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the two sequences of a document, chosen and rejected: ids and which are trained."""
    ids, mask = store.document(number).astype(np.int64), store.mask(number).astype(bool)
    end = int(number_sequences(np.zeros((1, len(ids))), mask[None])[0].argmax())
    return [(ids[:end], mask[:end]), (ids[end:], mask[end:])]


def padded_pairs(
    store: TokenStore, numbers: Sequence[int], reference_logps: torch.Tensor | None = None
) -> PairBatch:
    """Return pairs as a batch of one sequence a row; see :func:`model.dataset.padded`."""
    inputs, targets, lengths = padded([part for n in numbers for part in split_pair(store, n)])
    return PairBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        token_mask=torch.from_numpy(np.arange(inputs.shape[1]) < lengths[:, None]),
        n_units=len(numbers),
        n_tokens=int(lengths.sum()),
        sequence_ids=torch.arange(len(inputs))[:, None].expand(inputs.shape),
        reference_logps=reference_logps,
    )


def dpo_data(
    path: Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    *,
    val_path: Path | None = None,
    recipe: str = "best",
    log: Log = print,
) -> PairData:
    """Return the rows of preference tuning; recipe ``v1`` gives each pair a row of its own.

    A row has twice ``max_seq_len`` positions: the longest pair has two sequences of that length.

    Raises:
        FileNotFoundError, ValueError: as :func:`pair_store`, or no pair is left to train on.
    """
    store = pair_store(path, tokenizer, max_tokens=max_seq_len, log=log)
    held_out = (store, store.held_out)
    if val_path is not None:
        val_store = pair_store(val_path, tokenizer, max_tokens=max_seq_len, log=log)
        held_out = (val_store, np.flatnonzero(np.diff(val_store.offsets)))  # not the dropped
    plan = open_plan(
        store, 2 * max_seq_len + 1, cut=False, alone=recipe == "v1", hold_out=val_path is None
    )
    if not plan.n_rows:
        raise ValueError(f"{path}: nothing in it can be trained on; see the counts above")
    return PairData(store, plan, tokenizer, held_out)
