"""What goes wrong in the API server, as OpenAI's errors: a status, and JSON of four keys."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

INVALID = "invalid_request_error"
NO_TOOLS = "these models call no tools"
FREE = "answers are not constrained here"
NO_END = (
    'an answer ends where the model ends it; to go on, send logit_bias {"2": -100}, its end token'
)
NO_SAMPLER = "there is no such sampler here; there are temperature, top_k, top_p and min_p"
NO_TEMPLATE = "the chat template is the model's own"
# Fields of OpenAI, llama.cpp and vLLM that ask for what is not there, unless they are null, false,
# empty, or not above zero
NOT_HERE = {
    "audio": "these models write text only",
    "web_search_options": NO_TOOLS,
    "prediction": "answers are not predicted",
    "grammar": FREE,
    "json_schema": FREE,
    "guided_json": FREE,
    "guided_regex": FREE,
    "guided_choice": FREE,
    "guided_grammar": FREE,
    "structured_outputs": FREE,
    "logits_processors": FREE,
    "allowed_token_ids": f"{FREE}; logit_bias makes tokens more and less likely",
    "bad_words": f"{FREE}; logit_bias keeps tokens out",
    "suffix": "these models continue a text, they do not fill gaps",
    "ignore_eos": NO_END,
    "min_tokens": NO_END,
    "stop_token_ids": "answers end at strings: use stop",
    "include_stop_str_in_output": "a stop string is not part of an answer",
    "t_max_predict_ms": "answers are not bounded in time: use max_tokens",
    "use_beam_search": "answers are sampled",
    "mirostat": NO_SAMPLER,
    "top_n_sigma": NO_SAMPLER,
    "dynatemp_range": NO_SAMPLER,
    "xtc_probability": NO_SAMPLER,
    "dry_multiplier": "use repetition_penalty, presence_penalty or frequency_penalty",
    "n_probs": "use logprobs",
    "truncate_prompt_tokens": "a prompt is not shortened here",
    "continue_final_message": "an answer is a message of its own; use /v1/completions",
    "documents": NO_TEMPLATE,
    "chat_template": NO_TEMPLATE,
    "image_data": "these models read text only",
    "lora": "adapters are chosen when the server is started, each as a model of its own",
}
# The same, unless they have this value
UNLESS = {
    "typical_p": (1, NO_SAMPLER),
    "tfs_z": (1, NO_SAMPLER),
    "length_penalty": (1, "answers are sampled, not searched for"),
    "n_predict": (-1, "use max_tokens"),
    "skip_special_tokens": (True, "special tokens are not part of an answer"),
    "add_generation_prompt": (True, "a conversation is answered; use /v1/completions"),
    "prompt_logprobs": (False, "the prompt's own log probabilities are not computed"),
}
RETRY_S = "1"  # Retry-After, in seconds: a slot is free within about that


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: for people; names the thing, what was found and what was expected.
        type, param, code: for programs; ``param`` is the request's field, ``code`` never a number.
        more: further keys of the error object.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        error = {"message": message, "type": type, "param": param, "code": code}
        self.body = {"error": {**error, **(more or {})}}


def wrong_key() -> ApiError:
    return ApiError(
        401,
        "no API key of this server: send it as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'",
        type="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    return ApiError(
        404,
        f"the model {shown(name)} does not exist here; there is {', '.join(known)}",
        param="model",
        code="model_not_found",
    )


def too_long(n_prompt: int, context: int, field: str, at_least: bool = False) -> ApiError:
    """Return the error of a prompt that fills the context; ``at_least`` where it was not counted
    to its end.
    """
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens, prompt and answer together. "
        f"Your {field} resulted in {'at least ' * at_least}{n_prompt} tokens: shorten it, or leave "
        "out what is oldest.",
        param=field,
        code="context_length_exceeded",
        more={"n_prompt_tokens": n_prompt, "n_ctx": context},
    )


def too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes, the most this server reads (--max_body_mb)",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def queue_full(reason: str) -> ApiError:
    return ApiError(
        429,
        f"too many requests are waiting ({reason}): try again in a moment",
        type="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": RETRY_S},
    )


def unavailable(state: str, message: str | None = None) -> ApiError:
    """Return the error of a server that is loading, draining or failed."""
    return ApiError(
        503,
        message or f"the server is {state} and takes no requests: see /health",
        type="unavailable_error",
        code=state,
        headers={"Retry-After": RETRY_S},
    )


def stopping() -> ApiError:
    """Return the error of an answer that a server gave up when it ended."""
    return unavailable("draining", "the server is being stopped and cancelled the answer")


def not_served(path: str) -> ApiError:
    return ApiError(
        501,
        f"{path} is not served: these models do nothing but chat and complete text; use "
        "/v1/chat/completions or /v1/completions",
        type="not_implemented_error",
        code="not_implemented",
    )


def of_the_engine(error: Exception) -> ApiError:
    """Return the error of an answer that failed on its way; only what is meant for users is
    told.
    """
    reason = str(error) if isinstance(error, ValueError) else "see the server's log"
    return ApiError(500, f"the answer failed: {reason}", type="server_error", code="internal_error")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def refused(field: str, reason: str, value: Any = None) -> ApiError:
    """Return the error of a wish that these models cannot fulfil and that is not to be ignored."""
    what = f"{field} is {shown(value)}" if value is not None else field
    return ApiError(400, f"{what}: {reason}", param=field, code="unsupported_parameter")


def check_wishes(fields: Mapping[str, Any]) -> None:
    """Raise ApiError for the first field that asks for what is not there."""
    given = {name: value for name, value in fields.items() if value is not None}
    for name, reason in NOT_HERE.items():
        value = given.get(name)
        if value and not (isinstance(value, int | float) and value <= 0):
            raise refused(name, reason, value)
    for name, (neutral, reason) in UNLESS.items():
        value = given.get(name, neutral)
        if value != neutral or isinstance(value, bool) != isinstance(neutral, bool):
            raise refused(name, f"{reason}; expected {shown(neutral)}", value)


def of_validation(error: ValidationError) -> ApiError:
    """Return the first thing that pydantic objects to."""
    first = error.errors(include_url=False)[0]
    where = field_path(first["loc"])
    if first["type"] == "json_invalid":
        return invalid(f"the body is not {first['msg'].removeprefix('Invalid ')}", code="bad_json")
    if first["type"] == "missing":
        return invalid(f"{where} is missing", where, "missing_required_parameter")
    expected = first["msg"].replace("Input should be", "expected", 1)
    if first["type"] == "too_short":
        expected = f"expected at least {first['ctx']['min_length']}"
    if first["type"] == "too_long":
        expected = f"expected at most {first['ctx']['max_length']}"
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    if not where:
        return invalid("the body is no JSON object: expected fields such as messages", code=code)
    return invalid(f"{where} is {shown(first['input'])}: {expected}", where, code)


def field_path(parts: Sequence[str | int]) -> str:
    """Return ``messages[2].role`` for its parts."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".")


def shown(value: Any) -> str:
    """Return a value as JSON, at most 80 letters of it."""
    if isinstance(value, list | dict):
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, str) and len(value) > 80:
        value = value[:79] + "…"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:199] + "…"
