"""The models that the API server offers, and how the event loop waits for their answers."""

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .api_errors import (
    ApiError,
    invalid,
    queue_full,
    stopping,
    too_long,
    unavailable,
    unknown_model,
)
from .checkpoint import Loaded
from .engine_thread import EngineThread, Pieces, apart
from .generation import Answer, Engine, Piece, QueueFull
from .model_list import ModelChoice
from .sampling import SamplingOptions

Message = dict[str, str]
INLINE_CHARS = 2000  # encoding so much takes the event loop no longer than a millisecond
# What is counted for itself: 64 letters for each token of the context, or this many
LEAST_LETTERS = 100_000  # 0.1 s, in which nothing else runs
MESSAGE_LETTERS = 8  # a message takes as long as so many letters more
MESSAGE_TOKENS = 4  # <s>, a role, </s> and a line break at least


class Served:
    """A model with its engine; its pieces arrive in the event loop, once a step."""

    def __init__(
        self,
        choice: ModelChoice,
        loaded: Loaded,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.name = choice.name
        self.tokenizer = loaded.tokenizer
        self.engine = engine
        self.context = engine.context
        self.thread = EngineThread(engine, self._deliver)
        self.n_params = loaded.n_params
        self.fingerprint = fingerprint(loaded)
        self.created = int(choice.path.stat().st_mtime)
        self.longest_token = int(self.tokenizer.token_bytes.max())
        self.readers: dict[Answer, tuple[Reply, int]] = {}
        self.waiting: deque[Reply] = deque()  # they have answers for which the queue had no place
        self.is_draining = False
        self.at_rest = asyncio.Event()  # no reply is under way
        self.at_rest.set()
        self._replies: set[Reply] = set()  # under way
        self._loop = loop

    def _deliver(self, pieces: Pieces) -> None:
        """Hand a step's pieces to the event loop; called in the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._distribute, pieces)

    def _distribute(self, pieces: Pieces) -> None:
        for answer, piece in pieces:
            if reader := self.readers.get(answer):
                reply, index = reader
                reply.take(index, answer, piece)
        if any(piece.is_last for _, piece in pieces):  # nothing else frees a place
            self.feed()

    def feed(self) -> None:
        """Queue answers of the replies that have more, in turns, as long as there is room."""
        while self.waiting:
            reply = self.waiting[0]
            try:
                if reply.may_submit:
                    reply.submit_next()
            except QueueFull as error:
                if self.thread.is_alive:
                    return
                reply.fail(unavailable("failed", str(error)))
            except ValueError as error:
                reply.fail(invalid(str(error), code="invalid_value"))
            self.waiting.popleft()
            if reply.may_submit:
                self.waiting.append(reply)

    def note(self, reply: "Reply") -> None:
        """Know of a reply whether it is under way."""
        if reply.is_done or reply.is_abandoned:
            self._replies.discard(reply)
        else:
            self._replies.add(reply)
        (self.at_rest.clear if self._replies else self.at_rest.set)()

    def cancel_all(self) -> None:
        """Give up every answer, those too that are not queued yet."""
        for reply in list(self._replies):
            reply.fail(stopping())
        self.engine.cancel_all()

    def check_ids(self, ids: Sequence[int], field: str = "prompt") -> None:
        """Raise ApiError for ids that the model does not have, or that fill its context."""
        n_ids = self.tokenizer.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < n_ids:
            raise invalid(
                f"{field} has ids from {min(ids)} to {max(ids)}: expected 0 to {n_ids - 1}, see "
                "/tokenize",
                field,
            )
        if field == "prompt" and len(ids) >= self.context:
            raise too_long(len(ids), self.context, field)

    def check_length(self, what: str | Sequence[Message] | Sequence[int], field: str) -> None:
        """Raise ApiError for so much text, or so many ids, that translating it would hold up all
        others: the tokenizer lets nothing else run meanwhile.
        """
        limit = max(LEAST_LETTERS, 64 * self.context)
        n, unit = len(what), "ids" if field == "tokens" else "letters"
        if field == "messages":
            n = sum(len(message["content"]) + MESSAGE_LETTERS for message in what)
        if n > limit:
            raise invalid(
                f"{field} has {n} {unit}: expected at most {limit} in a request; send it in parts",
                field,
                "too_long",
            )

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return a conversation's ids, ready for the answer.

        Raises:
            ApiError: it leaves no room for one.
        """
        n_least = MESSAGE_TOKENS * len(messages)
        n_chars = sum(len(message["content"]) for message in messages)

        def encode() -> list[int]:
            return self.tokenizer.encode_chat(messages, add_generation_prompt=True)

        return await self._encode(encode, n_chars, n_least, "messages")

    async def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text to be continued.

        Raises:
            ApiError: it leaves no room for that.
        """

        def encode() -> list[int]:
            return self.tokenizer.encode_document(text)[:-1]

        return await self._encode(encode, len(text), 1, "prompt")

    async def _encode(
        self, encode: Callable[[], list[int]], n_chars: int, n_least: int, field: str
    ) -> list[int]:
        n_least = max(n_least, -(-n_chars // self.longest_token))
        if n_least >= self.context:  # no need to know how many exactly
            raise too_long(n_least, self.context, field, at_least=True)
        is_short = n_chars + 100 * n_least < INLINE_CHARS
        ids = encode() if is_short else await asyncio.to_thread(encode)
        if len(ids) >= self.context:
            raise too_long(len(ids), self.context, field)
        return ids


def fingerprint(loaded: Loaded) -> str:
    """Return what tells files apart that have one name: OpenAI's ``system_fingerprint``."""
    places = [loaded.path, *sorted(loaded.adapter.iterdir() if loaded.adapter else [])]
    states = [(str(place.resolve()), place.stat().st_mtime_ns) for place in places]
    return f"fp_{hashlib.sha256(repr(states).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Job:
    """One answer to be made."""

    prompt_ids: list[int]
    options: SamplingOptions


class Reply:
    """The answers to one HTTP request.

    At most as many as the engine has slots are queued at once, so that a request for many answers
    leaves room for others; the rest follow, in turns with those of other requests.

    Args:
        every_piece: whether the reader wants pieces as they come, or only whole answers.
    """

    def __init__(self, served: Served, jobs: Sequence[Job], *, every_piece: bool) -> None:
        self.served = served
        self.answers: list[Answer | None] = [None] * len(jobs)
        self.is_abandoned = False
        self._jobs = deque(enumerate(jobs))  # not submitted yet
        self._n_open = 0
        self._every_piece = every_piece
        self._fresh: list[tuple[int, Piece]] = []
        self._waiter: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Queue the first answers.

        Raises:
            ApiError: the queue is full, the server is being stopped, or a request that the engine
                does not take.
        """
        served = self.served
        if served.is_draining:
            raise unavailable("draining")
        served.feed()  # those who wait come first
        try:
            self.submit_next()
        except QueueFull as error:
            is_full = served.thread.is_alive
            raise (queue_full(str(error)) if is_full else unavailable("failed")) from None
        except ValueError as error:
            raise invalid(str(error), code="invalid_value") from None
        served.waiting.append(self)
        served.feed()
        for _, piece in self._fresh:  # none is from the engine yet
            self.abandon()
            raise piece.error

    @property
    def is_done(self) -> bool:
        """Whether every answer has come to its end."""
        return self._n_open == 0 and not self._jobs

    @property
    def is_read(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.is_abandoned or (self.is_done and not self._fresh)

    @property
    def may_submit(self) -> bool:
        """Whether it is up to the queue alone when the next answer is begun."""
        return bool(self._jobs) and self._n_open < self.served.engine.max_batch

    def submit_next(self) -> None:
        """Queue the next answer.

        Raises:
            QueueFull, ValueError: as the engine does.
        """
        index, job = self._jobs[0]
        answer = self.served.thread.submit(job.prompt_ids, job.options)
        self._jobs.popleft()
        self.answers[index] = answer
        self.served.readers[answer] = (self, index)
        self._n_open += 1
        self.served.note(self)

    def take(self, index: int, answer: Answer, piece: Piece) -> None:
        """Take a piece from the engine."""
        has_failed = piece.error is not None or piece.finish_reason == "cancelled"
        if piece.is_last:
            del self.served.readers[answer]
            self._n_open -= 1
            if has_failed:
                self._jobs.clear()
            elif self.may_submit and self not in self.served.waiting:
                self.served.waiting.append(self)
            self.served.note(self)
        if self.is_abandoned:
            return
        if self._every_piece or self.is_done or has_failed:
            self._fresh.append((index, piece))
            self._wake()

    def fail(self, error: ApiError) -> None:
        """End with an error, and everything that is under way with it."""
        self._fresh.append((0, Piece("", error=error)))
        self._give_up()

    def _give_up(self) -> None:
        self._jobs.clear()
        for answer in self.answers:
            if answer is not None and not answer.is_done:
                self.served.thread.cancel(answer)
        self.served.note(self)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def pieces(self) -> list[tuple[int, Piece]]:
        """Wait for what is new; without ``every_piece``, for the end. Empty: abandoned."""
        if not self._fresh and not self.is_abandoned:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        fresh, self._fresh = self._fresh, []
        return fresh

    def abandon(self) -> None:
        """Cancel what is not done; nobody waits for it any more."""
        if self.is_abandoned:
            return
        self.is_abandoned = True
        self._give_up()


class Service:
    """Everything that is served: models by name, the first one for any other name.

    Args:
        open_models: returns the models; is called in a thread of its own.
        defaults: how to answer where a request does not say.
        is_strict: refuse unknown names.
    """

    def __init__(
        self,
        open_models: Callable[[asyncio.AbstractEventLoop], list[Served]],
        defaults: SamplingOptions,
        *,
        is_strict: bool = False,
    ) -> None:
        self.models: dict[str, Served] = {}
        self.defaults = defaults
        self._open_models = open_models
        self._is_strict = is_strict
        self._state = "loading"

    @property
    def state(self) -> str:
        """``loading``, ``ok``, ``draining``, or ``failed``: an engine's thread has ended."""
        if self._state == "ok" and not all(m.thread.is_alive for m in self.models.values()):
            return "failed"
        return self._state

    async def load(self) -> None:
        """Open the models and start their engines.

        Raises:
            Exception: as ``open_models``.
        """
        loop = asyncio.get_running_loop()
        found = await asyncio.to_thread(apart, lambda: self._open_models(loop))
        for served in found:
            served.thread.start()
        self.models = {served.name: served for served in found}
        if self._state == "loading":
            self._state = "ok"

    def model(self, name: str | None) -> Served:
        """Return the model that a request names, or the first one.

        Raises:
            ApiError: there is none of that name and names are strict, or none is ready.
        """
        if self.state != "ok":
            raise unavailable(self.state)
        if name and (self._is_strict or name in self.models):
            return self.named(name)
        return next(iter(self.models.values()))

    def named(self, name: str) -> Served:
        """Return the model of exactly this name.

        Raises:
            ApiError: there is none.
        """
        if name not in self.models:
            raise unknown_model(name, list(self.models))
        return self.models[name]

    async def drain(self, limit_s: float) -> bool:
        """Take no more requests and let those under way come to their end, ``limit_s`` seconds
        long; then cancel the rest. Return whether all came to it.
        """
        self._state = "draining"
        everything = list(self.models.values())
        for served in everything:
            served.is_draining = True
        all_ended = True
        try:
            async with asyncio.timeout(limit_s):
                for served in everything:
                    if served.thread.is_alive:  # else nothing comes to its end any more
                        await served.at_rest.wait()
        except TimeoutError:
            all_ended = False
        self.cancel_all()
        await asyncio.gather(*(asyncio.to_thread(served.thread.close) for served in everything))
        return all_ended

    def cancel_all(self) -> None:
        """Give up every answer at once."""
        for served in self.models.values():
            served.cancel_all()


def check_names(choices: Sequence[ModelChoice]) -> None:
    """Raise ValueError where two models have one name."""
    names = [choice.name for choice in choices]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two models are called {name!r}: give one another name, --add_model NAME=PATH"
            )
