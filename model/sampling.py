"""How the next token is chosen: options, penalties, filters, one draw.

The functions on logits work on any leading dimensions; a parameter is a number or, for rows with
options of their own, a tensor that broadcasts against (..., V).
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

LIKELIEST = 256  # looked at before all are sorted
# end token or stop string; limit or context reached; given up by whoever asked
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen and when an answer ends; the defaults draw from the model as it is.

    The steps and their order (that of ``transformers``): repetition penalty, presence and frequency
    penalty, bias, temperature, top-k, top-p, min-p, one draw. Each filter sees what the ones before
    it left.

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
        stop: strings that end an answer and are not part of it; they are looked for in its text.
        seed: the same seed gives the same answer, whatever runs beside it; None: another each time.
        logprobs: give each token's log probability and those of this many likeliest ones (0: only
            its own). They are the model's, before any of the steps.
        logit_bias: added to the logits of these ids.

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
    logit_bias: Mapping[int, float] = field(default_factory=dict)

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
        in_range = all(is_int(i, 0) and abs(b) <= 1e4 for i, b in self.logit_bias.items())
        check("logit_bias", in_range, "made of ids and numbers of at most 10,000")
        check("logprobs", n is None or is_int(n, 0), "a whole number of at least 0")


@dataclass(frozen=True, slots=True)
class Token:
    """One new token; ``finish_reason`` stands on the last one of an answer."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (id, log probability), likeliest first
    finish_reason: FinishReason | None = None


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
    logits: Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    max_k: int = 0,
) -> Tensor:
    """Set to -inf what top-k (0: off), top-p and min-p remove; at least one token stays.

    ``max_k`` says that every row has a top-k, and none a larger one.
    """
    ranked, order = likely(logits, top_k, top_p, min_p, max_k)
    return torch.full_like(logits, -math.inf).scatter(-1, order, ranked)


def likely(
    logits: Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    max_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the same for as few of the likeliest as hold all that stays: their logits, and their
    ids.
    """
    top_k, top_p, min_p = (torch.as_tensor(f, device=logits.device) for f in (top_k, top_p, min_p))
    max_k = max_k or (int(top_k) if top_k.dim() == 0 else 0)

    def look_at(n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ``n`` likeliest logits, their ids, and which of them stay."""
        ranked, order = logits.topk(n, dim=-1) if n < n_all else logits.sort(-1, descending=True)
        return ranked, order, stays(logits, ranked, top_k, top_p, min_p)

    n_all = logits.shape[-1]
    is_limited = max_k > 0
    ranked, order, keep = look_at(min(n_all, max_k if is_limited else LIKELIEST))
    if not is_limited and LIKELIEST < n_all:  # a tenth of the time of a sort, and mostly enough
        n_kept = keep.sum(dim=-1, keepdim=True)
        least = ranked.gather(-1, n_kept - 1)
        after = ranked.gather(-1, n_kept.clamp(max=LIKELIEST - 1))
        # what stays may go on outside; and of equals a sort may keep another
        if top_k.any() or not (least > after).all():
            ranked, order, keep = look_at(n_all)
    return ranked.masked_fill(~keep, -math.inf), order


def stays(logits: Tensor, ranked: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Say which of the likeliest, ``ranked``, the filters let stay: the first few."""
    rank = torch.arange(ranked.shape[-1], device=logits.device)
    has_k = top_k > 0
    keep = (rank < top_k) | ~has_k
    left = ranked.masked_fill(~keep, -math.inf)
    total = left.logsumexp(dim=-1, keepdim=True)
    if not has_k.all():  # without a top-k the mass is that of all, whether or not they are ranked
        total = torch.where(has_k, total, logits.logsumexp(dim=-1, keepdim=True))
    probs = (left - total).exp()
    mass_before = probs.cumsum(dim=-1) - probs
    # >= 1 is off: rounding may lift the mass before the last tokens to 1
    keep = keep & ((mass_before < top_p) | (top_p >= 1))
    return (keep & (probs >= min_p * probs[..., :1])) | (rank == 0)


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
    """What one request's choices depend on: its options, random numbers, and tokens so far.

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
        self.in_prompt: Tensor | None = None  # (V,), where a penalty asks for it
        self.counts: Tensor | None = None  # (V,), of the answer
        if options.repetition_penalty != 1:
            self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.in_prompt[torch.tensor(prompt_ids, dtype=torch.long, device=device)] = True
        if options.repetition_penalty != 1 or options.presence_penalty or options.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)
        self.bias: tuple[Tensor, Tensor] | None = None  # ids and what is added to their logits
        if options.logit_bias:
            ids = torch.tensor(list(options.logit_bias), device=device)
            added = list(options.logit_bias.values())
            self.bias = ids, torch.tensor(added, dtype=torch.float, device=device)

    def penalise(self, logits: Tensor) -> Tensor:
        """Return ``logits`` (V,) after the penalties and the bias."""
        options = self.options
        if self.in_prompt is not None:
            seen = self.in_prompt | (self.counts > 0)
            logits = repetition_penalty(logits, seen, options.repetition_penalty)
        if options.presence_penalty or options.frequency_penalty:
            logits = count_penalty(
                logits, self.counts, options.presence_penalty, options.frequency_penalty
            )
        if self.bias is not None:
            logits = logits.index_add(0, *self.bias)
        return logits


@torch.inference_mode()
def choose_tokens(samplers: Sequence[Sampler], logits: Tensor) -> list[Token | ValueError]:
    """Choose each request's next token by its options, all in the same few operations.

    Args:
        samplers: one a row.
        logits: (n, V), the model's.

    Returns:
        A token a row, or the error that this request's logits are not numbers.
    """
    logits = logits.float()
    finite = logits.amax(dim=-1).isfinite().tolist()  # a row's maximum is NaN if any is
    adjusted = logits
    changed = [i for i, s in enumerate(samplers) if s.counts is not None or s.bias is not None]
    if changed:
        adjusted = logits.clone()
        for i in changed:
            adjusted[i] = samplers[i].penalise(logits[i])
    ids = choose_ids([s.options for s in samplers], adjusted, [s.random for s in samplers])
    chosen: list[Token | ValueError] = []
    for i, (sampler, token_id) in enumerate(zip(samplers, ids.tolist(), strict=True)):
        if not finite[i]:
            chosen.append(
                ValueError(
                    "the model's logits are not finite: its weights are damaged, or overflow in "
                    "this precision; try --dtype float32"
                )
            )
            continue
        if sampler.counts is not None:
            sampler.counts[token_id] += 1
        chosen.append(with_logprobs(token_id, logits[i], sampler.options.logprobs))
    return chosen


def choose_ids(
    options: Sequence[SamplingOptions], logits: Tensor, generators: Sequence[random.Random]
) -> Tensor:
    """Return the ids (n,) for ``logits`` (n, V) in fp32 after the penalties; greedy rows use no
    random number.
    """
    greedy = [o.temperature == 0 for o in options]
    if all(greedy):
        return logits.argmax(dim=-1)

    def column(values: Sequence[float | int]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    ids = logits.argmax(dim=-1) if any(greedy) else torch.empty_like(logits[:, 0], dtype=torch.long)
    uniform = [0.0 if g else r.random() for g, r in zip(greedy, generators, strict=True)]
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for i, o in enumerate(options):
        if not greedy[i]:
            kinds.setdefault((o.top_k > 0, o.top_p < 1 or o.min_p > 0), []).append(i)
    for (is_limited, is_filtered), rows in kinds.items():
        of = [options[i] for i in rows]
        scaled = logits if len(rows) == len(options) else logits[rows]
        # the likeliest becomes 0, so that a tiny temperature cannot overflow
        scaled = scaled - scaled.amax(dim=-1, keepdim=True)
        scaled = scaled / column([max(o.temperature, 1e-6) for o in of])
        numbers = column([uniform[i] for i in rows])
        if not (is_limited or is_filtered):
            ids[rows] = draw(scaled, numbers)
            continue
        filters = (column([getattr(o, name) for o in of]) for name in ("top_k", "top_p", "min_p"))
        max_k = max(o.top_k for o in of) if is_limited else 0
        ranked, order = likely(scaled, *filters, max_k=max_k)
        order, index = order.sort(dim=-1)  # drawn from in the order of ids, as from all
        drawn = draw(ranked.gather(-1, index), numbers)
        ids[rows] = order.gather(-1, drawn[:, None])[:, 0]
    return ids


def with_logprobs(token_id: int, logits: Tensor, n_likeliest: int | None) -> Token:
    """Return the token with its log probability and the likeliest ones' under ``logits`` (V,),
    where asked for.
    """
    if n_likeliest is None:
        return Token(token_id)
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(n_likeliest, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token_id, float(logprobs[token_id]), top)
