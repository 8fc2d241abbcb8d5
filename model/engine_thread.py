"""An engine in a thread of its own: requests come from other threads, pieces go back to them."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .generation import Answer, Engine, Piece, QueueFull
from .sampling import SamplingOptions

Result = TypeVar("Result")
Pieces = list[tuple[Answer, Piece]]


def apart(work: Callable[[], Result]) -> Result:
    """Return the result of work done in a thread that ends with it.

    Every thread that ever computed keeps a team of helpers (OpenMP's). With more of them than cores
    they no longer wait busily for the next operation but sleep, and being woken takes as long as an
    operation: an engine whose model was loaded in another living thread is a third slower.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


class Inbox:
    """The pieces of one answer that its reader has not taken yet."""

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()

    def put(self, answer: Answer, piece: Piece) -> None:
        self._pieces.put(piece)

    def take(self) -> Piece:
        return self._pieces.get()


class EngineThread:
    """Steps an engine whenever a request is under way, and sleeps otherwise.

    Args:
        engine: nobody else may step it.
        deliver: is called in this thread, once a step, with all its pieces; None: each answer's
            reader takes them by :meth:`iterate`.
    """

    def __init__(self, engine: Engine, deliver: Callable[[Pieces], None] | None = None) -> None:
        self.engine = engine
        self.error: BaseException | None = None  # what ended the thread, if it was not close()
        self._deliver = deliver
        self._inboxes: dict[Answer, Inbox] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(
        self,
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        on_piece: Callable[[Answer, Piece], None] | None = None,
    ) -> Answer:
        """Queue a request, see :meth:`Engine.submit`.

        Raises:
            ValueError: as there.
            QueueFull: as there, or the engine is being stopped.
        """
        with self._changed:
            if self.error is not None:
                raise QueueFull(f"the engine has failed: {self.error}")
            if self._closing:
                raise QueueFull("the engine is being stopped: no new requests")
            if on_piece is None and self._deliver is None:
                inbox = Inbox()
                answer = self.engine.submit(prompt_ids, options, inbox.put)
                self._inboxes[answer] = inbox
            else:
                answer = self.engine.submit(prompt_ids, options, on_piece)
            self._changed.notify_all()
        return answer

    def cancel(self, answer: Answer) -> None:
        """Give up an answer; its slot is free within one step."""
        with self._changed:
            self.engine.cancel(answer)
            self._changed.notify_all()

    def iterate(self, answer: Answer) -> Iterator[Piece]:
        """Yield the pieces of an answer as they come; breaking off cancels it.

        Raises:
            Exception: what ended the answer, if it failed.
        """
        inbox = self._inboxes[answer]
        try:
            while True:
                piece = inbox.take()
                yield piece
                if piece.error is not None:
                    raise piece.error
                if piece.is_last:
                    return
        finally:
            self._inboxes.pop(answer, None)
            if not answer.is_done:
                self.cancel(answer)

    def close(self) -> None:
        """Cancel what is under way and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self.engine.has_work or self._closing):
                        self._changed.wait()
                    closing = self._closing
                if closing:
                    self._end_all()
                    return
                self._step()
        except BaseException as error:
            with self._changed:
                self.error = error  # from here on nothing new comes in
            with contextlib.suppress(Exception):  # the one above is told
                self._end_all()
            raise

    def _end_all(self) -> None:
        self.engine.cancel_all()
        while self.engine.has_work:
            self._step()

    def _step(self) -> None:
        pieces = self.engine.step()
        if self._deliver is not None and pieces:
            self._deliver(pieces)
