"""Server-sent events: a reply written to its client as its tokens come, and given up with it."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .api_errors import ApiError, of_the_engine, stopping, unavailable
from .api_responses import DONE, ChatForm, Chunks, CompletionForm, event
from .api_service import Reply
from .generation import Piece

LOG = logging.getLogger("minimind.server")
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


async def watch(request: Request, reply: Reply) -> None:
    """Abandon a reply when its client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    reply.abandon()


def failure(reply: Reply, piece: Piece) -> ApiError | None:
    """Return why an answer ended, if not by itself."""
    if isinstance(piece.error, ApiError):
        return piece.error
    if piece.error is not None:
        if not isinstance(piece.error, ValueError):
            LOG.error("an answer failed", exc_info=piece.error)
        return of_the_engine(piece.error)
    if piece.finish_reason == "cancelled":
        return stopping() if reply.served.is_draining else unavailable("failed")
    return None


class EventStream(Response):
    """A reply as server-sent events, each written as soon as its token is there."""

    media_type = None

    def __init__(
        self,
        request: Request,
        reply: Reply,
        form: ChatForm | CompletionForm,
        chunks: Sequence[Chunks],
        usage_of: int | None,
    ) -> None:
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self._request, self._reply, self._form = request, reply, form
        self._chunks = chunks
        self._usage_of = usage_of  # the number of prompts, where usage is wanted

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        reply = self._reply
        watcher = asyncio.create_task(watch(self._request, reply))
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            data = "".join(chunks.opening for chunks in self._chunks).encode()
            while data is not None:
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                data = await self._next()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            LOG.warning("gave up a client that does not read, as the server is being stopped")
        finally:
            watcher.cancel()
            reply.abandon()

    async def _next(self) -> bytes | None:
        """Return the next events; None: there are no more."""
        reply = self._reply
        if reply.is_read:
            return None
        texts = []
        for index, piece in await reply.pieces():
            if error := failure(reply, piece):
                reply.abandon()
                return "".join(texts).encode() + event(error.body)
            texts.append(self._chunks[index].of(piece))
        data = "".join(texts).encode()
        if reply.is_read and not reply.is_abandoned:
            if self._usage_of is not None:
                data += self._form.usage_event(reply.answers, self._usage_of)
            data += DONE
        return data
