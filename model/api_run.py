"""The API server from its start to its end: socket, models, signals, draining."""

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from .api_server import create_app
from .api_service import Served, Service, check_names
from .generation import Engine
from .model_list import ModelChoice, chosen_model, open_model, parse_model
from .terminal import introduce, sampling_options

LOG = logging.getLogger("minimind.server")
BACKLOG = 2048
KEEP_ALIVE_S = 75  # longer than clients keep a connection, so that they are the ones to close it
LAST_WORDS_S = 3  # for slow readers, after everything else has come to its end


class Server(uvicorn.Server):
    """uvicorn, but signals are ours: it would end by them, not with exit code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(app: Any) -> Server:
    """Return the HTTP server of an application."""
    return Server(
        uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_level="warning",
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=LAST_WORDS_S,
            server_header=False,
            ws="none",
        )
    )


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        OSError: the port is in use, or the host is none of this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise OSError(
            f"cannot listen on {host}:{port} ({error.strerror}): stop what is there, or choose "
            "another with --port and --host"
        ) from None
    return listening


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def allow_connections() -> None:
    """Let this process have as many open connections as the system permits."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def choose_models(args: argparse.Namespace) -> list[ModelChoice]:
    """Return the models that the flags name, the main one first.

    Raises:
        FileNotFoundError, ValueError: one is not there, or two have one name.
    """
    choices = [chosen_model(args), *map(parse_model, args.add_model)]
    check_names(choices)
    return choices


def open_all(
    choices: list[ModelChoice], args: argparse.Namespace, loop: asyncio.AbstractEventLoop
) -> list[Served]:
    """Load the models and give each an engine."""
    found = []
    for choice in choices:
        loaded = open_model(choice, args)
        introduce(loaded)
        engine = Engine(
            loaded.model,
            loaded.tokenizer,
            max_batch=args.max_batch,
            max_queue=args.max_queue,
            deterministic=args.deterministic,
        )
        found.append(Served(choice, loaded, engine, loop))
    return found


def serve(args: argparse.Namespace) -> None:
    """Serve until a signal, as the flags of my_openai_api.py say.

    Raises:
        FileNotFoundError, ValueError, OSError: what keeps it from starting.
    """
    for name in ("minimind.access", "minimind.server"):
        handler = logging.StreamHandler(sys.stdout if name == "minimind.access" else sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).setLevel(logging.INFO)
    allow_connections()
    choices = choose_models(args)
    with contextlib.closing(bind(args.host, args.port)) as listening:
        asyncio.run(run(args, choices, listening))


async def run(
    args: argparse.Namespace, choices: list[ModelChoice], listening: socket.socket
) -> None:
    """Serve on a socket until SIGINT or SIGTERM; then finish what is under way."""
    service = Service(
        lambda loop: open_all(choices, args, loop),
        sampling_options(args),
        is_strict=args.strict_model,
    )
    app = create_app(
        service,
        api_key=args.api_key,
        allowed_origins=args.allowed_origins,
        max_body=round(args.max_body_mb * 2**20),
    )
    server = make_server(app)
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    n_told = 0

    def stop() -> None:
        nonlocal n_told
        n_told += 1
        told.set()
        if n_told > 1:
            service.cancel_all()

    with on_signals(lambda: loop.call_soon_threadsafe(stop)):
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        loading = asyncio.create_task(service.load())
        waiting = asyncio.create_task(told.wait())
        try:
            await asyncio.wait({loading, serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and not loading.exception():
                host, port = listening.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                names = ", ".join(service.models)
                print(f"serving {names} at http://{host}:{port}/v1 (Ctrl-C stops)", flush=True)
                if args.api_key is None and not is_loopback(listening):
                    LOG.warning("without --api_key everyone who reaches this port can use it")
                await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    print(
                        f"stopping: answers under way have {args.drain_s:g} s; Ctrl-C again "
                        "cancels them",
                        flush=True,
                    )
            if not await service.drain(args.drain_s):
                LOG.warning("cancelled what was not done after --drain_s %g", args.drain_s)
        finally:
            waiting.cancel()
            server.should_exit = True
            await serving
            if not loading.done():
                loading.cancel()
        if loading.done() and not loading.cancelled():
            loading.result()  # raises what kept the models from being opened


@contextlib.contextmanager
def on_signals(call: Callable[[], object]) -> Iterator[None]:
    """Call ``call`` for SIGINT and SIGTERM; only the main thread can be told of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, lambda *_: call()) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
