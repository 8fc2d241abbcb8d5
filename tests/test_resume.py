"""Stopped in any way, a resumed run is the run that was never stopped, bit for bit."""

import contextlib
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_trainer import Recorder, make_run, parts_of_run, run_with, signalling
from tiny_runs import (
    pretrain,
    pretrain_flags,
    records,
    same_weights,
    start,
    states,
    wait_until,
    write_corpus,
    write_documents,
    write_tokenizer,
)

from model.losses import language_model_loss
from model.trainer import train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    write_documents(folder / "pretrain.csv", 40, longest=25)
    return folder


def copy_of(corpus: Path, folder: Path) -> Path:
    """Return a corpus that a test may change."""
    return shutil.copytree(corpus, folder / "corpus")


def check_same(out: Path, straight: Path) -> None:
    """Compare everything but the clock with a run that was never stopped."""
    assert records(out) == records(straight)
    assert same_weights(out / "pretrain_32.pth", straight / "pretrain_32.pth")
    assert states(out) == states(straight)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in straight.iterdir())
    newest = states(out)[-1]
    one, other = (
        torch.load(o / "checkpoints" / "pretrain_32" / newest / "state.pt", weights_only=True)
        for o in (out, straight)
    )
    for key in ("optimizer", "random"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


# ----------------------------------------------------------------------------- kills


VARIANTS = {
    "every update saved": "--epochs 1 --save_interval 1",
    "dropout": "--epochs 1 --dropout 0.1 --keep_last 3",
    "accumulation over epochs": "--epochs 3 --batch_size 2 --accumulation_steps 3",
    "mixture of experts": "--epochs 1 --use_moe --dropout 0.1",
}


ROUNDS = (0, *(pytest.param(i, marks=pytest.mark.soak) for i in range(1, 25)))  # 4 kills each


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("number_of_round", ROUNDS)
def test_killed_at_random_moments(
    corpus: Path, tmp_path: Path, name: str, number_of_round: int
) -> None:
    """kill -9, SIGTERM and SIGINT, several times a run; every start is the same command."""
    source = random.Random(f"{name} {number_of_round}")
    flags = f"--val_data_path {corpus}/val.csv --log_interval 1 --eval_interval 5 --resume "
    flags += f"--save_interval 3 {VARIANTS[name]}"
    out, straight = tmp_path / "out", tmp_path / "straight"
    run_name = "pretrain_32_moe" if "moe" in flags else "pretrain_32"
    metrics = out / "logs" / run_name / "metrics.jsonl"

    def begin(out: Path):
        command = [*pretrain_flags(corpus, out), *flags.split()]
        return start("1-pretrain.py", *command, log=tmp_path / f"{out.name}.log")

    def said(out: Path) -> str:
        log = tmp_path / f"{out.name}.log"
        return log.read_text("utf-8") if log.is_file() else ""

    def has_come_to(n_starts: int, n_lines: int) -> Callable[[], bool]:
        def is_so() -> bool:
            n_written = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
            return n_written >= n_lines and said(out).count("\nschedule ") == n_starts

        return is_so

    whole = begin(straight)
    whole.join()
    assert whole.exitcode == 0, said(straight)
    n_lines = len(records(straight, run_name))
    for n_starts in range(1, 5):
        number = source.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        process = begin(out)
        moment = source.randint(n_starts * n_lines // 6, n_starts * n_lines // 5)
        wait_until(has_come_to(n_starts, moment), process)
        process.join(source.random() * 0.1)  # and anywhere in the middle of something
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        process.join()
        assert process.exitcode in (-number, 128 + number, 0), said(out)
    last = begin(out)
    last.join()
    assert last.exitcode == 0 and "Traceback" not in said(out), said(out)
    assert "going on from update" in said(out)
    assert records(out, run_name) == records(straight, run_name)
    weights = f"{run_name}.pth"
    assert same_weights(out / weights, straight / weights)
    left, expected = states(out, run_name), states(straight, run_name)
    assert len(left) == len(expected) and left[-1] == expected[-1]  # no leftovers of killed saves
    assert all(re.fullmatch(r"step_\d+", state) for state in left)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in straight.iterdir())


# ----------------------------------------------------------------------------- stops


STOPPED = "--max_steps 8 --log_interval 3 --eval_interval 4 --save_interval 100"


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    out = tmp_path_factory.mktemp("straight")
    assert pretrain(corpus, out, STOPPED, f"--val_data_path {corpus}/val.csv") == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("moment", (1, 4, 5, 7))
def test_stopped_between_two_log_lines(
    corpus: Path, tmp_path: Path, straight: Path, moment: int
) -> None:
    flags = f"{STOPPED} --val_data_path {corpus}/val.csv"
    assert run_with(corpus, tmp_path, signalling(moment), flags) == 143
    assert states(tmp_path) == [f"step_{moment}"]
    assert pretrain(corpus, tmp_path, flags, "--resume") == 0
    shutil.rmtree(tmp_path / "checkpoints" / "pretrain_32" / f"step_{moment}")
    check_same(tmp_path, straight)


@pytest.mark.slow
@pytest.mark.parametrize("moment", (1, 2))
def test_stopped_in_the_middle_of_a_validation(
    corpus: Path, tmp_path: Path, straight: Path, moment: int
) -> None:
    """The first, and that of the last update; stopped again before it is made up for."""
    flags = f"{STOPPED} --val_data_path {corpus}/val.csv"
    stop = signalling(moment, training=False)
    assert run_with(corpus, tmp_path, stop, flags) == 143
    step = 4 * moment
    assert states(tmp_path) == [f"step_{step}"]
    assert max(record["step"] for record in records(tmp_path)) <= step
    assert not [r for r in records(tmp_path) if "val_loss" in r and r["step"] == step]
    again = signalling(1, training=False)
    assert run_with(corpus, tmp_path, again, f"{flags} --resume") == 143
    for _ in range(2):
        assert pretrain(corpus, tmp_path, flags, "--resume") == 0
    shutil.rmtree(tmp_path / "checkpoints" / "pretrain_32" / "step_4", ignore_errors=True)
    check_same(tmp_path, straight)


@pytest.mark.slow
def test_lines_beyond_the_state_are_cut_off(corpus: Path, tmp_path: Path) -> None:
    flags = "--max_steps 6 --log_interval 1 --save_interval 2"
    metrics = tmp_path / "logs" / "pretrain_32" / "metrics.jsonl"
    assert run_with(corpus, tmp_path, signalling(4), flags) == 143
    shutil.rmtree(tmp_path / "checkpoints" / "pretrain_32" / "step_4")
    with open(metrics, "a") as file:
        file.write('{"step": 5, "lo')  # as a kill leaves it
    assert pretrain(corpus, tmp_path, flags, "--resume") == 0
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


# ----------------------------------------------------------------------------- what is resumed


def test_nothing_to_resume_is_said_and_started(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert pretrain(corpus, tmp_path, "--max_steps 1 --resume") == 0
    assert "nothing to resume in" in capsys.readouterr().out
    assert states(tmp_path) == ["step_1"]


def damage(out: Path, state: str, how: str) -> None:
    folder = out / "checkpoints" / "pretrain_32" / state
    path = folder / "state.pt"
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[:-100])
    elif how == "flipped":
        content[len(content) // 3] ^= 0x10
        path.write_bytes(content)
    else:
        (folder / "manifest.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("how", ("truncated", "flipped", "no manifest"))
def test_a_damaged_newest_state_costs_its_updates_alone(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture, how: str
) -> None:
    flags = "--max_steps 6 --log_interval 1 --save_interval 2"
    assert run_with(corpus, tmp_path / "out", signalling(5), flags) == 143
    damage(tmp_path / "out", "step_5", how)
    assert pretrain(corpus, tmp_path / "out", flags, "--resume") == 0
    shown = capsys.readouterr()
    assert "going on from update 4 of 6" in shown.out
    assert shown.err.count("warning: ") == 1 and "step_5 is damaged" in shown.err
    pretrain(corpus, tmp_path / "straight", flags)
    check_same(tmp_path / "out", tmp_path / "straight")


@pytest.mark.slow
def test_where_no_state_is_whole_nothing_is_thrown_away(corpus: Path, tmp_path: Path) -> None:
    flags = "--max_steps 6 --save_interval 2"
    assert run_with(corpus, tmp_path, signalling(5), flags) == 143
    for state in states(tmp_path):
        damage(tmp_path, state, "truncated")
    with pytest.raises(ValueError, match="no state in .* is whole: start anew with --overwrite"):
        pretrain(corpus, tmp_path, flags, "--resume")
    assert states(tmp_path) == ["step_4", "step_5"]
    assert pretrain(corpus, tmp_path, flags, "--overwrite") == 0


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = f"--max_steps 4 --val_data_path {corpus}/val.csv"
    out, straight = tmp_path / "out", tmp_path / "straight"
    for folder in (out, straight):
        pretrain(corpus, folder, flags)
    (out / "pretrain_32.pth").unlink()  # as if killed between the state and the weights
    for _ in range(2):
        assert pretrain(corpus, out, flags, "--resume") == 0
        assert "all 4 updates are done already" in capsys.readouterr().out
        check_same(out, straight)


# ----------------------------------------------------------------------------- what has changed


@pytest.fixture
def stopped(corpus: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A corpus of its own, and a run on it that was stopped at update 2 of 6."""
    own = copy_of(corpus, tmp_path)
    assert run_with(own, tmp_path / "out", signalling(2), "--max_steps 6") == 143
    return own, tmp_path / "out"


CHANGES = {
    "--learning_rate 1e-3": "learning_rate: 0.004 then, 0.001 now",
    "--weight_decay 0": "weight_decay: 0.1 then, 0.0 now",
    "--optimizer adam": "optimizer: 'muon' then, 'adam' now",
    "--schedule cosine": "schedule: 'linear' then, 'cosine' now",
    "--seed 7": "seed: 1337 then, 7 now",
    "--grad_clip 0": "grad_clip: 1.0 then, 0.0 now",
    "--warmup_iters 3": "warmup_iters: None then, 3 now",
    "--max_steps 8": "max_steps: 6 then, 8 now",
    "--dropout 0.1": "config.dropout: 0.0 then, 0.1 now",
    "--max_seq_len 40": "config.max_seq_len: 48 then, 40 now",
    "--dtype bfloat16": "dtype: 'float32' then, 'bfloat16' now",
    "--batch_size 8": "rows an update: 4 then, 8 now",
}


@pytest.mark.slow
def test_a_change_is_refused_by_name_and_accepted_on_demand(
    stopped: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    own, out = stopped
    for change, difference in CHANGES.items():
        with pytest.raises(ValueError, match="was made with other settings") as caught:
            pretrain(own, out, "--max_steps 6", change, "--resume")
        assert difference in str(caught.value) and "--resume_anyway" in str(caught.value)
    assert states(out) == ["step_2"]
    write_documents(own / "pretrain.csv", 41, longest=25)
    with pytest.raises(ValueError, match="data: '[0-9a-f]{32}' then, '[0-9a-f]{32}' now"):
        pretrain(own, out, "--max_steps 6 --resume")
    capsys.readouterr()
    assert pretrain(own, out, "--max_steps 6 --resume_anyway") == 0
    assert "warning: resuming with a change: data" in capsys.readouterr().err


@pytest.mark.slow
def test_another_tokenizer_or_shape_is_no_change_to_accept(stopped: tuple[Path, Path]) -> None:
    own, out = stopped
    with pytest.raises(ValueError, match="of a model of another shape: give the flags it was"):
        pretrain(own, out, "--max_steps 6 --n_layers 3 --resume_anyway")
    write_tokenizer(own / "tokenizer", vocab_size=280)
    with pytest.raises(ValueError, match="tokenizer: '[0-9a-f]+' then, '[0-9a-f]+' now"):
        pretrain(own, out, "--max_steps 6 --resume")
    with pytest.raises(ValueError, match="of a model of another shape"):
        pretrain(own, out, "--max_steps 6 --resume_anyway")
    assert states(out) == ["step_2"]


@pytest.mark.slow
def test_accepted_settings_take_effect(stopped: tuple[Path, Path]) -> None:
    own, out = stopped
    run = make_run(own, out, "--max_steps 6 --weight_decay 0.5 --resume_anyway")
    settings = [dict(group, params=None) for group in run.engine.optimizer.param_groups]
    progress = run.saves.begin()
    assert [dict(group, params=None) for group in run.engine.optimizer.param_groups] == settings
    assert run.engine.optimizer.state and progress.step == 2


@pytest.mark.slow
def test_another_kind_of_optimizer_begins_anew(
    stopped: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    own, out = stopped
    flags = "--max_steps 6 --optimizer adamw --resume_anyway"
    run = make_run(own, out, flags)
    assert run.saves.begin().step == 2 and not run.engine.optimizer.state
    assert "the state is of another optimizer" in capsys.readouterr().err
    assert pretrain(own, out, flags) == 0


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", (1, 3, 16))
def test_another_size_of_update_goes_on_along_the_same_rows_to_the_end(
    corpus: Path, tmp_path: Path, batch_size: int
) -> None:
    """As on another number of devices: each row once, and the last step saves."""
    flags = "--epochs 1 --save_interval 1000"
    assert run_with(corpus, tmp_path, signalling(3), flags) == 143  # after 12 rows
    change = f"--batch_size {batch_size} --resume_anyway"
    start, data, args, runtime = parts_of_run(corpus, tmp_path, f"{flags} {change}")
    assert isinstance(data, Recorder)
    rows = make_run(corpus, tmp_path, flags).sampler.rows(range(data.n_rows)).tolist()
    assert train(start, data, args, runtime, stage="pretrain") == 0
    assert sum(data.batches, []) == rows[12:]
    n_steps = 3 + -(-(data.n_rows - 12) // batch_size)
    assert f"step_{n_steps}" in states(tmp_path)
    assert records(tmp_path)[-1]["epoch"] == 1
    assert pretrain(corpus, tmp_path, flags, change) == 0  # and it is known to be done


@pytest.mark.slow
def test_the_split_into_batches_is_no_change(corpus: Path, tmp_path: Path) -> None:
    flags = "--max_steps 6 --log_interval 1"
    assert run_with(corpus, tmp_path / "out", signalling(3), flags) == 143
    split = "--batch_size 1 --accumulation_steps 4"
    assert pretrain(corpus, tmp_path / "out", flags, split, "--resume") == 0
    pretrain(corpus, tmp_path / "straight", flags)
    ours, theirs = ([r["loss"] for r in records(o) if "lr" in r] for o in
                    (tmp_path / "out", tmp_path / "straight"))  # fmt: skip
    # other orders of the same fp32 sums, over three updates
    assert ours == pytest.approx(theirs, rel=1e-4) and ours[:3] == theirs[:3]


def test_the_loss_seam_is_the_real_loss(corpus: Path, tmp_path: Path) -> None:
    """The tests above hand in a loss of their own; it must be the one that scripts use."""
    batch = next(make_run(corpus, tmp_path).updates())[0]
    model = make_run(corpus, tmp_path).model
    one, other = signalling()(model, batch), language_model_loss(model, batch)
    assert torch.equal(one.loss, other.loss)


def test_a_second_run_in_the_same_place_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Two starts of one command: the second leaves the first alone, and goes on after it."""
    given = [*pretrain_flags(corpus, tmp_path), "--max_steps", "100000", "--resume"]
    process = start("1-pretrain.py", *given, "--save_interval", "1", log=tmp_path / "log")
    folder = tmp_path / "checkpoints" / "pretrain_32"
    wait_until(lambda: any(folder.glob("step_*")), process)
    for more in ("", "--overwrite"):
        with pytest.raises(ValueError, match=f"is in use by process {process.pid}: wait for it"):
            pretrain(corpus, tmp_path, "--max_steps 100000", more)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)  # leaves its lock file, but no lock
    process.join(60)
    newest = max(int(name.split("_")[1]) for name in states(tmp_path) if name.startswith("step"))
    assert pretrain(corpus, tmp_path, f"--max_steps {newest + 2} --resume_anyway") == 0
