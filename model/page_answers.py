"""Where the chat page's answers come from: a model on this machine, or an OpenAI-style server.

Both work in threads of their own and fill a :class:`model.chats.Reply`, whatever becomes of the
page meanwhile; the page looks at it as often as it likes, and cancels.
"""

import argparse
import asyncio
import atexit
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from .chats import Message, Reply
from .remote import OURS, explain, is_too_long, read_chunk, request_fields, without_oldest

OFF = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
CONNECT_S, LIST_S = 10, 5


class Source(Protocol):
    """Answers questions."""

    name: str

    def start(self, messages: Sequence[Message], sampling: dict[str, Any], reply: Reply) -> None:
        """Begin to fill ``reply``; whatever fails is said in it."""


class Job:
    """An answer under way; ``changed`` is set whenever there is something new to show."""

    def __init__(self) -> None:
        self.changed = threading.Event()
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


def fail(reply: Reply, kind: str, error: object) -> None:
    """End a reply with what went wrong."""
    reply.error_kind, reply.error = kind, str(error)
    reply.finish_reason = "error"


# ---- this machine ----


class LocalModel:
    """A model with an engine thread, shared by everyone who looks at the page."""

    def __init__(self, loaded: Any, name: str) -> None:
        from .engine_thread import EngineThread
        from .generation import Engine

        self.name = name
        self.tokenizer = loaded.tokenizer
        model = loaded.model
        self.facts = {
            "n_params": loaded.n_params / 1e6,
            "context": model.config.max_seq_len,
            "device": str(model.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
        }
        engine = Engine(model, loaded.tokenizer)
        # the replies are filled as the pieces come, so nobody needs to collect them
        self.thread = EngineThread(engine, deliver=lambda pieces: None)
        self.thread.start()
        # a thread that computes while the program ends would abort it
        atexit.register(self.close)

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive

    def close(self) -> None:
        atexit.unregister(self.close)
        self.thread.close()

    def start(self, messages: Sequence[Message], sampling: dict[str, Any], reply: Reply) -> None:
        """Queue a prompt of the newest messages that fit as a whole."""
        from .generation import QueueFull
        from .prompts import fit_messages, prompt_limit
        from .sampling import SamplingOptions

        reply.model = self.name
        try:
            options = SamplingOptions(**sampling)
            limit = prompt_limit(self.thread.engine.context, options.max_new_tokens)
        except ValueError as error:
            return fail(reply, "other", error)
        try:
            fitting, reply.n_left_out = fit_messages(self.tokenizer, messages, limit)
        except ValueError as error:
            return fail(reply, "too_long", error)
        try:
            ids = self.tokenizer.encode_chat(fitting, add_generation_prompt=True)
            _LocalJob(self.thread, reply).submit(ids, options)
        except QueueFull as error:
            fail(reply, "queue_full", error)
        except ValueError as error:
            fail(reply, "other", error)


class _LocalJob(Job):
    def __init__(self, thread: Any, reply: Reply) -> None:
        super().__init__()
        self.thread = thread
        self.reply = reply

    def submit(self, ids: list[int], options: Any) -> None:
        self.reply.n_prompt = len(ids)
        self.answer = self.thread.submit(ids, options, self._take)
        self.reply.job = self

    def cancel(self) -> None:
        super().cancel()
        self.thread.cancel(self.answer)

    def _take(self, answer: Any, piece: Any) -> None:
        """Called in the engine's thread; ``finish_reason`` comes last, when all else is there."""
        reply = self.reply
        reply.text += piece.text
        reply.n_tokens = len(answer.tokens)
        reply.n_cached = answer.n_cached
        reply.first_token_s = answer.time_to_first_token_s
        if len(answer.tokens) > 1 and answer.decode_s:
            reply.tokens_per_s = (len(answer.tokens) - 1) / answer.decode_s
        if piece.error is not None:
            fail(reply, "other", piece.error)
        elif piece.finish_reason == "cancelled" and not self.is_cancelled:
            fail(reply, "other", self.thread.error or "the model was closed: ask again")
        else:
            reply.finish_reason = piece.finish_reason
        self.changed.set()


def load_local(choice: Any, args: argparse.Namespace) -> LocalModel:
    """Load a :class:`model.model_list.ModelChoice` and start its engine."""
    from .engine_thread import apart
    from .model_list import open_model

    return LocalModel(apart(lambda: open_model(choice, args)), choice.name)


def list_local(args: argparse.Namespace) -> tuple[list[Any], str]:
    """Return the models to choose from, the one that the flags name or prefer first, and why that
    one is missing, if it is.
    """
    from .model_list import chosen_model, find_models

    found = find_models(args.out_dir)
    try:
        first = chosen_model(args)
    except (FileNotFoundError, ValueError) as error:
        return found, str(error)
    if first.adapter and not first.adapter.exists():
        return found, f"{first.adapter} does not exist: name another adapter with --lora"

    def place(choice: Any) -> tuple[Any, Any]:
        return choice.path.resolve(), choice.adapter and choice.adapter.resolve()

    same = [choice for choice in found if place(choice) == place(first)]
    others = [choice for choice in found if choice not in same]
    names = {choice.name for choice in others}
    if not same and first.name in names:  # a file elsewhere with a usual name
        first = replace(first, name=str(first.path))
    return [*(same[:1] or [first]), *others], ""


# ---- a server ----


@dataclass(frozen=True)
class Server:
    """A model behind an OpenAI-style API.

    Attributes:
        is_typed: a visitor typed the address, so nothing of this machine's environment goes there.
    """

    base_url: str
    api_key: str = field(repr=False)
    name: str
    is_typed: bool = True

    def client_facts(self) -> dict[str, Any]:
        """Return how ``openai.OpenAI`` reaches it."""
        from openai import Omit

        key = self.api_key or "none"
        # no retries: the page says at once what is wrong, and has a button
        facts: dict[str, Any] = {"base_url": self.base_url, "api_key": key, "max_retries": 0}
        if self.is_typed:  # openai would add these from the environment
            lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
            names = [line.partition(":")[0].strip() for line in lines if ":" in line]
            names = ["OpenAI-Organization", "OpenAI-Project", *names]
            headers = {name: Omit() for name in names if name.lower() != "authorization"}
            facts["default_headers"] = {**headers, "Authorization": f"Bearer {key}"}
        return facts

    def start(self, messages: Sequence[Message], sampling: dict[str, Any], reply: Reply) -> None:
        """Ask; messages that do not fit are left out, whole turns, oldest first."""
        reply.model = self.name
        reply.job = _ServerJob(self, list(messages), sampling, reply)
        reply.job.thread.start()


class _ServerJob(Job):
    """A request in an event loop of its own, which can be cancelled while it waits."""

    def __init__(
        self, server: Server, messages: list[Message], sampling: dict[str, Any], reply: Reply
    ) -> None:
        super().__init__()
        self.server, self.messages, self.sampling, self.reply = server, messages, sampling, reply
        self.thread = threading.Thread(target=self._run, name="answer", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def cancel(self) -> None:
        super().cancel()
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._task.cancel)
            except RuntimeError:  # it has just ended
                pass

    def _run(self) -> None:
        reason = "error"
        try:
            reason = asyncio.run(self._main())
        except asyncio.CancelledError:
            reason = "cancelled"
        except Exception as error:  # this thread has no other place to say it
            self.reply.error_kind, self.reply.error = explain(error, self.server.base_url)
        self.reply.finish_reason = reason
        self.changed.set()

    async def _main(self) -> str:
        from openai import AsyncOpenAI, BadRequestError, Timeout

        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        if self.is_cancelled:
            raise asyncio.CancelledError
        async with AsyncOpenAI(
            timeout=Timeout(600, connect=CONNECT_S), **self.server.client_facts()
        ) as api:
            while True:
                try:
                    return await self._stream(api)
                except BadRequestError as error:
                    if not self._give_way(error):
                        raise

    def _give_way(self, error: Exception) -> bool:
        """Ask for less of what a server refused, if that changes nothing of what was wanted."""
        said = {k: v for k, v in self.sampling.items() if k not in OURS or v != OFF[k]}
        # OpenAI's own knows none of ours; our server has defaults that "off" must override
        if any(name in str(error) for name in self.sampling.keys() - said.keys()):
            self.sampling = said
            return True
        shorter = without_oldest(self.messages) if is_too_long(error) else None
        if shorter is None:
            return False
        self.reply.n_left_out += len(self.messages) - len(shorter)
        self.messages = shorter
        return True

    async def _stream(self, api: Any) -> str:
        reply, n_chunks, reason = self.reply, 0, "stop"
        start = time.perf_counter()
        stream = await api.chat.completions.create(
            model=self.server.name,
            messages=self.messages,
            stream=True,
            stream_options={"include_usage": True},
            **request_fields(self.sampling),
        )
        async with stream:
            async for chunk in stream:
                delta = read_chunk(chunk)
                now = time.perf_counter()
                if delta.text:
                    n_chunks += 1
                    reply.text += delta.text
                    reply.first_token_s = reply.first_token_s or now - start
                reason = delta.finish_reason or reason
                # servers count tokens at the end; until then, about one comes in a chunk
                reply.n_tokens = delta.n_tokens or n_chunks
                reply.n_prompt = delta.n_prompt or reply.n_prompt
                reply.n_cached = delta.n_cached or reply.n_cached
                decode_s = now - start - (reply.first_token_s or 0)
                if reply.n_tokens > 1 and decode_s > 0:
                    reply.tokens_per_s = (reply.n_tokens - 1) / decode_s
                self.changed.set()
        return reason


def list_remote(server: Server) -> tuple[list[str], str, str]:
    """Return the names of a server's models, and the kind and text of an error, if any."""
    from openai import OpenAI, OpenAIError

    base_url = server.base_url
    if not base_url.startswith(("http://", "https://")) or not server.api_key.isascii():
        return [], "other", f"{base_url!r} does not begin with http://, or the key is not ASCII"
    try:
        with OpenAI(timeout=LIST_S, **server.client_facts()) as api:
            return [model.id for model in api.models.list()], "", ""
    except (OpenAIError, ValueError, AttributeError, TypeError) as error:  # or no such list at all
        return [], *explain(error, base_url)
