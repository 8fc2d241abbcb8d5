"""What the API server answers: OpenAI's objects, and the events of a stream.

Chunks are put together from text prepared once a stream, so that a token costs the event loop
microseconds.
"""

import codecs
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from .generation import Answer, Piece
from .sampling import Token
from .tokenizer import EOS_ID, SPECIAL_TOKENS, Tokenizer

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # JSON has no minus infinity
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# Some clients' line readers end a line at these too, as str.splitlines does
LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def to_json(value: Any) -> str:
    """Return JSON in UTF-8 that holds no line end, whatever a reader takes for one."""
    text = _encode(value)
    for end, escaped in LINE_ENDS.items():
        if end in text:
            text = text.replace(end, escaped)
    return text


def event(value: Any) -> bytes:
    """Return one event of a stream."""
    return f"data: {to_json(value)}\n\n".encode()


# ----------------------------------------------------------------------------- log probabilities


@cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for (GPT-2's table:
    printable ones for themselves, the others moved up behind 255).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(moved)}


class TokenTable:
    """The bytes of each token: a token need not be whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        alphabet = byte_alphabet()
        spec = json.loads((tokenizer.folder / "tokenizer.json").read_text("utf-8"))
        self._bytes: dict[int, bytes | None] = {
            id: None if text in SPECIAL_TOKENS else bytes(alphabet[letter] for letter in text)
            for text, id in spec["model"]["vocab"].items()
        }

    def bytes_of(self, id: int) -> bytes:
        """Return what a token spells; special tokens spell nothing."""
        return self._bytes.get(id) or b""

    def text_of(self, id: int) -> str:
        """Return a token for people."""
        spelled = self._bytes.get(id)
        return SPECIAL_TOKENS[id] if spelled is None else spelled.decode("utf-8", "replace")

    def key_of(self, id: int) -> str:
        """Return a token's name in a completion's top_logprobs, where each name stands once."""
        spelled = self.bytes_of(id)
        text = self.text_of(id)
        is_whole = spelled.decode("utf-8", "ignore").encode() == spelled
        return text if is_whole else "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def entry(self, id: int, logprob: float | None) -> dict[str, Any]:
        """Return a token of a chat's logprobs, without its alternatives."""
        spelled = self._bytes.get(id)
        return {
            "token": self.text_of(id),
            "logprob": max(LEAST_LOGPROB, logprob if logprob is not None else LEAST_LOGPROB),
            "bytes": None if spelled is None else list(spelled),
        }


class Letters:
    """Counts the characters of a text whose bytes come token by token; what is not UTF-8 shows as
    U+FFFD, as many as a decoder makes of it.
    """

    def __init__(self) -> None:
        self.n_whole = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def n_begun(self) -> int:
        """The whole ones, and the one whose bytes are not all there."""
        return self.n_whole + len(self._decoder.getstate()[0].decode("utf-8", "replace"))

    def read(self, spelled: bytes) -> None:
        self.n_whole += len(self._decoder.decode(spelled))


@dataclass
class LogprobReader:
    """Gives out a token's probabilities together with the text that it begins in.

    So the tokens' bytes join to the text, and nothing of a stop string or of the end token shows.
    """

    table: TokenTable
    _held: list[tuple[int, Token]] = field(default_factory=list)  # and the letter it begins in
    _read: Letters = field(default_factory=Letters)
    _n_sent: int = 0

    def read(self, piece: Piece) -> list[Token]:
        """Take a piece; return the tokens whose text is out with it."""
        token = piece.token
        if token is not None and token.id != EOS_ID:
            spelled = self.table.bytes_of(token.id)
            goes_on = spelled[:1] and spelled[0] & 0xC0 == 0x80  # within a letter, if one is begun
            self._held.append((self._read.n_whole if goes_on else self._read.n_begun, token))
            self._read.read(spelled)
        self._n_sent += len(piece.text)
        out = [token for start, token in self._held if start < self._n_sent]
        self._held = self._held[len(out) :]
        return out


def chat_logprobs(
    table: TokenTable, tokens: Sequence[Token], _: Letters | None = None
) -> dict[str, Any]:
    content = [
        {
            **table.entry(token.id, token.logprob),
            "top_logprobs": [table.entry(*pair) for pair in token.top_logprobs],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    table: TokenTable, tokens: Sequence[Token], before: Letters | None = None
) -> dict[str, Any]:
    """Return a completion's logprobs; ``before`` has read the tokens before, and reads these."""
    letters = before or Letters()
    offsets = []
    for token in tokens:
        offsets.append(letters.n_begun)
        letters.read(table.bytes_of(token.id))
    return {
        "tokens": [table.text_of(token.id) for token in tokens],
        "token_logprobs": [table.entry(t.id, t.logprob)["logprob"] for t in tokens],
        "top_logprobs": [
            {table.key_of(id): max(LEAST_LOGPROB, value) for id, value in token.top_logprobs}
            for token in tokens
        ],
        "text_offset": offsets,
    }


# ----------------------------------------------------------------------------- usage


def usage(answers: Sequence[Answer], n_prompts: int = 1) -> dict[str, Any]:
    """Return the tokens of a request; a prompt counts once, however many answers it has."""
    prompts = answers[:: len(answers) // n_prompts]
    n_prompt = sum(len(answer.prompt_ids) for answer in prompts)
    n_new = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": sum(answer.n_cached for answer in prompts)},
    }


def timings(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return how long it took, under the names that llama.cpp's server uses."""
    first = answers[0]
    begun = [answer for answer in answers if answer.tokens]
    n_prompt, n_new = len(first.prompt_ids) - first.n_cached, sum(len(a.tokens) for a in answers)
    start = min((answer.first_token_at for answer in begun), default=0.0)
    decode_s = max((answer.last_token_at for answer in begun), default=0.0) - start
    n_timed = n_new - len(begun)  # the first token comes of the prompt
    return {
        "cache_n": first.n_cached,
        "prompt_n": n_prompt,
        "prompt_ms": round(1000 * first.prefill_s, 3),
        "prompt_per_second": round(n_prompt / max(first.prefill_s, 1e-9), 2),
        "predicted_n": n_new,
        "predicted_ms": round(1000 * decode_s, 3),
        "predicted_per_second": round(n_timed / decode_s, 2) if decode_s > 0 else 0.0,
        "time_to_first_token_ms": round(1000 * (first.time_to_first_token_s or 0.0), 3),
        "queued_ms": round(1000 * first.queued_s, 3),
    }


# ----------------------------------------------------------------------------- objects


class Form:
    """The outer form that chats and completions share: what is the same in all of a stream."""

    chunk_object = object = prefix = ""

    def __init__(self, model: str, fingerprint: str) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model, self.fingerprint = model, fingerprint

    def head(self, *, is_chunk: bool) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.chunk_object if is_chunk else self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def whole(self, choices: list[dict[str, Any]], answers: Sequence[Answer], n_prompts: int = 1):
        """Return the object of an answer that is not streamed."""
        numbers = {"usage": usage(answers, n_prompts), "timings": timings(answers)}
        return {**self.head(is_chunk=False), "choices": choices, **numbers}

    def chunk_parts(
        self, index: int, inside: str, reason: str, include_usage: bool
    ) -> tuple[str, str]:
        """Return what stands in a chunk before and after the one thing that changes.

        Args:
            inside, reason: JSON in the choice and its finish reason, with ``%`` in its place.
        """
        choice = f'{{"index":{index},{inside},"finish_reason":{reason}}}'
        before, after = choice.split("%")
        head = to_json(self.head(is_chunk=True))[:-1]
        tail = ',"usage":null' if include_usage else ""
        return f'data: {head},"choices":[{before}', f"{after}]{tail}}}\n\n"

    def usage_event(self, answers: Sequence[Answer], n_prompts: int = 1) -> bytes:
        """Return the last chunk of a stream that includes its usage."""
        numbers = {"usage": usage(answers, n_prompts), "timings": timings(answers)}
        return event({**self.head(is_chunk=True), "choices": [], **numbers})


class ChatForm(Form):
    """chat.completion"""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    text_in_chunk, end_in_chunk = '"delta":{"content":%}', '"delta":{}'
    logprobs = staticmethod(chat_logprobs)

    def choice(self, index: int, answer: Answer, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        reason = answer.finish_reason
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int, include_usage: bool) -> str:
        """Return the first event of an answer, which alone says whose it is."""
        delta = '"delta":{"role":%,"content":"","refusal":null}'
        before, after = self.chunk_parts(index, f'{delta},"logprobs":null', "null", include_usage)
        return f'{before}"assistant"{after}'


class CompletionForm(Form):
    """text_completion"""

    object = chunk_object = "text_completion"
    prefix = "cmpl"
    text_in_chunk, end_in_chunk = '"text":%', '"text":""'
    logprobs = staticmethod(completion_logprobs)

    def __init__(self, model: str, fingerprint: str, echoed: Sequence[str] = ()) -> None:
        super().__init__(model, fingerprint)
        self.echoed = echoed  # the prompts, one for each answer, where they are to be repeated

    def choice(self, index: int, answer: Answer, logprobs: Any) -> dict[str, Any]:
        text = (self.echoed[index] if self.echoed else "") + answer.text
        reason = answer.finish_reason
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int, include_usage: bool) -> str:
        """Return the first event of an answer: the prompt, if it is repeated."""
        if not self.echoed:
            return ""
        before, after = self.chunk_parts(index, '"text":%,"logprobs":null', "null", include_usage)
        return before + to_json(self.echoed[index]) + after


class Chunks:
    """The events of one answer.

    Args:
        table: where log probabilities are wanted.
    """

    def __init__(
        self,
        form: ChatForm | CompletionForm,
        index: int,
        table: TokenTable | None,
        include_usage: bool,
    ) -> None:
        self._form = form
        self._reader = LogprobReader(table) if table else None
        self._letters = Letters()
        self.opening = form.opening(index, include_usage)

        def parts(inside: str, reason: str) -> tuple[str, str]:
            return form.chunk_parts(index, inside, reason, include_usage)

        self._text = parts(f'{form.text_in_chunk},"logprobs":null', "null")
        self._end = parts(f'{form.end_in_chunk},"logprobs":null', "%")
        self._both = parts("%", "null")

    def of(self, piece: Piece) -> str:
        """Return the events of a piece, often none: text that is certain, and the end."""
        out = ""
        if self._reader is not None:
            tokens = self._reader.read(piece)
            if piece.text or tokens:
                before, after = self._both
                out = before + self._with_logprobs(piece.text, tokens) + after
        elif piece.text:
            before, after = self._text
            out = before + to_json(piece.text) + after
        if piece.finish_reason:
            before, after = self._end
            out += f'{before}"{piece.finish_reason}"{after}'
        return out

    def _with_logprobs(self, text: str, tokens: Sequence[Token]) -> str:
        table = self._reader.table
        logprobs = to_json(self._form.logprobs(table, tokens, self._letters))
        before, after = self._form.text_in_chunk.split("%")
        return f'{before}{to_json(text)}{after},"logprobs":{logprobs}'


def tokens_of_text(table: TokenTable, answer: Answer) -> list[Token]:
    """Return the tokens of a whole answer that its text is made of."""
    reader = LogprobReader(table)
    tokens = [token for t in answer.tokens for token in reader.read(Piece("", t))]
    return tokens + reader.read(Piece(answer.text))
