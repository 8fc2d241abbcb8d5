"""The real server with a tiny model, in a process of its own: what tests with clients share."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talkers import tiny_model
from tiny_runs import ROOT

from model.checkpoint import save_weights
from model.tokenizer import Tokenizer

PATIENCE_S = 90  # for what takes a second on an idle machine


def write_talker(folder: Path, **fields: Any) -> Path:
    """Write a tiny model with the shipped tokenizer; what it says is Chinese nonsense."""
    tokenizer = Tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size, **{"max_seq_len": 256, **fields})
    path = folder / "talker.pth"
    save_weights(model, path, tokenizer)
    return path


@dataclass
class Running:
    """A server that answers."""

    process: subprocess.Popen
    port: int
    log: Path

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return f"{self.root}/v1"

    def chat(self, **body: Any) -> dict[str, Any]:
        """Return what a chat is answered, by no client library at all."""
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.base_url}/chat/completions", data, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return json.load(response)

    def metric(self, name: str) -> float:
        """Return a metric's value, summed over its labels."""
        with urllib.request.urlopen(f"{self.root}/metrics", timeout=PATIENCE_S) as response:
            text = response.read().decode()
        found = re.findall(rf"^minimind_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name} in:\n{text}"
        return sum(map(float, found))

    def is_at_rest(self) -> bool:
        """Whether no request is being answered and none waits."""
        return self.metric("requests_active") == self.metric("requests_queued") == 0


@contextlib.contextmanager
def serving(weights: Path, *flags: str) -> Iterator[Running]:
    """Start ``my_openai_api.py`` and end it, which must go without a traceback."""
    log = weights.with_suffix(".log")
    command = [sys.executable, "-u", str(ROOT / "my_openai_api.py"), "--weights", str(weights)]
    command += ["--port", "0", "--device", "cpu", "--dtype", "float32", "--drain_s", "1", *flags]
    with open(log, "w") as file:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
    try:
        said: list[re.Match[str]] = []

        def is_up() -> bool:
            said[:] = re.finditer(r"serving .* at http://[^:]+:(\d+)/v1", log.read_text("utf-8"))
            return bool(said) or process.poll() is not None

        wait_for(is_up)
        assert said, log.read_text("utf-8")
        yield Running(process, int(said[0][1]), log)
        assert process.poll() is None, log.read_text("utf-8")[-2000:]
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
        assert "Traceback" not in log.read_text("utf-8")
    finally:
        process.kill()
        process.wait()


def wait_for(is_so: Callable[[], bool]) -> None:
    """Return when something has come about."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"{is_so} never came true"
        time.sleep(0.02)


def events(text: str) -> list[Any]:
    """Return the events of a whole stream, the last of which says that it is done."""
    *found, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", ""), text[-300:]
    assert all(event.startswith("data: ") for event in found)
    return [json.loads(event.removeprefix("data: ")) for event in found]


def text_of(chunks: list[Any], index: int = 0) -> str:
    """Return the text of one choice of a stream."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(c["delta"].get("content") or "" for c in choices if c["index"] == index)
