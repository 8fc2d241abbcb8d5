"""Clients that others wrote, on the real server: openai, LangChain, curl, openai-node."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from serving import Running, events, serving, text_of, wait_for, write_talker
from tiny_runs import ROOT

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "世界上最高的山是什么？"}]
GREEDY = {"model": "any", "messages": QUESTION, "temperature": 0, "max_tokens": 24}
NODE_PACKAGE = "openai@7.57.0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(write_talker(tmp_path_factory.mktemp("talker"))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as found:
        yield found


# ----------------------------------------------------------------------------- openai


def test_openai_reads_the_same_streamed_and_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 24
    stream = client.chat.completions.create(
        **GREEDY, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    # many programs read choices[0] of every chunk: none may lack it unless usage was asked for
    bare = list(client.chat.completions.create(**GREEDY, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in bare) == text


def test_openai_accumulates_a_stream_of_several_answers(client: openai.OpenAI) -> None:
    wish = {**GREEDY, "temperature": 1.0, "seed": 5, "n": 3}
    with client.chat.completions.stream(**wish) as stream:
        for _ in stream:
            pass
        # its final completion is for answers that were not cut short
        snapshot = stream.current_completion_snapshot
    streamed = [choice.message.content for choice in snapshot.choices]
    whole = [choice.message.content for choice in client.chat.completions.create(**wish).choices]
    assert streamed == whole
    assert len(set(whole)) == 3


def test_openai_asks_many_things_at_once(server: Running) -> None:
    questions = [f"第{number}座山有多高？" for number in range(12)]

    def wish(question: str) -> dict:
        return {**GREEDY, "messages": [{"role": "user", "content": question}]}

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none") as client:

            async def ask(question: str) -> str:
                stream = await client.chat.completions.create(**wish(question), stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*map(ask, questions))

    together = asyncio.run(ask_all())
    alone = [server.chat(**wish(q))["choices"][0]["message"]["content"] for q in questions]
    assert together == alone


def test_openai_s_reader_that_leaves_frees_its_slot(server: Running, client: openai.OpenAI) -> None:
    before = server.metric("answers_cancelled_total")
    for leaves_after in (0, 1, 5):
        stream = client.chat.completions.create(**{**GREEDY, "max_tokens": 200}, stream=True)
        for _ in range(leaves_after):
            next(stream)
        stream.close()
    wait_for(server.is_at_rest)
    # the tiny model may have been done before the server heard of it
    assert server.metric("answers_cancelled_total") > before


@pytest.mark.parametrize("is_streamed", [False, True])
def test_openai_tells_errors_apart(client: openai.OpenAI, is_streamed: bool) -> None:
    def failure(**wish: object) -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(**{**GREEDY, "stream": is_streamed, **wish})
        return caught.value

    too_long = failure(messages=[{"role": "user", "content": "山" * 2000}])
    assert isinstance(too_long, openai.BadRequestError)
    assert too_long.code == "context_length_exceeded"
    assert "maximum context length is 256 tokens" in too_long.message
    hot = failure(temperature=3)
    assert isinstance(hot, openai.BadRequestError) and hot.param == "temperature"
    tool = {"type": "function", "function": {"name": "climb", "parameters": {}}}
    assert failure(tools=[tool]).param == "tools"
    shaped = failure(response_format={"type": "json_object"})
    assert shaped.param == "response_format" and shaped.status_code == 400


def test_openai_s_other_calls(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "talker"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    done = client.completions.create(
        model="any", prompt=["山", "水"], max_tokens=3, logprobs=2, extra_body={"top_k": 5}
    )
    assert [choice.index for choice in done.choices] == [0, 1]
    assert all(len(choice.logprobs.tokens) <= 3 for choice in done.choices)
    with pytest.raises(openai.APIStatusError) as caught:
        client.embeddings.create(model="any", input="山")
    assert caught.value.status_code == 501


# ----------------------------------------------------------------------------- LangChain


def test_langchain(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGSMITH_TRACING", "false")  # it would report to its makers
    langchain_openai = pytest.importorskip(
        "langchain_openai", reason="pip install langchain-openai"
    )

    from langchain_core.messages import HumanMessage

    def chat(**settings: object):
        return langchain_openai.ChatOpenAI(
            base_url=server.base_url,
            api_key="none",
            model="any",
            **{"temperature": 0, "max_tokens": 24, **settings},
        )

    question = [("system", "你是一座山。"), ("human", QUESTION[0]["content"])]
    answer = chat().invoke(question)
    assert answer.content and answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata["output_tokens"] == 24

    chunks = list(chat(stream_usage=True).stream(question))
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    assert joined.content == answer.content
    usage = ("input_tokens", "output_tokens", "total_tokens")
    assert [joined.usage_metadata[name] for name in usage] == [
        answer.usage_metadata[name] for name in usage
    ]

    others = ["长江有多长？", "黄河有多长？", "山有多高？", "你好"]
    alone = [chat().invoke(other).content for other in others]
    assert [found.content for found in chat().batch(others)] == alone

    several = chat(n=3, temperature=1, seed=3).generate([[HumanMessage("你好")]])
    assert len({found.text for found in several.generations[0]}) == 3

    stop = answer.content[8:10]
    assert chat().invoke(question, stop=[stop]).content == answer.content.split(stop)[0]

    told = chat(logprobs=True, top_logprobs=2).invoke(question).response_metadata["logprobs"]
    assert len(told["content"]) == 24
    spelled = b"".join(bytes(token["bytes"]) for token in told["content"])
    assert spelled.decode("utf-8", "replace") == answer.content
    assert all(len(token["top_logprobs"]) == 2 for token in told["content"])


# ----------------------------------------------------------------------------- curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_documented_curl(server: Running) -> None:
    # README of v1: any model name, no key, no limit
    body = (
        '{ "model": "model-identifier", "messages": [ { "role": "user", "content": '
        '"世界上最高的山是什么?" } ], "temperature": 0.7, "max_tokens": -1, "stream": true }'
    )
    url = f"{server.base_url}/chat/completions"
    command = ["curl", "-sS", "-i", "-N", url, "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    head, _, stream = done.stdout.decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200")
    assert "content-type: text/event-stream; charset=utf-8" in head.lower()
    chunks = events(stream)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert text_of(chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert len({chunk["id"] for chunk in chunks}) == 1


# ----------------------------------------------------------------------------- openai-node


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with openai-node in it."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("there is no node with npm: https://nodejs.org")
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", NODE_PACKAGE, "--no-audit", "--no-fund", "--prefer-offline"]
    env = os.environ | {"npm_config_update_notifier": "false"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm cannot install {NODE_PACKAGE}: {done.stderr.strip()[-300:]}")
    return folder


@pytest.mark.soak
def test_openai_node(server: Running, node_modules: Path) -> None:
    before = server.metric("answers_cancelled_total")
    script = ROOT / "tests" / "clients" / "openai_node.mjs"
    command = ["node", str(script), server.base_url]
    done = subprocess.run(command, cwd=node_modules, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["models"] == ["talker"] and said["model"] == "talker"
    expected = server.chat(**GREEDY)
    assert said["whole"] == expected["choices"][0]["message"]["content"] == said["streamed"]
    assert said["reason"] == said["streamReason"] == "length"
    for usage in (said["usage"], said["streamUsage"]):
        assert usage["completion_tokens"] == 24
        assert usage["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    assert len(set(said["choices"])) == 2
    assert said["legacy"] == "length"
    assert said["nBeforeAbort"] == 5
    wait_for(server.is_at_rest)
    assert server.metric("answers_cancelled_total") == before + 1
    too_long, too_hot = said["tooLong"], said["tooHot"]
    assert (too_long["kind"], too_long["status"]) == ("BadRequestError", 400)
    assert too_long["code"] == "context_length_exceeded"
    assert (too_hot["status"], too_hot["param"]) == (400, "temperature")
