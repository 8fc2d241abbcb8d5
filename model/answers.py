"""An answer while it is made: what a reader gets of it, piece by piece, and how it went."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from .sampling import FinishReason, Sampler, SamplingOptions, Token
from .text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step gave an answer: its new token and the text that became certain with it.

    The last piece has a ``finish_reason`` or an ``error``, and the text that was held back.
    """

    text: str
    token: Token | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Answer:
    """A request and what has come of it so far; the engine alone changes it."""

    def __init__(
        self,
        prompt_ids: list[int],
        options: SamplingOptions,
        n_most: int,
        sampler: Sampler,
        stream: TextStream | None,
        on_piece: Callable[["Answer", Piece], None] | None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.options = options
        self.text = ""
        self.tokens: list[Token] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.n_cached = 0  # tokens of the prompt whose keys and values were there already
        self.submitted_at = time.perf_counter()
        self.started_at: float | None = None  # left the queue
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.is_cancelled = False
        self._n_most = n_most
        self._sampler = sampler
        self._stream = stream
        self._on_piece = on_piece

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def queued_s(self) -> float:
        """Seconds in the queue; 0 while it waits."""
        return (self.started_at or self.submitted_at) - self.submitted_at

    @property
    def prefill_s(self) -> float:
        """Seconds from leaving the queue to the first token; 0 before it."""
        return self.first_token_at - self.started_at if self.tokens else 0.0

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the newest."""
        return self.last_token_at - self.first_token_at if self.tokens else 0.0

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from the request to its first token; None before it."""
        return self.first_token_at - self.submitted_at if self.tokens else None

    @property
    def speed(self) -> str:
        """Tokens and tokens per second of prompt and answer, for people."""
        n_prompt = len(self.prompt_ids)
        parts = [f"prompt {n_prompt} tokens"]
        if self.n_cached:
            parts[0] += f" ({self.n_cached} of them known)"
        parts.append(rate(n_prompt - self.n_cached, self.prefill_s))
        parts.append(f"answer {len(self.tokens)} tokens")
        if len(self.tokens) > 1:
            parts.append(rate(len(self.tokens) - 1, self.decode_s))
        return ", ".join(parts)

    def take(self, token: Token) -> Piece:
        """Add one token; return what the reader gets of it."""
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        self.tokens.append(token)
        text, reason = "", token.finish_reason
        if self._stream is not None:
            text = self._stream.push(token.id)
            if reason and not self._stream.stopped:
                text += self._stream.finish()
            if self._stream.stopped:
                reason = "stop"
        self.text += text
        self.finish_reason = reason
        return Piece(text, token, reason)

    def end(self, reason: FinishReason | None = None, error: Exception | None = None) -> Piece:
        """End without another token; what was held back comes out, but after an error."""
        rest = self._stream.finish() if self._stream is not None and error is None else ""
        self.text += rest
        self.finish_reason, self.error = reason, error
        return Piece(rest, None, reason, error)


def rate(n: int, elapsed_s: float) -> str:
    return f"{n / max(elapsed_s, 1e-9):,.1f} tokens/s"
