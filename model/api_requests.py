"""What a client may send to the API server, and what it means for the engine.

Strict in types and ranges, lenient otherwise: null is as good as absent, unknown fields are
accepted. What these models cannot do is refused by name, never ignored.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from .api_errors import NO_TOOLS, check_wishes, invalid, of_validation, refused, shown
from .sampling import SamplingOptions

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_LOGPROBS, MAX_COMPLETION_LOGPROBS = 20, 5
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
Number = Annotated[float, Field(allow_inf_nan=False)]
Request = TypeVar("Request", bound=BaseModel)


# ----------------------------------------------------------------------------- fields


def wrong(expected: str) -> PydanticCustomError:
    return PydanticCustomError("value", "expected {expected}", {"expected": expected})


def join_parts(content: Any) -> Any:
    """Return a message's text: it may come in parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal"):
            raise wrong(
                f"parts of the type text, as these models read nothing else (part {index} is "
                f"{shown(kind if kind is not None else part)})"
            )
        text = part.get(kind)
        if not isinstance(text, str):
            raise wrong(f'a string as "{kind}" of part {index}')
        texts.append(text)
    return "".join(texts)


def as_stops(stop: Any) -> Any:
    """Return stop strings as a list, without empty ones, which would stop everything."""
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise wrong(f"a string or a list of at most {MAX_STOPS} strings")
    return [text for text in stop if text]


def as_prompts(prompt: Any) -> Any:
    """Return prompts as a list of texts and lists of ids."""
    if isinstance(prompt, str) or _are_ids(prompt):
        return [prompt]
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(p, str) or _are_ids(p) for p in prompt)
    ):
        return prompt
    raise wrong("a string, a list of strings, a list of token ids, or a list of such lists")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


TEXT = {"type": "string"}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PART = {
    "type": "object",
    "properties": {"type": {"enum": ["text"]}, "text": TEXT},
    "required": ["type", "text"],
}
Content = Annotated[
    str,
    BeforeValidator(join_parts),
    WithJsonSchema({"anyOf": [TEXT, {"type": "array", "items": PART}]}),
]
Stops = Annotated[
    list[str],
    Field(max_length=MAX_STOPS),
    BeforeValidator(as_stops),
    WithJsonSchema({"anyOf": [TEXT, {"type": "array", "items": TEXT, "maxItems": MAX_STOPS}]}),
]
Prompts = Annotated[
    list[Any],
    BeforeValidator(as_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                TEXT,
                {"type": "array", "items": TEXT, "minItems": 1},
                IDS,
                {"type": "array", "items": IDS, "minItems": 1},
            ]
        }
    ),
]


class Lenient(BaseModel):
    """Known fields are checked strictly, unknown ones accepted."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(Lenient):
    include_usage: bool | None = None


class ChatMessage(Lenient):
    role: str = Field(json_schema_extra={"enum": list(ROLES)})
    content: Content | None = None


# ----------------------------------------------------------------------------- requests


class Sampled(Lenient):
    """What a chat and a completion have in common."""

    model: str | None = Field(None, description="any name is served unless --strict_model")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=-1)] | None = Field(None, description="-1: until the end")
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="0 or -1: off")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    repeat_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = Field(
        None, description="the same as repetition_penalty"
    )
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = Field(
        None, description="token id to what is added to its logit"
    )
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None

    @property
    def n_logprobs(self) -> int | None:
        """How many likeliest tokens to give with each token; None: no probabilities at all."""
        raise NotImplementedError

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that bounds the answer, and its value."""
        return "max_tokens", self.max_tokens

    def check(self) -> None:
        """Raise ApiError for what goes beyond one field."""
        check_wishes(self.model_extra or {})
        if self.stream_options is not None and not self.stream:
            raise invalid(
                "stream_options is there without stream: expected stream true", "stream_options"
            )
        name, limit = self.token_limit
        if limit == 0:
            raise invalid(f"{name} is 0: expected at least 1, or -1 for no limit", name)

    def options(self, defaults: SamplingOptions, vocab_size: int) -> SamplingOptions:
        """Return how to answer: what the request says, and ``defaults`` for what it does not.

        Raises:
            ApiError: a biased token that does not exist.
        """
        _, limit = self.token_limit
        penalty = self.repetition_penalty
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repeat_penalty if penalty is None else penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "stop": None if self.stop is None else tuple(self.stop),
            "seed": self.seed,
            "logprobs": self.n_logprobs,
            "max_new_tokens": limit,
            "logit_bias": read_bias(self.logit_bias or {}, vocab_size) or None,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if limit == -1:
            given["max_new_tokens"] = None
        return replace(defaults, **given)


def read_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    """Return biases by token id.

    Raises:
        ApiError: a key that is no id of the model.
    """
    for key in bias:
        if not re.fullmatch(r"[0-9]{1,9}", key) or int(key) >= vocab_size:
            raise invalid(
                f"logit_bias has the key {shown(key)}: expected token ids of this model, 0 to "
                f"{vocab_size - 1}, as strings; /tokenize tells them",
                "logit_bias",
            )
    return {int(key): value for key, value in bias.items()}


class ChatRequest(Sampled):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="wins over max_tokens"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def n_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().token_limit

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise invalid(
                f"top_logprobs is {self.top_logprobs} without logprobs: expected logprobs true",
                "top_logprobs",
            )
        extra = self.model_extra or {}
        for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
            wish = extra.get(choice)
            if wish not in (None, "none", "auto"):
                raise refused(choice, NO_TOOLS, wish)
            if extra.get(tools) not in (None, []) and wish != "none":
                raise refused(tools, f'{NO_TOOLS}; leave it out, or send {choice} "none"')
        form = extra.get("response_format")
        kind = form.get("type") if isinstance(form, dict) else form
        if form not in (None, {}) and kind != "text":
            raise refused(
                "response_format", 'answers are plain text here; expected {"type": "text"}', kind
            )
        if extra.get("echo"):
            raise refused("echo", "a conversation is not repeated; use /v1/completions", True)
        if extra.get("best_of") not in (None, 1):
            raise refused("best_of", "answers are not ranked here; use n", extra["best_of"])
        modalities = extra.get("modalities")
        if modalities not in (None, [], ["text"]):
            raise refused("modalities", 'these models write text only; expected ["text"]')

    def conversation(self) -> list[dict[str, str]]:
        """Return the messages as the chat template takes them.

        What the system says at the beginning, in one or several messages, is one text. The
        template has no place for it later, where clients ask for a summary with it: there it is
        the user's, part of the message before it where that is the user's too.

        Raises:
            ApiError: a role or a content that has no place in it.
        """
        found: list[tuple[str, list[str]]] = []
        for index, message in enumerate(self.messages):
            place = f"messages[{index}]"
            if message.role in ("tool", "function"):
                raise refused(f"{place}.role", NO_TOOLS, message.role)
            role = ROLES.get(message.role)
            if role is None:
                raise invalid(
                    f'{place}.role is {shown(message.role)}; use "system", "user" or "assistant"',
                    f"{place}.role",
                )
            for name in ("tool_calls", "function_call"):
                if (message.model_extra or {}).get(name):
                    raise refused(f"{place}.{name}", NO_TOOLS)
            content = message.content
            if content is None and role != "assistant":
                raise invalid(
                    f"{place}.content is missing: expected a string, or a list of text parts",
                    f"{place}.content",
                )
            before = found[-1][0] if found else "system"
            is_late = role == "system" and before != "system"
            if found and (is_late or role == "system") and before in ("system", "user"):
                found[-1][1].append(content)
            else:
                found.append(("user" if is_late else role, [content or ""]))
        return [{"role": role, "content": "\n".join(texts)} for role, texts in found]


class CompletionRequest(Sampled):
    """POST /v1/completions"""

    prompt: Prompts
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        n = self.n or 1
        if self.best_of not in (None, n):
            raise refused("best_of", f"answers are not ranked here; expected n={n}", self.best_of)
        if self.echo and self.logprobs is not None:
            raise refused("echo", "the prompt's own log probabilities are not computed", True)
        if n * len(self.prompt) > MAX_CHOICES:
            raise invalid(
                f"{len(self.prompt)} prompts with n={n} make {n * len(self.prompt)} answers: "
                f"expected at most {MAX_CHOICES} in a request",
                "prompt",
            )


class TokenizeRequest(Lenient):
    """POST /tokenize: of a text (also called prompt or text), or of a conversation."""

    model: str | None = None
    content: Annotated[str, Field()] | None = None
    prompt: str | None = None
    text: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special: bool | None = Field(None, description="begin with <s>")

    def check(self) -> None:
        if all(value is None for value in (self.content, self.prompt, self.text, self.messages)):
            raise invalid("content is missing: expected a text, or messages", "content")

    @property
    def the_text(self) -> str:
        given = (self.content, self.prompt, self.text)
        return next((text for text in given if text is not None), "")


class DetokenizeRequest(Lenient):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]

    def check(self) -> None:
        """Nothing goes beyond a field; whether the ids exist is a question to the model."""


def parse(kind: type[Request], body: bytes) -> Request:
    """Return the request in a body.

    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    try:
        request = kind.model_validate_json(body.removeprefix(b"\xef\xbb\xbf"))
    except ValidationError as error:
        raise of_validation(error) from None
    request.check()
    return request


def schemas(kinds: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """Return the requests' JSON schemas, for the components of /openapi.json."""
    found: dict[str, Any] = {}
    for kind in kinds:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {})
        found[kind.__name__] = schema
    return found
