"""The engine: many requests decoded together, each in a slot of the cache, text as it completes.

Knows neither this project's model nor its tokenizer beyond what it calls: a ``transformers`` causal
language model with ``config.max_seq_len``, and an object with ``decode``.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .answers import Answer, Piece
from .fast_step import fast_step
from .sampling import Sampler, SamplingOptions, Token, choose_tokens
from .slot_cache import PromptView, SlotCache, StepView
from .text_stream import TextStream
from .threads import ThreadTuner

WIDTH = 16  # tokens; widths of prompts are multiples of it


class QueueFull(RuntimeError):
    """So many requests wait that another one is refused; it may come again later."""


@dataclass
class EngineCounters:
    """What an engine has done since it was made."""

    n_requests: int = 0
    n_finished: int = 0
    n_cancelled: int = 0
    n_failed: int = 0
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_new_tokens: int = 0
    n_steps: int = 0
    busy_s: float = 0.0


class Engine:
    """Answers many requests at once: they join and leave between steps (Orca, OSDI 2022, section
    3.1, iteration-level scheduling).

    A step computes at most ``prefill_chunk`` tokens of prompts, so that a long one does not hold up
    the others (Sarathi, arXiv:2308.16369, section 4.1), then one token of every request that is
    past its prompt. The requests being decoded are in the first slots of the cache, without a gap,
    so that the model sees them as one batch; the request whose prompt is being computed is in the
    slot after them; the others keep what they held for a later prompt that begins alike.

    A request depends on its neighbours by rounding alone: a batch of another size adds in another
    order. ``deterministic`` computes each request by itself, in shapes that it alone decides, and
    reuses nothing: its answer is the same bit for bit whatever runs beside it, and the gain of
    batches is lost.

    Not for two threads, but for :meth:`submit` and :meth:`cancel`; see :mod:`model.engine_thread`.

    Args:
        model: in eval mode; ``config.max_seq_len`` bounds prompt and answer together.
        tokenizer: has ``decode``; None: answers have tokens and no text.
        max_batch: requests under way at once.
        max_queue: requests that may wait.
        prefill_chunk: tokens of prompts in a step.
        capacity: tokens of prompt and answer together, if fewer than the context.
        tune_threads: on a CPU, find out how many threads are fastest; not if ``deterministic``,
            since even their number may show in a last bit.

    Raises:
        ValueError: a model in training mode, or sizes below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any | None,
        *,
        max_batch: int = 8,
        max_queue: int = 64,
        prefill_chunk: int = 128,
        deterministic: bool = False,
        capacity: int | None = None,
        tune_threads: bool = True,
    ) -> None:
        if model.training:
            raise ValueError("the model is in training mode, so dropout would answer: call eval()")
        if min(max_batch, max_queue, prefill_chunk) < 1:
            raise ValueError(
                f"max_batch={max_batch}, max_queue={max_queue}, prefill_chunk={prefill_chunk}: "
                "each must be at least 1"
            )
        self.model, self.tokenizer = model, tokenizer
        self._device = model.device
        self.context: int = model.config.max_seq_len
        self.max_batch, self.max_queue = max_batch, max_queue
        self.prefill_chunk = prefill_chunk
        self.deterministic = deterministic
        self.counters = EngineCounters()
        tune_threads = tune_threads and not deterministic and self._device.type == "cpu"
        self._fast_step = fast_step(model)
        self._threads = ThreadTuner() if tune_threads else None
        self._lock = threading.Lock()  # of the queue
        self._queue: deque[Answer] = deque()
        self._decoding: list[Answer] = []  # the index is the slot
        self._prefilling: Answer | None = None  # its slot is len(self._decoding)
        self._cache = SlotCache(max_batch, min(capacity or self.context, self.context))
        self._last_used = [0] * max_batch  # the step in which a slot was last written

    @property
    def n_active(self) -> int:
        """Requests that have a slot."""
        return len(self._under_way())

    @property
    def n_queued(self) -> int:
        """Requests that wait for one."""
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        return bool(self._queue or self._decoding or self._prefilling)

    # ---- requests ----

    def submit(
        self,
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        on_piece: Callable[[Answer, Piece], None] | None = None,
    ) -> Answer:
        """Queue a request.

        Args:
            prompt_ids: at least one id, and fewer than the context.
            on_piece: is called with each piece, by whoever steps the engine.

        Raises:
            ValueError: an empty prompt, an id the model does not have, or a prompt that leaves no
                room for an answer.
            QueueFull: too many requests wait.
        """
        prompt_ids = list(prompt_ids)
        self.check(prompt_ids, options)
        room = self._cache.capacity - len(prompt_ids)
        vocab_size = self.model.config.vocab_size
        answer = Answer(
            prompt_ids,
            options,
            room if options.max_new_tokens is None else min(room, options.max_new_tokens),
            Sampler(options, prompt_ids, vocab_size, self._device),
            TextStream(self.tokenizer, options.stop) if self.tokenizer is not None else None,
            on_piece,
        )
        with self._lock:
            n_waiting = len(self._queue) - (self.max_batch - self.n_active)
            if n_waiting >= self.max_queue:
                raise QueueFull(
                    f"{n_waiting} requests wait already, {self.max_queue} may: try again later"
                )
            self._queue.append(answer)
            self.counters.n_requests += 1
        return answer

    def check(self, prompt_ids: Sequence[int], options: SamplingOptions) -> None:
        """Raise ValueError for a request that cannot be answered, see :meth:`submit`."""
        vocab_size = self.model.config.vocab_size
        if not prompt_ids:
            raise ValueError("the prompt is empty: it needs at least one token, such as <s>")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
            raise ValueError(
                f"the prompt has ids from {min(prompt_ids)} to {max(prompt_ids)}, the model has "
                f"vocab_size={vocab_size}: the tokenizer does not fit the model"
            )
        if len(prompt_ids) >= self._cache.capacity:
            raise ValueError(
                f"the prompt of {len(prompt_ids)} tokens leaves no room for an answer in a context "
                f"of max_seq_len={self._cache.capacity}: shorten it, or lengthen the context with "
                "--rope_scaling"
            )
        if max(options.logit_bias, default=0) >= vocab_size:
            raise ValueError(
                f"logit_bias has the id {max(options.logit_bias)}, the model has vocab_size="
                f"{vocab_size}"
            )

    def cancel(self, answer: Answer) -> None:
        """Give up an answer: the next step frees its slot and ends it with ``cancelled``."""
        answer.is_cancelled = True

    def cancel_all(self) -> None:
        """Give up every answer that waits or is under way."""
        with self._lock:
            for answer in [*self._queue, *self._under_way()]:
                answer.is_cancelled = True

    def _under_way(self) -> list[Answer]:
        return [*self._decoding, *filter(None, [self._prefilling])]

    def stream(self, answer: Answer) -> Iterator[str]:
        """Step until ``answer`` is done and yield its text; breaking off cancels it.

        For programs without an engine thread.

        Raises:
            Exception: what ended the answer, if it failed.
        """
        n_read = 0
        try:
            while not answer.is_done:
                self.step()
                if len(answer.text) > n_read:
                    piece, n_read = answer.text[n_read:], len(answer.text)
                    yield piece
            if answer.error:
                raise answer.error
        finally:
            if not answer.is_done:
                self.cancel(answer)
                self.step()

    def answer_all(
        self, prompts: Iterable[Sequence[int]], options: SamplingOptions
    ) -> list[Answer]:
        """Return the whole answers to many prompts, in their order.

        Raises:
            Exception: what ended an answer, if one failed.
        """
        answers = []
        for prompt_ids in prompts:
            while self.n_queued >= self.max_queue:
                self.step()
            answers.append(self.submit(prompt_ids, options))
        while self.has_work:
            self.step()
        for answer in answers:
            if answer.error:
                raise answer.error
        return answers

    # ---- a step ----

    def step(self) -> list[tuple[Answer, Piece]]:
        """Let every request go on; return the new pieces.

        An error of one request ends that one; an error of the model ends all that are under way,
        and the engine goes on with those that wait.
        """
        start = time.perf_counter()
        pieces: list[tuple[Answer, Piece]] = []
        try:
            self._drop_cancelled(pieces)
            self._prefill(pieces)
            self._decode(pieces)
        except BaseException as error:
            self._abandon(error, pieces)
            if not isinstance(error, Exception):  # Ctrl-C
                raise
        self.counters.n_steps += 1
        self.counters.busy_s += time.perf_counter() - start
        for answer, piece in pieces:
            if answer._on_piece is not None:
                answer._on_piece(answer, piece)
        return pieces

    def _drop_cancelled(self, pieces: list[tuple[Answer, Piece]]) -> None:
        with self._lock:
            waiting = [answer for answer in self._queue if answer.is_cancelled]
            for answer in waiting:
                self._queue.remove(answer)
        dropped = [answer for answer in self._decoding if answer.is_cancelled]
        if self._prefilling is not None and self._prefilling.is_cancelled:
            dropped.append(self._prefilling)
        for answer in dropped:
            self._free(answer)
        for answer in [*waiting, *dropped]:
            self._end(answer, answer.end("cancelled"), pieces)

    def _prefill(self, pieces: list[tuple[Answer, Piece]]) -> None:
        """Compute up to a chunk of prompts; a request whose prompt is done has its first token."""
        budget = self.prefill_chunk
        while budget > 0:
            answer = self._prefilling or self._next_in_queue()
            if answer is None:
                return
            slot = len(self._decoding)
            start = len(self._cache.ids[slot])
            # in shapes of its own, an answer may not have what others leave of the budget
            n_most = self.prefill_chunk if self.deterministic else budget
            chunk = answer.prompt_ids[start : start + n_most]
            padded = self._padded(chunk, start)
            with self._tuned(len(padded)):
                logits = self._forward([padded], slot, n_last=len(chunk) - 1)
                self._cache.ids[slot] += chunk
                self._last_used[slot] = self.counters.n_steps
                budget -= len(chunk)
                if start + len(chunk) == len(answer.prompt_ids):
                    self._decoding.append(answer)
                    self._prefilling = None
                    self._sample([answer], logits, pieces)

    def _padded(self, chunk: list[int], start: int) -> list[int]:
        """Return a chunk that begins at ``start``, filled up to one of a few widths.

        Kernels are compiled for each width, 3 ms and 3 MB every time. What fills up comes after
        the chunk, so nothing of it sees that, and the next tokens replace it in the cache.
        """
        width = min(WIDTH, self.prefill_chunk)
        room = self._cache.capacity - start - len(chunk)
        return chunk + [0] * min(-len(chunk) % width, room)

    def _decode(self, pieces: list[tuple[Answer, Piece]]) -> None:
        """Compute the next token of every request that has one already."""
        if self.deterministic:
            self._decode_alone(pieces)
            return
        answers = list(self._decoding)
        if not answers:
            return
        last = [answer.tokens[-1].id for answer in answers]
        with self._tuned(len(last)):
            logits = self._next_logits(last)
            for slot, token_id in enumerate(last):
                self._cache.ids[slot].append(token_id)
                self._last_used[slot] = self.counters.n_steps
            self._sample(answers, logits, pieces)

    def _decode_alone(self, pieces: list[tuple[Answer, Piece]]) -> None:
        for answer in list(self._decoding):
            slot = self._decoding.index(answer)  # others may have left, and this one moved
            last = answer.tokens[-1].id
            logits = self._next_logits([last], slot)
            self._cache.ids[slot].append(last)
            self._sample([answer], logits, pieces)

    def _tuned(self, n_tokens: int) -> AbstractContextManager:
        """Compute what is inside, choosing tokens included, with the best number of threads."""
        return nullcontext() if self._threads is None else self._threads.step(n_tokens)

    def _next_logits(self, last: list[int], slot: int | None = None) -> Tensor:
        """Append a token to each of the first slots, or to one; return the logits (n, V)."""
        if self._fast_step is not None:
            with torch.inference_mode():
                return self._fast_step(self._cache, last, slot or 0)
        return self._forward([[token_id] for token_id in last], slot)

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]], slot: int | None = None, n_last: int = 0) -> Tensor:
        """Append ``ids`` (n, T) to the slots; return the logits (n, V) after column ``n_last``.

        Args:
            slot: of the only row; None: a token each for the first slots.
        """
        if slot is None:
            view = StepView(self._cache, len(ids), self._device)
            places = {"position_ids": view.positions[:, None], "attention_mask": view.mask()}
        else:
            view, places = PromptView(self._cache, slot), {}
        out = self.model(
            torch.tensor(ids, device=self._device),
            past_key_values=view,
            use_cache=True,
            logits_to_keep=torch.tensor([n_last], device=self._device),
            **places,
        )
        return out.logits[:, 0]

    def _sample(
        self, answers: list[Answer], logits: Tensor, pieces: list[tuple[Answer, Piece]]
    ) -> None:
        """Give each answer its next token; those that end leave their slots."""
        chosen = choose_tokens([answer._sampler for answer in answers], logits)
        for answer, token in zip(answers, chosen, strict=True):
            if isinstance(token, ValueError):
                piece = answer.end(error=token)
            else:
                if token.id == self.model.config.eos_token_id:
                    token = replace(token, finish_reason="stop")
                elif len(answer.tokens) + 1 == answer._n_most:
                    token = replace(token, finish_reason="length")
                self.counters.n_new_tokens += 1
                try:
                    piece = answer.take(token)
                except Exception as error:  # of its text: the others' is right
                    piece = answer.end(error=error)
            if piece.is_last:
                self._free(answer)
                self._end(answer, piece, pieces)
            else:
                pieces.append((answer, piece))

    def _end(self, answer: Answer, piece: Piece, pieces: list[tuple[Answer, Piece]]) -> None:
        self.counters.n_finished += piece.finish_reason in ("stop", "length")
        self.counters.n_cancelled += piece.finish_reason == "cancelled"
        self.counters.n_failed += piece.error is not None
        pieces.append((answer, piece))

    def _abandon(self, error: BaseException, pieces: list[tuple[Answer, Piece]]) -> None:
        """End all that are under way; what their slots hold is unsure now."""
        failed = self._under_way()
        self._decoding, self._prefilling = [], None
        self._cache.ids = [[] for _ in range(self.max_batch)]
        cause = error if isinstance(error, Exception) else RuntimeError("interrupted")
        for answer in failed:
            self._end(answer, answer.end(error=cause), pieces)

    # ---- slots ----

    def _next_in_queue(self) -> Answer | None:
        """Return the next request that waits, in the slot after those being decoded, with as much
        of its prompt as any slot holds already.
        """
        if len(self._decoding) == self.max_batch:
            return None
        with self._lock:  # at every moment it is in one of the two places
            if not self._queue:
                return None
            answer = self._prefilling = self._queue.popleft()
        answer.started_at = time.perf_counter()
        answer.n_cached = 0 if self.deterministic else self._reuse(answer.prompt_ids)
        slot = len(self._decoding)
        self._cache.ids[slot] = self._cache.ids[slot][: answer.n_cached]
        self.counters.n_prompt_tokens += len(answer.prompt_ids)
        self.counters.n_cached_tokens += answer.n_cached
        return answer

    def _reuse(self, prompt_ids: list[int]) -> int:
        """Let the slot after those being decoded begin like a prompt; return for how many tokens.

        The prompt's last token is always computed: its logits are what is wanted.
        """
        slot, ids = len(self._decoding), self._cache.ids
        known = [n_common(held, prompt_ids[:-1]) for held in ids]
        # where as good, a free slot, and the one that holds least beyond it
        source = max(
            range(self.max_batch), key=lambda i: (known[i], i >= slot, known[i] - len(ids[i]))
        )
        n_known = known[source]
        others = [i for i in range(slot, self.max_batch) if i != source or n_known == 0]
        is_next_turn = n_known > 0 and 4 * n_known >= 3 * len(ids[source])
        if source >= slot and (is_next_turn or not others):
            self._swap(source, slot)
            return n_known
        # its holder is at work, or holds much else that is wanted again: a copy serves this one
        oldest = min(others, key=lambda i: (len(ids[i]) > 0, self._last_used[i]))
        self._swap(oldest, slot)
        if n_known:
            self._cache.copy(oldest if source == slot else source, slot, n_known)
        return n_known

    def _free(self, answer: Answer) -> None:
        """Take an answer out of its slot and close the gap with the last one."""
        if answer is self._prefilling:
            self._prefilling = None
            return
        slot, last = self._decoding.index(answer), len(self._decoding) - 1
        self._swap(slot, last)
        self._decoding[slot] = self._decoding[last]
        self._decoding.pop()
        if self._prefilling is not None:
            self._swap(last, last + 1)

    def _swap(self, one: int, other: int) -> None:
        self._cache.swap(one, other)
        used = self._last_used
        used[one], used[other] = used[other], used[one]


def n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two sequences begin with alike."""
    n = min(len(one), len(other))
    if one[:n] == other[:n]:  # compared at C's speed
        return n
    return next(i for i in range(n) if one[i] != other[i])


def generate(
    model: nn.Module, prompt_ids: Sequence[int], options: SamplingOptions
) -> Iterator[Token]:
    """Return one answer's tokens as they are made, the end token included.

    Answers generated side by side do not meet: each has an engine of its own. ``options.stop``
    needs text, so it is left to :func:`model.text_stream.stream_text`.

    Raises:
        ValueError: as :class:`Engine` and its ``submit``, at once; logits that are not numbers,
            later.
    """
    n_new = options.max_new_tokens or model.config.max_seq_len
    capacity = len(prompt_ids) + n_new
    engine = Engine(model, None, max_batch=1, capacity=capacity, tune_threads=False)
    answer = engine.submit(prompt_ids, options)

    def tokens() -> Iterator[Token]:
        while not answer.is_done:
            for _, piece in engine.step():
                if piece.token is not None:
                    yield piece.token
        if answer.error:
            raise answer.error

    return tokens()
