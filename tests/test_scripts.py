"""The stages as a user starts them: one after the other, stopped, misspelt, on the wrong files."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    MODEL,
    PLACE,
    ROOT,
    run,
    states,
    write_chats,
    write_csv,
    write_documents,
    write_tokenizer,
)

from model.flags import run_main

TINY = f"{MODEL} {PLACE} --batch_size 4 --eval_interval 10 --log_interval 5"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: raw tables, nothing else."""
    folder = tmp_path_factory.mktemp("user")
    write_documents(folder / "pretrain_data.csv", 250)
    write_chats(folder / "sft_data_single.csv", 250, seed=1)
    write_chats(folder / "sft_data.csv", 250, turns=3, seed=2)
    rows = [{"prompt": f"山 {i}", "chosen": "长江", "rejected": "黄河 river"} for i in range(150)]
    (folder / "dpo.json").write_text(json.dumps(rows), "utf-8")
    return folder


def start(command: str, cwd: Path) -> subprocess.Popen:
    """Start a command line that begins with ``python``."""
    _, script, *flags = shlex.split(command)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.Popen(
        [sys.executable, ROOT / script, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=env,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Wait for a process to end with ``code``; return what it printed."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out


def losses(out: Path, name: str) -> list[float]:
    lines = (out / "logs" / name / "metrics.jsonl").read_text("utf-8").split("\n")[:-1]
    return [record["loss"] for record in map(json.loads, lines) if "lr" in record]


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


@pytest.mark.slow
def test_the_whole_chain_from_text_to_exports(corpus: Path) -> None:
    """The documented chain with the shipped tokenizer: each stage finds what the last one left."""
    steps = "--max_steps 30 --learning_rate 1e-2"
    shown = finish(
        start(f"python 1-pretrain.py --data_path pretrain_data.csv {TINY} {steps}", corpus)
    )
    assert "weights: out/pretrain_32.pth" in shown and "val_loss" in shown
    sft = f"python 3-full_sft.py {PLACE} --dim 32 {steps} --batch_size 4 --log_interval 5"
    shown = finish(start(f"{sft} --data_path sft_data_single.csv", corpus))
    assert "starting from out/pretrain_32.pth" in shown
    assert "weights: out/single_chat/full_sft_32.pth" in shown
    shown = finish(start(f"{sft} --data_path sft_data.csv", corpus))
    assert "starting from out/single_chat/full_sft_32.pth" in shown
    out = corpus / "out"
    for name in ("pretrain_32", "full_sft_single_32", "full_sft_multi_32"):
        found = losses(out, name)
        assert found[-1] < found[0], name
        assert (out / "logs" / name / "curve.png").is_file() and states(out, name) == ["step_30"]
    # a stage begins where the one before ended, far below the log 6400 = 8.8 of random weights
    assert losses(out, "full_sft_multi_32")[0] < losses(out, "full_sft_single_32")[0] < 8
    tune = f"{PLACE} --dim 32 {steps} --batch_size 4 --log_interval 5"
    lora = start(f"python 4-lora_sft.py {tune} --data_path sft_data_single.csv", corpus)
    dpo = start(f"python 5-dpo_train.py {tune} --data_path dpo.json", corpus)
    for process, left in ((lora, "out/lora_32"), (dpo, "out/rl_32.pth")):
        shown = finish(process)
        assert "starting from out/single_chat/full_sft_32.pth" in shown
        assert f"weights: {left}" in shown
    for name in ("lora_32", "dpo_32"):
        found = losses(out, name)
        assert found[-1] < found[0], name
    names = ("pretrain_32", "single_chat/full_sft_32", "multi_chat/full_sft_32", "rl_32")
    stages = [json.loads((out / f"{name}.json").read_text("utf-8"))["stage"] for name in names]
    assert stages == ["pretrain", "full_sft_single", "full_sft_multi", "dpo"]
    check_exports(corpus, "--weights out/rl_32.pth", torch.load(out / "rl_32.pth"))
    check_exports(corpus, "--lora out/lora_32", merged_by_peft(out))


def merged_by_peft(out: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the base with its adapter as peft merges them."""
    from peft import PeftModel

    from model.checkpoint import read_sidecar
    from model.LMConfig import LMConfig
    from model.model import MiniMindForCausalLM

    base = out / "single_chat/full_sft_32.pth"
    model = MiniMindForCausalLM(LMConfig(**read_sidecar(base)["config"]))
    model.load_state_dict(torch.load(base))
    return PeftModel.from_pretrained(model, out / "lora_32").merge_and_unload().state_dict()


def check_exports(corpus: Path, source: str, weights: dict[str, torch.Tensor]) -> None:
    """Export in the three formats and reload each with what its users load it with."""
    from transformers import AutoModelForCausalLM

    from model.checkpoint import read_sidecar
    from model.LMConfig import LMConfig
    from model.model import MiniMindForCausalLM

    folder = corpus / source.split()[-1].replace("/", "_")
    with chdir(corpus):
        for name in ("minimind", "llama", "gguf"):
            run("export_model.py", source, f"--format {name} --output {folder}/{name}")
        run("export_model.py", f"--from {folder}/minimind --output {folder}/back.pth")
    model = MiniMindForCausalLM(LMConfig(**read_sidecar(corpus / "out/rl_32.pth")["config"]))
    model.load_state_dict(weights)
    expected = logits_of(model)
    assert logits_of(model).std() > 0.1
    load = AutoModelForCausalLM.from_pretrained
    exported = load(folder / "minimind", trust_remote_code=True)
    torch.testing.assert_close(logits_of(exported), expected, rtol=0, atol=1e-6)
    llama = load(folder / "llama")
    assert type(llama).__module__.startswith("transformers.")
    torch.testing.assert_close(logits_of(llama), expected, rtol=0, atol=1e-4)
    [gguf] = (folder / "gguf").glob("*.gguf")
    theirs = load(folder / "gguf", gguf_file=gguf.name)
    torch.testing.assert_close(logits_of(theirs), expected, rtol=0, atol=1e-4)
    for name, tensor in torch.load(folder / "back.pth").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_command_that_a_stop_prints_goes_on(corpus: Path) -> None:
    command = f"python 1-pretrain.py --data_path pretrain_data.csv {TINY} --run_name stopped"
    process = start(f"{command} --max_steps 2000 --save_interval 2000", corpus)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "loss" in line:
            process.send_signal(signal.SIGINT)
            break
    shown = "".join(lines) + finish(process, code=130)
    found = re.search(r"stopped at update (\d+) of 2,000; go on with: (.*)", shown)
    assert states(corpus / "out", "pretrain_32_stopped") == [f"step_{found[1]}"]
    process = start(found[2].replace(str(ROOT / "1-pretrain.py"), "1-pretrain.py"), corpus)
    for line in process.stdout:
        if "loss" in line:
            process.send_signal(signal.SIGTERM)
            break
        lines.append(line)
    finish(process, code=143)
    assert f"going on from update {found[1]} of 2,000\n" in lines


# ----------------------------------------------------------------------------- mistakes


def message(capsys: pytest.CaptureFixture, code: int, name: str, *flags: object) -> str:
    """Return the one message with which a script ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: run(name, *flags))
    err = capsys.readouterr().err
    assert caught.value.code == code, err
    assert "Traceback" not in err
    return err


@pytest.fixture
def here(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a tokenizer; the tables are in ``corpus``."""
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


ONE_MESSAGE = {
    "no data": ("1-pretrain.py", "--data_path no.csv", "no.csv does not exist"),
    "default data": (
        "1-pretrain.py",
        "",
        "dataset/pretrain_data.csv does not exist: make the tables",
    ),
    "other data": ("1-pretrain.py", "--data_path {}/sft_data.csv", 'no "text"'),
    "not a table": ("1-pretrain.py", "--data_path {}", "is a folder: name a file"),
    "no tokenizer": ("1-pretrain.py", "--tokenizer no", "no/tokenizer.json does not exist"),
    "no device": ("1-pretrain.py", "--device cuda:77", "--device cuda:77 is not on this machine"),
    "no such device": ("1-pretrain.py", "--device gpu", "--device gpu is unknown: use auto, cpu"),
    "odd width": ("1-pretrain.py", "--dim 33", "dim=33 does not divide into n_heads=4 heads"),
    "heads": ("1-pretrain.py", "--n_kv_heads 3", "n_heads=4 is not a multiple of n_kv_heads=3"),
    "scaling": ("1-pretrain.py", "--rope_scaling linear", "rope_scaling='linear' is unknown"),
    "dropout": ("1-pretrain.py", "--dropout 2", "dropout=2.0 is not in [0, 1)"),
    "no start": ("3-full_sft.py", "", "out/pretrain_32.pth does not exist: run 1-pretrain.py"),
    "no single": ("3-full_sft.py", "--chat multi", "run 3-full_sft.py --chat single first"),
    "no such start": ("3-full_sft.py", "--init_from no.pth", "--init_from no.pth does not exist"),
    "not weights": ("3-full_sft.py", "--init_from note.txt", "note.txt is not a readable weights"),
    "a folder of nothing": ("3-full_sft.py", "--init_from tokenizer", "holds neither"),
}


@pytest.mark.parametrize("case", ONE_MESSAGE)
def test_a_mistake_is_one_message(
    corpus: Path, here: Path, capsys: pytest.CaptureFixture, case: str
) -> None:
    name, flags, expected = ONE_MESSAGE[case]
    (here / "note.txt").write_text("not weights")
    path = "sft_data_single.csv" if "sft" in name else "pretrain_data.csv"
    data = "" if case == "default data" else f"--data_path {corpus}/{path}"
    given = f"{MODEL} {PLACE} --tokenizer tokenizer {data} {flags.format(corpus)} --max_steps 1"
    err = message(capsys, 1, name, given)
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_flags_that_contradict_the_weights_are_one_message(
    corpus: Path, here: Path, capsys: pytest.CaptureFixture
) -> None:
    given = f"{PLACE} --tokenizer tokenizer --max_steps 1"
    run("1-pretrain.py", MODEL, given, f"--data_path {corpus}/pretrain_data.csv")
    sft = f"{given} --data_path {corpus}/sft_data_single.csv --dim 32"
    err = message(capsys, 1, "3-full_sft.py", sft, "--n_layers 5")
    assert "out/pretrain_32.pth has n_layers=2, not 5" in err
    write_tokenizer(here / "other", vocab_size=280)
    err = message(capsys, 1, "3-full_sft.py", sft, "--tokenizer other")
    assert "was trained with another tokenizer" in err
    weights = here / "out" / "pretrain_32.pth"
    weights.write_bytes(weights.read_bytes()[:-5000])
    err = message(capsys, 1, "3-full_sft.py", sft)
    assert "is not a readable weights file" in err and "make it anew" in err
    state = torch.load(here / "out/checkpoints/pretrain_32/step_1/state.pt", weights_only=True)
    del state["model"]["norm.weight"]
    torch.save(state["model"], weights)
    err = message(capsys, 1, "3-full_sft.py", sft)
    assert 'missing "norm.weight"' in err


def test_a_folder_that_cannot_be_written_is_one_message(
    corpus: Path, here: Path, capsys: pytest.CaptureFixture
) -> None:
    (here / "out").write_text("a file")
    given = f"{MODEL} {PLACE} --tokenizer tokenizer --max_steps 1"
    err = message(capsys, 1, "1-pretrain.py", given, f"--data_path {corpus}/pretrain_data.csv")
    assert err.startswith("error: ") and "out" in err and err.count("\n") == 1


def test_a_table_without_rows_is_one_message(here: Path, capsys: pytest.CaptureFixture) -> None:
    for name, header in (("1-pretrain.py", ["text"]), ("3-full_sft.py", ["history", "q", "a"])):
        path = write_csv(here / "empty.csv", header, [])
        given = f"{MODEL} {PLACE} --tokenizer tokenizer --init_from none --data_path {path}"
        err = message(capsys, 1, name, given)
        assert "empty.csv" in err and "no documents in it" in err


def test_wrong_flags_end_with_code_two(here: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("1-pretrain.py", "3-full_sft.py"):
        err = message(capsys, 2, name, "--batch_size 0")
        assert err.splitlines()[-1].endswith(
            "argument --batch_size: 0 is not above 0 or not finite"
        )


def test_chats_show_what_is_learnt(corpus: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    given = f"{MODEL} {PLACE} --tokenizer tokenizer --init_from none --show_samples 1"
    assert run("3-full_sft.py", given, f"--data_path {corpus}/sft_data.csv") == 0
    shown = capsys.readouterr().out
    conversations = re.findall(r"<s>assistant\n⟦[^⟦⟧]+</s>⟧\n", shown)
    assert conversations and len(conversations) == shown.count("⟦")
    assert not (here / "out").exists()
