"""eval_stages.py and what it measures: which weights, the same measures for each, one report."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import script, write_csv, write_tokenizer

from model.checkpoint import Loaded, save_weights
from model.evaluation import Share, measure_text
from model.LMConfig import LMConfig
from model.lora import LoRAConfig, adapters, add_adapter, save_adapter
from model.model import MiniMindForCausalLM
from model.stages import Tasks, answer_each, changes, find_stages, measure, read_texts, stage_at
from model.tally import Tally
from model.tokenizer import Tokenizer

TEXTS = ["river mountain 长江", "the river of 北京 walks quickly . " * 20]
NAMES = ["pretrain_32", "single_chat/full_sft_32", "rl_32", "lora_32"]


def tiny(seed: int) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    config = LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=192)
    return MiniMindForCausalLM(config).eval()


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a chain of stages leaves, each with other weights, and some of another width."""
    folder = tmp_path_factory.mktemp("out")
    tokenizer = Tokenizer(write_tokenizer(folder / "tokenizer"))
    for seed, name in enumerate(("rl_32", "pretrain_32", "single_chat/full_sft_32", "rl_320")):
        (folder / name).parent.mkdir(exist_ok=True)
        save_weights(tiny(seed), folder / f"{name}.pth", tokenizer)
    model = tiny(2)
    add_adapter(model, LoRAConfig(rank=2, alpha=4.0))
    for _, layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B, std=0.5)
    save_adapter(model, folder / "lora_32", folder / "single_chat/full_sft_32.pth")
    (folder / "lora_notes").mkdir()
    (folder / "pretrain_32.txt").write_text("no weights")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A text, a quiz and an exam."""
    folder = tmp_path_factory.mktemp("files")
    write_csv(folder / "text.csv", ["text"], [[text] for text in TEXTS])
    (folder / "exam/val").mkdir(parents=True)
    rows = [[str(i), f"river {i}?", "the", "山", "city", "of", "ABCD"[i % 4]] for i in range(6)]
    header = ["id", "question", "A", "B", "C", "D", "answer"]
    write_csv(folder / "exam/val/law_val.csv", header, rows)
    items = [{"question": "the river?", "accept": ["山"]}, {"question": "city", "accept": ["of"]}]
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (folder / "quiz.jsonl").write_text(lines, encoding="utf-8")
    return {"text": folder / "text.csv", "quiz": folder / "quiz.jsonl", "exam": folder / "exam"}


def run(out_dir: Path, *flags: object) -> int:
    place = f"--out_dir {out_dir} --tokenizer {out_dir}/tokenizer --device cpu --dtype float32"
    return script("eval_stages.py").main([*place.split(), *map(str, flags)])


# ---- which weights ----


def test_stages_are_found_in_the_order_of_training(out_dir: Path) -> None:
    assert [stage.name for stage in find_stages(out_dir, "32")] == NAMES
    widths = [stage.name for stage in find_stages(out_dir)]
    assert widths == [*NAMES[:3], "rl_320", NAMES[3]]
    lora = find_stages(out_dir, "32")[3]
    assert lora.weights is None and lora.lora == out_dir / "lora_32"


def test_the_demos_stages_are_taken_where_there_are_no_others(
    out_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "demo").mkdir()
    shutil.copy(out_dir / "pretrain_32.pth", tmp_path / "demo")
    assert [stage.name for stage in find_stages(tmp_path)] == ["demo/pretrain_32"]
    with pytest.raises(FileNotFoundError, match="holds no weights of any stage .*pretrain_64"):
        find_stages(tmp_path, "64")


def test_named_weights_are_called_by_their_place(out_dir: Path, tmp_path: Path) -> None:
    assert stage_at(out_dir / "rl_32.pth", out_dir).name == "rl_32"
    assert stage_at(out_dir / "rl_32.pth", tmp_path).name == f"{out_dir.name}/rl_32"
    assert stage_at(out_dir / "lora_32", out_dir).lora == out_dir / "lora_32"


# ---- measures ----


def test_texts_are_whole_documents_up_to_the_limit(files: dict[str, Path]) -> None:
    assert read_texts(files["text"], 0, Tally()) == TEXTS
    assert read_texts(files["text"], 1, Tally()) == TEXTS[:1]
    n_bytes = len(TEXTS[0].encode())
    assert read_texts(files["text"], n_bytes, Tally()) == TEXTS[:1]
    assert read_texts(files["text"], n_bytes + 1, Tally()) == TEXTS


def test_an_answer_is_the_likeliest_tokens(out_dir: Path) -> None:
    model, tokenizer = tiny(0), Tokenizer(out_dir / "tokenizer")
    (said,) = answer_each(Loaded(model, tokenizer, None), ["the river?"], 12)
    messages = [{"role": "user", "content": "the river?"}]
    prompt = torch.tensor([tokenizer.encode_chat(messages, add_generation_prompt=True)])
    whole = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    new = whole[0, prompt.shape[1] :].tolist()
    assert (said["answer"], said["tokens"]) == (tokenizer.decode(new), len(new))
    assert said["is_cut"] == (new[-1] != 2)


def test_nothing_asked_for_is_nothing_measured(out_dir: Path) -> None:
    loaded = Loaded(tiny(0), Tokenizer(out_dir / "tokenizer"), None)
    assert measure(loaded, Tasks(), print) == {"parameters": loaded.model.num_parameters()}


def test_what_changed_is_told_with_its_sign_and_where_it_may_be_chance() -> None:
    def stage(name: str, bits: float, right: int, letters: int) -> dict:
        ceval = {"letters": Share(letters, 100).as_json()}
        quiz = {"quiz": Share(right, 100).as_json()}
        return {"stage": name, "text": {"bits_per_byte": bits}, "quiz": quiz, "ceval": ceval}

    assert changes(stage("one", 2.5, 10, 25), stage("two", 2.25, 90, 28)) == (
        "one → two: bits per byte -0.2500; quiz quiz +80.0 points; "
        "C-Eval by letters +3.0 points (the intervals overlap)"
    )


# ---- the script ----


@pytest.mark.slow
def test_the_report_holds_every_stage_and_every_measure(
    out_dir: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    measures = f"--text {files['text']} --quiz {files['quiz']} --ceval_dir {files['exam']}".split()
    asked = ["--dim", 32, "--prompt", "the river?", "--prompt", "a|b", "--max_new_tokens", 8]
    assert run(out_dir, *measures, *asked) == 0
    printed = capsys.readouterr().out
    markdown = (out_dir / "stages/report.md").read_text("utf-8")
    assert markdown in printed
    known = json.loads((out_dir / "stages/report.json").read_text("utf-8"))["stages"]
    assert [stage["stage"] for stage in known] == NAMES
    header, rule, *rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")[2:-1]] == NAMES
    assert len({len(line) for line in (header, rule, *rows)}) == 1  # columns stand in line
    table = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in rows}
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    bits = [float(cell) for cell in table[f"bits per byte, {n_bytes:,} bytes"]]
    tokenizer = Tokenizer(out_dir / "tokenizer")
    for seed, index in ((1, 0), (2, 1), (0, 2)):
        expected = measure_text(tiny(seed), tokenizer, TEXTS).bits_per_byte
        assert bits[index] == pytest.approx(expected, abs=1e-4)
    assert bits.count(bits[3]) == 1  # the adapter did something
    for label in ("quiz", "C-Eval by letters (chance 25 %)", "C-Eval by option text (chance 25 %)"):
        assert all(re.fullmatch(r" *\d/[26] = .* % \(.* to .*\) ", cell) for cell in table[label])
    assert len(table) == 11 and "**a|b**" in markdown
    assert markdown.count("\n- rl_32: ") == 2 and markdown.count(" → ") == 3


@pytest.mark.slow
def test_one_model_is_enough_and_a_bad_one_costs_only_itself(
    out_dir: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ("--weights", out_dir / "rl_32.pth", "--text", files["text"], "--prompt", "x")
    assert run(out_dir, *one) == 0
    assert " → " not in capsys.readouterr().out
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"not weights")
    weights = ("--weights", bad, out_dir / "rl_32.pth", tmp_path / "absent.pth")
    assert run(out_dir, *weights, "--prompt", "x") == 1
    printed = capsys.readouterr()
    assert "| rl_32 |" in printed.out.replace("  ", "")
    assert "bad: left out, " in printed.err and "absent.pth does not exist" in printed.err
    with pytest.raises(ValueError, match="none of the weights could be measured"):
        run(out_dir, "--weights", bad)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text", "absent.txt"), "absent.txt is not a file"),
        (("--quiz", "absent.jsonl"), "absent.jsonl"),
        (("--ceval_dir", "absent"), "absent does not exist, expected absent/val/"),
        (("--dim", "48"), "holds no weights of any stage"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_measured(
    out_dir: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        run(out_dir, *flags)
