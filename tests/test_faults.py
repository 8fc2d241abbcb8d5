"""Several ranks under fire: nothing is lost but the updates since the last save."""

import os
import random
import signal
from functools import partial
from pathlib import Path

import pytest
from tiny_runs import (
    exit_codes,
    pretrain_flags,
    records,
    run_ranks,
    same_weights,
    start_ranks,
    states,
    wait_until,
    write_corpus,
)

pytestmark = pytest.mark.slow
RUN = "--max_steps 40 --dropout 0.1 --log_interval 1 --eval_interval 9 --save_interval 3 --resume"
ENGINES = {"DDP": "", "ZeRO 2": "--zero_stage 2", "mixture, ZeRO 3": "--use_moe --zero_stage 3"}
# Two disturbed starts each; one round of each engine in `make test`
ROUNDS = [
    pytest.param(engine, number, marks=[] if number == 0 else pytest.mark.soak)
    for engine in ENGINES
    for number in range(34)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def command(corpus: Path, out: Path, flags: str) -> list[str]:
    given = f"{flags} --val_data_path {corpus}/val.csv --batch_size 2"
    return [*pretrain_flags(corpus, out), *RUN.split(), *given.split()]


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The outcome of a run that nobody disturbs, by engine, as far as it has been asked for."""
    return Outcomes(corpus, tmp_path_factory)


class Outcomes(dict):
    def __init__(self, corpus: Path, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self.corpus, self.factory = corpus, factory

    def __missing__(self, engine: str) -> Path:
        out = self.factory.mktemp("undisturbed")
        given = command(self.corpus, out, ENGINES[engine])
        assert run_ranks(2, "1-pretrain.py", *given, log=out / "log") == [0, 0]
        self[engine] = out
        return out


def has_come_to(log: Path, n_starts: int, metrics: Path, n_lines: int) -> bool:
    """Say whether a run, started so many times, has recorded so many lines."""
    if not (log.is_file() and metrics.is_file()):
        return False
    is_this_start = log.read_text("utf-8").count("schedule  ") >= n_starts
    return is_this_start and metrics.read_bytes().count(b"\n") >= n_lines


@pytest.mark.parametrize(("engine", "number_of_round"), ROUNDS)
def test_ranks_killed_at_random_moments(
    corpus: Path, tmp_path: Path, undisturbed: Outcomes, engine: str, number_of_round: int
) -> None:
    """One of them or all, by kill -9, or one by SIGTERM; whoever is left ends by itself."""
    source = random.Random(f"{engine} {number_of_round}")
    whole, log = undisturbed[engine], tmp_path / "log"
    run_name = "pretrain_32_moe" if "moe" in ENGINES[engine] else "pretrain_32"
    given = command(corpus, tmp_path / "out", ENGINES[engine])
    metrics = tmp_path / "out/logs" / run_name / "metrics.jsonl"
    for n_starts in (1, 2):
        processes = start_ranks(2, "1-pretrain.py", *given, log=log)
        aim = source.randint(1, 18) * n_starts
        wait_until(partial(has_come_to, log, n_starts, metrics, aim), processes[0])
        processes[0].join(source.random() * 0.1)  # and anywhere in the middle of something
        number = source.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        victims = source.choice((processes[:1], processes[1:], processes))
        for process in victims:
            if process.is_alive():
                os.kill(process.pid, number)
        codes = exit_codes(processes)
        # on its own a rank ends well, was killed, stopped with a save, or lost the other
        assert set(codes) <= {0, -number, 128 + number, 1}, (codes, log.read_text("utf-8"))
    folder = tmp_path / "out/checkpoints" / run_name
    has_saved = any(folder.glob("step_*"))  # unless both starts were killed before that
    n_before = log.read_text("utf-8").count("going on from update")
    assert run_ranks(2, "1-pretrain.py", *given, log=log) == [0, 0]
    said = log.read_text("utf-8")
    assert "Traceback" not in said, said
    assert said.count("going on from update") == n_before + has_saved, said
    assert records(tmp_path / "out", run_name) == records(whole, run_name)
    assert same_weights(tmp_path / "out" / f"{run_name}.pth", whole / f"{run_name}.pth")
    assert states(tmp_path / "out", run_name)[-1] == "step_40"
    assert all(name.startswith("step_") for name in states(tmp_path / "out", run_name))


def test_a_full_disk_and_a_damaged_state_cost_ranks_no_more_than_a_save(
    corpus: Path, tmp_path: Path, undisturbed: Outcomes
) -> None:
    whole, out, log = undisturbed["DDP"], tmp_path / "out", tmp_path / "log"
    given = command(corpus, out, ENGINES["DDP"])
    folder = out / "checkpoints/pretrain_32"
    processes = start_ranks(2, "1-pretrain.py", *given, log=log)
    wait_until(lambda: (folder / "step_9").is_dir(), processes[0])
    os.kill(processes[0].pid, signal.SIGKILL)
    assert exit_codes(processes) == [-signal.SIGKILL, 1]
    assert "error on rank 1: another rank has ended" in log.read_text("utf-8")
    newest, before = sorted(folder.glob("step_*"), key=lambda p: int(p.name[5:]))[:-3:-1]
    with open(newest / "state.pt", "r+b") as file:  # a flipped bit
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    size = (before / "state.pt").stat().st_size
    assert run_ranks(2, "1-pretrain.py", *given, log=log, disk_bytes=size // 2)[0] == 1
    said = log.read_text("utf-8")
    assert f"{newest} is damaged" in said
    assert f"going on from update {before.name[5:]} of 40" in said
    assert "is not saved" in said and "error on rank 0" in said, "the last save must be"
    assert run_ranks(2, "1-pretrain.py", *given, log=log) == [0, 0]
    assert "Traceback" not in log.read_text("utf-8")
    assert records(out) == records(whole)
    assert same_weights(out / "pretrain_32.pth", whole / "pretrain_32.pth")


def test_a_second_start_of_several_ranks_is_refused(corpus: Path, tmp_path: Path) -> None:
    log, second = tmp_path / "log", tmp_path / "second"
    given = command(corpus, tmp_path / "out", "--max_steps 100000")
    processes = start_ranks(2, "1-pretrain.py", *given, log=log)
    folder = tmp_path / "out/checkpoints/pretrain_32"
    wait_until(lambda: (folder / "step_3").is_dir(), processes[0])
    refused = run_ranks(2, "1-pretrain.py", *given, log=second)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    assert exit_codes(processes) == [143, 143]
    assert refused == [1, 1]
    assert f"{folder} is in use by process {processes[0].pid}" in second.read_text("utf-8")
