"""A real HTTP server on this machine that says, as an OpenAI-style server, what a test wrote down.

For what a good server never says: it hangs, breaks off, sends chunks without choices, refuses.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class TinyServer:
    """Answers each chat request with the next of ``replies``, the last one for ever.

    Attributes:
        requests: the bodies that came.
        keys: the Authorization headers that came.
        left: set when a client closed the connection before its answer was over.
    """

    def __init__(self) -> None:
        self.replies: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.models = ["tiny"]
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.left = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                send_json(self, 200, {"object": "list", "data": [model(m) for m in server.models]})

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                server.requests.append(json.loads(self.rfile.read(length)))
                server.keys.append(self.headers["Authorization"])
                reply = server.replies[0] if len(server.replies) == 1 else server.replies.pop(0)
                try:
                    reply(self)
                except ConnectionError:
                    server.left.set()

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@contextlib.contextmanager
def tiny_server() -> Iterator[TinyServer]:
    server = TinyServer()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "test"}


def send_json(handler: BaseHTTPRequestHandler, status: int, content: dict[str, Any]) -> None:
    data = json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def error(status: int, message: str, code: str | None = None) -> Callable[..., None]:
    """Refuse with OpenAI's error object."""
    content = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return lambda handler: send_json(handler, status, {"error": content})


def says(*texts: str, finish: str = "stop", usage: tuple[int, int] | None = None) -> Any:
    """Stream texts, as OpenAI does it."""
    chunks = [chunk(role="assistant", content=""), *(chunk(content=text) for text in texts)]
    chunks.append(chunk(finish_reason=finish))
    if usage:
        counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": 0}
        chunks.append({**chunk(), "choices": [], "usage": counts})
    return sends(*chunks, "[DONE]")


def sends(*events: dict[str, Any] | str) -> Callable[..., None]:
    """Stream any events; the connection ends after them."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        for event in events:
            write(handler, event)

    return reply


def talks_on(first: str) -> Callable[..., None]:
    """Stream ``first`` and then more, until the client leaves."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        write(handler, chunk(content=first))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            write(handler, chunk(content="."))
            time.sleep(0.005)

    return reply


def hangs(server: TinyServer) -> Callable[..., None]:
    """Say nothing until the client leaves."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.connection.settimeout(60)
        if handler.connection.recv(1) == b"":
            server.left.set()

    return reply


def begin(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
    handler.end_headers()


def write(handler: BaseHTTPRequestHandler, event: dict[str, Any] | str) -> None:
    text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
    handler.wfile.write(f"data: {text}\n\n".encode())


def chunk(finish_reason: str | None = None, **delta: str) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    facts = {"object": "chat.completion.chunk", "created": 0, "model": "tiny"}
    return {"id": "chatcmpl-1", **facts, "choices": [choice]}
