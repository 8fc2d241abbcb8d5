"""Talking to a model: cache, sampling, one token after another, text as it completes.

Knows neither this project's model nor its tokenizer beyond what it calls: a ``transformers`` causal
language model with ``config.max_seq_len``, and an object with ``encode``, ``encode_chat``,
``decode``.
"""

import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

FinishReason = Literal["stop", "length"]  # end token or stop string; limit or context reached
Message = dict[str, str]


# ---- cache ----


class KVCache:
    """Keys and values of one request, preallocated, so that a token costs no copy of the past.

    It belongs to whoever made it and ends with them. A model uses it as it uses ``transformers``'
    caches. Each layer has a tensor of its own: compiled code copies all of a larger one at each
    write.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._keys: dict[int, Tensor] = {}  # layer -> (B, K, capacity, Dh)
        self._values: dict[int, Tensor] = {}
        self._lengths: dict[int, int] = {}

    def get_seq_length(self, layer_id: int = 0) -> int:
        """Return the number of positions that ``layer_id`` holds."""
        return self._lengths.get(layer_id, 0)

    def update(self, k: Tensor, v: Tensor, layer_id: int) -> tuple[Tensor, Tensor]:
        """Append ``k`` and ``v`` (B, K, T, Dh); return all of the layer, (B, K, past + T, Dh)."""
        start = self.get_seq_length(layer_id)
        end = start + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} positions do not fit a cache of {self.capacity}")
        if start == 0:  # here the layer's device, dtype and shape are known
            B, K, _, head_dim = k.shape
            self._keys[layer_id] = k.new_empty(B, K, self.capacity, head_dim)
            self._values[layer_id] = v.new_empty(B, K, self.capacity, head_dim)
        keys, values = self._keys[layer_id], self._values[layer_id]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        self._lengths[layer_id] = end
        return keys[:, :, :end], values[:, :, :end]


# ---- sampling ----


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen and when an answer ends; the defaults draw from the model as it is.

    The steps and their order (that of ``transformers``): repetition penalty, presence and frequency
    penalty, temperature, top-k, top-p, min-p, one draw. Each filter sees what the ones before it
    left.

    Args:
        max_new_tokens: the answer's most tokens, its end token included; None: until the context
            is full.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: only the k likeliest tokens; 0 is off.
        top_p: only the likeliest tokens whose mass before them is below p (nucleus sampling,
            arXiv:1904.09751, section 3.1); 1 is off.
        min_p: only tokens at least this fraction as likely as the likeliest (arXiv:2407.01082,
            section 3); 0 is off.
        repetition_penalty: every token of prompt *and* answer: a positive logit is divided, a
            negative one multiplied (CTRL, arXiv:1909.05858, section 4.1, made right for negative
            ones); 1 is off.
        presence_penalty: subtracted once from the logit of every token of the answer; 0 is off.
        frequency_penalty: subtracted for each time the token stands in the answer; 0 is off.
        stop: strings that end an answer and are not part of it; the text decides, so
            :class:`TextStream` looks for them, not :func:`generate`.
        seed: the same seed gives the same answer, whatever runs beside it; None: another each time.
        logprobs: give each token's log probability and those of this many likeliest ones (0: only
            its own). They are the model's, before any of the steps.

    Raises:
        ValueError: a value outside its range.
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)

        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r} is not {expected}")

        def is_int(value: Any, least: int) -> bool:
            return isinstance(value, int) and value >= least

        new, seed, n = self.max_new_tokens, self.seed, self.logprobs
        check("max_new_tokens", new is None or is_int(new, 1), "a whole number of at least 1")
        # each comparison is false for NaN
        check("temperature", 0 <= self.temperature < math.inf, "a number of at least 0 (greedy)")
        check("top_k", is_int(self.top_k, 0), "a whole number of at least 0 (off)")
        check("top_p", 0 <= self.top_p <= 1, "in 0..1 (off: 1)")
        check("min_p", 0 <= self.min_p <= 1, "in 0..1 (off: 0)")
        check("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "in 0.01..100 (off: 1)")
        check("presence_penalty", abs(self.presence_penalty) <= 100, "in -100..100 (off: 0)")
        check("frequency_penalty", abs(self.frequency_penalty) <= 100, "in -100..100 (off: 0)")
        check("stop", all(isinstance(s, str) and s for s in stop), "made of non-empty strings")
        check("seed", seed is None or isinstance(seed, int), "a whole number")
        check("logprobs", n is None or is_int(n, 0), "a whole number of at least 0")


@dataclass(frozen=True, slots=True)
class Token:
    """One new token; ``finish_reason`` stands on the last one of an answer."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (id, log probability), likeliest first
    finish_reason: FinishReason | None = None


# The functions on logits work on any leading dimensions; a parameter is a number or, for rows with
# options of their own, a tensor that broadcasts against (..., V).


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Make the tokens that ``seen`` (..., V) marks less likely, whatever their logit's sign."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def count_penalty(
    logits: Tensor, counts: Tensor, presence: float | Tensor, frequency: float | Tensor
) -> Tensor:
    """Lower each token by how often it stands in the answer, ``counts`` (..., V); OpenAI's
    formula.
    """
    return logits - frequency * counts - presence * (counts > 0)


def keep_likely(
    logits: Tensor, top_k: int | Tensor, top_p: float | Tensor, min_p: float | Tensor
) -> Tensor:
    """Set to -inf what top-k (0: off), top-p and min-p remove; at least one token stays."""
    if isinstance(top_k, int) and 0 < top_k < logits.shape[-1]:
        ranked, order = logits.topk(top_k, dim=-1)  # 10 us where a sort takes 300
    else:
        ranked, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(ranked.shape[-1], device=logits.device)
    top_k = torch.as_tensor(top_k, device=logits.device)
    keep = (rank < top_k) | (top_k == 0)
    probs = ranked.masked_fill(~keep, -math.inf).softmax(dim=-1)
    mass_before = probs.cumsum(dim=-1) - probs
    # >= 1 is off: rounding may lift the mass before the last tokens to 1
    keep = keep & ((mass_before < top_p) | (torch.as_tensor(top_p, device=logits.device) >= 1))
    keep = keep & (probs >= min_p * probs[..., :1])
    keep = keep | (rank == 0)
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, keep)
    return logits.masked_fill(~kept, -math.inf)


def draw(logits: Tensor, uniform: float | Tensor) -> Tensor:
    """Return the ids (...) where the cumulative distribution passes ``uniform``, in [0, 1).

    One number a row decides, so a row's token depends on its own generator and on no other row.
    """
    probs = logits.softmax(dim=-1)
    cumulative = probs.cumsum(dim=-1)
    # a little below 1, so that rounding cannot push the target past the last token
    target = cumulative[..., -1:] * (uniform * (1 - 2**-20))
    # the first such id; a GPU's parallel sum may rise by rounding where there is no mass
    return ((cumulative > target) & (probs > 0)).int().argmax(dim=-1)


class Sampler:
    """Chooses the tokens of one request and remembers them for the penalties.

    Its random numbers come from Python's generator, one a token: the same on every device, in every
    version of torch, and beside any other request.
    """

    def __init__(
        self,
        options: SamplingOptions,
        prompt_ids: Sequence[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.options = options
        self.random = random.Random(options.seed)
        self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.in_prompt[torch.tensor(prompt_ids, dtype=torch.long, device=device)] = True
        self.counts = torch.zeros(vocab_size, device=device)  # of the answer

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Token:
        """Return the next token for ``logits`` (V,).

        Raises:
            ValueError: the model's logits are not numbers.
        """
        logits = logits.float()
        if not torch.isfinite(logits.amax()):  # the maximum is NaN if any is
            raise ValueError(
                "the model's logits are not finite: its weights are damaged, or overflow in this "
                "precision; try --dtype float32"
            )
        token_id = int(self.choose(logits))
        self.counts[token_id] += 1
        if self.options.logprobs is None:
            return Token(token_id)
        logprobs = logits.log_softmax(dim=-1)
        values, ids = logprobs.topk(min(self.options.logprobs, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(token_id, float(logprobs[token_id]), top)

    def choose(self, logits: Tensor) -> Tensor:
        """Return the id for ``logits`` (V,) in fp32, by the steps of the options."""
        options = self.options
        if options.repetition_penalty != 1:
            seen = self.in_prompt | (self.counts > 0)
            logits = repetition_penalty(logits, seen, options.repetition_penalty)
        if options.presence_penalty or options.frequency_penalty:
            logits = count_penalty(
                logits, self.counts, options.presence_penalty, options.frequency_penalty
            )
        if options.temperature == 0:
            return logits.argmax(dim=-1)
        # the likeliest becomes 0, so that a tiny temperature cannot overflow
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(options.temperature, 1e-6)
        if options.top_k or options.top_p < 1 or options.min_p:
            logits = keep_likely(logits, options.top_k, options.top_p, options.min_p)
        return draw(logits, self.random.random())


# ---- tokens ----


def generate(
    model: nn.Module, prompt_ids: Sequence[int], options: SamplingOptions
) -> Iterator[Token]:
    """Return the answer's tokens as they are made, the end token included.

    The prompt is computed once, then each token costs one step with the cache. Answers generated
    side by side do not meet: cache, counts and random numbers belong to the iterator.

    Args:
        model: in eval mode; ``config.max_seq_len`` bounds prompt and answer together.
        prompt_ids: at least one id.
        options: see :class:`SamplingOptions`; ``stop`` is left to :class:`TextStream`.

    Raises:
        ValueError: a model in training mode, an empty prompt, an id the model does not have, or a
            prompt that leaves no room for an answer.
    """
    config = model.config
    if model.training:
        raise ValueError("the model is in training mode, so dropout would answer: call eval()")
    if not prompt_ids:
        raise ValueError("the prompt is empty: it needs at least one token, such as <s>")
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < config.vocab_size:
        raise ValueError(
            f"the prompt has ids from {min(prompt_ids)} to {max(prompt_ids)}, the model has "
            f"vocab_size={config.vocab_size}: the tokenizer does not fit the model"
        )
    room = config.max_seq_len - len(prompt_ids)
    if room < 1:
        raise ValueError(
            f"the prompt of {len(prompt_ids)} tokens leaves no room for an answer in a context of "
            f"max_seq_len={config.max_seq_len}: shorten it, or lengthen the context with "
            "--rope_scaling"
        )
    limit = room if options.max_new_tokens is None else min(room, options.max_new_tokens)
    return decode_tokens(model, list(prompt_ids), options, limit)


def decode_tokens(
    model: nn.Module, prompt_ids: list[int], options: SamplingOptions, limit: int
) -> Iterator[Token]:
    """Yield at most ``limit`` tokens after a prompt that :func:`generate` has checked."""
    cache = KVCache(len(prompt_ids) + limit)
    sampler = Sampler(options, prompt_ids, model.config.vocab_size, model.device)
    ids = prompt_ids
    for n_new in range(1, limit + 1):
        token = sampler(next_logits(model, ids, cache))
        if token.id == model.config.eos_token_id:
            token = replace(token, finish_reason="stop")
        elif n_new == limit:
            token = replace(token, finish_reason="length")
        yield token
        if token.finish_reason:
            return
        ids = [token.id]


@torch.inference_mode()
def next_logits(model: nn.Module, ids: list[int], cache: KVCache) -> Tensor:
    """Append ``ids`` to what ``cache`` holds; return the logits (V,) of the token after them."""
    tokens = torch.tensor([ids], device=model.device)
    return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]


# ---- text ----


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


class Answer:
    """An answer while it is made: iterate over its text, then read how it went.

    Breaking off is allowed at any piece: ``text`` is what has come so far.
    """

    def __init__(
        self, tokenizer: Any, tokens: Iterable[Token], stop: Sequence[str] = (), n_prompt: int = 0
    ) -> None:
        self.text = ""
        self.tokens: list[Token] = []
        self.n_prompt = n_prompt
        self.finish_reason: FinishReason | None = None
        self.prefill_s = 0.0  # until the first token
        self.decode_s = 0.0  # for all others; what the reader of the text does is not counted
        self._stream = TextStream(tokenizer, stop)
        self._tokens = iter(tokens)

    def __iter__(self) -> Iterator[str]:
        while not self.finish_reason and (token := self._next_token()):
            piece = self._stream.push(token.id)
            self.finish_reason = "stop" if self._stream.stopped else token.finish_reason
            self.text += piece
            if piece:
                yield piece
        rest = self._stream.finish()
        if self._stream.stopped:
            self.finish_reason = "stop"
        self.text += rest
        if rest:
            yield rest

    def _next_token(self) -> Token | None:
        start = time.perf_counter()
        token = next(self._tokens, None)
        elapsed_s = time.perf_counter() - start
        if self.tokens:
            self.decode_s += elapsed_s
        else:
            self.prefill_s += elapsed_s
        if token:
            self.tokens.append(token)
        return token

    @property
    def speed(self) -> str:
        """Tokens and tokens per second of prompt and answer, for people."""
        parts = [f"prompt {self.n_prompt} tokens, {rate(self.n_prompt, self.prefill_s)}"]
        parts.append(f"answer {len(self.tokens)} tokens")
        if len(self.tokens) > 1:
            parts.append(rate(len(self.tokens) - 1, self.decode_s))
        return ", ".join(parts)


def rate(n: int, elapsed_s: float) -> str:
    return f"{n / max(elapsed_s, 1e-9):,.1f} tokens/s"


def stream_text(tokenizer: Any, tokens: Iterable[Token], stop: Sequence[str] = ()) -> Iterator[str]:
    """Yield the text of ``tokens`` as it completes, up to the first stop string."""
    return iter(Answer(tokenizer, tokens, stop))


# ---- prompts that are too long ----


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
