"""eval_ceval.py as a user starts it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import script, write_csv, write_tokenizer

from model.checkpoint import save_weights
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
HEADER = ["id", "question", "A", "B", "C", "D"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``exam`` with three splits of two subjects, ``out/rl_32.pth`` and its tokenizer."""
    folder = tmp_path_factory.mktemp("ceval")
    tokenizer = Tokenizer(write_tokenizer(folder / "tokenizer"))
    config = LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=256)
    torch.manual_seed(0)
    save_weights(MiniMindForCausalLM(config), folder / "out/rl_32.pth", tokenizer)
    for split, n in (("dev", 2), ("val", 7), ("test", 5)):
        (folder / "exam" / split).mkdir(parents=True)
        for subject in ("law", "logic"):
            rows = [[str(i), f"river {i}?", "the", "山", "city", "of"] for i in range(n)]
            if split != "test":
                rows = [[*row, "ABCD"[i % 4]] for i, row in enumerate(rows)]
            header = [*HEADER, *["answer"] * (split != "test")]
            write_csv(folder / "exam" / split / f"{subject}_{split}.csv", header, rows)
    return folder


def flags(place: Path, *more: object) -> list[str]:
    files = f"--data_dir {place}/exam --out_dir {place}/out --tokenizer {place}/tokenizer"
    return [*files.split(), "--dim", "32", "--device", "cpu", *map(str, more)]


@pytest.mark.slow
def test_the_exam_leaves_tables_a_summary_and_a_chart(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    main = script("eval_ceval.py").main
    main(flags(place))
    printed = capsys.readouterr().out
    folder = place / "out/ceval/rl_32"
    assert f"weights: {place}/out/rl_32.pth" in printed and f"wrote {folder}/" in printed
    assert "val: 14 questions of 2 subjects" in printed
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    right = {"letters": 0, "option text": 0}
    for subject in ("law", "logic"):
        with open(folder / f"{subject}_val_result.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                right["letters"] += row["llm_answer"] == row["answer"]
                right["option text"] += row["option_answer"] == row["answer"]
    assert {method: summary[method]["total"]["right"] for method in right} == right
    assert summary["letters"]["total"]["asked"] == 14 and summary["shots"] == 0
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    main(["--results", str(folder)])
    shown = capsys.readouterr().out.strip()
    assert shown and shown in printed


@pytest.mark.slow
def test_the_test_split_gives_a_submission(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("eval_ceval.py").main(flags(place, "--split", "test", "--shots", 2))
    folder = place / "out/ceval/rl_32_2shot/test"  # apart from the results of val
    answers = json.loads((folder / "submission_letters.json").read_text("utf-8"))
    assert {name: list(given) for name, given in answers.items()} == {
        "law": [*"01234"],
        "logic": [*"01234"],
    }
    assert set("".join(given for of in answers.values() for given in of.values())) <= set("ABCD")
    assert (folder / "submission_option_text.json").is_file()
    assert not (folder / "summary.json").exists()
    assert "submission_letters.json" in capsys.readouterr().out


def start(*args: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    command = [sys.executable, ROOT / "eval_ceval.py", *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=120
    )


@pytest.mark.slow
def test_a_missing_exam_and_missing_weights_are_one_line_each(place: Path, tmp_path: Path) -> None:
    done = start(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: dataset/ceval-exam does not exist, expected ")
    assert "--data_dir dataset/demo/ceval-exam" in done.stderr and done.stderr.count("\n") == 1
    done = start("--data_dir", place / "exam", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: no weights: looked for ")


def test_examples_from_the_questions_themselves_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script("eval_ceval.py").main(["--split", "dev", "--shots", "1"])
    assert stopped.value.code == 2 and "would show the answers" in capsys.readouterr().err
