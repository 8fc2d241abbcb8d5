"""A client that costs little: python benchmarks/load_client.py PORT < plan.json > times.json

A process of its own, so that it takes as little as possible of the time of the server that it
measures: while answers come it only keeps the bytes and when they came, and reads them afterwards.
The plan is a list of clients, each a list of bodies for /v1/chat/completions; all clients begin at
once, and each sends its next body when its last answer has ended. Prints, for each client and
body, when it was sent, when its first and its last text came, in seconds, and its tokens.

python benchmarks/load_client.py PORT --idle N opens N connections, uses each once, says "ready",
keeps them open until its standard input ends, and then says how many still are.
"""

import argparse
import asyncio
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

HOST = "127.0.0.1"
AT_ONCE = 100  # connections that are opened side by side


class Exchange(asyncio.Protocol):
    """One connection: sends a request and keeps what comes back."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.sent_s = 0.0
        self.parts: list[tuple[float, bytes]] = []
        loop = asyncio.get_running_loop()
        self.answered: asyncio.Future[None] = loop.create_future()  # something has come
        self.ended: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.sent_s = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.parts.append((time.perf_counter(), data))
        if not self.answered.done():
            self.answered.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        for future in (self.answered, self.ended):
            if not future.done():
                future.set_result(None)


def request(method: str, path: str, body: Any = None, *, keep: bool = False) -> bytes:
    """Return a request as it goes over the wire."""
    data = b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {HOST}", f"Content-Length: {len(data)}"]
    lines += ["Content-Type: application/json"] * bool(data)
    lines += [f"Connection: {'keep-alive' if keep else 'close'}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


async def exchange(port: int, data: bytes) -> Exchange:
    loop = asyncio.get_running_loop()
    _, protocol = await loop.create_connection(lambda: Exchange(data), HOST, port)
    return protocol


# ----------------------------------------------------------------------------- afterwards


def events(parts: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """Yield the data of a stream's events and when each was there.

    Raises:
        ValueError: a status other than 200, or no stream in chunks.
    """
    raw = b"".join(data for _, data in parts)
    head, _, _ = raw.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0] or b"chunked" not in head.lower():
        raise ValueError(f"expected a stream, found {raw[:400].decode('utf-8', 'replace')!r}")
    ends = []  # of the parts: where in ``raw``
    for _, data in parts:
        ends.append((ends[-1] if ends else 0) + len(data))
    at, part, buffer = len(head) + 4, 0, b""
    while size := int(raw[at : (line := raw.index(b"\r\n", at))], 16):
        buffer += raw[line + 2 : line + 2 + size]
        at = line + 2 + size + 2
        while ends[part] < at - 2:
            part += 1
        *whole, buffer = buffer.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: "):
                yield parts[part][0], event[6:].decode()


def times_of(done: Exchange) -> dict[str, float | int]:
    """Return when an answer came, and its tokens as the server counts them.

    Raises:
        ValueError: it is no whole answer.
    """
    first_s = last_s = n_tokens = None
    for at_s, data in events(done.parts):
        if data == "[DONE]":
            break
        chunk = json.loads(data)
        if "error" in chunk:
            raise ValueError(f"the stream ended with the error {chunk['error']}")
        if chunk.get("usage"):
            n_tokens = chunk["usage"]["completion_tokens"]
            n_prompt = chunk["usage"]["prompt_tokens"]
        if any(choice["delta"].get("content") for choice in chunk["choices"]):
            first_s, last_s = first_s or at_s, at_s
    if first_s is None or n_tokens is None:
        raise ValueError("the stream has no text, or no usage")
    times = {"sent_s": done.sent_s, "first_s": first_s, "last_s": last_s}
    return {**times, "n_tokens": n_tokens, "n_prompt": n_prompt}


# ----------------------------------------------------------------------------- the two ways


async def load(port: int, plan: list[list[dict[str, Any]]]) -> list[list[Exchange]]:
    """Let all clients of a plan send what they have."""

    async def client(bodies: list[bytes]) -> list[Exchange]:
        done = []
        for body in bodies:
            done.append(await exchange(port, body))
            await done[-1].ended
        return done

    path = "/v1/chat/completions"
    prepared = [[request("POST", path, body) for body in bodies] for bodies in plan]
    return await asyncio.gather(*map(client, prepared))


async def idle(port: int, n: int) -> None:
    """Keep ``n`` used connections open until the standard input ends."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    data = request("GET", "/health", keep=True)
    open_ones: list[Exchange] = []
    while len(open_ones) < n:
        these = range(min(AT_ONCE, n - len(open_ones)))
        new = await asyncio.gather(*(exchange(port, data) for _ in these))
        await asyncio.gather(*(connection.answered for connection in new))
        open_ones += new
    answered = [c for c in open_ones if c.parts and c.parts[0][1].startswith(b"HTTP/1.1 200")]
    if len(answered) < n:
        sys.exit(f"{len(answered)} of {n} connections were answered")
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(sum(not connection.ended.done() for connection in open_ones), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("port", type=int)
    parser.add_argument("--idle", type=int, metavar="N", help="connections to keep open")
    args = parser.parse_args()
    if args.idle:
        asyncio.run(idle(args.port, args.idle))
        return
    begin = time.process_time()
    done = asyncio.run(load(args.port, json.load(sys.stdin)))
    cpu_s = time.process_time() - begin
    answers = [[times_of(one) for one in client] for client in done]
    json.dump({"answers": answers, "client_cpu_s": cpu_s}, sys.stdout)


if __name__ == "__main__":
    main()
