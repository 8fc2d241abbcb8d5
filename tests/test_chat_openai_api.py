"""The terminal client as a user starts it: through pipes, and on a terminal of its own."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import free_port
from tiny_server import TinyServer, chunk, error, hangs, says, sends, talks_on, tiny_server

from model.chats import from_json
from model.remote import request_fields, without_oldest
from model.terminal_client import read_lines

ROOT = Path(__file__).parents[1]
TOO_LONG = error(400, "maximum context length is 9 tokens", "context_length_exceeded")
pytestmark = pytest.mark.slow  # each starts a process that imports openai


@pytest.fixture
def server() -> Iterator[TinyServer]:
    with tiny_server() as server:
        yield server


def environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
    return {**env, "PYTHONUTF8": "1", "NO_PROXY": "127.0.0.1", **more}


def talk(
    url: str, typed: str, *flags: str, cwd: Path = ROOT, **env: str
) -> tuple[int, str, list[str]]:
    """Run the client on what a pipe holds; return its exit code, output and lines of errors."""
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "chat_openai_api.py",
            *(["--base_url", url] if url else []),
            *flags,
        ],
        input=typed,
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env=environment(**env),
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if line]


def sent(server: TinyServer) -> list[list[str]]:
    """Return the contents of the messages of each request."""
    return [[message["content"] for message in body["messages"]] for body in server.requests]


# ---- a conversation ----


def test_the_conversation_so_far_is_sent_along(server: TinyServer) -> None:
    server.replies = [says("一", "答"), says("二答", usage=(5, 3))]
    code, out, errors = talk(server.url, "一问\n二问\n三问\n", "--history_cnt", "2")
    assert (code, errors) == (0, [])
    assert "用户: 一问\nMiniMind: 一答\n" in out
    assert "answer 3 tokens" in out and "prompt 5 tokens" in out
    assert sent(server) == [["一问"], ["一问", "一答", "二问"], ["二问", "二答", "三问"]]
    assert server.keys == ["Bearer none"] * 3
    body = server.requests[0]
    assert body["stream"] is True and body["model"] == "minimind"
    assert not {"temperature", "max_tokens", "top_k", "stop"} & body.keys(), (
        "nothing was said of it"
    )


def test_flags_and_environment_reach_the_server(server: TinyServer) -> None:
    server.replies = [says("ok")]
    flags = (
        "--model m --max_new_tokens 7 --temperature 0 --top_k 0 --top_p 0.5 --min_p 0.1 --seed 3 "
        "--repetition_penalty 1.2 --presence_penalty -1 --frequency_penalty 2 --stop a --stop b"
    ).split()
    env = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "sk-1"}
    code, _, errors = talk("", "q\n/retry\n", *flags, "--system", "be kind", **env)
    assert (code, errors, server.keys) == (0, [], ["Bearer sk-1"] * 2)
    expected = {
        "model": "m", "max_tokens": 7, "temperature": 0.0, "top_k": 0, "top_p": 0.5, "min_p": 0.1,
        "seed": 3, "repetition_penalty": 1.2, "presence_penalty": -1.0, "frequency_penalty": 2.0,
        "stop": ["a", "b"],
    }  # fmt: skip
    assert expected.items() <= server.requests[0].items()
    assert server.requests[0]["messages"][0] == {"role": "system", "content": "be kind"}
    assert server.requests[1]["seed"] == 4, "the same seed would give the same answer again"


def test_commands(server: TinyServer, tmp_path: Path) -> None:
    server.replies = [says("first"), says("second"), says("third"), says("rest")]
    typed = (
        "/retry\nq1\n/retry\n/save chat.json\n/save chat.md\n/system be brief\n/clear\nq2\n"
        "/system\n//etc/fstab\n/unknown\n/save\n/save chat.json\n/save old.txt\n/save no/where.md\n"
        "/help\nexit\nnever sent\n"
    )
    (tmp_path / "old.txt").write_text("mine")
    code, out, errors = talk(server.url, typed, cwd=tmp_path)
    assert sent(server) == [["q1"], ["q1"], ["be brief", "q2"], ["q2", "third", "/etc/fstab"]]
    assert "MiniMind: second" in out and "/system TEXT" in out
    patterns = (
        "no question to answer again",
        "/unknown is no command",
        "/save needs a file",
        "old.txt exists already",
        "no/where.md cannot be written: No such file",
    )
    assert len(errors) == len(patterns), errors
    assert all(f"error: {p}" in e or p in e for p, e in zip(patterns, errors, strict=True))
    assert code == 1, "a script learns that not all went well"
    [saved] = from_json((tmp_path / "chat.json").read_bytes())
    assert [turn.question for turn in saved.turns] == ["q2", "/etc/fstab"], "saved again"
    assert (tmp_path / "chat.md").read_text("utf-8").count("second") == 1
    assert (tmp_path / "old.txt").read_text() == "mine"


def test_answers_that_no_good_server_gives(server: TinyServer) -> None:
    empty = {**chunk(), "choices": []}
    no_delta = {**chunk(), "choices": [{"index": 0, "delta": None, "finish_reason": None}]}
    server.replies = [
        sends(empty, no_delta, chunk(content="guarded"), empty, chunk(finish_reason="length")),
        sends("[DONE]"),
        sends(chunk(content="half "), {"error": {"message": "the model is on fire"}}),
        sends(chunk(content="half "), "{not json"),
        error(500, "a page\nof many lines " + "x" * 500),
        error(401, "wrong key"),
        error(404, "no such route"),
        error(429, "64 wait"),
        says("fine again"),
    ]
    code, out, errors = talk(server.url, "".join(f"q{i}\n" for i in range(9)))
    assert "guarded" in out and "cut at the limit" in out
    assert "an empty answer" in out
    assert "MiniMind: fine again" in out, "the program goes on"
    patterns = (
        "the model is on fire",
        r"127.0.0.1",
        r"500: a page of many lines x+…$",
        r"refuses the API key \(401\): wrong key",
        r"404: no such route; such addresses mostly end in /v1",
        r"busy \(429\): 64 wait",
    )
    assert len(errors) == len(patterns), errors
    for pattern, line in zip(patterns, errors, strict=True):
        assert line.startswith("error: ") and re.search(pattern, line), line
    assert code == 1
    # what failed without a word is not remembered, what was said before is
    assert sent(server)[-1] == ["q2", "half ", "q3", "half ", "q8"]


def test_a_long_conversation_loses_its_oldest_turns_and_says_so(server: TinyServer) -> None:
    server.replies = [says("a1"), says("a2"), TOO_LONG, TOO_LONG, says("a3"), TOO_LONG]
    code, out, errors = talk(server.url, "q1\nq2\nq3\nq4\n", "--system", "s")
    assert "[left out the 4 oldest messages: they do not fit]\nMiniMind: a3" in out
    assert sent(server)[2:5] == [["s", "q1", "a1", "q2", "a2", "q3"], ["s", "q2", "a2", "q3"],
                                 ["s", "q3"]]  # fmt: skip
    assert len(errors) == 1 and "the message is too long: maximum context length" in errors[0]


def test_no_server_is_one_line_and_not_the_end() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    code, out, errors = talk(url, "q1\nq2\n")
    assert code == 1 and out.count("用户: q") == 2
    assert len(errors) == 2
    assert f"{url} cannot be reached" in errors[0] and "python my_openai_api.py" in errors[0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--history_cnt 3", "--history_cnt 3 is odd"),
        ("--base_url localhost:8000", "does not begin with http://"),
        ("--api_key 密钥", "only ASCII"),
        ("--top_p 2", "not between 0 and 1"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_asked(flags: str, expected: str) -> None:
    code, _, errors = talk("http://127.0.0.1:9/v1", "q\n", *flags.split())
    assert code == 2 and expected in errors[-1]


# ---- a terminal ----


class Terminal:
    """The client on a pseudo-terminal."""

    def __init__(self, url: str) -> None:
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.clear()
            os.environ.update(environment(TERM="dumb"))
            script = str(ROOT / "chat_openai_api.py")
            os.execv(sys.executable, [sys.executable, script, "--base_url", url])
        self.seen = ""

    def expect(self, text: str) -> None:
        """Read until ``text`` has come."""
        import select

        deadline = time.monotonic() + 60
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def terminal(server: TinyServer) -> Iterator[Terminal]:
    terminal = Terminal(server.url)
    try:
        yield terminal
    finally:
        try:
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_ctrl_c_stops_the_answer_and_not_the_program(
    server: TinyServer, terminal: Terminal
) -> None:
    server.replies = [talks_on("begin"), hangs(server), says("later")]
    terminal.expect("用户: ")
    terminal.type("q1\n")
    terminal.expect("begin")
    terminal.type("\x03")
    terminal.expect("已停止")
    assert server.left.wait(60), "the connection is closed, so the server stops too"
    server.left.clear()
    terminal.expect("用户: ")
    terminal.type("q2\n")
    while len(server.requests) < 2:
        time.sleep(0.01)
    terminal.type("\x03")  # before a first word
    terminal.expect("已停止")
    assert server.left.wait(60)
    terminal.expect("用户: ")
    terminal.type("q3\n")
    terminal.expect("later")
    q1, partial, q3 = sent(server)[2]
    assert (q1, q3) == ("q1", "q3") and partial.startswith("begin"), "the partial answer is kept"
    terminal.type("exit\n")
    assert terminal.end() == 0


def test_the_end_of_input_ends_it(server: TinyServer, terminal: Terminal) -> None:
    terminal.expect("用户: ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_at_the_prompt_one_ctrl_c_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    # not on a terminal: readline itself loses a signal that comes while it prints the prompt
    typed = iter([KeyboardInterrupt, " one ", KeyboardInterrupt, KeyboardInterrupt, "never"])

    def give(prompt: str) -> str:
        line = next(typed)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", give)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert list(read_lines("> ")) == ["one"]


# ---- our server ----


def test_a_conversation_with_our_server(tmp_path: Path) -> None:
    from tiny_chat import serving, wait_until_idle, write_chat_weights

    write_chat_weights(tmp_path / "demo" / "rl_32.pth", max_seq_len=20_000)
    flags = ("--out_dir", tmp_path, "--device", "cpu", "--dtype", "float32")
    with serving("my_openai_api.py", "/health", tmp_path / "log", *flags) as url:
        sampling = "--temperature 0 --max_new_tokens 9".split()
        code, out, errors = talk(f"{url}/v1", "你好\n/retry\n", *sampling)
        assert (code, errors) == (0, [])
        first, second = re.findall(r"MiniMind: (.*?)\n\[prompt", out, re.DOTALL)
        assert first == second != "" and out.count("answer 9 tokens") == 2
        terminal = Terminal(f"{url}/v1")
        terminal.expect("用户: ")
        terminal.type("你好\n")
        terminal.expect("MiniMind: ")
        terminal.type("\x03")
        terminal.expect("已停止")
        wait_until_idle(url)
        terminal.type("exit\n")
        assert terminal.end() == 0


# ---- pieces ----


def test_what_is_not_said_is_not_sent() -> None:
    fields = request_fields({"top_k": None, "stop": (), "seed": 0, "min_p": 0.0, "top_p": None})
    assert fields == {"seed": 0, "extra_body": {"min_p": 0.0}}


def test_the_oldest_turn_is_left_out_as_a_whole() -> None:
    roles = "system user user assistant user".split()
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    left = []
    while messages:
        messages = without_oldest(messages)
        left.append(json.dumps([int(m["content"]) for m in messages or []]))
    assert left == ["[0, 2, 3, 4]", "[0, 4]", "[]"]
