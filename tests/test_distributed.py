"""Several ranks: the mathematics of one process, the same rows, one stop for all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    MODEL,
    PLACE,
    ROOT,
    free_port,
    pretrain,
    pretrain_flags,
    records,
    run,
    run_ranks,
    same_weights,
    start_ranks,
    states,
    wait_until,
    write_chats,
    write_corpus,
    write_documents,
)

pytestmark = pytest.mark.slow
# AdamW is what DeepSpeed has too
OFTEN = "--log_interval 1 --eval_interval 5 --learning_rate 5e-3 --optimizer adamw"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    write_chats(folder / "own.csv", 60)
    pairs = [
        {"prompt": f"city {i}", "chosen": f"北京 {i % 7}", "rejected": f"walks {i % 5}"}
        for i in range(60)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs), "utf-8")
    return folder


def check_same_course(one: Path, other: Path, name: str, tolerance: float) -> None:
    """Compare the records of two runs: equal but for rounding."""
    first, second = records(one, name), records(other, name)
    assert len(first) == len(second) > 10
    for a, b in zip(first, second, strict=True):
        assert {key for key in a if key != "sample"} == {key for key in b if key != "sample"}
        for key in a.keys() - {"sample"}:
            if isinstance(a[key], float):  # the norm is a sum over all weights, rounded as often
                allowed = 100 * tolerance if key == "grad_norm" else tolerance
                assert a[key] == pytest.approx(b[key], rel=allowed, abs=allowed), (key, a, b)
            else:
                assert a[key] == b[key], (key, a, b)


# Sums in another order, fp32, after 50 updates: 1e-5 where no decision is taken. A mixture's router
# decides: where two experts are nearly alike, rounding chooses, and from there on the course is
# another.
SAME = {
    "dense": ("", 1e-5),
    "mixture": ("--use_moe", 1e-3),
    # small singular values are as much of an update as large ones, and more of them is rounding
    "muon": ("--optimizer muon", 1e-3),
}


@pytest.mark.parametrize("kind", SAME)
def test_two_ranks_train_as_one_process_with_accumulation(
    corpus: Path, tmp_path: Path, kind: str
) -> None:
    """Over the end of an epoch and to a last update that is not full."""
    flags, tolerance = SAME[kind]
    given = f"{OFTEN} {flags} --max_steps 50 --val_data_path {corpus}/val.csv"
    name = "pretrain_32_moe" if "moe" in flags else "pretrain_32"
    assert pretrain(corpus, tmp_path / "one", given, "--accumulation_steps 4") == 0
    log = tmp_path / "log"
    for out, more in (("two", "--accumulation_steps 2"), ("many", "--batch_size 8")):
        given_out = pretrain_flags(corpus, tmp_path / out)
        assert run_ranks(2, "1-pretrain.py", *given_out, given, more, log=log) == [0, 0]
        check_same_course(tmp_path / "one", tmp_path / out, name, tolerance)


def test_a_last_update_of_fewer_rows_than_ranks(corpus: Path, tmp_path: Path) -> None:
    """41 rows by 4 leave one row: a rank without a row takes part and adds nothing."""
    write_documents(tmp_path / "few.csv", 45, longest=60)
    flags = f"{OFTEN} --data_path {tmp_path}/few.csv --val_data_path {corpus}/val.csv --dropout 0"
    given = [*pretrain_flags(corpus, tmp_path / "out"), *flags.split()]
    n_rows = re.search(r"(\d+) rows of 48", dry_run(given, tmp_path / "dry"))[1]
    size = next(k for k in (4, 3, 5, 7) if int(n_rows) % k == 1)
    given += ["--epochs", "2"]
    single = f"--batch_size {size} --out_dir {tmp_path}/one"
    assert run("1-pretrain.py", *given, single) == 0
    assert (2 * int(n_rows)) % size in (1, 2)
    # so many ranks that some of the last update's have no row
    several = f"--batch_size 1 --out_dir {tmp_path}/several"
    codes = run_ranks(size, "1-pretrain.py", *given, several, log=tmp_path / "log")
    assert codes == [0] * size
    check_same_course(tmp_path / "one", tmp_path / "several", "pretrain_32", 1e-5)


def dry_run(flags: list[str], log: Path) -> str:
    assert run_ranks(1, "1-pretrain.py", *flags, "--dry_run", log=log) == [0]
    return log.read_text("utf-8")


def test_adapters_and_preferences_train_on_two_ranks_as_on_one(
    corpus: Path, tmp_path: Path
) -> None:
    given = (
        f"{PLACE} --tokenizer {corpus}/tokenizer {OFTEN} --max_steps 20 --init_from none {MODEL}"
    )
    for script, name, data in (
        ("3-full_sft.py", "full_sft_multi_32", "own.csv"),
        ("4-lora_sft.py", "lora_32", "own.csv"),
        ("5-dpo_train.py", "dpo_32", "pairs.json"),
    ):
        flags = f"{given} --data_path {corpus}/{data}"
        one = f"{flags} --out_dir {tmp_path}/one --batch_size 4"
        two = f"{flags} --out_dir {tmp_path}/two --batch_size 2"
        assert run(script, one) == 0
        assert run_ranks(2, script, two, log=tmp_path / "log") == [0, 0]
        check_same_course(tmp_path / "one", tmp_path / "two", name, 1e-4)


# ----------------------------------------------------------------------------- stops


def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_bit_for_bit(
    corpus: Path, tmp_path: Path
) -> None:
    """With dropout: each rank's random numbers are part of the state."""
    flags = f"--max_steps 24 --dropout 0.1 --val_data_path {corpus}/val.csv"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    log = tmp_path / "log"
    given = [*pretrain_flags(corpus, whole), flags]
    assert run_ranks(2, "1-pretrain.py", *given, log=log) == [0, 0]
    given = [*pretrain_flags(corpus, cut), flags, "--save_interval 1 --resume"]
    processes = start_ranks(2, "1-pretrain.py", *given, log=log)
    folder = cut / "checkpoints" / "pretrain_32"
    wait_until(lambda: any(folder.glob("step_[3-9]")), processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [143, 143]
    stopped_at = states(cut)
    assert run_ranks(2, "1-pretrain.py", *given, log=log) == [0, 0]
    assert states(cut) != stopped_at
    assert records(cut) == records(whole)
    assert same_weights(cut / "pretrain_32.pth", whole / "pretrain_32.pth")


@pytest.mark.parametrize(("before", "after"), ((1, 2), (2, 1)))
def test_a_run_goes_on_along_the_same_rows_on_another_number_of_ranks(
    corpus: Path, tmp_path: Path, before: int, after: int
) -> None:
    """With as many rows an update the course is the same; no flag has to accept anything."""
    flags = f"{OFTEN} --max_steps 24 --save_interval 1 --val_data_path {corpus}/val.csv"
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    log = tmp_path / "log"
    assert pretrain(corpus, straight, flags) == 0

    def given(n_ranks: int) -> list[str]:
        size = 4 // n_ranks
        return [*pretrain_flags(corpus, moved), *flags.split(), "--batch_size", str(size)]

    processes = start_ranks(before, "1-pretrain.py", *given(before), log=log)
    folder = moved / "checkpoints" / "pretrain_32"
    wait_until(lambda: any(folder.glob("step_[5-9]")), processes[0])
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    assert run_ranks(after, "1-pretrain.py", *given(after), "--resume", log=log) == [0] * after
    shown = log.read_text("utf-8")
    assert f"saved by {before} ranks, going on with {after}: 4 rows an update" in shown
    check_same_course(straight, moved, "pretrain_32", 1e-5)


def test_more_ranks_end_after_as_many_updates(corpus: Path, tmp_path: Path) -> None:
    """--max_steps counts updates whatever their size; another goal is a change to accept."""
    given = [*pretrain_flags(corpus, tmp_path), "--save_interval 1 --log_interval 1"]
    log, folder = tmp_path / "log", tmp_path / "checkpoints/pretrain_32"
    assert run("1-pretrain.py", *given, "--max_steps 20") == 0
    for path in folder.glob("step_20"):
        shutil.rmtree(path)
    more = [*given, "--resume"]
    assert run_ranks(2, "1-pretrain.py", *more, "--max_steps 30", log=log) == [1, 1]
    assert "max_steps: 20 then, 30 now" in log.read_text("utf-8")
    assert run_ranks(2, "1-pretrain.py", *more, "--max_steps 20", log=log) == [0, 0]
    found = [r for r in records(tmp_path) if "lr" in r]
    assert [r["step"] for r in found] == list(range(1, 21))
    assert [r["samples"] for r in found[-2:]] == [19 * 4, 19 * 4 + 8]


def test_torchrun_starts_it_and_an_error_on_one_rank_ends_all(corpus: Path, tmp_path: Path) -> None:
    def torchrun(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        given = [*pretrain_flags(corpus, tmp_path / "out"), *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, "--standalone", ROOT / "1-pretrain.py", *given],
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            env=env,
        )

    done = torchrun("--max_steps", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("weights: ") == 1, "one rank prints"
    assert "destroy_process_group" not in done.stderr, "they part in good order"
    state = torch.load(tmp_path / "out/checkpoints/pretrain_32/step_3/state.pt", weights_only=True)
    assert len(state["random"]) == 2
    done = torchrun("--max_steps", "3")  # refused: there is a run
    assert done.returncode == 1
    assert "holds a run that came to update 3" in done.stderr


# ----------------------------------------------------------------------------- DeepSpeed


@pytest.mark.parametrize(
    ("stage", "flags", "more", "tolerance"),
    ((1, "", "", 1e-5), (2, "--use_moe", "--offload", 1e-3), (3, "", "", 1e-5)),
)
def test_zero_trains_as_one_process(
    corpus: Path, tmp_path: Path, stage: int, flags: str, more: str, tolerance: float
) -> None:
    """The optimizer asked for really steps: the course is AdamW's with our rates and our decay."""
    given = f"{OFTEN} {flags} --max_steps 30 --val_data_path {corpus}/val.csv"
    assert pretrain(corpus, tmp_path / "one", given, "--accumulation_steps 4") == 0
    zero = [*pretrain_flags(corpus, tmp_path / "zero"), given, "--accumulation_steps 2"]
    zero += ["--zero_stage", str(stage), more]
    assert run_ranks(2, "1-pretrain.py", *zero, log=tmp_path / "log") == [0, 0]
    name = "pretrain_32_moe" if flags else "pretrain_32"
    check_same_course(tmp_path / "one", tmp_path / "zero", name, tolerance)
    one, two = (torch.load(tmp_path / f"{o}/{name}.pth") for o in ("one", "zero"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=100 * tolerance)


@pytest.mark.parametrize("optimizer", ("adamw", "adam"))
def test_the_optimizer_asked_for_makes_every_update(
    corpus: Path, tmp_path: Path, optimizer: str
) -> None:
    """Its own count of steps tells, over a stop; a configuration without one made v1 make none."""
    out = tmp_path / "out"
    given = [*pretrain_flags(corpus, out), f"--zero_stage 2 --optimizer {optimizer} --resume"]
    for n_updates in (4, 6):
        flags = [*given, f"--max_steps {n_updates} --resume_anyway"]
        assert run_ranks(2, "1-pretrain.py", *flags, log=tmp_path / "log") == [0, 0]
        state = torch.load(out / f"checkpoints/pretrain_32/step_{n_updates}/state.pt")
        assert {float(s["step"]) for s in state["optimizer"].values()} == {float(n_updates)}
        assert len(state["optimizer"]) == len(state["model"]) - 1, "all but the tied head"


@pytest.mark.parametrize("stage", (1, 3))
def test_deepspeeds_own_checkpoints_hold_the_same_weights(
    corpus: Path, tmp_path: Path, stage: int
) -> None:
    """By DeepSpeed's own tool."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    flags = f"--zero_stage {stage} --deepspeed_checkpoints --save_interval 2 --max_steps 6"
    given = [*pretrain_flags(corpus, tmp_path), flags]
    assert run_ranks(2, "1-pretrain.py", *given, log=tmp_path / "log") == [0, 0]
    folder = tmp_path / "checkpoints/pretrain_32/deepspeed"
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_4", "step_6"]
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    ours = torch.load(tmp_path / "pretrain_32.pth")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("stage", (2, 3))
def test_a_run_goes_from_one_process_to_zero_and_on_to_plain_ranks(
    corpus: Path, tmp_path: Path, stage: int
) -> None:
    """Each takes up the other's state, moments included, and the course is the one of no change."""
    flags = f"{OFTEN} --max_steps 24 --val_data_path {corpus}/val.csv --save_interval 8"
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    assert pretrain(corpus, straight, flags) == 0
    given = [*pretrain_flags(corpus, moved), flags, "--keep_last 9 --batch_size 2 --resume"]
    log, folder = tmp_path / "log", moved / "checkpoints" / "pretrain_32"

    def take_back(step: int) -> None:
        """Let the run stand at ``step``, as if it had been killed after that save."""
        for path in folder.glob("step_*"):
            if int(path.name.split("_")[1]) > step:
                shutil.rmtree(path)

    assert pretrain(corpus, moved, flags, "--keep_last 9") == 0
    take_back(8)
    zero = f"--zero_stage {stage}"
    assert run_ranks(2, "1-pretrain.py", *given, zero, log=log) == [0, 0]
    again = tmp_path / "again"
    shutil.copytree(moved, again)
    take_back(16)
    assert run_ranks(2, "1-pretrain.py", *given, log=log) == [0, 0]
    check_same_course(straight, moved, "pretrain_32", 1e-5)
    # under the engine that saved it goes on bit for bit
    expected = records(again), torch.load(again / "pretrain_32.pth")
    folder = again / "checkpoints" / "pretrain_32"
    take_back(16)
    given += [zero, "--out_dir", str(again)]
    assert run_ranks(2, "1-pretrain.py", *given, log=log) == [0, 0]
    assert records(again) == expected[0]
    for name, tensor in torch.load(again / "pretrain_32.pth").items():
        assert torch.equal(tensor, expected[1][name])


def test_the_deepspeed_launcher_starts_it(corpus: Path, tmp_path: Path) -> None:
    """As documented for v1; adapters and preferences included, whose base is frozen."""
    given = f"{PLACE} {MODEL} --tokenizer {corpus}/tokenizer --init_from none --max_steps 6 {OFTEN}"
    command = [Path(sys.executable).with_name("deepspeed"), "--master_port", free_port()]
    command += ["--num_gpus=2", ROOT / "5-dpo_train.py", *given.split(), "--zero_stage", "2"]
    command += ["--data_path", corpus / "pairs.json", "--out_dir", tmp_path / "out", "--lora"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    path = f"{Path(sys.executable).parent}:{env['PATH']}"
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        encoding="utf-8",
        timeout=150,
        env=env | {"PATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [r for r in records(tmp_path / "out", "lora_dpo_32") if "lr" in r]
    assert found[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and found[-1]["loss"] < 0.69
    assert (tmp_path / "out/lora_rl_32/adapter_model.safetensors").is_file()


def test_what_deepspeed_cannot_do_is_told(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = pretrain_flags(corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="need a launcher: deepspeed --num_gpus=1"):
        run("1-pretrain.py", *given, "--zero_stage 1")
    config = tmp_path / "ds.json"
    for content, message in (
        ({"gradient_clipping": 5.0}, "gradient_clipping=5.0, the flags say 1.0"),
        ({"optimizer": {"type": "SGD"}}, "has 'optimizer', which --optimizer"),
        ({"train_batch_size": 64}, "has train_batch_size=64, the flags say 4"),
        ({"bf16": {"enabled": True}}, "turns bf16 on, --dtype says float32"),
        (["no object"], "holds no JSON object"),
    ):
        config.write_text(json.dumps(content), "utf-8")
        log = tmp_path / f"log{len(message)}"
        flags = [*given, "--deepspeed_config", str(config)]
        assert run_ranks(1, "1-pretrain.py", *flags, log=log) == [1]
        assert message in log.read_text("utf-8")
    config.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    with pytest.raises(SystemExit):
        run("1-pretrain.py", *given, "--deepspeed_config", config)
    assert "stage 0 keeps everything on every rank" in capsys.readouterr().err
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}))
    flags = [*given, "--deepspeed_config", str(config), "--max_steps", "2"]
    assert run_ranks(1, "1-pretrain.py", *flags, log=tmp_path / "log") == [0]
