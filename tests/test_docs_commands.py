"""The commands of the pages work: each is run as it stands, in the order of the pages, in a copy
of the project with a little of each kind of data, with tiny settings from the environment.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
from pages import ROOT, Page, all_pages
from tiny_runs import free_port

# Commands that are not run, by what they contain, and why
NOT_RUN = {
    "make demo": "it installs packages; what it runs is run",
    "make test": "it is what runs this",
    "pip install": "installs packages",
    "-m venv": "makes another environment",
    "-m pytest": "it is what runs this",
    "--nnodes": "needs several machines",
    "benchmarks/": "minutes; those of speed have tests of their own",
}
LAUNCHERS = ("torchrun ", "deepspeed ")
SERVERS = {"my_openai_api.py": "/health", "fast_inference.py": "/_stcore/health"}
TINY = {
    "MAX_STEPS": "2",
    "BATCH_SIZE": "2",
    "ACCUMULATION_STEPS": "1",
    "MAX_NEW_TOKENS": "4",
    "DTYPE": "float32",
    "DEVICE": "cpu",
    "WORKERS": "1",
    "NUM_WORKERS": "1",
    "VOCAB_SIZE": "400",
}
PAGES = [  # twins have the same commands; a log keeps those of its day
    page
    for page in all_pages()
    if not page.name.endswith("_zh.md") and page.name != "benchmarks/LOG.md"
]
COMMANDS = [(page, line, command) for page in PAGES for line, command in page.commands()]


def reason_not_to_run(command: str) -> str | None:
    return next((why for text, why in NOT_RUN.items() if text in command), None)


# ---- a place to run them ----


class Workshop:
    """A copy of the project, and the servers that commands have started there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.servers: dict[str, subprocess.Popen[bytes]] = {}
        self.exports: dict[str, str] = {}
        files = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        ).stdout.decode().split("\0")  # fmt: skip
        for name in filter(None, files):
            if (ROOT / name).is_file() and not name.startswith(("tests/", "images/page")):
                target = root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
        self._shrink()
        bin_dir = root / ".venv" / "bin"  # as the README has it
        bin_dir.mkdir(parents=True)
        for name in ("python", "torchrun", "deepspeed"):
            with contextlib.suppress(FileNotFoundError):
                (bin_dir / name).write_text(f'#!/bin/sh\nexec {self._program(name)} "$@"\n')
                (bin_dir / name).chmod(0o755)

    @staticmethod
    def _program(name: str) -> str:
        if name == "python":
            return sys.executable
        path = Path(sys.executable).with_name(name)
        if not path.is_file():
            raise FileNotFoundError(path)
        return str(path)

    def _shrink(self) -> None:
        """Raw data under their names, a few lines of each; one layer where it is not said."""
        demo, data = self.root / "dataset" / "demo", self.root / "dataset"
        for name in ("quiz", "identity_quiz"):
            _head(demo / f"{name}.jsonl", demo / f"{name}.jsonl", 4)
        _head(demo / "pretrain.jsonl", data / "mobvoi_seq_monkey_general_open_corpus.jsonl", 400)
        chats = [_lines(demo / f"sft_{kind}.jsonl", 150) for kind in ("single", "multi")]
        (data / "sft_data_zh.jsonl").write_text("".join(map("".join, chats)), "utf-8")
        (data / "dpo").mkdir()
        pairs = [json.loads(line) for line in _lines(demo / "dpo.jsonl", 60)]
        (data / "dpo" / "huozi_rlhf_data.json").write_text(json.dumps(pairs), "utf-8")
        _head(demo / "identity.jsonl", self.root / "my.jsonl", 20)
        _head(demo / "pretrain.jsonl", self.root / "my_texts.jsonl", 200)
        for split in ("dev", "val"):
            for file in sorted((demo / "ceval-exam" / split).glob("*.csv"))[1:]:
                file.unlink()
        shutil.copytree(demo / "ceval-exam", data / "ceval-exam")
        config = self.root / "model" / "LMConfig.py"
        text, n = re.subn(r"n_layers: int = 8\b", "n_layers: int = 1", config.read_text("utf-8"))
        assert n == 1, "the default of n_layers stands elsewhere now"
        config.write_text(text, "utf-8")

    def run(self, command: str) -> None:
        """Run a command to its end, or to where its server answers."""
        if export := re.fullmatch(r"export (\w+)=(\S+)", command):
            self.exports[export[1]] = export[2]
            return
        env = os.environ | {f"MINIMIND_{name}": value for name, value in TINY.items()}
        env |= {"OMP_NUM_THREADS": "1", "PATH": f"{self.root}/.venv/bin:{os.environ['PATH']}"}
        env |= {"WANDB_MODE": "offline", **self.exports}
        server = next((name for name in SERVERS if name in command), None)
        if server:
            self.serve(command, server, env)
            return
        for name, port in {"8000": "my_openai_api.py", "8501": "fast_inference.py"}.items():
            if f":{name}" in command:
                assert port in self.servers, f"nobody has started {port} before: {command}"
                command = command.replace(f":{name}", f":{self.servers[port].port}")
        if command.startswith("curl "):
            command = command.replace("curl ", "curl --fail-with-body --silent --show-error ", 1)
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.root, env=env, encoding="utf-8", errors="replace",
            input="你好\nexit\n", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"

    def serve(self, command: str, name: str, env: dict[str, str]) -> None:
        """Start a server in the place of an earlier one, and wait until it answers."""
        self.stop(name)
        port = free_port()
        command = re.sub(r"--host \S+", "", command)
        command = f"exec {command}"
        log = self.root / "server.log"
        with open(log, "wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", command], cwd=self.root, env=env | {"MINIMIND_PORT": port},
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        process.port = port
        self.servers[name] = process
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, f"{command}\n{log.read_text('utf-8')[-3000:]}"
            assert time.monotonic() < deadline, f"{command}\n{log.read_text('utf-8')[-3000:]}"
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}{SERVERS[name]}", timeout=5).close()
                return
            time.sleep(0.1)

    def stop(self, name: str) -> None:
        if process := self.servers.pop(name, None):
            process.terminate()
            process.wait(60)


def _lines(path: Path, n: int) -> list[str]:
    with open(path, encoding="utf-8", newline="\n") as file:
        return list(islice(file, n))


def _head(source: Path, target: Path, n: int) -> None:
    target.write_text("".join(_lines(source, n)), "utf-8")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    workshop = Workshop(tmp_path_factory.mktemp("project"))
    yield workshop
    for name in list(workshop.servers):
        workshop.stop(name)


# ---- what is tested ----


def name_of(value: object) -> str:
    if isinstance(value, Page):
        return value.name
    return re.sub(r"\s+", " ", value)[:60] if isinstance(value, str) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "line", "command"),
    [
        pytest.param(*item, marks=[pytest.mark.soak] if item[2].startswith(LAUNCHERS) else [])
        for item in COMMANDS
        if reason_not_to_run(item[2]) is None
    ],
    ids=name_of,
)
def test_the_command_works(page: Page, line: int, command: str, workshop: Workshop) -> None:
    workshop.run(command)


def test_what_is_not_run_is_still_there() -> None:
    for text in NOT_RUN:
        assert any(text in command for *_, command in COMMANDS), f"no page has {text!r} any more"


@cache
def flags_of(script: str) -> set[str]:
    """Return the flags that a script's ``--help`` lists; a benchmark's, which imports torch before
    that, are read in its source.
    """
    if script.startswith("benchmarks/"):
        return set(re.findall(r'"(--[a-z]\w*)"', (ROOT / script).read_text("utf-8")))
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, encoding="utf-8", check=True
    )
    return set(re.findall(r"--[a-z]\w*", done.stdout)) | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_that_are_named_exist(page: Page) -> None:
    """In commands, those that are not run and those in the text included."""
    inline = re.findall(r"`((?:python|torchrun|deepspeed) [^`]+)`", page.prose)
    for command in [*inline, *(command for _, command in page.commands())]:
        script = re.search(r"[\w/.-]*\w\.py\b", command)
        if script is None or not (ROOT / script[0]).is_file() or "install" in command:
            continue
        if script[0].startswith("images/"):
            continue
        given = set(re.findall(r"--[a-z]\w*", command[script.end() :]))
        unknown = given - flags_of(script[0])
        assert not unknown, f"{page.name}: {script[0]} has no {' '.join(unknown)}: {command}"
