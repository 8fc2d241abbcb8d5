"""Around the API server's routes: the access log with its counters, and the key.

Plain ASGI: what wraps every request of a stream costs nothing by the token.
"""

import hmac
import json
import logging
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .api_errors import ApiError, wrong_key
from .api_metrics import Metrics

if TYPE_CHECKING:
    from .api_service import Reply

ACCESS = logging.getLogger("minimind.access")
PUBLIC = {"/health"}
GONE = 499  # what a log says of a client that left before it was answered

Scope = dict[str, Any]


async def send_error(error: ApiError, send: Any) -> None:
    """Answer with an error, outside of any route."""
    body = json.dumps(error.body, ensure_ascii=False).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **error.headers,
    }
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class KeyCheck:
    """Lets only those in who know the key."""

    def __init__(self, app: Any, api_key: str) -> None:
        self.app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC:
            headers = dict(scope["headers"])
            scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
            given = bearer.strip() if scheme.lower() == b"bearer" else b""
            if not any(
                hmac.compare_digest(key, self._key)  # takes as long for any wrong key
                for key in (given, headers.get(b"x-api-key", b""))
            ):
                await send_error(wrong_key(), send)
                return
        await self.app(scope, receive, send)


class Journal:
    """Writes a line for each request and counts it, when its response has ended."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = GONE

        async def noting(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope["reply"] = None
        try:
            await self.app(scope, receive, noting)
        finally:
            self._note(scope, status, time.perf_counter() - start)

    def _note(self, scope: Scope, status: int, elapsed_s: float) -> None:
        route = scope.get("route")
        self._metrics.requests[getattr(route, "path", "other"), status] += 1
        reply: Reply | None = scope["reply"]
        more = ""
        if reply is not None:
            self._metrics.duration.add(elapsed_s)
            answers = [answer for answer in reply.answers if answer is not None]
            first = next((a.time_to_first_token_s for a in answers if a.tokens), None)
            if first is not None:
                self._metrics.first_token.add(first)
            more = summary(reply, elapsed_s, first)
        client = (scope.get("client") or ("-",))[0]
        path = quote(scope["path"], safe="/:+@,")
        ACCESS.info("%s %s %s %s %.3fs%s", client, scope["method"], path, status, elapsed_s, more)


def summary(reply: "Reply", elapsed_s: float, first_s: float | None) -> str:
    """Return a request's tokens and speed for its line in the log."""
    answers = [answer for answer in reply.answers if answer is not None]
    if not answers:
        return ""
    n_new = sum(len(answer.tokens) for answer in answers)
    begun = [answer for answer in answers if answer.tokens]
    line = f" prompt={len(answers[0].prompt_ids)} cached={answers[0].n_cached} new={n_new}"
    if begun:
        start, end = (
            min(a.first_token_at for a in begun),
            max(a.last_token_at for a in begun),
        )
        line += f" first={first_s:.3f}s"
        if n_new > len(begun) and end > start:
            line += f" {(n_new - len(begun)) / (end - start):.1f} tokens/s"
    if len(reply.answers) > 1:
        line += f" answers={len(reply.answers)}"
    reasons = {"error" if a.error else a.finish_reason or "cancelled" for a in answers}
    return f"{line} {'+'.join(sorted(reasons))}"
