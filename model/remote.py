"""Asking an OpenAI-style server: what is sent, what comes back, what went wrong in one line.

For the chat page and the terminal client; imports ``openai`` only inside its functions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
DEFAULT_URL = "http://127.0.0.1:8000/v1"
NAMES = {"max_new_tokens": "max_tokens"}  # ours -> OpenAI's, where they differ
OURS = ("top_k", "min_p", "repetition_penalty")  # OpenAI has none of these
ERROR_LENGTH = 300


def request_fields(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``chat.completions.create`` takes for sampling options of ours.

    What is None or empty is left out, for the server to decide; ``OURS`` go into ``extra_body``.
    """
    given = {k: v for k, v in sampling.items() if v is not None and v != [] and v != ()}
    extra = {name: given.pop(name) for name in OURS if name in given}
    fields = {NAMES.get(name, name): value for name, value in given.items()}
    return {**fields, **({"extra_body": extra} if extra else {})}


@dataclass(frozen=True)
class Delta:
    """What a chunk of a stream says."""

    text: str = ""
    finish_reason: str | None = None
    n_prompt: int | None = None
    n_cached: int | None = None
    n_tokens: int | None = None


def read_chunk(chunk: Any) -> Delta:
    """Read a chunk; those with only the usage, or without anything, have no choices."""
    usage = getattr(chunk, "usage", None)
    details = getattr(usage, "prompt_tokens_details", None)
    counts = (
        getattr(usage, "prompt_tokens", None),
        getattr(details, "cached_tokens", None),
        getattr(usage, "completion_tokens", None),
    )
    if not chunk.choices:
        return Delta("", None, *counts)
    choice = chunk.choices[0]
    return Delta((choice.delta and choice.delta.content) or "", choice.finish_reason, *counts)


def without_oldest(messages: Sequence[Message]) -> list[Message] | None:
    """Return ``messages`` without their oldest question and what answers it, or None if only the
    newest question is left.
    """
    n_system = 1 if messages[0]["role"] == "system" else 0
    users = [i for i, m in enumerate(messages) if m["role"] == "user" and i > n_system]
    return [*messages[:n_system], *messages[users[0] :]] if users else None


def is_too_long(error: Exception) -> bool:
    """Say whether a server refused the messages because they do not fit its model's context."""
    codes = {"context_length_exceeded", "exceed_context_size_error"}  # OpenAI's, llama.cpp's type
    is_coded = bool({getattr(error, "code", None), getattr(error, "type", None)} & codes)
    is_said = "maximum context length" in str(error).lower()
    return getattr(error, "status_code", None) == 400 and (is_coded or is_said)


def explain(error: Exception, base_url: str) -> tuple[str, str]:
    """Return the kind of an error and one line for people.

    The kind is server_away, auth, not_found, queue_full, too_long or other.
    """
    import openai

    said = getattr(error, "body", None)
    said = said.get("message") if isinstance(said, dict) else None
    detail = " ".join(str(said or getattr(error, "message", "") or error).split())
    if len(detail) > ERROR_LENGTH:
        detail = detail[: ERROR_LENGTH - 1] + "…"
    status = getattr(error, "status_code", None)
    if isinstance(error, openai.APITimeoutError):
        return "server_away", f"{base_url} did not answer in time; try again"
    if isinstance(error, openai.APIConnectionError):
        why = " ".join(str(error.__cause__ or error).split())
        return (
            "server_away",
            f"{base_url} cannot be reached ({why}): start it with `python my_openai_api.py`, or "
            "check the address",
        )
    if status in (401, 403):
        return "auth", f"{base_url} refuses the API key ({status}): {detail}"
    if status == 404:
        return "not_found", f"{base_url} answers 404: {detail}; such addresses mostly end in /v1"
    if status in (429, 503):
        return "queue_full", f"{base_url} is busy ({status}): {detail}; try again in a moment"
    if is_too_long(error):
        return "too_long", f"the message is too long: {detail}"
    return "other", f"{base_url}: {f'{status}: ' if status else ''}{detail or type(error).__name__}"
