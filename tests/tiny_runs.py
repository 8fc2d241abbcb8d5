"""Tiny corpora, a tiny tokenizer, and ways to start a training script on them.

In this process, which takes a fraction of a second, or in one that can be killed: forked from a
server that has imported everything once.
"""

import contextlib
import csv
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
WORDS = (
    "river mountain 长江 黄河 the of and a 山 水 city 北京 walks sings 唱歌 quickly slowly 。 , !"
)
MODEL = "--dim 32 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 48"
QUIET = "--log_interval 1000 --eval_interval 1000 --save_interval 1000"
PLACE = "--device cpu --dtype float32"
TIMES = {"elapsed_s", "tokens_per_s", "mfu"}  # what may differ between two runs of the same


# ----------------------------------------------------------------------------- files


def sentence(source: random.Random, n_words: int) -> str:
    return " ".join(source.choice(WORDS.split()) for _ in range(n_words))


def write_tokenizer(folder: Path, vocab_size: int = 300) -> Path:
    """Train a tokenizer of the project's kind; so small that a step takes milliseconds.

    With the shipped chat template, for whoever loads the folder with ``transformers``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from model.tokenizer import DEFAULT_TOKENIZER

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS, "user assistant"] * 9, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    shutil.copy(DEFAULT_TOKENIZER / "tokenizer_config.json", folder)
    return folder


def write_documents(path: Path, n: int, seed: int = 0, longest: int = 40) -> Path:
    """Write a pretraining table of ``n`` documents."""
    source = random.Random(seed)
    rows = [[sentence(source, source.randint(1, longest))] for _ in range(n)]
    return write_csv(path, ["text"], rows)


def write_chats(path: Path, n: int, turns: int = 1, seed: int = 0) -> Path:
    """Write a fine-tuning table of ``n`` conversations of up to ``turns`` turns."""
    source = random.Random(seed)
    rows = []
    for _ in range(n):
        n_texts = 2 * source.randint(1, turns)
        texts = [sentence(source, source.randint(1, 3)) for _ in range(n_texts)]
        history = [texts[i : i + 2] for i in range(0, len(texts) - 2, 2)]
        rows.append([json.dumps(history, ensure_ascii=False), *texts[-2:]])
    return write_csv(path, ["history", "q", "a"], rows)


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_corpus(folder: Path) -> Path:
    """Fill a folder: ``tokenizer/``, ``pretrain.csv``, ``val.csv``, ``sft_single.csv``,
    ``sft_multi.csv``.
    """
    write_tokenizer(folder / "tokenizer")
    write_documents(folder / "pretrain.csv", 300)
    write_documents(folder / "val.csv", 20, seed=5, longest=10)
    write_chats(folder / "sft_single.csv", 300, seed=1)
    write_chats(folder / "sft_multi.csv", 300, turns=3, seed=2)
    return folder


# ----------------------------------------------------------------------------- starting scripts


@cache
def script(name: str) -> ModuleType:
    """Import a numbered script."""
    spec = importlib.util.spec_from_file_location("script_" + name[0], ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *flags: object) -> int:
    """Run a script in this process; a flag may be a string of several, separated by spaces."""
    return script(name).main([word for flag in flags for word in str(flag).split()])


def pretrain(corpus: Path, out: Path, *flags: object) -> int:
    """Run ``1-pretrain.py`` with the tiny model on the corpus; later flags win."""
    return run("1-pretrain.py", *pretrain_flags(corpus, out), *flags)


def pretrain_flags(corpus: Path, out: Path) -> list[str]:
    files = f"--data_path {corpus}/pretrain.csv --tokenizer {corpus}/tokenizer --out_dir {out}"
    return [*files.split(), *MODEL.split(), *QUIET.split(), *PLACE.split(), "--batch_size", "4"]


def records(out: Path, run_name: str = "pretrain_32") -> list[dict[str, Any]]:
    """Return what a run recorded, without what depends on the clock."""
    lines = (out / "logs" / run_name / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def states(out: Path, run_name: str = "pretrain_32") -> list[str]:
    """Return the names of everything in a run's folder of states."""
    return sorted(path.name for path in (out / "checkpoints" / run_name).iterdir())


def same_weights(one: Path, other: Path) -> bool:
    """Say whether two weights files hold the same tensors, bit for bit."""
    import torch

    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """Let no file grow beyond ``n_bytes``: to who writes it looks like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ----------------------------------------------------------------------------- to be killed

PRELOAD = (
    "model.trainer",
    "model.dataset",
    "model.checkpoint",
    "matplotlib.pyplot",
    "deepspeed",  # seconds, which each rank of each test would take
    "tiny_runs",
)


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def start(
    name: str,
    *flags: object,
    log: Path,
    env: dict[str, str] | None = None,
    disk_bytes: int | None = None,
) -> multiprocessing.Process:
    """Start a script in a process of its own within milliseconds.

    Args:
        log: gets what it prints.
        disk_bytes: as :func:`full_disk` has it.
    """
    process = _server().Process(
        target=_child, args=(name, flags, log, env or {}, disk_bytes), daemon=True
    )
    process.start()
    return process


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def rank_environment(rank: int, n_ranks: int, port: str) -> dict[str, str]:
    """Return the environment that ``torchrun`` sets for a rank, all being on one machine."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": n_ranks, "RANK": rank}
    env |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n_ranks}
    return {name: str(value) for name, value in env.items()}


def start_ranks(
    n_ranks: int, name: str, *flags: object, log: Path, disk_bytes: int | None = None
) -> list[multiprocessing.Process]:
    """Start a script as the ranks of one run."""
    port = free_port()
    environments = [rank_environment(rank, n_ranks, port) for rank in range(n_ranks)]
    return [start(name, *flags, log=log, env=e, disk_bytes=disk_bytes) for e in environments]


def run_ranks(
    n_ranks: int, name: str, *flags: object, log: Path, disk_bytes: int | None = None
) -> list[int]:
    """Run a script as the ranks of one run to its end; return their exit codes."""
    return exit_codes(start_ranks(n_ranks, name, *flags, log=log, disk_bytes=disk_bytes))


def exit_codes(processes: list[multiprocessing.Process]) -> list[int]:
    """Wait for processes; None for one that does not end within a minute."""
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def _child(
    name: str,
    flags: tuple[object, ...],
    log: Path,
    env: dict[str, str],
    disk_bytes: int | None,
) -> None:
    import torch

    from model.flags import run_main

    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    torch.set_num_threads(1)
    with full_disk(disk_bytes) if disk_bytes else contextlib.nullcontext():
        run_main(lambda: run(name, *flags))


def wait_until(is_so: Callable[[], bool], process: multiprocessing.Process) -> None:
    """Return when something has come about, or the process that should bring it has ended."""
    deadline = time.monotonic() + 60
    while not is_so() and process.is_alive():
        assert time.monotonic() < deadline, "nothing happens"
        process.join(0.002)
