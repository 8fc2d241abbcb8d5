"""What a request may hold: leniency, refusals by name, and what it asks of the engine."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.api_errors import ApiError
from model.api_requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
    schemas,
)
from model.sampling import SamplingOptions

HI = [{"role": "user", "content": "hi"}]
DEFAULTS = SamplingOptions(temperature=0.7, top_k=16, max_new_tokens=99, stop=("END",), seed=4)


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": HI, **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "hi", **fields}).encode())


def error_of(call: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    with pytest.raises(ApiError) as caught:
        call(*args, **kwargs)
    assert caught.value.status == 400
    error = caught.value.body["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"] is None or isinstance(error["code"], str)
    return error


# ----------------------------------------------------------------------------- accepted


def test_null_is_as_good_as_absent() -> None:
    names = ChatRequest.model_fields.keys() - {"messages"}
    nulls = {name: None for name in [*names, "tools", "tool_choice", "response_format", "suffix"]}
    assert chat(**nulls).options(DEFAULTS, 300) == DEFAULTS == chat().options(DEFAULTS, 300)


@pytest.mark.parametrize(
    "fields",
    [
        {"foo": [1, {"x": None}], "user": "u", "metadata": {"a": "b"}, "store": True},
        {"tools": [], "functions": []},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"stream": True, "stream_options": {"include_usage": False, "x": 1}},
        # what programs send along whose users changed nothing
        {
            "ignore_eos": False, "min_tokens": 0, "stop_token_ids": [], "bad_words": [],
            "prediction": None, "use_beam_search": False, "length_penalty": 1.0,
            "continue_final_message": False, "add_generation_prompt": True, "best_of": 1,
            "echo": False, "skip_special_tokens": True, "allowed_token_ids": None,
        },
        {
            "mirostat": 0, "mirostat_tau": 5.0, "typical_p": 1.0, "tfs_z": 1, "dynatemp_range": 0.0,
            "dry_multiplier": 0, "dry_base": 1.75, "xtc_probability": 0.0, "top_n_sigma": -1,
            "n_predict": -1, "n_probs": 0, "t_max_predict_ms": -1, "cache_prompt": True, "lora": [],
        },
        {"top_logprobs": 0},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}, *HI]},
        {"messages": [{"role": "user", "content": "", "name": "Li"}]},
    ],
    ids=lambda fields: "-".join(fields)[:40],
)  # fmt: skip
def test_what_clients_send_along_is_accepted(fields: dict[str, Any]) -> None:
    request = chat(**fields)
    assert request.options(DEFAULTS, 300) == DEFAULTS
    request.conversation()


def test_a_byte_order_mark_is_no_error() -> None:
    body = b"\xef\xbb\xbf" + json.dumps({"messages": HI}).encode()
    assert parse(ChatRequest, body).conversation() == HI


# ----------------------------------------------------------------------------- what it means


def test_every_parameter_reaches_the_engine() -> None:
    given = {
        "temperature": 2, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.3,
        "presence_penalty": -2, "frequency_penalty": 2, "seed": -7,
    }  # fmt: skip
    options = chat(
        **given, stop=["a", "", "b"], max_tokens=5, logprobs=True, top_logprobs=2,
        logit_bias={"7": -100, "0": 1.5},
    ).options(DEFAULTS, 300)  # fmt: skip
    assert options == SamplingOptions(
        **given, stop=("a", "b"), max_new_tokens=5, logprobs=2, logit_bias={7: -100.0, 0: 1.5}
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 99),
        ({"max_tokens": None}, 99),
        ({"max_tokens": -1}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": None}, 5),
        ({"max_tokens": 5, "max_completion_tokens": -1}, None),
        ({"max_tokens": 0, "max_completion_tokens": 6}, 6),
        ({"max_tokens": 10**30}, 10**30),
    ],
)
def test_the_limit_of_an_answer(fields: dict[str, Any], expected: int | None) -> None:
    assert chat(**fields).options(DEFAULTS, 300).max_new_tokens == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"repeat_penalty": 1.2}, 1.2),
        ({"repetition_penalty": 1.1}, 1.1),
        ({"repeat_penalty": 1.2, "repetition_penalty": 1.1}, 1.1),
        ({"repeat_penalty": 1.2, "repetition_penalty": None}, 1.2),
    ],
)
def test_both_names_of_the_repetition_penalty(fields: dict[str, Any], expected: float) -> None:
    assert chat(**fields).options(DEFAULTS, 300).repetition_penalty == expected


def test_minus_one_turns_top_k_off() -> None:
    assert chat(top_k=-1).options(DEFAULTS, 300).top_k == 0


def test_an_empty_list_of_stops_is_none_at_all() -> None:
    assert chat(stop=[]).options(DEFAULTS, 300).stop == ()
    assert chat(stop="x").options(DEFAULTS, 300).stop == ("x",)


def test_logprobs_count_only_when_asked_for() -> None:
    assert chat(logprobs=False).options(DEFAULTS, 300).logprobs is None
    assert chat(logprobs=True).options(DEFAULTS, 300).logprobs == 0
    assert completion(logprobs=0).options(DEFAULTS, 300).logprobs == 0


def test_the_conversation() -> None:
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    messages = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        *HI,
    ]
    assert chat(messages=messages).conversation() == [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "no"},
        *HI,
    ]


def test_what_the_system_says_later_is_the_users() -> None:
    late = {"role": "system", "content": "late"}
    answer = {"role": "assistant", "content": "a"}
    both = [{"role": "user", "content": "hi\nlate"}]
    alone = [{"role": "user", "content": "late"}]
    for messages, expected in (
        ([*HI, late], both),
        ([*HI, late, late], [{"role": "user", "content": "hi\nlate\nlate"}]),
        ([*HI, answer, late], [*HI, answer, *alone]),
        ([*HI, answer, late, *HI], [*HI, answer, *alone, *HI]),
        ([late, *HI, {**late, "role": "developer"}], [late, *both]),
        ([late, answer, late], [late, answer, *alone]),
        ([*HI, *HI, answer, answer], [*HI, *HI, answer, answer]),
    ):
        assert chat(messages=messages).conversation() == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_forms_of_a_prompt(prompt: Any, expected: list[Any]) -> None:
    assert completion(prompt=prompt).prompt == expected


# ----------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", '"hi"'),
        ({"messages": ["hi"]}, "messages[0]", "object"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "string"),
        ({"temperature": "1"}, "temperature", 'is "1": expected a valid number'),
        ({"temperature": True}, "temperature", "is true"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": -0.1}, "temperature", "-0.1"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"temperature": float("inf")}, "temperature", "temperature"),
        ({"top_p": 1.01}, "top_p", "1.01"),
        ({"presence_penalty": -2.5}, "presence_penalty", "-2.5"),
        ({"frequency_penalty": 3}, "frequency_penalty", "3"),
        ({"n": 0}, "n", "0"),
        ({"n": 129}, "n", "128"),
        ({"n": "2"}, "n", "integer"),
        ({"n": True}, "n", "true"),
        ({"n": 1.5}, "n", "1.5"),
        ({"max_tokens": 0}, "max_tokens", "at least 1, or -1"),
        ({"max_tokens": -2}, "max_tokens", "-2"),
        ({"max_tokens": 9, "max_completion_tokens": 0}, "max_completion_tokens", "is 0"),
        ({"stop": list("abcde")}, "stop", "at most 4"),
        ({"stop": 3}, "stop", "a string or a list"),
        ({"stop": ["a", 3]}, "stop", "a string or a list"),
        ({"seed": 2**64}, "seed", "seed"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
        ({"logit_bias": [[5, 1]]}, "logit_bias", "object"),
        ({"model": 5}, "model", "string"),
        ({"min_p": 2}, "min_p", "2"),
        ({"repeat_penalty": 0}, "repeat_penalty", "0"),
        ({"tools": [{"type": "function"}]}, "tools", "call no tools"),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools", "call no tools"),
        ({"tool_choice": "required"}, "tool_choice", "required"),
        ({"functions": [{"name": "f"}]}, "functions", "call no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
        ({"response_format": "json"}, "response_format", "json"),
        ({"modalities": ["text", "audio"]}, "modalities", "text only"),
        ({"audio": {"voice": "x"}}, "audio", "text only"),
        ({"guided_json": {"type": "object"}}, "guided_json", "not constrained"),
        ({"stream_options": {}}, "stream_options", "stream true"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options", "true"),
        ({"ignore_eos": True}, "ignore_eos", "logit_bias"),
        ({"min_tokens": 5}, "min_tokens", "is 5"),
        ({"stop_token_ids": [7]}, "stop_token_ids", "use stop"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction", "not predicted"),
        ({"bad_words": ["x"]}, "bad_words", "logit_bias"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids", "logit_bias"),
        ({"use_beam_search": True}, "use_beam_search", "sampled"),
        ({"prompt_logprobs": 0}, "prompt_logprobs", "not computed"),
        ({"continue_final_message": True}, "continue_final_message", "/v1/completions"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "expected true"),
        ({"best_of": 2}, "best_of", "use n"),
        ({"n": 2, "best_of": 2}, "best_of", "use n"),
        ({"echo": True}, "echo", "not repeated"),
        ({"mirostat": 2}, "mirostat", "no such sampler"),
        ({"typical_p": 0.9}, "typical_p", "expected 1"),
        ({"tfs_z": 0}, "tfs_z", "is 0"),
        ({"top_n_sigma": 1.5}, "top_n_sigma", "no such sampler"),
        ({"dynatemp_range": 0.5}, "dynatemp_range", "no such sampler"),
        ({"dry_multiplier": 0.8}, "dry_multiplier", "use repetition_penalty"),
        ({"xtc_probability": 0.5}, "xtc_probability", "no such sampler"),
        ({"n_predict": 5}, "n_predict", "use max_tokens"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "expected true"),
        ({"lora": [{"id": 0, "scale": 1}]}, "lora", "started"),
        ({"chat_template": "{{ messages }}"}, "chat_template", "own"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_chat_names_what_it_refuses(fields: dict[str, Any], param: str, says: str) -> None:
    error = error_of(chat, **fields)
    assert error["param"] == param
    assert param in error["message"] and says in error["message"]


@pytest.mark.parametrize(
    ("message", "param", "says"),
    [
        ({"role": "bot", "content": "x"}, "messages[1].role", '"bot"; use "system", "user"'),
        ({"role": "tool", "content": "x"}, "messages[1].role", "call no tools"),
        ({"role": "system"}, "messages[1].content", "missing"),
        ({"role": "user"}, "messages[1].content", "missing"),
        ({"role": "user", "content": None}, "messages[1].content", "missing"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1"}]},
            "messages[1].tool_calls",
            "call no tools",
        ),
    ],
    ids=lambda value: "",
)
def test_a_conversation_names_what_it_refuses(message: Any, param: str, says: str) -> None:
    error = error_of(chat(messages=[*HI, message]).conversation)
    assert error["param"] == param
    assert param in error["message"] and says in error["message"]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", None])
def test_a_part_that_is_not_text_is_named(kind: str | None) -> None:
    content = [{"type": "text", "text": "x"}, {"type": kind, "image_url": {"url": "u"}}]
    error = error_of(chat, messages=[{"role": "user", "content": content}])
    assert error["param"] == "messages[0].content"
    assert "part 1" in error["message"] and (kind is None or kind in error["message"])


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": None}, "prompt", "a string"),
        ({"prompt": []}, "prompt", "a list of strings"),
        ({"prompt": [1, "a"]}, "prompt", "a list of strings"),
        ({"prompt": [True]}, "prompt", "a list of strings"),
        ({"prompt": [[]]}, "prompt", "a list of strings"),
        ({"suffix": "x"}, "suffix", "do not fill gaps"),
        ({"ignore_eos": True}, "ignore_eos", "logit_bias"),
        ({"use_beam_search": True}, "use_beam_search", "sampled"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream true"),
        ({"best_of": 2}, "best_of", "not ranked"),
        ({"n": 2, "best_of": 1}, "best_of", "not ranked"),
        ({"echo": True, "logprobs": 1}, "echo", "prompt's own"),
        ({"logprobs": 6}, "logprobs", "5"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt", "at most 128"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_completion_names_what_it_refuses(fields: Any, param: str, says: str) -> None:
    error = error_of(completion, **fields)
    assert error["param"] == param and says in error["message"]


def test_no_prompt_and_no_messages() -> None:
    for kind, name in ((ChatRequest, "messages"), (CompletionRequest, "prompt")):
        assert error_of(parse, kind, b"{}")["message"] == f"{name} is missing"
    assert error_of(parse, TokenizeRequest, b"{}")["param"] == "content"


@pytest.mark.parametrize("key", ["300", "-1", "x", "1.0", "９", "1" * 5000])
def test_a_bias_is_for_an_id_of_the_model(key: str) -> None:
    error = error_of(chat(logit_bias={key: 1}).options, DEFAULTS, 300)
    assert error["param"] == "logit_bias" and "0 to 299" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe\x00", b"{'a': 1}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"x": ' + b"[" * 100_000,
        b'{"n": 1' + b"0" * 5000 + b"}",
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_json_object(body: bytes) -> None:
    assert "JSON" in error_of(parse, ChatRequest, body)["message"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "system", "x"]) | anything, "content": anything}
)
FIELDS = sorted(
    {*ChatRequest.model_fields, *CompletionRequest.model_fields, "tools", "tool_choice", "audio"}
)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4),
    st.lists(MESSAGE, max_size=3) | anything,
    st.sampled_from([ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest]),
)
def test_whatever_is_sent_is_understood_or_refused(fields: Any, messages: Any, kind: Any) -> None:
    body = json.dumps({"prompt": "x", "tokens": [1], "messages": messages, **fields}).encode()
    try:
        request = parse(kind, body)
        if kind is ChatRequest:
            request.conversation()
        if isinstance(request, ChatRequest | CompletionRequest):
            assert isinstance(request.options(DEFAULTS, 300), SamplingOptions)
    except ApiError as error:
        assert error.status == 400
        json.dumps(error.body).encode()


def test_the_schemas_refer_only_to_one_another() -> None:
    found = schemas((ChatRequest, CompletionRequest))
    text = json.dumps(found)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names and names <= found.keys()
    assert found["ChatRequest"]["required"] == ["messages"]
