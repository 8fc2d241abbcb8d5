"""What benchmarks/serve.py measures: an engine or a server, each in a process of its own."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from model.checkpoint import save_weights  # noqa: E402 (the line above finds it)
from model.LMConfig import LMConfig  # noqa: E402
from model.model import MiniMindForCausalLM  # noqa: E402
from model.tokenizer import Tokenizer  # noqa: E402

SAMPLING = {"temperature": 0.7, "top_k": 16}  # what the server takes by default
PLACE = ["--device", "cpu", "--dtype", "float32"]
START_S = 120  # a server has so long to be ready

Body = dict[str, Any]
Answers = list[list[dict[str, float]]]


class Engine:
    """The bare engine in its process; ``n_threads`` None: as torch likes it."""

    def __init__(
        self, weights: str, n_slots: int, stack: contextlib.ExitStack, n_threads: int | None = None
    ) -> None:
        flags = ["--weights", weights, "--max_batch", str(n_slots), *PLACE]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "engine_client.py"), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(n_threads),
        )
        stack.callback(end, self._process)
        if self._process.stdout.readline().strip() != "ready":
            sys.exit("the engine's process did not start: see above")

    def answer(self, plan: list[list[Body]]) -> Answers:
        """Answer the bodies of a plan; all have the same options."""
        options = {name: value for name, value in plan[0][0].items() if name in SAMPLING}
        options["max_new_tokens"] = plan[0][0]["max_tokens"]
        options["logit_bias"] = plan[0][0]["logit_bias"]
        clients = [[body["messages"] for body in bodies] for bodies in plan]
        print(
            json.dumps({"clients": clients, "options": options}),
            file=self._process.stdin,
            flush=True,
        )
        return json.loads(self._process.stdout.readline())["answers"]


class Server:
    """A server in its process, asked by load_client.py in another.

    Args:
        name: of its log.
        port: where it listens; None: its log says so.
        adapt: makes a body what this server understands.

    Attributes:
        limit_s: how long a plan may take.
        client_share: of one core, that the last plan's client took.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        stack: contextlib.ExitStack,
        port: int | None = None,
        adapt: Callable[[Body], Body] = lambda body: body,
        n_threads: int | None = None,
    ) -> None:
        self.name, self.limit_s, self.client_share = name, 600.0, 0.0
        self._adapt = adapt
        self.log = folder / f"{name}.log"
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment(n_threads)
            )
        stack.callback(end, self._process)
        self.port = port or 0
        deadline = time.monotonic() + START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{name} did not start:\n{self.log.read_text('utf-8')[-2000:]}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        if not self.port:
            said = re.search(r"serving .* at http://[^:]+:(\d+)/v1", self.log.read_text("utf-8"))
            self.port = int(said[1]) if said else 0
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
            return bool(self.port)
        return False

    def answer(self, plan: list[list[Body]]) -> Answers:
        """Let a client process ask; keep what CPU time it took.

        Raises:
            TimeoutError: within ``limit_s`` not all was answered.
            RuntimeError: an answer was not what was expected.
        """
        plan = [[self._adapt(body) for body in bodies] for bodies in plan]
        begin = time.monotonic()
        command = [sys.executable, str(HERE / "load_client.py"), str(self.port)]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(plan),
                capture_output=True,
                text=True,
                timeout=self.limit_s,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not answered within {self.limit_s:.0f} s") from None
        if done.returncode:
            raise RuntimeError(f"{self.name}: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout)
        self.client_share = found["client_cpu_s"] / (time.monotonic() - begin)
        return found["answers"]


def environment(n_threads: int | None = None) -> dict[str, str]:
    """Return this process's environment, without the network."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env |= {"OMP_NUM_THREADS": str(n_threads)} if n_threads else {}
    return env | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def random_weights(folder: Path, **fields: Any) -> Path:
    """Write a model that has learned nothing: of 26 M, or what the config's ``fields`` make."""
    torch.manual_seed(0)
    config = LMConfig(**fields)
    path = folder / f"random_{config.dim}.pth"
    save_weights(MiniMindForCausalLM(config), path, Tokenizer())
    return path


def export(weights: str, folder: Path) -> Path:
    """Write the weights as a plain LlamaForCausalLM with tokenizer and chat template."""
    path = folder / "llama"
    flags = ["--weights", weights, "--format", "llama", "--output", str(path)]
    command = [sys.executable, str(ROOT / "export_model.py"), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
    return path


def transformers_serve(
    export: Path,
    folder: Path,
    stack: contextlib.ExitStack,
    *flags: str,
    n_threads: int | None = None,
) -> Server:
    """Start the peer on an export, and nothing else."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(export), *flags]
    command += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]

    def adapt(body: Body) -> Body:
        # it refuses fields that it does not know; temperature alone does not let it draw
        drawn = {"do_sample": True, "min_new_tokens": body["max_tokens"], "pad_token_id": 0}
        kept = {name: body[name] for name in ("messages", "max_tokens", "stream")}
        return {"model": str(export), "generation_config": json.dumps(SAMPLING | drawn), **kept}

    name = "_".join(["transformers", str(n_threads), *(flag.strip("-") for flag in flags)])
    return Server(name, command, folder, stack, port, adapt, n_threads)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
