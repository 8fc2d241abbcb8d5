"""Where the page's answers come from: the engine on this machine, and servers."""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_chat import serving, wait_until_idle, write_chat_weights
from tiny_runs import free_port
from tiny_server import TinyServer, chunk, error, hangs, says, sends, talks_on, tiny_server

from model.chats import Chat, Message, Reply
from model.checkpoint import load_model
from model.page_answers import LocalModel, Server, Source, list_local, list_remote
from model.remote import explain

FLAGS = ("weights load_from lora model dim n_layers n_heads n_kv_heads hidden_dim use_moe "
         "n_shared_experts max_seq_len dropout rope_scaling tokenizer")  # fmt: skip
GREEDY = {"temperature": 0.0, "max_new_tokens": 20}
HELLO = [{"role": "user", "content": "你好"}]


def arguments(out_dir: Path, **flags: object) -> argparse.Namespace:
    none = dict.fromkeys(FLAGS.split())
    usual = {"out_dir": str(out_dir), "device": "cpu", "dtype": "float32"}
    return argparse.Namespace(**(none | usual | flags))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_weights(tmp_path_factory.mktemp("out") / "demo" / "rl_32.pth")


@pytest.fixture(scope="module")
def local(weights: Path) -> Iterator[LocalModel]:
    loaded = load_model(weights, arguments(weights.parents[1]))
    loaded.model.eval()
    local = LocalModel(loaded, "rl_32")
    yield local
    local.close()


@pytest.fixture
def server() -> Iterator[TinyServer]:
    with tiny_server() as server:
        yield server


def wait(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.002)


def ask(source: Source, messages: list[Message] = HELLO, **sampling: object) -> Reply:
    """Return the finished answer."""
    reply = Reply()
    source.start(messages, {**GREEDY, **sampling}, reply)
    wait(lambda: reply.is_done)
    return reply


# ---- this machine ----


def test_the_answer_is_the_likeliest_tokens_one_by_one(local: LocalModel) -> None:
    import torch

    model, tokenizer = local.thread.engine.model, local.tokenizer
    ids = tokenizer.encode_chat(HELLO, add_generation_prompt=True)
    n_prompt = len(ids)
    with torch.inference_mode():
        for _ in range(20):  # the whole text again for each token: no cache, no engine
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    reply = ask(local)
    assert reply.text == tokenizer.decode(ids[n_prompt:])
    assert (reply.finish_reason, reply.model, reply.error) == ("length", "rl_32", "")
    assert (reply.n_tokens, reply.n_prompt) == (20, n_prompt)
    assert reply.first_token_s > 0 and reply.tokens_per_s > 0


def test_cancelling_keeps_the_text_and_frees_the_slot(local: LocalModel) -> None:
    reply = Reply()
    local.start(HELLO, {**GREEDY, "max_new_tokens": 200}, reply)
    wait(lambda: reply.text)
    reply.job.cancel()
    wait(lambda: reply.is_done)
    wait(lambda: local.thread.engine.n_active == 0)
    assert reply.finish_reason == "cancelled" and reply.text and reply.n_tokens < 200


def test_a_long_history_loses_whole_messages_and_the_number_is_told(local: LocalModel) -> None:
    chat = Chat(system="你是助手")
    for i in range(30):
        chat.ask(f"第{i}个问题是什么？").text = "这是回答。"
    chat.ask("最后")
    messages = chat.messages(100)
    reply = ask(local, messages, max_new_tokens=4)
    assert reply.n_left_out > 0 and reply.n_left_out % 2 == 0
    kept = [messages[0], *messages[1 + reply.n_left_out :]]
    assert reply.n_prompt == len(local.tokenizer.encode_chat(kept, add_generation_prompt=True))


def test_what_cannot_be_answered_is_told_by_kind(local: LocalModel) -> None:
    long = [{"role": "user", "content": "很长的问题" * 200}]
    reply = ask(local, long)
    assert (reply.error_kind, reply.text) == ("too_long", "")
    assert "the newest message takes" in reply.error
    assert ask(local, top_p=3.0).error_kind == "other"
    engine = local.thread.engine
    before, engine.max_queue = engine.max_queue, -engine.max_batch  # free slots do not help
    try:
        assert ask(local).error_kind == "queue_full"
    finally:
        engine.max_queue = before


def test_many_at_once_each_have_their_own_answer(local: LocalModel) -> None:
    questions = [[{"role": "user", "content": f"问题{i}"}] for i in range(12)]
    replies = [Reply() for _ in questions]
    for messages, reply in zip(questions, replies, strict=True):
        local.start(messages, GREEDY, reply)
    wait(lambda: all(reply.is_done for reply in replies))
    assert [r.text for r in replies] == [ask(local, messages).text for messages in questions]


def test_a_model_that_is_closed_ends_its_answers(weights: Path) -> None:
    loaded = load_model(weights, arguments(weights.parents[1]))
    loaded.model.eval()
    local = LocalModel(loaded, "rl_32")
    reply = Reply()
    local.start(HELLO, {**GREEDY, "max_new_tokens": 200}, reply)
    local.close()
    wait(lambda: reply.is_done)
    assert reply.finish_reason == "error" and "ask again" in reply.error
    assert not local.is_alive
    assert ask(local).error_kind == "queue_full"


def test_the_models_begin_with_the_one_that_was_named(weights: Path, tmp_path: Path) -> None:
    out = weights.parents[1]
    choices, missing = list_local(arguments(out))
    assert [choice.name for choice in choices] == ["rl_32"] and not missing
    elsewhere = write_chat_weights(tmp_path / "rl_32.pth", seed=1)
    choices, _ = list_local(arguments(out, weights=str(elsewhere)))
    assert [choice.path for choice in choices] == [elsewhere, weights]
    assert len({choice.name for choice in choices}) == 2
    choices, missing = list_local(arguments(tmp_path / "nothing"))
    assert choices == [] and "make demo" in missing
    choices, missing = list_local(arguments(out, weights="gone.pth"))
    assert [choice.path for choice in choices] == [weights] and "gone.pth" in missing


# ---- a server ----


def test_a_server_answers(server: TinyServer) -> None:
    server.replies = [says("你", "好", usage=(7, 2), finish="length")]
    reply = ask(Server(server.url, "sk-1", "m"), top_k=5, stop=("a",))
    assert (reply.text, reply.finish_reason, reply.model) == ("你好", "length", "m")
    assert (reply.n_prompt, reply.n_tokens, reply.error) == (7, 2, "")
    body = server.requests[0]
    assert body["messages"] == HELLO and body["max_tokens"] == 20 and body["temperature"] == 0
    assert body["top_k"] == 5 and body["stop"] == ["a"] and server.keys == ["Bearer sk-1"]


def test_cancelling_closes_the_connection(server: TinyServer) -> None:
    for reply_of_server in (talks_on("begin"), hangs(server)):
        server.replies = [reply_of_server]
        n_before = len(server.requests)
        reply = Reply()
        Server(server.url, "", "m").start(HELLO, GREEDY, reply)
        wait(lambda n=n_before: len(server.requests) > n)
        if not server.left.is_set():
            wait(lambda r=reply: r.text)
        server.left.clear()
        reply.job.cancel()
        wait(lambda r=reply: r.is_done)
        assert reply.finish_reason == "cancelled"
        assert server.left.wait(60)
        reply.job.cancel()  # once more does nothing


def test_off_is_said_and_unsaid_where_a_server_knows_no_such_thing(server: TinyServer) -> None:
    server.replies = [error(400, "Unrecognized request argument supplied: top_k"), says("ok")]
    off = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert ask(Server(server.url, "", "m"), **off).text == "ok"
    assert off.items() <= server.requests[0].items()
    assert not off.keys() & server.requests[1].keys()
    server.replies = [error(400, "Unrecognized request argument supplied: top_k"), says("no")]
    reply = ask(Server(server.url, "", "m"), top_k=5)
    assert "top_k" in reply.error and not reply.text, "what was wanted is not dropped in silence"


def test_a_server_that_finds_it_too_long_gets_less(server: TinyServer) -> None:
    chat = Chat(system="s")
    for i in range(2):
        chat.ask(f"q{i}").text = f"a{i}"
    chat.ask("last")
    refusal = error(400, "too many", "context_length_exceeded")
    server.replies = [refusal, says("ok")]
    reply = ask(Server(server.url, "", "m"), chat.messages(100))
    assert (reply.text, reply.n_left_out) == ("ok", 2)
    assert [m["content"] for m in server.requests[1]["messages"]] == ["s", "q1", "a1", "last"]
    server.replies = [refusal]
    assert ask(Server(server.url, "", "m"), chat.messages(100)).error_kind == "too_long"


@pytest.mark.parametrize(
    ("refusal", "kind", "text", "expected"),
    [
        (error(401, "no"), "auth", "", "401"),
        (error(429, "busy"), "queue_full", "", "busy"),
        (error(503, "loading"), "queue_full", "", "loading"),
        (error(404, "no route"), "not_found", "", "/v1"),
        (error(500, "broken"), "other", "", "500: broken"),
        (sends(chunk(content="half"), {"error": {"message": "late"}}), "other", "half", "late"),
        (sends(chunk(content="half"), "{"), "other", "half", "127.0.0.1"),
    ],
)
def test_refusals_are_told_by_kind(server: TinyServer, refusal, kind, text, expected) -> None:
    server.replies = [refusal]
    reply = ask(Server(server.url, "", "m"))
    assert (reply.error_kind, reply.text, reply.finish_reason) == (kind, text, "error")
    assert expected in reply.error and "\n" not in reply.error


def test_a_server_that_is_away_is_told() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    reply = ask(Server(url, "", "m"))
    assert reply.error_kind == "server_away" and url in reply.error
    assert list_remote(Server(url, "", ""))[1] == "server_away"


def test_the_models_of_a_server(server: TinyServer) -> None:
    server.models = ["a", "b"]
    assert list_remote(Server(server.url, "", "")) == (["a", "b"], "", "")
    assert list_remote(Server("localhost:8000", "", ""))[1] == "other"
    assert list_remote(Server(server.url, "密钥", ""))[1] == "other"


@pytest.mark.slow  # starts our server, which imports torch
def test_our_server_says_what_the_engine_says(
    weights: Path, local: LocalModel, tmp_path: Path
) -> None:
    out = weights.parents[1]
    flags = ("--out_dir", out, "--device", "cpu", "--dtype", "float32", "--api_key", "sk-1")
    flags += ("--top_k", 3, "--repetition_penalty", 2)  # which "off" must override
    with serving("my_openai_api.py", "/health", tmp_path / "log", *flags) as url:
        assert list_remote(Server(f"{url}/v1", "sk-1", "")) == (["rl_32"], "", "")
        server = Server(f"{url}/v1", "sk-1", "rl_32")
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 4}
        for sampling in (off, {**off, "temperature": 1.0}):
            here, there = ask(local, **sampling), ask(server, **sampling)
            assert there.text == here.text and there.finish_reason == here.finish_reason
            assert (there.n_tokens, there.n_prompt) == (here.n_tokens, here.n_prompt)
        chat = Chat(system="你是助手")
        for i in range(30):
            chat.ask(f"第{i}个问题是什么？").text = "这是回答。"
        chat.ask("最后")
        reply = ask(server, chat.messages(100))
        assert reply.text and reply.n_left_out > 0 and reply.n_left_out % 2 == 0
        assert ask(Server(f"{url}/v1", "no", "rl_32")).error_kind == "auth"
        long = [{"role": "user", "content": "很长的问题" * 200}]
        assert ask(server, long).error_kind == "too_long"
        reply = Reply()
        server.start(HELLO, {**GREEDY, "max_new_tokens": 200}, reply)
        wait(lambda: reply.text)
        reply.job.cancel()
        wait(lambda: reply.is_done)
        wait_until_idle(url)


def test_an_error_of_a_server_is_one_short_line() -> None:
    assert explain(ValueError("a\n" * 999), "http://x")[1].count("\n") == 0
    assert len(explain(ValueError("a" * 999), "http://x")[1]) < 400
