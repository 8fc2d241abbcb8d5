"""4-lora_sft.py and 5-dpo_train.py: what they leave, how they go on, what they measure."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    MODEL,
    PLACE,
    QUIET,
    records,
    run,
    same_weights,
    states,
    write_chats,
    write_documents,
    write_tokenizer,
)

from model.flags import run_main

GIVEN = f"{PLACE} --tokenizer tokenizer --dim 32 {QUIET} --batch_size 4"
OWN = f"{GIVEN} --data_path own.jsonl --val_data_path val.jsonl"
LORA = f"{OWN} --lora_rank 4"
DPO = f"{GIVEN} --data_path pairs.json --learning_rate 1e-3"


def write_own(path: Path) -> Path:
    """Write a small set of chats in all the forms that people bring."""
    rows = []
    for i in range(40):
        question, answer = f"river {i % 10}", f"mountain {i % 10} 山"
        form = i % 3
        if form == 0:
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            rows.append({"messages": turns})
        elif form == 1:
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            rows.append({"conversations": turns})
        else:
            rows.append({"instruction": question, "input": "", "output": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_pairs(path: Path) -> Path:
    """Write pairs that prefer one word to another."""
    rows = [
        {"prompt": f"city {i}", "chosen": f"北京 {i % 7}", "rejected": f"walks {i % 5}"}
        for i in range(120)
    ]
    path.write_text(json.dumps(rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has been through both stages before."""
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder / "tokenizer")
    write_documents(folder / "pretrain.csv", 60)
    write_chats(folder / "sft_single.csv", 60)
    before = Path.cwd()
    os.chdir(folder)
    try:
        given = f"{PLACE} --tokenizer tokenizer {QUIET} --max_steps 60 --learning_rate 1e-2"
        assert run("1-pretrain.py", given, MODEL, "--data_path pretrain.csv --optimizer adamw") == 0
        assert run("3-full_sft.py", given, "--dim 32 --data_path sft_single.csv") == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own with the weights and raw files."""
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer", "out"):
        os.symlink(base / name, tmp_path / f"base_{name}")
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "out/single_chat").mkdir(parents=True)
    for suffix in ("pth", "json"):
        source = base / f"out/single_chat/full_sft_32.{suffix}"
        (tmp_path / f"out/single_chat/full_sft_32.{suffix}").write_bytes(source.read_bytes())
    write_own(tmp_path / "own.jsonl")
    write_own(tmp_path / "val.jsonl")  # whether it was learnt by heart
    write_pairs(tmp_path / "pairs.json")
    return tmp_path


def stop_at(n_updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process SIGTERM when a run has made so many updates, as a cluster would."""
    from model.trainer import Run

    update = Run.update

    def counted(self: Run, *arguments) -> float:
        norm = update(self, *arguments)
        if self.progress.step == n_updates:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    monkeypatch.setattr(Run, "update", counted)


# ----------------------------------------------------------------------------- adapters


def test_lora_leaves_an_adapter_and_the_base_as_it_was(
    here: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = here / "out/single_chat/full_sft_32.pth"
    before = weights.read_bytes()
    assert run("4-lora_sft.py", LORA, "--max_steps 60 --learning_rate 1e-2") == 0
    shown = capsys.readouterr().out
    assert "read as messages (14), ShareGPT conversations (13), instruction, input, output" in shown
    assert "parameters are trained (" in shown and "rank 4 in 14 layers" in shown
    found = records(here / "out", "lora_32")
    assert found[0]["step"] == 0, "validated before the first update"
    assert found[-1]["val_loss"] < 0.5 * found[0]["val_loss"]
    assert weights.read_bytes() == before
    folder = here / "out/lora_32"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "out/single_chat/full_sft_32.pth"
    assert len(load_file(folder / "adapter_model.safetensors")) == 28
    state = torch.load(here / "out/checkpoints/lora_32/step_60/state.pt", weights_only=True)
    assert all(".lora_" in name for name in state["model"]), "states hold what is trained"


def test_an_adapter_goes_on_bit_for_bit_after_a_stop(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"{LORA} --max_steps 12 --lora_dropout 0.2"
    assert run("4-lora_sft.py", flags, "--run_name whole") == 0
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert run("4-lora_sft.py", flags, "--run_name cut") == 128 + signal.SIGTERM
    assert states(here / "out", "lora_32_cut") == ["step_5"]
    assert run("4-lora_sft.py", flags, "--run_name cut --resume") == 0
    one, two = (here / f"out/lora_32_{n}/adapter_model.safetensors" for n in ("whole", "cut"))
    assert one.read_bytes() == two.read_bytes()
    assert records(here / "out", "lora_32_whole") == records(here / "out", "lora_32_cut")


def test_an_adapter_is_not_resumed_on_another_base(here: Path, base: Path) -> None:
    assert run("4-lora_sft.py", LORA, "--max_steps 4") == 0
    other = f"--init_from {base}/out/pretrain_32.pth"
    with pytest.raises(ValueError, match="frozen weights: '.*' then, '.*' now"):
        run("4-lora_sft.py", LORA, "--max_steps 4 --resume", other)


def test_a_second_adapter_begins_where_the_first_ended(here: Path) -> None:
    flags = "--max_steps 40 --learning_rate 1e-2"
    assert run("4-lora_sft.py", LORA, flags) == 0
    assert run("4-lora_sft.py", OWN, flags, "--lora out/lora_32 --run_name more") == 0
    first, second = (records(here / "out", f"lora_32{n}") for n in ("", "_more"))
    # in fp32: the file holds what the run had
    assert second[0]["val_loss"] == pytest.approx(first[-1]["val_loss"], abs=1e-6)


def test_an_adapter_is_used_by_name_alone_and_merged(
    here: Path, base: Path, capsys: pytest.CaptureFixture
) -> None:
    import argparse

    from model.checkpoint import load_for_inference
    from model.flags import weights_flags
    from model.lora import has_adapter

    def load(flags: str):
        parser = argparse.ArgumentParser()
        weights_flags(parser)
        return load_for_inference(parser.parse_args(f"{PLACE} {flags}".split()))

    assert run("4-lora_sft.py", LORA, "--max_steps 30 --learning_rate 1e-2") == 0
    plain = load("--weights out/single_chat/full_sft_32.pth --tokenizer tokenizer")
    tuned = load("--lora out/lora_32 --tokenizer tokenizer")
    assert tuned.path == Path("out/single_chat/full_sft_32.pth")
    assert tuned.adapter == Path("out/lora_32") and not has_adapter(tuned.model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert (tuned.model(ids).logits - plain.model(ids).logits).abs().max() > 0.5
    capsys.readouterr()
    load(f"--lora out/lora_32 --weights {base}/out/pretrain_32.pth --tokenizer tokenizer")
    assert "out/lora_32 was trained on other weights" in capsys.readouterr().err
    (here / "out/single_chat/full_sft_32.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"full_sft_32\.pth, on which out/lora_32 was"):
        load("--lora out/lora_32 --tokenizer tokenizer")


# ----------------------------------------------------------------------------- preferences


def test_dpo_learns_the_preference_and_leaves_rl_weights(here: Path) -> None:
    assert run("5-dpo_train.py", DPO, "--max_steps 30 --log_interval 1") == 0
    found = records(here / "out", "dpo_32")
    trained = [record for record in found if "lr" in record]
    assert trained[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2 at the reference
    assert trained[0]["accuracy"] == 0.5 or abs(trained[0]["margin"]) < 1e-4
    assert trained[-1]["loss"] < 0.5 and trained[-1]["accuracy"] > 0.9
    assert trained[-1]["margin"] > 0.3
    assert (here / "out/rl_32.pth").is_file()
    start = here / "out/single_chat/full_sft_32.pth"
    assert not same_weights(here / "out/rl_32.pth", start)


def test_a_live_reference_trains_the_same(here: Path) -> None:
    flags = "--max_steps 8 --log_interval 1 --label_smoothing 0.1"
    assert run("5-dpo_train.py", DPO, flags, "--run_name stored") == 0
    assert run("5-dpo_train.py", DPO, flags, "--run_name live --reference live") == 0
    stored, live = (records(here / "out", f"dpo_32_{n}") for n in ("stored", "live"))
    assert len(list(here.glob("pairs.tokens/reference-*-held-out.npy"))) == 1
    for one, two in zip(stored, live, strict=True):
        if "lr" in one:
            assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)


def test_dpo_with_an_adapter_leaves_an_adapter(here: Path) -> None:
    assert run("5-dpo_train.py", DPO, "--lora --max_steps 30 --learning_rate 1e-2") == 0
    found = records(here / "out", "lora_dpo_32")
    assert found[-1]["accuracy"] > 0.9 and not (here / "out/rl_32.pth").exists()
    assert (here / "out/lora_rl_32/adapter_model.safetensors").is_file()
    again = "--lora out/lora_rl_32 --max_steps 1 --run_name on"
    assert run("5-dpo_train.py", DPO, again) == 0
    # the adapter it begins with is its reference: log 2
    assert records(here / "out", "lora_dpo_32_on")[-1]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_dpo_goes_on_bit_for_bit_after_a_stop(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = f"{DPO} --max_steps 10"
    assert run("5-dpo_train.py", flags, "--run_name whole") == 0
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        assert run("5-dpo_train.py", flags, "--run_name cut") == 128 + signal.SIGTERM
    assert run("5-dpo_train.py", flags, "--run_name cut --resume") == 0
    assert same_weights(here / "out/rl_32_whole.pth", here / "out/rl_32_cut.pth")
    assert records(here / "out", "dpo_32_whole") == records(here / "out", "dpo_32_cut")


def test_dpo_is_not_resumed_with_another_beta_or_reference(here: Path, base: Path) -> None:
    assert run("5-dpo_train.py", DPO, "--max_steps 2") == 0
    for change, expected in (
        ("--beta 0.2", "beta: 0.1 then, 0.2 now"),
        (f"--init_from {base}/out/pretrain_32.pth", "reference: '.*' then, '.*' now"),
    ):
        with pytest.raises(ValueError, match=expected):
            run("5-dpo_train.py", DPO, "--max_steps 2 --resume", change)


# ----------------------------------------------------------------------------- quizzes, mistakes


def test_quizzes_are_taken_before_and_after(here: Path, capsys: pytest.CaptureFixture) -> None:
    items = [{"question": f"river {i}", "accept": ["mountain"]} for i in range(5)]
    lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (here / "own_quiz.jsonl").write_text("".join(lines), "utf-8")
    flags = "--quiz own_quiz.jsonl --max_steps 100 --learning_rate 2e-2"
    assert run("4-lora_sft.py", LORA, flags) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "quiz        own_quiz: 0/5 (0.0 %) before training" in shown
    last = "quiz        own_quiz: 0/5 (0.0 %) before, 5/5 (100.0 %) after (+100.0 points)"
    assert shown[-1] == last


def test_a_run_that_was_stopped_does_not_tell_what_it_changed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    item = json.dumps({"question": "river 1", "accept": ["mountain"]})
    (here / "quiz.jsonl").write_text(item, "utf-8")
    stop_at(2, monkeypatch)
    assert run("4-lora_sft.py", LORA, "--max_steps 9 --quiz quiz.jsonl") == 128 + signal.SIGTERM
    shown = capsys.readouterr().out
    assert "before training" in shown and "after" not in shown


def test_an_adapter_that_is_there_says_itself_what_it_is(
    here: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        run("4-lora_sft.py", LORA, "--lora out/lora_32")
    assert caught.value.code == 2
    assert "--lora out/lora_32 goes on from that adapter as it is: drop" in capsys.readouterr().err


def test_a_few_chats_are_not_copied_to_fill_a_batch(
    here: Path, capsys: pytest.CaptureFixture
) -> None:
    own = here / "own.jsonl"
    own.write_text("".join(own.read_text("utf-8").splitlines(keepends=True)[:3]), "utf-8")
    given = OWN.replace("--batch_size 4", "")
    assert run("4-lora_sft.py", given, "--dry_run") == 0
    assert re.search(r"= 200 updates of [1-3] rows ", capsys.readouterr().out)


MISTAKES = {
    "no adapter": ("4-lora_sft.py", "--lora out", "out holds no adapter (no adapter_config.json)"),
    "no such layer": ("4-lora_sft.py", "--lora_targets q_proj", "under the name 'q_proj': use"),
    "no start": ("4-lora_sft.py", "--dim 64", "out/single_chat/full_sft_64.pth does not exist"),
    "no quiz": ("4-lora_sft.py", "--quiz no.jsonl", "no.jsonl"),
    "chats": ("5-dpo_train.py", "--data_path own.jsonl", 'no "chosen"'),
    "pairs": ("4-lora_sft.py", "--data_path pairs.json", "no "),
    "dropout": ("4-lora_sft.py", "--lora_dropout 1", "dropout=1.0 is not in [0, 1)"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_message(here: Path, capsys: pytest.CaptureFixture, case: str) -> None:
    name, flags, expected = MISTAKES[case]
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: run(name, OWN if name[0] == "4" else DPO, flags, "--max_steps 1"))
    err = capsys.readouterr().err
    assert caught.value.code == 1 and err.startswith("error: "), err
    assert expected in err and err.count("\n") == 1
