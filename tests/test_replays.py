"""Requests as Open-WebUI, FastGPT and NextChat send them, on the real server.

The programs themselves are too heavy to run here; what they send and what they need back was read
in their sources.
"""

import json
from collections.abc import Iterator

import httpx
import pytest
from serving import PATIENCE_S, Running, events, serving, text_of, wait_for, write_talker

pytestmark = pytest.mark.slow
QUESTION = {"role": "user", "content": "世界上最高的山是什么？"}
ERROR_KEYS = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(write_talker(tmp_path_factory.mktemp("talker"))) as running:
        yield running


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.base_url, timeout=PATIENCE_S) as client:
        yield client


def whole_text(server: Running, **body: object) -> str:
    body.pop("stream_options", None)
    return server.chat(**{**body, "stream": False})["choices"][0]["message"]["content"]


# ----------------------------------------------------------------------------- Open-WebUI

OF_OPEN_WEBUI = {  # aiohttp's, and who is logged in; no Authorization, as no key was given
    "Content-Type": "application/json",
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate, br",
    "User-Agent": "Python/3.11 aiohttp/3.12.15",
    "X-OpenWebUI-User-Name": "%E5%B0%8F%E6%98%8E",
    "X-OpenWebUI-User-Id": "8e0d2ad0-5ad8-4a8c-8a3e-53d2f5a6b1a1",
    "X-OpenWebUI-User-Email": "ming@example.org",
    "X-OpenWebUI-User-Role": "user",
    "X-OpenWebUI-Chat-Id": "f3c0a6f0-0f0f-4f7e-9a5e-0d7f6f3a2b1c",
}


def test_open_webui_connects(http: httpx.Client) -> None:
    answer = http.get("/models", headers=OF_OPEN_WEBUI)
    assert answer.status_code == 200
    assert "error" not in answer.json()
    assert [model["id"] for model in answer.json()["data"]] == ["talker"]


def test_open_webui_chats(server: Running, http: httpx.Client) -> None:
    body = {
        "stream": True,
        "model": "talker",
        "messages": [{"role": "system", "content": "你是一座山。"}, QUESTION],
        # what a user set: their names are those of several servers at once
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repeat_penalty": 1.1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {"100": -100, "101": 5},
        "stop": ["\n\n\n", "###"],
        "seed": 42,
        "max_tokens": 24,
        # custom fields, and those of other servers that mean nothing here
        "mirostat": None,
        "num_ctx": 2048,
        "keep_alive": "5m",
        "think": False,
        "my_field": {"a": [1, None]},
        "stream_options": {"include_usage": True},
    }
    answer = http.post("/chat/completions", json=body, headers=OF_OPEN_WEBUI)
    assert answer.status_code == 200
    assert "text/event-stream" in answer.headers["content-type"]
    assert "content-encoding" not in answer.headers  # lines must come as they are made
    chunks = events(answer.text)
    assert text_of(chunks) == whole_text(server, **body)
    usage = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert [found["completion_tokens"] for found in usage] == [24]


def test_open_webui_asks_for_a_title_in_the_background(http: httpx.Client) -> None:
    task = (
        "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history."
        '\n### Output:\nJSON format: { "title": "your concise title here" }\n'
        "### Chat History:\n<chat_history>\nUSER: 山？\nASSISTANT: 山。\n</chat_history>"
    )
    body = {
        "model": "talker",
        "messages": [{"role": "user", "content": task}],
        "stream": False,
        "max_tokens": 20,
    }
    answer = http.post("/chat/completions", json=body, headers=OF_OPEN_WEBUI)
    assert answer.status_code == 200
    assert isinstance(answer.json()["choices"][0]["message"]["content"], str)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_open_webui_shows_what_went_wrong(http: httpx.Client, is_streamed: bool) -> None:
    long = {"role": "user", "content": "山有多高？" * 500}
    body = {"model": "talker", "messages": [long], "stream": is_streamed}
    answer = http.post("/chat/completions", json=body, headers=OF_OPEN_WEBUI)
    assert answer.status_code == 400
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json()["error"].keys() >= ERROR_KEYS
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_open_webui_s_stop_closes_the_connection(server: Running) -> None:
    before = server.metric("answers_cancelled_total")
    body = {"model": "talker", "messages": [QUESTION], "stream": True, "temperature": 0}
    with httpx.stream(
        "POST",
        f"{server.base_url}/chat/completions",
        json=body,
        headers=OF_OPEN_WEBUI,
        timeout=PATIENCE_S,
    ) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    wait_for(server.is_at_rest)
    assert server.metric("answers_cancelled_total") == before + 1


# ----------------------------------------------------------------------------- FastGPT

OF_FASTGPT = {  # openai-node's
    "Accept": "application/json, text/plain, */*",
    "Content-Type": "application/json",
    "Authorization": "Bearer sk-whatever",
    "User-Agent": "OpenAI/JS 4.61.0",
    "X-Stainless-Lang": "js",
    "X-Stainless-Package-Version": "4.61.0",
    "X-Stainless-OS": "Linux",
    "X-Stainless-Arch": "x64",
    "X-Stainless-Runtime": "node",
    "X-Stainless-Runtime-Version": "v20.18.0",
    "X-Stainless-Retry-Count": "0",
}


def test_fastgpt_tests_a_model(http: httpx.Client) -> None:
    body = {"model": "talker", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    answer = http.post("/chat/completions", json=body, headers=OF_FASTGPT)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"]  # empty: "LLM model response empty"


def test_fastgpt_chats(server: Running, http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "世界上最高的"}, {"type": "text", "text": "山是什么？"}]
    body = {
        "model": "talker",
        "messages": [
            {"role": "system", "content": "你是一座山。", "dataId": None},
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": "是我。", "tool_calls": None},
            {"role": "user", "content": "为什么？", "hideInUI": False},
        ],
        "temperature": 0.01,
        "max_tokens": 24,
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop": "</回答>|问：".split("|"),
        "response_format": None,
        "tools": None,
        "tool_choice": None,
        "top_p": None,
        "parallel_tool_calls": None,
        "seed": 1,
    }
    answer = http.post("/chat/completions", json=body, headers=OF_FASTGPT)
    assert answer.status_code == 200
    assert "text/event-stream" in answer.headers["content-type"]
    text, reason, usage = "", None, None
    for chunk in events(answer.text):
        for choice in chunk["choices"][:1]:
            text += choice["delta"].get("content") or ""
            reason = choice["finish_reason"] or reason
        usage = chunk["usage"] or usage
    plain = [
        {"role": message["role"], "content": message["content"]} for message in body["messages"]
    ]
    plain[1]["content"] = QUESTION["content"]
    assert text == whole_text(
        server, messages=plain, max_tokens=24, temperature=0.01, seed=1, stop=body["stop"]
    )
    assert reason in ("stop", "length")
    assert usage["prompt_tokens"] and usage["completion_tokens"]


def test_fastgpt_s_tool_mode_is_refused_by_name(http: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "search", "description": "", "parameters": {}}}
    body = {"model": "talker", "messages": [QUESTION], "tools": [tool], "tool_choice": "auto"}
    answer = http.post("/chat/completions", json={**body, "stream": True}, headers=OF_FASTGPT)
    assert answer.status_code == 400
    assert answer.json()["error"].keys() >= ERROR_KEYS
    assert answer.json()["error"]["param"] == "tools"


# ----------------------------------------------------------------------------- NextChat

PAGE = "https://chat.example.org"
OF_NEXTCHAT = {  # a browser's fetch from a page elsewhere
    "Accept": "text/event-stream",
    "Content-Type": "application/json",
    "Authorization": "Bearer none",
    "Origin": PAGE,
    "Referer": f"{PAGE}/",
    "Sec-Fetch-Mode": "cors",
    "Sec-Fetch-Site": "cross-site",
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/130.0 Safari/537.36",
}
NEXTCHAT_BODY = {
    "messages": [{"role": "system", "content": "\nYou are ChatGPT.\n"}, QUESTION],
    "stream": True,
    "model": "gpt-4o-mini",
    "temperature": 0.5,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "top_p": 1,
}


@pytest.mark.parametrize(
    "asked",
    [
        "authorization,content-type",
        # openai-node in a browser
        "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,"
        "x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
        "x-stainless-runtime-version,x-stainless-timeout",
    ],
)
def test_a_browser_may_call(http: httpx.Client, asked: str) -> None:
    preflight = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked,
    }
    answer = http.options("/chat/completions", headers=preflight)
    assert answer.is_success
    assert answer.headers["access-control-allow-origin"] in ("*", PAGE)
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = answer.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
    # "*" would not cover Authorization (Fetch standard, CORS-preflight)
    assert set(asked.split(",")) <= set(allowed)


def test_nextchat_chats(http: httpx.Client) -> None:
    answer = http.post("/chat/completions", json=NEXTCHAT_BODY, headers=OF_NEXTCHAT)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["access-control-allow-origin"] in ("*", PAGE)
    chunks = events(answer.text)
    assert text_of(chunks)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    # as long as the context lets it, or until the model ends it: it set no limit
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_nextchat_asks_for_a_summary(server: Running, http: httpx.Client) -> None:
    said = [QUESTION, {"role": "assistant", "content": "珠穆朗玛峰。"}]
    wish = "简要总结一下对话内容，用作后续的上下文提示 prompt，控制在 200 字以内"
    body = {
        **NEXTCHAT_BODY,
        "messages": [*said, {"role": "system", "content": wish, "date": ""}],
        "temperature": 0,
        "max_tokens": 24,
    }
    answer = http.post("/chat/completions", json=body, headers=OF_NEXTCHAT)
    assert answer.status_code == 200
    plain = [*said, {"role": "user", "content": wish}]
    assert text_of(events(answer.text)) == whole_text(
        server, messages=plain, temperature=0, max_tokens=24, top_p=1
    )


@pytest.mark.parametrize(
    ("method", "path", "change", "status"),
    [
        ("POST", "/chat/completions", {"temperature": 9}, 400),
        ("POST", "/chat/completions", {"messages": []}, 400),
        ("POST", "/nowhere", {}, 404),
        ("PUT", "/chat/completions", {}, 405),
        ("POST", "/images/generations", {}, 501),
    ],
)
def test_a_browser_may_read_errors(
    http: httpx.Client, method: str, path: str, change: dict[str, object], status: int
) -> None:
    body = {**NEXTCHAT_BODY, **change}
    answer = http.request(method, path, json=body, headers=OF_NEXTCHAT)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] in ("*", PAGE)
    assert answer.json()["error"].keys() >= ERROR_KEYS


# ----------------------------------------------------------------------------- with a key


def test_a_key_does_not_keep_browsers_from_asking(tmp_path_factory: pytest.TempPathFactory) -> None:
    weights = write_talker(tmp_path_factory.mktemp("locked"))
    with serving(weights, "--api_key", "open sesame") as server:
        preflight = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        url = f"{server.base_url}/chat/completions"
        asked = httpx.options(url, headers=preflight, timeout=PATIENCE_S)
        assert asked.is_success  # a browser sends no key with this one
        body = {**NEXTCHAT_BODY, "max_tokens": 4, "stream": False}
        refused = httpx.post(url, json=body, headers=OF_NEXTCHAT, timeout=PATIENCE_S)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] in ("*", PAGE)
        assert refused.json()["error"]["code"] == "invalid_api_key"
        key = {**OF_NEXTCHAT, "Authorization": "Bearer open sesame"}
        assert httpx.post(url, json=body, headers=key, timeout=PATIENCE_S).status_code == 200
        assert json.loads(httpx.get(f"{server.root}/health").text)["status"] == "ok"
