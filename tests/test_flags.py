"""The flags: recipes, checks, exit codes, and answers before anything heavy is imported."""

import argparse
import copy
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import script

from model.flags import parse_training_args, quick_imports, run_main, training_parser

ROOT = Path(__file__).parents[1]
STAGES = ("1-pretrain.py", "3-full_sft.py")
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


def parse(name: str, *argv: str) -> argparse.Namespace:
    return script(name).parse_args(list(argv))


def refused(name: str, *argv: str, capsys: pytest.CaptureFixture) -> str:
    """Return the message with which ``argv`` is refused."""
    with pytest.raises(SystemExit) as caught:
        parse(name, *argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ----------------------------------------------------------------------------- recipes


def test_recipe_v1_is_what_v1_documents() -> None:
    recipe = dict(optimizer="adam", schedule="cosine", weight_decay=0.0, warmup_iters=0)
    found = {
        "pretrain": parse("1-pretrain.py", "--recipe", "v1"),
        "single": parse("3-full_sft.py", "--recipe", "v1", "--chat", "single"),
        "multi": parse("3-full_sft.py", "--recipe", "v1", "--chat", "multi"),
    }
    epochs = {stage: args.epochs for stage, args in found.items()}
    assert epochs == {"pretrain": 5, "single": 6, "multi": 5}
    rates = {stage: args.learning_rate for stage, args in found.items()}
    assert rates == {"pretrain": 1e-4, "single": 1e-5, "multi": 1e-5}
    for args in found.values():
        assert recipe.items() <= vars(args).items()


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("recipe", ("best", "v1"))
def test_a_flag_given_wins_over_the_recipe(name: str, recipe: str) -> None:
    given = "--epochs 2.5 --learning_rate 3e-4 --optimizer adamw --weight_decay 0 --warmup_iters 7"
    args = parse(name, "--recipe", recipe, "--chat" if "sft" in name else "--seed", "multi" if "sft"
                 in name else "1", *given.split())  # fmt: skip
    assert (args.epochs, args.learning_rate, args.optimizer) == (2.5, 3e-4, "adamw")
    assert (args.weight_decay, args.warmup_iters) == (0, 7)
    assert not {"epochs", "learning_rate", "optimizer"} & set(args.from_recipe)


@pytest.mark.parametrize("name", STAGES)
def test_a_recipe_settles_everything_it_names(name: str) -> None:
    unsettled = {"warmup_iters"}  # the trainer's: a share of the run
    args = parse(name)
    assert set(args.from_recipe) >= {"epochs", "batch_size", "schedule", "optimizer"}
    assert {key for key in args.from_recipe if getattr(args, key) is None} == unsettled


@pytest.mark.parametrize("name", STAGES)
def test_help_shows_the_defaults_of_both_recipes(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(name, "--help")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    best, v1 = parse(name), parse(name, "--recipe", "v1", "--data_path", "single.csv")
    for key in ("epochs", "learning_rate", "batch_size"):
        assert f"(default {getattr(best, key)}; v1: {getattr(v1, key)})" in shown


@pytest.mark.parametrize(
    ("path", "chat"),
    (
        ("dataset/sft_data_single.csv", "single"),
        ("sft_data.csv", "multi"),
        ("single/sft.csv", "multi"),
    ),
)
def test_chat_goes_by_the_tables_name(path: str, chat: str) -> None:
    assert parse("3-full_sft.py", "--data_path", path).chat == chat
    assert parse("3-full_sft.py", "--data_path", path, "--chat", "single").chat == "single"


# ----------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("wrong", "message"),
    (
        ("--batch_size 0", "--batch_size: 0 is not above 0"),
        ("--batch_size 1.5", "--batch_size: invalid positive int value: '1.5'"),
        ("--epochs -1", "--epochs: -1 is not above 0"),
        ("--epochs nan", "--epochs: nan is not above 0"),
        ("--learning_rate inf", "--learning_rate: inf is not"),
        ("--learning_rate fast", "invalid positive float value: 'fast'"),
        ("--warmup_iters -1", "--warmup_iters: -1 is below 0"),
        ("--grad_clip nan", "--grad_clip: nan is below 0 or not finite"),
        ("--dtype fp16", "--dtype: invalid choice: 'fp16'"),
        ("--schedule step", "--schedule: invalid choice: 'step'"),
        ("--recipe v2", "--recipe: invalid choice: 'v2'"),
        ("--model gpt2", "--model: invalid choice: 'gpt2'"),
        ("--use_moe maybe", "'maybe' is neither true nor false"),
        ("--seed x", "--seed: invalid seed value: 'x'"),
        ("--seed 18446744073709551616", "18446744073709551616 does not fit 64 bits"),
        ("--learning-rate 1", "unrecognized arguments: --learning-rate"),
    ),
)
def test_a_wrong_flag_is_named_with_its_value(
    wrong: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert message in refused("1-pretrain.py", *wrong.split(), capsys=capsys)


def test_switches_take_true_and_false_as_v1s_commands_spell_them() -> None:
    for value, expected in (("", True), ("true", True), ("True", True), ("1", True)):
        assert parse("1-pretrain.py", *f"--resume {value}".split()).resume is expected
    for value in ("false", "False", "0", "no"):
        assert parse("1-pretrain.py", "--use_moe", value).use_moe is False
    assert parse("1-pretrain.py").use_moe is None  # not given
    assert parse("1-pretrain.py", "--resume_anyway").resume


def test_a_stage_adds_its_own_defaults() -> None:
    parser = training_parser(
        "A stage", data_path="x.csv", v1={"epochs": 9.0}, epochs=3.0, batch_size=5
    )
    args = parse_training_args(parser, [])
    assert (args.data_path, args.epochs, args.batch_size) == ("x.csv", 3.0, 5)
    args = parse_training_args(parser, ["--recipe", "v1"])
    assert (args.epochs, args.optimizer, args.batch_size) == (9.0, "adam", 64)


# ----------------------------------------------------------------------------- exit codes


def exit_of(main: object, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    return caught.value.code, capsys.readouterr().err


def raising(error: BaseException) -> object:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    (
        (ValueError("dim=3 is odd"), 1, "error: dim=3 is odd\n"),
        (FileNotFoundError("a.csv does not exist"), 1, "error: a.csv does not exist\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (MemoryError(), 1, "error: MemoryError\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ),
)
def test_what_the_user_can_mend_is_one_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert exit_of(raising(error), capsys) == (code, message)


def test_a_code_is_passed_on(capsys: pytest.CaptureFixture) -> None:
    assert exit_of(lambda: 143, capsys) == (143, "")
    assert exit_of(lambda: None, capsys)[0] in (0, None)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError):
        run_main(raising(KeyError("ours")))
    monkeypatch.setenv("MINIMIND_TRACEBACK", "1")
    with pytest.raises(ValueError):
        run_main(raising(ValueError("wanted")))


# ----------------------------------------------------------------------------- at once


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_comes_at_once_and_without_torch(name: str) -> None:
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "loaded = {'torch', 'transformers', 'numpy', 'pandas', 'tokenizers'} & set(sys.modules)\n"
        "print('loaded:', sorted(loaded))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, ROOT / name]
    took = []
    for _ in range(3):  # once may be slow on a busy machine
        start = time.perf_counter()
        done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8")
        took.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "usage:" in done.stdout and done.stdout.endswith("loaded: []\n")
        if took[-1] < 1:
            return
    raise AssertionError(f"--help took {took} s")


def test_garbage_is_left_alone_while_a_script_imports_and_no_longer() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()  # whoever wanted that still does
    finally:
        gc.enable()


@pytest.mark.slow
def test_what_torch_brings_is_left_out_of_later_collections() -> None:
    code = """
import gc
from model.flags import quick_imports
with quick_imports():
    import torch
before = gc.get_freeze_count()
with quick_imports():  # what a caller made meanwhile is not kept for ever
    pass
print(before > 10_000, gc.get_freeze_count() - before)
"""
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert shown.split() == ["True", "0"]


def test_the_usual_rate_is_that_of_the_optimizer() -> None:
    """Muon's would be too high for another one, and DeepSpeed cannot have Muon."""
    parser = training_parser("", data_path="a.csv", v1={}, optimizer="muon", learning_rate=4e-3)

    def settled(flags: str) -> tuple[str, float]:
        args = parse_training_args(copy.deepcopy(parser), flags.split())
        return args.optimizer, args.learning_rate

    assert settled("") == ("muon", 4e-3)
    assert settled("--optimizer adamw") == ("adamw", 2e-3)
    assert settled("--zero_stage 2") == ("adamw", 2e-3)
    assert settled("--optimizer adamw --learning_rate 1e-2") == ("adamw", 1e-2)
    assert settled("--recipe v1") == ("adam", 1e-4)


def test_muon_and_deepspeed_are_told_apart(capsys: pytest.CaptureFixture) -> None:
    parser = training_parser("", data_path="a.csv", v1={})
    with pytest.raises(SystemExit):
        parse_training_args(parser, ["--optimizer", "muon", "--zero_stage", "1"])
    assert "--optimizer muon needs whole matrices on each rank" in capsys.readouterr().err
