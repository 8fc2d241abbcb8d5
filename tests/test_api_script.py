"""my_openai_api.py as an operator starts and stops it."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import PATIENCE_S, wait_for, write_talker
from tiny_runs import ROOT

import my_openai_api
from model.api_run import serve

BODY = {
    "messages": [{"role": "user", "content": "你好"}],
    "stream": True,
    "logit_bias": {"2": -100},
}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("out"))


@contextlib.contextmanager
def serving_until_signal(
    weights: Path, *flags: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Serve weights; the test ends the process."""
    command = [sys.executable, "-u", ROOT / "my_openai_api.py", "--weights", weights, "--port", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, env=env)
    try:
        line = next(line for line in process.stdout if line.startswith(b"serving"))
        yield process, f"{line.split()[3].decode()}/chat/completions"
    finally:
        process.kill()
        process.wait()


def test_the_key_comes_from_the_environment_or_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIMIND_API_KEY", raising=False)
    assert my_openai_api.parse_args([]).api_key is None
    monkeypatch.setenv("MINIMIND_API_KEY", "")
    assert my_openai_api.parse_args([]).api_key is None
    monkeypatch.setenv("MINIMIND_API_KEY", "a")
    assert my_openai_api.parse_args([]).api_key == "a"
    assert my_openai_api.parse_args(["--api_key", "b"]).api_key == "b"


@pytest.mark.parametrize("flags", (["--api_key", ""], ["--port", "65536"], ["--max_batch", "0"]))
def test_flags_that_cannot_be(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        my_openai_api.parse_args(flags)
    assert flags[0] in capsys.readouterr().err


@pytest.fixture
def loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the handlers back that a server in this process sets."""
    for name in ("minimind.access", "minimind.server"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])


def test_what_keeps_it_from_starting_is_told(loggers: None, talker: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"no weights")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flags, kind, says in (
            (["--weights", "none.pth"], FileNotFoundError, "none.pth does not exist"),
            (["--weights", damaged, "--port", 0], ValueError, "damaged.pth is not a readable"),
            (["--weights", talker, "--add_model", f"talker={talker}"], ValueError, "two models"),
            (["--weights", talker, "--port", port], OSError, f"cannot listen on 127.0.0.1:{port}"),
        ):
            with pytest.raises(kind, match=says):  # run_main makes it a line
                serve(my_openai_api.parse_args(list(map(str, flags))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_come_to_their_end(talker: Path, kind: signal.Signals) -> None:
    with serving_until_signal(talker, "--drain_s", "60") as (process, url):
        with httpx.stream("POST", url, json=BODY, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(kind)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.slow
def test_a_second_signal_cancels(tmp_path: Path) -> None:
    talker = write_talker(tmp_path, max_seq_len=8192)
    with serving_until_signal(talker, "--drain_s", "600") as (process, url):
        with httpx.stream("POST", url, json=BODY, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            health = url.replace("v1/chat/completions", "health")
            wait_for(lambda: httpx.get(health).status_code == 503)
            process.send_signal(signal.SIGINT)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        assert process.wait(PATIENCE_S) == 0
