"""Measuring a model: loss, bits per byte, the likelihood of answers, and how sure a share is.

The functions that score text need of the model what every ``transformers`` causal language model
has: ``base_model`` (everything before the head), ``get_output_embeddings`` and
``config.max_position_embeddings``.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .losses import Batch, LossFn

Progress = Callable[[int], None]  # called with how many more are done
MAX_POSITIONS = 4096  # of a batch, padding included; larger ones are no faster on a CPU
HEAD_ROWS = 2048  # positions whose logits are held at once: 50 MB at 6,400 ids
WILSON_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile: 95 % between -z and z


# ---- held-out batches, in training ----


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> dict[str, float] | None:
    """Return means over held-out batches, None if told to stop; the model's mode stays as it was.

    Where several ranks measure a part of the batches each, ``gather`` collects what they found.

    ``val_loss`` is in nats per unit (trained token), ``val_bpb`` in bits per byte of UTF-8 text,
    which unlike the loss does not depend on the tokenizer. Empty where there is nothing to measure
    on.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {}
    n_units = n_bytes = 0
    for batch in batches:
        if should_stop():
            break
        out = loss_fn(model, batch.to(device))
        for name, value in {"loss": out.loss, **out.metrics}.items():
            name = f"val_{name}"
            sums[name] = sums.get(name, 0.0) + float(value)
        n_units += batch.n_units
        n_bytes += batch.n_bytes
    model.train(was_training)
    parts = gather((sums, n_units, n_bytes, should_stop()))
    if any(was_stopped for *_, was_stopped in parts):
        return None
    n_units, n_bytes = (sum(part[place] for part in parts) for place in (1, 2))
    if not n_units:
        return {}
    names = dict.fromkeys(name for part in parts for name in part[0])
    sums = {name: sum(part[0].get(name, 0.0) for part in parts) for name in names}
    result = {name: value / n_units for name, value in sums.items()}
    if n_bytes:
        result["val_bpb"] = sums["val_loss"] / math.log(2) / n_bytes
    return result


# ---- shares ----


def wilson_interval(n_yes: int, n: int, z: float = WILSON_Z) -> tuple[float, float]:
    """Return the bounds between which a share lies that was seen ``n_yes`` times in ``n``.

    Wilson's score interval (1927, Journal of the American Statistical Association 22, p. 209): the
    usual ``p ± z·s`` leaves 0..1 and is empty at 0 of n, which happens in subjects of 20 questions.
    """
    if not 0 <= n_yes <= n:
        raise ValueError(f"{n_yes} of {n} is no share")
    if n == 0:
        return 0.0, 1.0  # nothing was seen, so anything may be
    share = n_yes / n
    scale = 1 + z**2 / n
    center = (share + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True)
class Share:
    """How many of how many, with its 95 % interval."""

    n_yes: int
    n: int

    @property
    def value(self) -> float:
        """The share itself; 0 of nothing."""
        return self.n_yes / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """:func:`wilson_interval`."""
        return wilson_interval(self.n_yes, self.n)

    def __add__(self, other: "Share") -> "Share":
        return Share(self.n_yes + other.n_yes, self.n + other.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    def as_json(self) -> dict[str, Any]:
        """Return the numbers under names."""
        low, high = self.interval
        return {"right": self.n_yes, "asked": self.n, "share": self.value, "low": low, "high": high}


# ---- likelihood ----


def batches_by_length(lengths: Sequence[int], max_positions: int) -> Iterator[list[int]]:
    """Yield the indices of ``lengths`` in groups of like length, the longest first.

    A group padded to its longest has at most ``max_positions`` positions, or a single member. The
    longest come first, so that memory that is too small shows at once.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and (len(group) + 1) * lengths[group[0]] > max_positions:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    """Return the rows (B, longest) with ``fill`` after them."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=device)


def target_logprobs(model: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """Return the log probability (n,) in nats, fp32, of each target after its state (n, D).

    Only these states pass through the head, which is an eighth of the small model's arithmetic.
    """
    head = model.get_output_embeddings()
    parts = [
        head(some).float().log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]
        for some, ids in zip(states.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
    ]
    return torch.cat(parts)


def _no_progress(n_more: int) -> None:
    """Nobody watches."""


@torch.inference_mode()
def next_token_logprobs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[int],
    *,
    max_positions: int = MAX_POSITIONS,
    progress: Progress = _no_progress,
) -> Tensor:
    """Return log probabilities (prompts, candidates) in nats, fp32, of the token after each prompt.

    Prompts of like length share a batch, padded on the right, where causal attention never looks.

    Args:
        model: in eval mode.
        prompts: ids, each at least one.
        candidates: ids whose probability is asked for.
    """
    result = torch.empty(len(prompts), len(candidates))
    head = model.get_output_embeddings()
    for group in batches_by_length([len(prompt) for prompt in prompts], max_positions):
        rows = [prompts[index] for index in group]
        out = model.base_model(input_ids=padded(rows, 0, model.device), use_cache=False)
        last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
        states = out.last_hidden_state[torch.arange(len(rows), device=model.device), last]  # (B, D)
        logprobs = head(states).float().log_softmax(dim=-1)
        result[group] = logprobs[:, list(candidates)].cpu()
        progress(len(group))
    return result


@torch.inference_mode()
def option_logprobs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    max_positions: int = MAX_POSITIONS,
    progress: Progress = _no_progress,
) -> list[list[float]]:
    """Return the summed log probability in nats of every option after its prompt.

    A prompt and its options are one row, so that the prompt is computed once: an option sees the
    prompt and itself, and its positions go on from the prompt's.

    Args:
        model: in eval mode.
        prompts: ids, each at least one.
        options: for each prompt, ids of texts that may follow, each at least one.
    """
    rows = [
        [
            *prompt,
            *(token for option in texts for token in option[:-1]),
        ]  # the last predicts nothing
        for prompt, texts in zip(prompts, options, strict=True)
    ]
    result: list[list[float]] = [[] for _ in prompts]
    for group in batches_by_length([len(row) for row in rows], max_positions):
        segments: list[list[int]] = []  # of a row: 0 for the prompt, 1, 2, … for the options
        positions: list[list[int]] = []
        sources: list[tuple[int, int]] = []  # (row, column) of the state before each option token
        targets: list[int] = []
        owners: list[int] = []  # the option that a target belongs to, counted through the batch
        n_options = 0
        for row, index in enumerate(group):
            n_prompt = len(prompts[index])
            segments.append([0] * n_prompt)
            positions.append(list(range(n_prompt)))
            for number, option in enumerate(options[index], 1):
                column = len(segments[-1])
                segments[-1] += [number] * (len(option) - 1)
                positions[-1] += range(n_prompt, n_prompt + len(option) - 1)
                columns = [n_prompt - 1, *range(column, column + len(option) - 1)]
                sources += [(row, column) for column in columns]
                targets += option
                owners += [n_options] * len(option)
                n_options += 1
        device = model.device
        out = model.base_model(
            input_ids=padded([rows[index] for index in group], 0, device),
            position_ids=padded(positions, 0, device),
            attention_mask=see_own_option(padded(segments, -1, device)),
            use_cache=False,
        )
        row_of, column_of = torch.tensor(sources, device=device).T
        states = out.last_hidden_state[row_of, column_of]
        logprobs = target_logprobs(model, states, torch.tensor(targets, device=device))
        sums = torch.zeros(n_options, dtype=torch.float64)
        sums.index_add_(0, torch.tensor(owners), logprobs.cpu().double())  # MPS has no fp64
        values = iter(sums.tolist())
        for index in group:
            result[index] = [next(values) for _ in options[index]]
        progress(len(group))
    return result


def see_own_option(segments: Tensor) -> Tensor:
    """Return the mask (B, 1, T, T) under which a query sees the prompt (0) and its own segment."""
    T = segments.shape[1]
    queries, keys = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    return (causal & ((keys == queries) | (keys == 0)))[:, None]


# ---- bits per byte ----


@dataclass
class TextScore:
    """What a text costs under a model; the end token of each document counts as part of it."""

    bits: float = 0.0
    n_bytes: int = 0
    n_tokens: int = 0
    n_documents: int = 0

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8, which does not depend on the tokenizer."""
        return self.bits / self.n_bytes if self.n_bytes else math.nan

    def as_json(self) -> dict[str, Any]:
        """Return the numbers under names."""
        return {**vars(self), "bits_per_byte": self.bits_per_byte}


@dataclass(frozen=True)
class Window:
    """A stretch of a document for one pass: ``ids[start:stop]``, scored from ``first`` on."""

    start: int
    first: int
    stop: int


def windows_of(n_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Yield windows of at most ``context`` inputs in which each token but the first is scored once.

    The first window scores all it holds. Each later one ends ``stride`` tokens further and scores
    only those, after at least ``context - stride + 1`` tokens that came before: nothing is lost at
    a border, and no token is judged without its past.
    """
    first = 1
    while first < n_tokens:
        stop = min(n_tokens, context + 1 if first == 1 else first + stride)
        yield Window(max(0, stop - context - 1), first, stop)
        first = stop


def measure_text(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    context: int | None = None,
    max_positions: int = MAX_POSITIONS,
    progress: Progress = _no_progress,
) -> TextScore:
    """Return what ``texts`` cost as documents ``<s> text </s>``, every byte of them.

    A document longer than the context is scored in :func:`windows_of` with a stride of half of it.

    Args:
        model: in eval mode.
        tokenizer: has ``encode_document``.
        texts: documents; a few at a time are held in memory.
        context: inputs that the model sees at once; default: its ``max_position_embeddings``.
        progress: called with the bytes that were scored.
    """
    context = context or model.config.max_position_embeddings
    score = TextScore()
    held: list[tuple[list[int], Window]] = []
    n_held = n_bytes_held = 0

    def flush() -> None:
        nonlocal held, n_held, n_bytes_held
        score.bits += window_bits(model, held, max_positions)
        progress(n_bytes_held)
        held, n_held, n_bytes_held = [], 0, 0

    for text in texts:
        ids = tokenizer.encode_document(text)
        n_bytes = len(text.encode())
        windows = list(windows_of(len(ids), context, max(1, context // 2)))
        held += [(ids, window) for window in windows]
        n_held += sum(window.stop - window.start for window in windows)
        n_bytes_held += n_bytes
        score.n_bytes += n_bytes
        score.n_tokens += len(ids) - 1
        score.n_documents += 1
        if n_held >= 16 * max_positions:  # enough to find rows of like length
            flush()
    flush()
    return score


@torch.inference_mode()
def window_bits(
    model: nn.Module, windows: Sequence[tuple[list[int], Window]], max_positions: int
) -> float:
    """Return the bits of the scored tokens of (document's ids, window), in batches by length."""
    nats = 0.0
    for group in batches_by_length([w.stop - w.start - 1 for _, w in windows], max_positions):
        members = [windows[index] for index in group]
        rows = [ids[w.start : w.stop - 1] for ids, w in members]
        states = model.base_model(
            input_ids=padded(rows, 0, model.device), use_cache=False
        ).last_hidden_state
        scored = torch.cat(
            [states[row, w.first - w.start - 1 : w.stop - w.start - 1] for row, (_, w) in
             enumerate(members)]
        )  # fmt: skip
        targets = [token for ids, w in members for token in ids[w.first : w.stop]]
        logprobs = target_logprobs(model, scored, torch.tensor(targets, device=model.device))
        nats -= float(logprobs.cpu().double().sum())
    return nats / math.log(2)
