"""The benchmarks of training: that they run at a tiny size, and what they conclude from figures."""

import json
import lzma
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import sentence

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from goals import spread, verdict  # noqa: E402 (the line above finds it)

N_SHARDS, N_DOCUMENTS = 6, 250


@pytest.mark.parametrize(
    ("values", "at_least", "begins"),
    (
        ([1.3, 0.9, 2.0], True, "AIM"),
        ([1.15, 1.2], True, "reached"),
        ([1.1], True, "MISSED"),
        ([1.3], False, "MISSED"),
        ([1.2], False, "reached"),
        ([0.3, 5.0, 0.2], False, "AIM"),
    ),
)
def test_a_goal_is_judged_by_the_median(values: list[float], at_least: bool, begins: str) -> None:
    must, aim = (1.12, 1.25) if at_least else (1.25, 1.12)
    assert verdict("x", values, must, aim, at_least=at_least).startswith(begins)


def test_a_spread_is_median_and_range() -> None:
    assert spread([3000.0, 1000.0, 2000.0]) == "2,000 (1,000 to 3,000)"
    assert spread([0.5], ".1f") == "0.5"


@pytest.mark.parametrize("needed", range(12))
def test_the_least_budget_is_found_by_few_trials(needed: int) -> None:
    from time_to_loss import least

    tried: list[int] = []

    def is_enough(value: int) -> bool:
        tried.append(value)
        return value >= needed

    values = list(range(11))
    assert least(values, is_enough) == (needed if needed in values else None)
    assert len(tried) <= 4 and len(set(tried)) == len(tried)


def run(script: str, *flags: object) -> str:
    command = [sys.executable, ROOT / "benchmarks" / script, *flags]
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    return done.stdout


@pytest.mark.slow
def test_throughput_is_compared_with_a_peer(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    flags = ["--model", "demo", "--rounds", 1, "--turn_s", 0.1, "--threads", 1, "--json", path]
    names = ["ours fp32", "Llama fp32", "ours MoE fp32"]
    shown = run("train.py", *flags, "--device", "cpu", "--only", *names)
    for goal in (
        "positions/s, ours",
        "peak memory, ours",
        "share of the faster sgemm",
        "FLOP/s, ours MoE",
    ):
        assert goal in shown
    found = json.loads(path.read_text("utf-8"))["models"]["demo"]
    own, peer, moe = (found["first_update"][name] for name in names)
    assert own["n_params"] == peer["n_params"] < moe["n_params"]  # an equal size
    assert own["flops_per_position"] == peer["flops_per_position"] < moe["flops_per_position"]
    assert set(found["turns"]) == set(names)
    assert all(turn["positions"] % (4 * 128) == 0 for (turn,) in found["turns"].values())


@pytest.mark.slow
def test_time_to_loss_judges_both_by_one_evaluator(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "pretrain").mkdir(parents=True)
    source = random.Random(0)
    for number in range(N_SHARDS):
        rows = [json.dumps({"text": sentence(source, 30)}) for _ in range(N_DOCUMENTS)]
        with lzma.open(
            data / "pretrain" / f"seq_monkey_format_{number:02d}.jsonl.xz", "wt"
        ) as file:
            file.write("\n".join(rows) + "\n")
    shutil.copytree(ROOT / "model" / "minimind_tokenizer", data / "original_tokenizer")
    place = ["--data", data, "--work_dir", tmp_path / "work", "--device", "cpu", "--threads", 1]
    place += ["--json", tmp_path / "found.json", "--only", "padded, Adam 2e-4"]
    place += ["--seconds", 4, "--budgets", 3]
    shown = run("time_to_loss.py", *place, "--recipe_flags=--batch_size 2 --max_seq_len 128")
    assert "times faster than padded, Adam 2e-4" in shown and "WARNING" not in shown
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    baseline, own = found["baselines"]["1337"], found["ours"]["1337"]["3"]
    assert abs(own["val_loss"] - own["stated_val_loss"]) < 0.01
    assert 0 < own["tokens"] <= 3 * 2 * 128
    # the baseline is taken from the file, and so costs nothing
    again = run("time_to_loss.py", *place, "--reuse", tmp_path / "found.json", "--budgets", 1)
    assert f"of {baseline['padded, Adam 2e-4']['at']}, loss" in again
    assert json.loads((tmp_path / "found.json").read_text("utf-8"))["baselines"]["1337"] == baseline
