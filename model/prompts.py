"""Prompts that fit: whole messages are left out, oldest first, never a part of one."""

from collections.abc import Sequence
from typing import Any

Message = dict[str, str]


def prompt_limit(context: int, max_new_tokens: int | None = None) -> int:
    """Return how many tokens a prompt may take: all but the answer's, but three quarters at
    least.
    """
    quarter = max(1, context // 4)
    return context - (quarter if max_new_tokens is None else min(max_new_tokens, quarter))


def fit_messages(
    tokenizer: Any, messages: Sequence[Message], max_prompt_tokens: int
) -> tuple[list[Message], int]:
    """Leave out the oldest messages until the chat prompt fits; return the rest and their number.

    A system text and the newest user message (with what follows it) stay. What is left begins with
    a user message, so that no answer stands without its question.

    Raises:
        ValueError: no messages, or what must stay is already too long.
    """
    if not messages:
        raise ValueError("messages is empty: it needs at least one user message")
    messages = list(messages)
    n_tokens = len(tokenizer.encode_chat(messages, add_generation_prompt=True))
    if n_tokens <= max_prompt_tokens:
        return messages, 0
    n_system = 1 if messages[0]["role"] == "system" else 0
    users = [i for i, m in enumerate(messages) if m["role"] == "user" and i > n_system]
    lengths = [len(tokenizer.encode_chat([message])) for message in messages]
    for start in users:  # the text of a conversation is that of its messages, one after another
        if n_tokens - sum(lengths[n_system:start]) <= max_prompt_tokens:
            return messages[:n_system] + messages[start:], start - n_system
    n_least = n_tokens - (sum(lengths[n_system : users[-1]]) if users else 0)
    raise ValueError(
        f"the newest message takes {n_least} tokens{' with the system text' * n_system}, a prompt "
        f"may take {max_prompt_tokens}: shorten it, or lengthen the context with --rope_scaling"
    )


def fit_text(tokenizer: Any, text: str, max_prompt_tokens: int) -> tuple[list[int], int]:
    """Return ``<s>`` and the ids of ``text`` to be continued, and how many at its beginning were
    left out.
    """
    bos, *ids = tokenizer.encode_document(text)[:-1]
    n_dropped = max(0, len(ids) + 1 - max_prompt_tokens)
    return [bos, *ids[n_dropped:]], n_dropped
