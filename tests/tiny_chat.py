"""Tiny models to chat with, and the servers that they answer in."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tiny_runs import free_port

ROOT = Path(__file__).parents[1]


def write_chat_weights(path: Path, seed: int = 0, max_seq_len: int = 256) -> Path:
    """Write a random model with the shipped tokenizer; it says nonsense, always the same."""
    import torch

    from model.checkpoint import save_weights
    from model.LMConfig import LMConfig
    from model.model import MiniMindForCausalLM
    from model.tokenizer import Tokenizer

    tokenizer = Tokenizer()
    torch.manual_seed(seed)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": max_seq_len}
    model = MiniMindForCausalLM(LMConfig(**shape, vocab_size=tokenizer.vocab_size)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # at the usual 0.02 every answer repeats its first token
            parameter.data.mul_(6)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model, path, tokenizer)
    return path


@contextlib.contextmanager
def serving(script: str, health: str, log: Path, *flags: object) -> Iterator[str]:
    """Run a server's script until the end of the block; yield its address once it answers."""
    port = free_port()
    command = [sys.executable, str(ROOT / script), "--port", port, *map(str, flags)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "BROWSER": "none"}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=env, cwd=ROOT, stdin=subprocess.DEVNULL
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while not answers(url + health):
            said = log.read_text("utf-8", "replace")
            assert process.poll() is None, f"{script} ended: {said[-2000:]}"
            assert time.monotonic() < deadline, f"{script} does not answer: {said[-2000:]}"
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    """Say whether a server answers with 200."""
    try:
        get(url)
        return True
    except (urllib.error.URLError, OSError):
        return False


def get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as response:
        return response.read()


def wait_until_idle(url: str) -> None:
    """Return when our API server makes no answer any more."""
    deadline = time.monotonic() + 60
    while (state := json.loads(get(f"{url}/health")))["active"] + state["queued"]:
        assert time.monotonic() < deadline, f"{url} goes on: {state}"
        time.sleep(0.02)
