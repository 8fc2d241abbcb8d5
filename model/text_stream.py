"""Text as it completes: whole characters, and nothing of a stop string.

Knows of the tokenizer only that it has ``decode``.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .sampling import Token


class TextStream:
    """Turns an answer's tokens into text: whole characters, and nothing of a stop string.

    Tokens go in one by one (:meth:`push`), the text that is certain comes out, and :meth:`finish`
    gives the rest. The work a token makes does not grow with the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped = False  # a stop string has come
        self._ids: list[int] = []  # the last tokens, while they end within a character
        self._n_sent = 0  # characters of _ids that are out already
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is certain now, often empty."""
        if self.stopped or not self.tokenizer.decode([token_id]):
            return ""  # <s> and its like are no text, and may stand within a character
        self._ids.append(token_id)
        text = self.tokenizer.decode(self._ids)
        # Bytes that may yet become a character show as one U+FFFD at the end. Byte-level tokens
        # decode independently of what surrounds them, so the window can be cut: those bytes are
        # three at most, in the last three tokens.
        certain = text.removesuffix("\ufffd")
        new = certain[self._n_sent :]
        self._ids = [] if certain == text else self._ids[-3:]
        self._n_sent = len(self.tokenizer.decode(self._ids)) - 1 if self._ids else 0
        return self._hold_back(new)

    def finish(self) -> str:
        """Return what was held back; bytes that never became a character are U+FFFD."""
        rest = self.tokenizer.decode(self._ids)[self._n_sent :]
        out = self._hold_back(rest) + self._held
        self._ids, self._n_sent, self._held = [], 0, ""
        return out

    def _hold_back(self, new: str) -> str:
        text = self._held + new
        found = [(text.find(s) + len(s), text.find(s)) for s in self.stop if s in text]
        if found:
            # the one complete first, as if the text had come letter by letter
            self.stopped, self._held, self._ids = True, "", []
            return text[: min(found)[1]]
        n_held = max((overlap(text, s) for s in self.stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` are the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(tokenizer: Any, tokens: Iterable[Token], stop: Sequence[str] = ()) -> Iterator[str]:
    """Yield the text of ``tokens`` as it completes, up to the first stop string."""
    stream = TextStream(tokenizer, stop)
    for token in tokens:
        if piece := stream.push(token.id):
            yield piece
        if stream.stopped:
            return
    if rest := stream.finish():
        yield rest
