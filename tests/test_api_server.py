"""The API server over real HTTP: a tiny model, uvicorn, and clients that others wrote."""

import asyncio
import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from serving import events, text_of
from talkers import tiny_model

from model.api_errors import ApiError
from model.api_run import bind, make_server
from model.api_server import create_app
from model.api_service import Job, Reply, Served, Service, check_names
from model.checkpoint import Loaded, save_weights
from model.generation import Engine, generate
from model.model_list import ModelChoice
from model.sampling import SamplingOptions
from model.text_stream import stream_text
from model.tokenizer import EOS_ID, Tokenizer

CONTEXT = 256
PATIENCE_S = 60
HI = [{"role": "user", "content": "你好，你是谁？"}]
GREEDY = {"messages": HI, "temperature": 0, "max_tokens": 12}
ENDLESS = {"messages": HI, "logit_bias": {str(EOS_ID): -100}}  # until the context is full


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    tokenizer = Tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_seq_len=CONTEXT)
    path = tmp_path_factory.mktemp("out") / "talker.pth"
    save_weights(model, path, tokenizer)
    return Loaded(model, tokenizer, path)


class Running(SimpleNamespace):
    """A server in a thread: its URL, its service, and its loop to ask things of."""

    url: str
    service: Service
    engine: Engine

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE_S)

    def post(self, path: str = "/v1/chat/completions", body: Any = None, **more: Any) -> Any:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE_S, **more)

    def client(self, **more: Any) -> openai.OpenAI:
        fields = {"api_key": "x", "max_retries": 0, "timeout": PATIENCE_S, **more}
        return openai.OpenAI(base_url=f"{self.url}/v1", **fields)


@contextlib.contextmanager
def serving(
    *loadeds: Loaded,
    open_models: Callable[..., list[Served]] | None = None,
    engine: dict[str, Any] | None = None,
    strict: bool = False,
    defaults: SamplingOptions | None = None,
    waits: bool = True,
    **app: Any,
) -> Iterator[Running]:
    """Serve models under their files' names, the first one for any other name."""

    def open_all(loop: asyncio.AbstractEventLoop) -> list[Served]:
        return [
            Served(
                ModelChoice(one.path.stem, one.path),
                one,
                Engine(one.model, one.tokenizer, **(engine or {})),
                loop,
            )
            for one in loadeds
        ]

    service = Service(open_models or open_all, defaults or SamplingOptions(), is_strict=strict)
    server = make_server(create_app(service, **app))
    listening = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    running = Running(url=url, service=service, server=server)
    ready = threading.Event()

    async def run() -> None:
        running.loop = asyncio.get_running_loop()
        loading = asyncio.create_task(service.load())
        if waits:
            await loading
            running.engine = next(iter(s.engine for s in service.models.values()), None)
        ready.set()
        await server.serve(sockets=[listening])
        await loading
        await service.drain(0)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(PATIENCE_S)
        yield running
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Running]:
    with serving(loaded) as running:
        yield running


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Return a model with a context of seconds, so that clients can leave before the end."""
    tokenizer = Tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_seq_len=8192)
    path = tmp_path_factory.mktemp("out") / "patient.pth"
    path.touch()
    return Loaded(model, tokenizer, path)


@pytest.fixture(scope="module")
def patient(wordy: Loaded) -> Iterator[Running]:
    with serving(wordy) as running:
        yield running


@contextlib.contextmanager
def held(loaded: Loaded) -> Iterator[None]:
    """Keep every engine of a model from ending a step."""
    go = threading.Event()
    hook = loaded.model.register_forward_pre_hook(lambda *_: go.wait(PATIENCE_S) and None)
    try:
        yield
    finally:
        go.set()
        hook.remove()


class Asking(threading.Thread):
    """Sends a request and waits for what it is answered."""

    def __init__(self, server: Running, body: dict[str, Any]) -> None:
        super().__init__()
        self._server, self._body = server, body
        self.start()

    def run(self) -> None:
        self._response = self._server.post(body=self._body)

    @property
    def response(self) -> httpx.Response:
        self.join(PATIENCE_S)
        return self._response


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def check_error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)
    return error


# ----------------------------------------------------------------------------- answers


def test_the_documented_curl(server: Running) -> None:
    body = {"model": "model-identifier", **GREEDY, "max_tokens": -1, "stream": True}
    response = server.post(body=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    chunks = events(response.text)
    assert all(chunk["choices"] for chunk in chunks)  # many clients read choices[0] unguarded
    whole = server.post(body=body | {"stream": False}).json()["choices"][0]
    assert text_of(chunks) == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_an_answer_is_the_engines(server: Running, loaded: Loaded) -> None:
    ids = loaded.tokenizer.encode_chat(HI, add_generation_prompt=True)
    options = SamplingOptions(temperature=0, max_new_tokens=12)
    expected = "".join(stream_text(loaded.tokenizer, generate(loaded.model, ids, options)))
    choice = server.post(body=GREEDY).json()["choices"][0]
    assert choice["message"]["content"] == expected


def test_openai_streams_what_it_gets_whole(server: Running) -> None:
    with server.client() as client:
        whole = client.chat.completions.create(model="any", **GREEDY)
        usage = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(model="any", stream=True, stream_options=usage, **GREEDY)
        )
        *others, last = chunks
        text = "".join(chunk.choices[0].delta.content or "" for chunk in others)
        assert text == whole.choices[0].message.content
        assert (last.choices, last.usage.completion_tokens) == ([], whole.usage.completion_tokens)
        assert all(chunk.usage is None for chunk in others)
        assert last.usage.prompt_tokens == whole.usage.prompt_tokens > 0
        completion = client.completions.create(model="any", prompt="你好", max_tokens=5, echo=True)
        assert completion.choices[0].text.startswith("你好")
        (model,) = client.models.list().data
        assert client.models.retrieve(model.id) == model


def test_the_prompt_of_a_second_turn_is_reused(server: Running) -> None:
    first = server.post(body=GREEDY).json()
    reply = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    second = server.post(body=GREEDY | {"messages": [*HI, reply, *HI]}).json()
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == second["timings"]["cache_n"] >= first["usage"]["prompt_tokens"] - 1


def test_several_answers_each_have_a_seed(server: Running) -> None:
    body = {"messages": HI, "n": 3, "seed": 5, "max_tokens": 12, "temperature": 1}
    whole = server.post(body=body).json()["choices"]
    assert [choice["index"] for choice in whole] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in whole]
    assert len(set(texts)) == 3
    chunks = events(server.post(body=body | {"stream": True}).text)
    assert [text_of(chunks, index) for index in range(3)] == texts
    ends = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]
    alone = server.post(body=body | {"n": 1, "seed": 6}).json()["choices"][0]
    assert alone["message"]["content"] == texts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_more_answers_than_slots_and_places_in_the_queue(loaded: Loaded, stream: bool) -> None:
    with serving(loaded, engine={"max_batch": 2, "max_queue": 1}) as server:
        body = {"messages": HI, "n": 20, "max_tokens": 3, "stream": stream}
        response = server.post(body=body)
        found = events(response.text) if stream else [response.json()]
        ends = [c["index"] for o in found for c in o["choices"] if c["finish_reason"]]
        assert sorted(ends) == list(range(20))


def test_completions_of_several_prompts(server: Running, loaded: Loaded) -> None:
    prompts = ["你好", "我是"]
    body = {"temperature": 0, "max_tokens": 6}
    path = "/v1/completions"
    both = server.post(path, body | {"prompt": prompts}).json()
    alone = [server.post(path, body | {"prompt": p}).json()["choices"][0] for p in prompts]
    assert [c["text"] for c in both["choices"]] == [c["text"] for c in alone]
    ids = [loaded.tokenizer.encode_document(p)[:-1] for p in prompts]
    of_ids = server.post(path, body | {"prompt": ids}).json()
    assert [c["text"] for c in of_ids["choices"]] == [c["text"] for c in alone]
    assert both["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_log_probabilities_are_the_models(server: Running, loaded: Loaded) -> None:
    import torch

    body = GREEDY | {"logprobs": True, "top_logprobs": 4, "max_tokens": 1}
    (entry,) = server.post(body=body).json()["choices"][0]["logprobs"]["content"]
    ids = loaded.tokenizer.encode_chat(HI, add_generation_prompt=True)
    with torch.inference_mode():
        logprobs = loaded.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    expected = logprobs.topk(4).values.tolist()
    found = [top["logprob"] for top in entry["top_logprobs"]]
    assert found == pytest.approx(expected, abs=1e-4)  # what engines may differ by
    assert entry["logprob"] == pytest.approx(expected[0], abs=1e-4)


def test_tokenize_and_back(server: Running, loaded: Loaded) -> None:
    text = "你好 world"
    ids = server.post("/tokenize", {"content": text}).json()["tokens"]
    assert ids == loaded.tokenizer.encode(text)
    assert server.post("/detokenize", {"tokens": ids}).json()["content"] == text
    chat = server.post("/tokenize", {"messages": HI}).json()
    usage = server.post(body=GREEDY).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]


def test_openais_routes_without_v1(server: Running) -> None:
    for path, body in (
        ("/chat/completions", GREEDY),
        ("/completions", {"prompt": "你好", "temperature": 0, "max_tokens": 6}),
    ):
        with_v1, without = (server.post(start + path, body).json() for start in ("/v1", ""))
        assert without["choices"] == with_v1["choices"]
    for path in ("/models", "/models/talker"):
        assert httpx.get(server.url + path).json() == httpx.get(f"{server.url}/v1{path}").json()
    paths = httpx.get(server.url + "/openapi.json").json()["paths"]
    assert "/v1/models" in paths and not paths.keys() & {"/models", "/chat/completions"}


def test_defaults_of_the_server_and_of_a_request(loaded: Loaded) -> None:
    defaults = SamplingOptions(temperature=0, max_new_tokens=4)
    with serving(loaded, defaults=defaults) as server:
        usual = server.post(body={"messages": HI}).json()
        assert usual["usage"]["completion_tokens"] == 4
        assert usual["choices"] == server.post(body=GREEDY | {"max_tokens": 4}).json()["choices"]
        longer = server.post(body=ENDLESS | {"max_tokens": -1}).json()
        assert longer["usage"]["total_tokens"] == CONTEXT


# ----------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, "bad_json"),
        ("POST", "/v1/chat/completions", b"{}", 400, "missing_required_parameter"),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400, "bad_json"),
        ("POST", "/v1/completions", b'{"prompt": [99999]}', 400, None),
        ("POST", "/v1/completions", b'{"prompt": "a", "n": "1"}', 400, "invalid_type"),
        ("POST", "/detokenize", b'{"tokens": [99999]}', 400, None),
        ("GET", "/v1/models/none", None, 404, "model_not_found"),
        ("GET", "/v1/none", None, 404, None),
        ("POST", "/chat/completions", b"{}", 400, "missing_required_parameter"),
        ("GET", "/models/none", None, 404, "model_not_found"),
        ("GET", "/docs", None, 404, None),
        ("GET", "/v1/chat/completions", None, 405, None),
        ("DELETE", "/v1/models", None, 405, None),
        ("POST", "/v1/embeddings", b"{}", 501, "not_implemented"),
        ("POST", "/v1/images/generations", b"{}", 501, "not_implemented"),
        ("GET", "/v1/files", None, 501, "not_implemented"),
        ("POST", "/v1/responses", b"{}", 501, "not_implemented"),
    ],
)
def test_errors_are_openais(
    server: Running, method: str, path: str, body: bytes | None, status: int, code: str | None
) -> None:
    origin = {"Origin": "https://page.example"}
    response = httpx.request(method, server.url + path, content=body, headers=origin)
    assert check_error(response, status)["code"] == code
    assert response.headers["access-control-allow-origin"] == "*"
    assert status != 405 or response.headers["allow"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n_letters", [CONTEXT, 200_000])  # the second is never tokenised
def test_a_prompt_that_is_too_long(server: Running, stream: bool, n_letters: int) -> None:
    content = "长" * n_letters
    for path, prompt in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}),
        ("/v1/completions", {"prompt": content}),
        ("/v1/completions", {"prompt": [5] * CONTEXT}),
    ):
        error = check_error(server.post(path, {**prompt, "stream": stream}), 400)
        assert error["code"] == "context_length_exceeded"
        assert f"maximum context length is {CONTEXT} tokens" in error["message"]
        assert (error["n_ctx"], error["n_prompt_tokens"] >= CONTEXT) == (CONTEXT, True)
        is_counted = n_letters == CONTEXT or isinstance(prompt.get("prompt"), list)
        assert is_counted == ("at least" not in error["message"])


def test_what_the_tokenizer_is_asked_has_bounds(server: Running) -> None:
    limit = 100_000
    assert limit > 64 * CONTEXT
    text = "山有 " * (limit // 3) + "。"
    fits = server.post("/tokenize", {"content": text}).json()
    assert server.post("/detokenize", {"tokens": fits["tokens"]}).json()["content"] == text
    half = {"role": "user", "content": "a" * (limit // 2)}
    for path, body, field in (
        ("/tokenize", {"content": "a" * (limit + 1)}, "content"),
        ("/tokenize", {"messages": [half, half]}, "messages"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": ""}] * (limit // 8 + 1)},
            "messages",
        ),
        ("/detokenize", {"tokens": [5] * (limit + 1)}, "tokens"),
    ):
        error = check_error(server.post(path, body), 400)
        assert error["param"] == field
        assert f"at most {limit}" in error["message"]


def test_a_prompt_of_just_the_right_length(server: Running) -> None:
    fits = server.post("/v1/completions", {"prompt": [5] * (CONTEXT - 1)}).json()
    assert fits["usage"]["total_tokens"] == CONTEXT


def test_ten_thousand_messages(server: Running) -> None:
    error = check_error(server.post(body={"messages": HI * 10_000}), 400)
    assert error["code"] == "context_length_exceeded"


def test_large_bodies(loaded: Loaded) -> None:
    with serving(loaded, max_body=10_000) as server:
        url = server.url + "/v1/chat/completions"
        fits = json.dumps({**GREEDY, "x": "a" * 9000}).encode()
        assert httpx.post(url, content=fits, timeout=PATIENCE_S).status_code == 200
        large = b"x" * 10_001
        assert check_error(httpx.post(url, content=large), 413)["code"] == "request_too_large"
        in_pieces = (large[i : i + 1000] for i in range(0, len(large), 1000))
        check_error(httpx.post(url, content=in_pieces), 413)


def test_the_key(loaded: Loaded) -> None:
    with serving(loaded, api_key="sécret") as server:
        url = server.url + "/v1/models"
        key = "sécret".encode()
        for headers in ({b"Authorization": b"Bearer " + key}, {b"X-Api-Key": key}):
            assert httpx.get(url, headers=headers).status_code == 200
        for headers in (
            {},
            {b"Authorization": b"Bearer x"},
            {b"Authorization": key},
            {b"X-Api-Key": b""},
        ):
            error = check_error(httpx.get(url, headers={b"Origin": b"https://p", **headers}), 401)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert httpx.get(server.url + "/health").status_code == 200
        preflight = {"Origin": "https://p", "Access-Control-Request-Method": "POST"}
        preflight["Access-Control-Request-Headers"] = "authorization,x-stainless-os"
        assert httpx.options(url, headers=preflight).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()


def test_pages_of_other_origins(loaded: Loaded) -> None:
    with serving(loaded, allowed_origins=["https://a"]) as server:
        for origin, allowed in (("https://a", "https://a"), ("https://b", None)):
            response = httpx.get(server.url + "/none", headers={"Origin": origin})
            assert response.headers.get("access-control-allow-origin") == allowed


def test_strict_names(loaded: Loaded) -> None:
    with serving(loaded, strict=True) as server:
        assert server.post(body={"model": "talker", **GREEDY}).status_code == 200
        assert server.post(body=GREEDY).status_code == 200  # names none
        error = check_error(server.post(body={"model": "other", **GREEDY}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "talker" in error["message"]


def test_models_are_told_apart(loaded: Loaded, tmp_path: Path) -> None:
    model = tiny_model(seed=1, vocab_size=loaded.tokenizer.vocab_size, max_seq_len=CONTEXT)
    path = tmp_path / "other.pth"
    save_weights(model, path, loaded.tokenizer)
    with serving(loaded, Loaded(model, loaded.tokenizer, path)) as server:
        ids = [entry["id"] for entry in httpx.get(server.url + "/v1/models").json()["data"]]
        assert ids == ["talker", "other"]
        answers = [server.post(body=GREEDY | {"model": name}).json() for name in (*ids, "x")]
        assert [answer["model"] for answer in answers] == ["talker", "other", "talker"]
        first, second, third = (answer["choices"] for answer in answers)
        assert first == third != second


def test_two_models_cannot_have_one_name() -> None:
    with pytest.raises(ValueError, match="'a'"):
        check_names([ModelChoice("a", Path("x")), ModelChoice("a", Path("y"))])


def test_a_full_queue(loaded: Loaded) -> None:
    with serving(loaded, engine={"max_batch": 2, "max_queue": 3}) as server:
        url = server.url + "/v1/chat/completions"
        with contextlib.ExitStack() as streams, held(loaded):

            def ask() -> httpx.Response:
                body = {**ENDLESS, "stream": True}
                return streams.enter_context(httpx.stream("POST", url, json=body, timeout=60))

            burst = [ask() for _ in range(8)]
            assert [one.status_code for one in burst] == [200] * (2 + 3) + [429] * 3
            burst[-1].read()
            assert check_error(burst[-1], 429)["code"] == "queue_full"
            assert int(burst[-1].headers["retry-after"]) > 0


def test_who_waits_is_not_overtaken(wordy: Loaded) -> None:
    with serving(wordy, engine={"max_batch": 1, "max_queue": 1}) as server:
        served = server.service.models["patient"]

        def reply(n: int = 1, n_new: int | None = None) -> Reply:
            bias = {EOS_ID: -100.0}  # seconds, where there is no n_new
            job = Job([1, 5, 6], SamplingOptions(max_new_tokens=n_new, logit_bias=bias))
            return Reply(served, [job] * n, every_piece=True)

        async def scene() -> None:  # the loop learns of nothing where this does not await
            several, first, second, late = reply(2, n_new=3), reply(), reply(), reply()
            several.start()
            wait_for(lambda: several.answers[0].is_done)
            first.start()
            second.start()  # so there is no place for the other one of several
            while several.answers[0] in served.readers:
                await asyncio.sleep(0)
            assert several.answers[1] is None
            first.abandon()
            wait_for(lambda: first.answers[0].is_done)
            with pytest.raises(ApiError) as refused:
                late.start()
            assert refused.value.status == 429
            assert several.answers[1] is not None
            second.abandon()
            while not several.is_done:
                await several.pieces()
            assert several.answers[1].finish_reason == "length"

        server.do(scene())


def test_a_request_of_which_the_engine_refuses_a_part(tmp_path: Path) -> None:
    # fewer rows than the tokenizer has ids, so that the engine alone knows what is wrong
    model = tiny_model(vocab_size=100, max_seq_len=CONTEXT)
    path = tmp_path / "small.pth"
    path.touch()
    with serving(Loaded(model, Tokenizer(), path), engine={"max_batch": 2}) as server:
        for stream in (False, True):
            for prompt in ([200], [[5], [200]], [[5], [5], [5]] + [[200]]):
                body = {"prompt": prompt, "logit_bias": {"2": -100}, "stream": stream}
                response = server.post("/v1/completions", body)
                if stream and len(prompt) == 4:  # begun before it was known
                    error = json.loads(response.text.split("data: ")[-1])["error"]
                else:
                    error = check_error(response, 400)
                assert (error["code"], "ids from 200" in error["message"]) == (
                    "invalid_value",
                    True,
                )
                wait_for(lambda: server.engine.n_active == server.engine.n_queued == 0)


def test_a_failure_in_mid_stream(tmp_path: Path, loaded: Loaded) -> None:
    model = tiny_model(vocab_size=loaded.tokenizer.vocab_size, max_seq_len=CONTEXT)
    model.norm.weight.data.fill_(float("nan"))
    path = tmp_path / "damaged.pth"
    path.touch()
    with serving(Loaded(model, loaded.tokenizer, path)) as server:
        assert "not finite" in check_error(server.post(body=GREEDY), 500)["message"]
        text = server.post(body=GREEDY | {"stream": True}).text
        assert "[DONE]" not in text and '"error"' in text.split("\n\n")[-2]
        with pytest.raises(openai.APIError, match="not finite"):
            list(server.client().chat.completions.create(model="x", stream=True, **GREEDY))
        assert server.engine.n_active == 0


def test_a_fault_of_ours_is_json_for_browsers_too() -> None:
    with serving(open_models=lambda loop: []) as server:  # ready, but with nothing to serve
        response = server.post(body=GREEDY, headers={"Origin": "https://p"})
        assert check_error(response, 500)["type"] == "server_error"
        assert "Traceback" not in response.text
        assert response.headers["access-control-allow-origin"] == "*"


# ----------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("n", [1, 12])
def test_breaking_off_a_stream_frees_its_slots(patient: Running, n: int) -> None:
    before = patient.engine.counters.n_cancelled
    client = patient.client()
    stream = client.chat.completions.create(model="x", stream=True, n=n, **ENDLESS)
    next(stream)
    stream.close()
    client.close()
    wait_for(lambda: patient.engine.n_active == patient.engine.n_queued == 0)
    # the engine's thread frees slots before it counts, and the event loop learns of it last
    wait_for(lambda: not patient.service.models["patient"].readers)
    assert patient.engine.counters.n_cancelled > before


def test_leaving_before_an_answer_frees_its_slot(patient: Running) -> None:
    before = patient.engine.counters.n_cancelled
    body = json.dumps({**ENDLESS, "n": 8}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = patient.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: patient.engine.n_active > 0)
    wait_for(lambda: patient.engine.n_active == patient.engine.n_queued == 0)
    wait_for(lambda: patient.engine.counters.n_cancelled > before)


def test_one_who_leaves_does_not_disturb_others(patient: Running) -> None:
    expected = patient.post(body=GREEDY).json()["choices"]
    client = patient.client()
    streams = [client.chat.completions.create(model="x", stream=True, **ENDLESS) for _ in range(4)]
    for stream in streams:
        next(stream)
    found = []
    asking = threading.Thread(target=lambda: found.append(patient.post(body=GREEDY).json()))
    asking.start()
    for stream in streams:
        stream.close()
    asking.join(PATIENCE_S)
    assert found[0]["choices"] == expected


# ----------------------------------------------------------------------------- states


def test_while_it_loads(loaded: Loaded) -> None:
    go = threading.Event()

    def open_models(loop: asyncio.AbstractEventLoop) -> list[Served]:
        go.wait(PATIENCE_S)
        engine = Engine(loaded.model, loaded.tokenizer)
        return [Served(ModelChoice("late", loaded.path), loaded, engine, loop)]

    with serving(open_models=open_models, waits=False) as server:
        try:
            wait_for(lambda: server.server.started)
            health = httpx.get(server.url + "/health")
            assert (health.status_code, health.json()["status"]) == (503, "loading")
            error = check_error(server.post(body=GREEDY), 503)
            assert error["code"] == "loading"
            for path in ("/v1/models", "/v1/models/late"):
                assert check_error(httpx.get(server.url + path), 503)["code"] == "loading"
        finally:
            go.set()
        wait_for(lambda: httpx.get(server.url + "/health").status_code == 200)
        assert server.post(body=GREEDY).status_code == 200


def test_draining_ends_what_is_under_way_and_refuses_more(loaded: Loaded) -> None:
    with serving(loaded) as server:
        url = server.url + "/v1/chat/completions"
        body = {**ENDLESS, "stream": True}
        with httpx.stream("POST", url, json=body, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            next(lines)
            draining = asyncio.run_coroutine_threadsafe(
                server.service.drain(PATIENCE_S), server.loop
            )
            wait_for(lambda: server.service.state == "draining")
            refused = server.post(body=GREEDY)
            assert (
                check_error(refused, 503)["code"] == "draining" and refused.headers["retry-after"]
            )
            assert httpx.get(server.url + "/health").status_code == 503
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert draining.result(PATIENCE_S) is True


@pytest.mark.parametrize("stream", [False, True])
def test_draining_ends_all_of_a_request(loaded: Loaded, stream: bool) -> None:
    with serving(loaded, engine={"max_batch": 2, "max_queue": 1}) as server:
        with held(loaded):
            asking = Asking(server, {**ENDLESS, "n": 7, "max_tokens": 20, "stream": stream})
            wait_for(lambda: server.engine.n_active > 0)
            draining = asyncio.run_coroutine_threadsafe(
                server.service.drain(PATIENCE_S), server.loop
            )
            wait_for(lambda: server.service.state == "draining")
        assert draining.result(PATIENCE_S) is True
        text = asking.response.text
        found = events(text) if stream else [asking.response.json()]
        ends = [c["index"] for o in found for c in o["choices"] if c["finish_reason"]]
        assert sorted(ends) == list(range(7))


def test_draining_gives_up_what_was_never_begun(
    loaded: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(loaded, engine={"max_batch": 1, "max_queue": 1}) as server:
        with held(loaded):
            asking = [Asking(server, {**ENDLESS, "n": 30}) for _ in range(2)]
            wait_for(lambda: server.engine.n_active + server.engine.n_queued == 2)
            draining = asyncio.run_coroutine_threadsafe(server.service.drain(0), server.loop)
            wait_for(lambda: server.service.state == "draining")
        assert draining.result(PATIENCE_S) is False
        for one in asking:
            assert check_error(one.response, 503)["code"] == "draining"
    assert "an answer failed" not in caplog.text


def test_draining_cancels_what_takes_too_long(loaded: Loaded) -> None:
    with serving(loaded) as server:
        url = server.url + "/v1/chat/completions"
        body = {**ENDLESS, "stream": True, "n": 30}
        with httpx.stream("POST", url, json=body, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            next(lines)
            assert server.do(server.service.drain(0)) is False
            last = [line for line in lines if line][-1]
        assert "cancelled" in json.loads(last.removeprefix("data: "))["error"]["message"]


# ----------------------------------------------------------------------------- for operators


def test_metrics(server: Running) -> None:
    def read() -> dict[str, float]:
        response = httpx.get(server.url + "/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        found = {}
        for line in response.text.splitlines():
            if not line.startswith("#"):  # the grammar of the text format
                match = re.fullmatch(
                    r'([a-z_]+(?:\{[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*\})?) (\S+)', line
                )
                assert match, line
                found[match[1]] = float(match[2])
        return found

    before = read()
    usage = server.post(body=GREEDY).json()["usage"]
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    model = '{model="talker"}'
    assert grown(f"minimind_generated_tokens_total{model}") == usage["completion_tokens"]
    assert grown(f"minimind_prompt_tokens_total{model}") == usage["prompt_tokens"]
    route = '{route="/v1/chat/completions",status="200"}'
    assert grown(f"minimind_requests_total{route}") == 1
    assert grown("minimind_time_to_first_token_seconds_count") == 1
    assert grown('minimind_time_to_first_token_seconds_bucket{le="+Inf"}') == 1
    assert after["minimind_up"] == 1


def test_a_line_in_the_log_for_each_request(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "minimind.access")
    usage = server.post(body=GREEDY).json()["usage"]
    httpx.get(server.url + "/none%0Aforged")

    def lines(start: str) -> list[str]:
        return [line for line in caplog.messages if line.startswith(f"127.0.0.1 {start}")]

    wait_for(lambda: bool(lines("GET /none")))
    (first,), (second,) = lines("POST /v1/chat/completions 200 "), lines("GET /none")
    for part in (f"prompt={usage['prompt_tokens']}", f"new={usage['completion_tokens']}", "first="):
        assert part in first
    assert re.search(r"[0-9.]+ tokens/s length", first) or usage["completion_tokens"] < 12
    assert "\n" not in second and " 404 " in second


def test_openapi_names_what_is_checked(server: Running) -> None:
    document = httpx.get(server.url + "/openapi.json").json()
    schema = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "repeat_penalty", "max_completion_tokens"} <= schema.keys()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    reference = body["content"]["application/json"]["schema"]["$ref"]
    assert reference == "#/components/schemas/ChatRequest"


def test_a_port_in_use_is_told(server: Running) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(OSError, match=f"127.0.0.1:{port}.*--port"):
        bind("127.0.0.1", port)
