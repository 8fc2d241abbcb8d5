"""Several machines, played by processes on this one: their disks, their launchers, their loss."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_distributed import check_same_course
from tiny_runs import (
    ROOT,
    exit_codes,
    free_port,
    pretrain,
    pretrain_flags,
    rank_environment,
    records,
    run_ranks,
    same_weights,
    start,
    states,
    wait_until,
    write_corpus,
    write_documents,
)

pytestmark = pytest.mark.slow
DATA = "--val_data_path {}/val.csv"
COURSE = "--max_steps 30 --log_interval 1 --eval_interval 10 --save_interval 2"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


# ----------------------------------------------------------------------------- disks


class Machine:
    """A folder with a corpus of its own and the results of the ranks that run there."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.corpus = write_corpus(folder)
        write_documents(folder / "pretrain.csv", 300, seed=seed)
        self.out, self.log = folder / "out", folder / "log"
        self.states = self.out / "checkpoints/pretrain_32"

    def start(self, rank: int, port: str):
        flags = f"{COURSE} --dropout 0.1 --resume --val_data_path {self.corpus}/val.csv"
        env = rank_environment(rank, 2, port) | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        given = [*pretrain_flags(self.corpus, self.out), *flags.split()]
        return start("1-pretrain.py", *given, log=self.log, env=env)


def start_on(*machines: Machine) -> list:
    port = free_port()
    return [machine.start(rank, port) for rank, machine in enumerate(machines)]


def test_machines_that_share_no_disk_make_their_own_stores_and_move_the_state(
    tmp_path: Path,
) -> None:
    """After a restart rank 0 may be elsewhere: it goes on from where the others' disk has come."""
    whole = [Machine(tmp_path / "whole_a"), Machine(tmp_path / "whole_b")]
    assert exit_codes(start_on(*whole)) == [0, 0]
    a, b = Machine(tmp_path / "a"), Machine(tmp_path / "b")
    processes = start_on(a, b)
    wait_until(lambda: (a.states / "step_8").is_dir(), processes[0])
    os.kill(processes[0].pid, signal.SIGTERM)
    assert exit_codes(processes) == [143, 143]
    assert not b.states.is_dir(), "one rank writes"
    assert exit_codes(start_on(b, a)) == [0, 0]
    assert "going on from update" in b.log.read_text("utf-8")
    assert states(b.out)[-1] == "step_30"
    assert same_weights(b.out / "pretrain_32.pth", whole[0].out / "pretrain_32.pth")


def test_machines_with_different_data_are_refused(tmp_path: Path) -> None:
    a, b = Machine(tmp_path / "a"), Machine(tmp_path / "b", seed=9)
    assert exit_codes(start_on(a, b)) == [1, 1]
    assert "the ranks do not agree (data: " in a.log.read_text("utf-8")
    assert "give every machine the same command and the same files" in b.log.read_text("utf-8")


# ----------------------------------------------------------------------------- launchers


def environment() -> dict[str, str]:
    """Of a launcher; the switch is for torch 2.13, whose agents otherwise cannot be replaced."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PATH": path}
    return {**os.environ, **own, "DS_ACCELERATOR": "cpu"}


def agent(port: str, flags: list[str], log: Path) -> subprocess.Popen:
    command = "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --max_restarts 3 --rdzv_id r"
    command += f" --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port} --local_addr 127.0.0.1"
    words = [sys.executable, *command.split(), str(ROOT / "1-pretrain.py"), *flags]
    return subprocess.Popen(
        words, stdout=open(log, "a"), stderr=subprocess.STDOUT, env=environment()
    )


def is_open(port: str) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", int(port))) == 0


def children(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def until(is_so: Callable[[], bool], *processes: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline, "nothing happens"
        assert all(process.poll() is None for process in processes), "a launcher has ended"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks into Linux's /proc")
def test_a_lost_machine_that_comes_back_goes_on_by_itself(corpus: Path, tmp_path: Path) -> None:
    """torchrun's agents on loopback: one is killed with its rank, the other waits for it."""
    course = f"--optimizer adamw --max_steps 300 --log_interval 20 --eval_interval 100 {DATA}"
    course += " --save_interval 10"
    course = course.format(corpus)
    assert pretrain(corpus, tmp_path / "one", course, "--batch_size 4") == 0
    out = tmp_path / "two"
    more = f"{course} --batch_size 2 --resume"
    flags = [*pretrain_flags(corpus, out), *more.split()]
    port, logs = free_port(), [tmp_path / "a.log", tmp_path / "b.log"]
    host = agent(port, flags, logs[0])
    lost = back = None
    try:
        until(lambda: is_open(port), host)  # it is the one that they meet at
        lost = agent(port, flags, logs[1])
        until((out / "checkpoints/pretrain_32/step_20").is_dir, host, lost)
        for pid in (lost.pid, *children(lost)):
            os.kill(pid, signal.SIGKILL)
        back = agent(port, flags, logs[1])
        assert host.wait(120) == 0, said(logs[0])
        assert back.wait(60) == 0, said(logs[1])
    finally:
        for process in filter(None, (host, lost, back)):
            process.kill()
            process.wait()
    shown = said(logs[0]) + said(logs[1])
    assert "another rank has ended" in shown and "going on from update" in shown, shown
    check_same_course(tmp_path / "one", out, "pretrain_32", 1e-4)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks into Linux's /proc")
@pytest.mark.parametrize(
    ("victim", "number"),
    (("rank 0", signal.SIGTERM), ("launcher", signal.SIGINT), ("launcher", signal.SIGKILL)),
)
def test_whatever_is_stopped_under_a_launcher_the_last_update_is_saved(
    corpus: Path, tmp_path: Path, victim: str, number: int
) -> None:
    """Launchers signal all ranks as soon as one ends; here a save takes long enough to be hit."""
    flags = "--dim 384 --n_layers 8 --max_steps 100000 --save_interval 100000 --log_interval 1"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += [str(ROOT / "1-pretrain.py"), *pretrain_flags(corpus, tmp_path), *flags.split()]
    metrics = tmp_path / "logs/pretrain_384/metrics.jsonl"
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(words, stdout=log, stderr=log, env=environment())
    ranks: list[int] = []
    try:
        until(lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") > 2, launcher)
        ranks = children(launcher)
        os.kill(min(ranks) if victim == "rank 0" else launcher.pid, number)
        until(lambda: not any(map(is_running, ranks)))
        launcher.wait(60)
    finally:
        launcher.kill()
        for pid in filter(is_running, ranks):
            os.kill(pid, signal.SIGKILL)
    last = records(tmp_path, "pretrain_384")[-1]["step"]
    assert states(tmp_path, "pretrain_384") == [f"step_{last}"], said(tmp_path / "log")
    assert (tmp_path / "pretrain_384.pth").is_file()
    assert f"stopped at update {last} of 100,000" in said(tmp_path / "log")


def is_running(pid: int) -> bool:
    """Say whether a process is there and no zombie."""
    path = Path(f"/proc/{pid}/stat")
    return path.is_file() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def said(log: Path) -> str:
    return log.read_text("utf-8") if log.is_file() else ""


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed's launcher is for Linux")
def test_deepspeed_trains_on_the_machines_of_a_hostfile(corpus: Path, tmp_path: Path) -> None:
    """Started by hand on each, as where there is no ssh; the same as two ranks on one."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n", "utf-8")
    course = f"{COURSE} --val_data_path {corpus}/val.csv --zero_stage 2"
    port, launchers = free_port(), []
    for number in (0, 1):
        command = f"--hostfile {hostfile} --no_ssh --node_rank {number} --master_addr 127.0.0.1"
        words = [
            Path(sys.executable).with_name("deepspeed"),
            *command.split(),
            "--master_port",
            port,
        ]
        words += [
            ROOT / "1-pretrain.py",
            *pretrain_flags(corpus, tmp_path / "out"),
            *course.split(),
        ]
        with open(tmp_path / f"log{number}", "w") as log:
            launchers.append(
                subprocess.Popen(
                    list(map(str, words)), stdout=log, stderr=subprocess.STDOUT, env=environment()
                )
            )
    codes = [launcher.wait(120) for launcher in launchers]
    assert codes == [0, 0], said(tmp_path / "log0") + said(tmp_path / "log1")
    given = [*pretrain_flags(corpus, tmp_path / "one"), *course.split()]
    assert run_ranks(2, "1-pretrain.py", *given, log=tmp_path / "log") == [0, 0]
    assert records(tmp_path / "out") == records(tmp_path / "one")
    assert same_weights(tmp_path / "out/pretrain_32.pth", tmp_path / "one/pretrain_32.pth")
