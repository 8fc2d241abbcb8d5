"""The commands whose terminals terminal.py draws, run for real."""

import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from screen import ROOT, Command, Screen

PORT = 8000
URL = f"http://127.0.0.1:{PORT}/v1"
CONTENT = '  | grep -oP \'"content":"\\K[^"]*\''  # what the model says, out of the JSON
QUESTIONS = (
    "你好",
    "你是谁？",
    "法国的首都是哪里？",
    "那日本呢？",
    "What is the capital of Italy?",
    "exit",
)
REQUESTS = (
    (f'curl -s {URL}/models | grep -o \'"id":"[^"]*"\'',),
    (
        f"curl -s {URL}/chat/completions --json",
        """  '{"messages": [{"role": "user", "content": "你是谁？"}], "temperature": 0}'""",
        CONTENT,
    ),
    (
        f"curl -sN {URL}/chat/completions --json",
        """  '{"messages": [{"role": "user", "content": "法国的首都是哪里？"}], "stream": true}'""",
        CONTENT + " | tr '\\n' ' '",
    ),
)
PRETRAIN = (
    "1-pretrain.py --data_path out/demo/data/pretrain_data.csv --out_dir out/mine",
    "  --dim 192 --n_layers 4 --n_heads 6 --n_kv_heads 3 --max_seq_len 128 --batch_size 4",
    "  --optimizer adamw --epochs 8 --eval_interval 100",
)


def prompt(*lines: str) -> list[str]:
    """Return the rows of a command as a shell shows it while it is typed."""
    shown = " \\\n> ".join(lines)
    return f"$ {shown}".split("\n")


def python(command: str, columns: int) -> Command:
    return Command([sys.executable, *shlex.split(command)], columns)


def run_eval(columns: int) -> list[dict]:
    line = "2-eval.py --interactive --temperature 0"
    command = python(line, columns)
    for question in QUESTIONS:
        command.until("用户: ")
        command.type(question)
    rows = [*prompt(f"python {line}"), *command.finish()]
    return [{"title": "python 2-eval.py", "rows": rows}]


def run_server(columns: int) -> list[dict]:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            raise SystemExit(f"port {PORT} is taken: end what listens there")
    server = python("my_openai_api.py", columns)
    server.until("Ctrl-C stops")
    rows: list[str] = []
    for request in REQUESTS:
        rows += prompt(*request)
        command = " \\\n".join(request)
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        screen = Screen(columns)
        screen.feed(done.stdout.replace("\n", "\r\n"))
        rows += screen.rows()
        time.sleep(1)
    server.process.send_signal(signal.SIGINT)
    shown = [*prompt("python my_openai_api.py"), *server.finish()]
    return [{"title": "the server", "rows": shown}, {"title": "a client", "rows": rows}]


def run_pretrain(columns: int) -> list[dict]:
    """Train in a temporary folder, which the screen shows as out/mine."""
    with tempfile.TemporaryDirectory(prefix="pt_", dir=ROOT / "out") as folder:
        shown = Path(folder).relative_to(ROOT).as_posix()
        assert len(shown) > len("out/mine")
        command = python(" ".join(PRETRAIN).replace("out/mine", shown), columns)
        command.finish()
        command.text = command.text.replace(shown, "out/mine")
    rows = [*prompt(f"python {PRETRAIN[0]}", *PRETRAIN[1:]), *command.rows()]
    return [{"title": "python 1-pretrain.py", "rows": rows}]


RUNS = {"eval": run_eval, "server": run_server, "pretrain": run_pretrain}
