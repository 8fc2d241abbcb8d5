"""0-eval_pretrain.py and 2-eval.py as a user starts them."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.checkpoint import save_weights
from model.generation import generate
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.sampling import SamplingOptions
from model.terminal import ask
from model.text_stream import stream_text
from model.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SCRIPTS = ("0-eval_pretrain.py", "2-eval.py")
GREEDY = ("--temperature", "0", "--max_new_tokens", "12", "--dtype", "float32", "--device", "cpu")


def start(script: str, *args: object, cwd: Path = ROOT) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, args)],
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        cwd=cwd,
        env=env,
        encoding="utf-8",
    )


def run(script: str, *args: object, cwd: Path = ROOT, typed: str = "") -> tuple[int, str, str]:
    process = start(script, *args, cwd=cwd)
    out, err = process.communicate(typed, timeout=120)
    assert "Traceback" not in err
    return process.returncode, out, err


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    config = LMConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tokenizer.vocab_size, max_seq_len=96
    )
    model = MiniMindForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # at the usual 0.02 every answer repeats its first token
            parameter.data.mul_(6)
    return model


@pytest.fixture(scope="module")
def out_dir(
    model: MiniMindForCausalLM, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What stages leave: rl_64.pth is the model, the rest of the chat weights are not readable."""
    folder = tmp_path_factory.mktemp("out")
    save_weights(model, folder / "rl_64.pth", tokenizer)
    save_weights(model, folder / "pretrain_64.pth", tokenizer)
    for name in ("single_chat", "multi_chat"):
        (folder / name).mkdir()
        (folder / name / "full_sft_64.pth").write_bytes(b"not weights")
    return folder


def greedy_text(model: MiniMindForCausalLM, tokenizer: Tokenizer, ids: list[int]) -> str:
    options = SamplingOptions(temperature=0, max_new_tokens=12)
    return "".join(stream_text(tokenizer, generate(model, ids, options)))


def chat(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


# ---- before torch ----


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_flags_answer_without_torch(script: str) -> None:
    for args, code in ((["--help"], 0), (["--top_p", "2"], 2), (["--nonsense"], 2)):
        program = (
            "import runpy, sys\nsys.argv = sys.argv[1:]\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally:\n    assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, ROOT / script, *args],
            capture_output=True,
            cwd=ROOT,
            text=True,
        )
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert ("--repetition_penalty" in done.stdout) == (code == 0)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--interactive", "--prompt", "你好"), "not allowed with"),
        (("--history_cnt", "3"), "--history_cnt 3 is odd"),
        (("--temperature", "-1"), "--temperature: -1 is below 0"),
        (("--max_new_tokens", "0"), "--max_new_tokens: 0 is not above 0"),
    ],
)
def test_wrong_flags_exit_with_2(args: tuple[str, ...], expected: str) -> None:
    code, _, err = run("2-eval.py", *args)
    assert code == 2 and expected in err


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        (b"one\n\n  \n two", ["one", " two"]),  # the end of the input
        (b"one\nexit\ntwo\n", ["one"]),
        (b"\xe4\xbd\xa0\xff\nquit \n", ["你\ufffd"]),  # a terminal that is not UTF-8
    ],
)
def test_what_a_user_types(typed: bytes, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
    assert list(ask("> ")) == lines


# ---- with a model ----


@pytest.mark.slow
def test_missing_weights_tell_what_to_run(tmp_path: Path) -> None:
    code, out, err = run("2-eval.py", cwd=tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("error: no weights: looked for out/rl_512.pth") and "3-full_sft.py" in err


@pytest.mark.slow
def test_the_lists_are_answered_in_chinese_and_english(out_dir: Path) -> None:
    for script, name in zip(SCRIPTS, ("pretrain", "rl"), strict=True):
        code, out, err = run(script, "--out_dir", out_dir, "--dim", 64, "--max_new_tokens", 5)
        assert (code, err) == (0, "")
        assert out.startswith(f"weights: {out_dir / name}_64.pth (")
        known = r"( \(\d+ of them known\))?"
        speed = rf"\[prompt \d+ tokens{known}, [\d,.]+ tokens/s, answer \d+ tokens"
        n = len(re.findall(speed, out))
        assert n >= 10
        assert "The capital of France" in out or "the capital of France" in out


@pytest.mark.slow
def test_a_text_is_continued(
    model: MiniMindForCausalLM, tokenizer: Tokenizer, out_dir: Path
) -> None:
    long = "秋天来了，树叶黄了。" * 20
    ids = tokenizer.encode_document("长江")[:-1]
    code, out, _ = run(
        "0-eval_pretrain.py", "--weights", out_dir / "rl_64.pth", *GREEDY,
        "--prompt", "长江", "--prompt", long,
    )  # fmt: skip
    assert code == 0
    assert "\n长江" + greedy_text(model, tokenizer, ids) + "\n[prompt " in out
    n_left_out = len(tokenizer.encode(long)) + 1 - 84
    assert f"[left out its first {n_left_out} tokens: a prompt takes at most 84 tokens]" in out


@pytest.mark.slow
def test_an_interactive_chat_remembers(
    model: MiniMindForCausalLM, tokenizer: Tokenizer, out_dir: Path
) -> None:
    def reply(messages: list[dict[str, str]]) -> str:
        return greedy_text(
            model, tokenizer, tokenizer.encode_chat(messages, add_generation_prompt=True)
        )

    first = reply(chat("你好"))
    second = reply(chat("你好", first, "你是谁"))
    assert second != reply(chat("你是谁"))
    third = reply(chat("你是谁", second, "再见"))  # a history of two messages
    typed = "你好\n\n你是谁\n" + "长城" * 100 + "\n再见\nexit\nnever read\n"
    args = ("--interactive", "--history_cnt", 2, "--out_dir", out_dir, "--dim", 64, *GREEDY)
    code, out, err = run("2-eval.py", *args, typed=typed)
    assert (code, err) == (0, "")
    answers = re.findall(r"MiniMind: (.*?)\n\[prompt ", out, flags=re.DOTALL)
    assert answers == [first, second, third]
    assert out.count("error: the newest message takes ") == 1


@pytest.mark.slow
def test_an_exported_folder_and_a_system_text(
    model: MiniMindForCausalLM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    messages = [{"role": "system", "content": "简短。"}, *chat("你好")]
    ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
    args = ("--load_from", tmp_path, "--system", "简短。", "--prompt", "你好", *GREEDY)
    code, out, _ = run("2-eval.py", *args)
    assert code == 0 and f"MiniMind: {greedy_text(model, tokenizer, ids)}\n[prompt " in out


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_then_the_program(out_dir: Path) -> None:
    endless = ("--max_seq_len", 100_000, "--max_new_tokens", 90_000, "--seed", 1)
    program = start("2-eval.py", "--interactive", "--weights", out_dir / "rl_64.pth", *endless)

    def read_until(end: str) -> str:
        seen = ""
        while not seen.endswith(end):
            piece = program.stdout.read(1)
            assert piece, f"{seen!r}: ended before {end!r}"
            seen += piece
        return seen

    for _ in range(2):
        read_until("用户: ")
        program.stdin.write("你好\n")
        program.stdin.flush()
        read_until("MiniMind: ")
        program.stdout.read(30)  # in the middle of its answer
        program.send_signal(signal.SIGINT)
        assert re.search(r"已停止\)\n\[prompt \d+ tokens", read_until("]\n"))
    read_until("用户: ")
    program.send_signal(signal.SIGINT)
    _, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (0, "")
