"""The main job in small, on a CPU, in minutes: python dataset/demo/run.py  (or: make demo)

Demo corpus -> tables -> tokens -> pretraining -> fine-tuning -> preferences -> quiz -> a chat.
Every stage is a command of the project, printed before it runs, so that each can be run again by
hand. Weights go to out/demo/. Stopped and started again, it goes on where it was; done, it only
asks the quiz.
"""

import argparse
import hashlib
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from model.flags import run_main, weights_flags  # noqa: E402  the project's root is known by now

DEMO = Path("dataset/demo")
OUT = Path("out/demo")
DATA = OUT / "data"
SIZE = "--dim 192 --n_layers 4 --n_heads 6 --n_kv_heads 3 --max_seq_len 128"
EVERY = "--log_interval 100 --eval_interval 500 --save_interval 500"
COMMON = f"--out_dir {OUT} --batch_size 4 {EVERY} --resume"
SFT_FILES = f"{DEMO}/sft_single.jsonl {DEMO}/sft_multi.jsonl"
STAGES = (
    f"data_process.py pretrain --input {DEMO}/pretrain.jsonl --output {DATA}/pretrain_data.csv",
    f"data_process.py sft --input {SFT_FILES} --output {DATA}/sft_data.csv",
    f"data_process.py rl --input {DEMO}/dpo.jsonl --output {DATA}/dpo.json",
    f"data_process.py rl --input {DEMO}/dpo_heldout.jsonl --output {DATA}/dpo_heldout.json",
    f"1-pretrain.py --data_path {DATA}/pretrain_data.csv {SIZE} {COMMON} --optimizer adamw "
    "--epochs 8",
    f"3-full_sft.py --data_path {DATA}/sft_data.csv --init_from {OUT}/pretrain_192.pth {COMMON} "
    "--epochs 4 --learning_rate 2e-3",
    f"5-dpo_train.py --data_path {DATA}/dpo.json --val_data_path {DATA}/dpo_heldout.json "
    f"--init_from {OUT}/multi_chat/full_sft_192.pth {COMMON} --learning_rate 1e-4",
)
WEIGHTS = OUT / "rl_192.pth"
CHAT = ("你好", "你是谁？", "法国的首都是哪里？", "那日本呢？", "谢谢")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    start = time.monotonic()
    forget_other_settings()
    for command in STAGES:
        print(f"\n$ python {command}", flush=True)
        code = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT).returncode
        if code:
            print(f"the demo stopped: `python {command}` ended with code {code}", file=sys.stderr)
            return code
    code = show_results()
    print(f"\nall in {time.monotonic() - start:.0f} s")
    print("chat with it:  python 2-eval.py --interactive   (in .venv/bin, if make installed it)")
    return code


def forget_other_settings() -> None:
    """Remove the results of other stages or another corpus: no old weights under new settings."""
    digest = hashlib.sha256(repr(STAGES).encode())
    for path in sorted((ROOT / DEMO).glob("*.jsonl")):
        digest.update(path.read_bytes())
    stamp = ROOT / OUT / "made_from"
    if not stamp.is_file() or stamp.read_text() != digest.hexdigest():
        shutil.rmtree(ROOT / OUT, ignore_errors=True)
        stamp.parent.mkdir(parents=True)
        stamp.write_text(digest.hexdigest())


def show_results() -> int:
    """Ask the quiz and hold a short chat with the weights just made."""
    from model.checkpoint import load_for_inference
    from model.prompts import Message
    from model.quiz import MAX_ANSWER_TOKENS, answer_greedily, load_quiz, take_quiz

    parser = argparse.ArgumentParser()
    weights_flags(parser)
    loaded = load_for_inference(parser.parse_args(["--weights", str(ROOT / WEIGHTS)]))
    result = take_quiz(loaded, load_quiz(ROOT / DEMO / "quiz.jsonl"))
    print(f"\na chat with {WEIGHTS}")
    messages: list[Message] = []
    for question in CHAT:
        messages.append({"role": "user", "content": question})
        (answer,) = answer_greedily(loaded, [messages], MAX_ANSWER_TOKENS)
        messages.append({"role": "assistant", "content": answer.text})
        print(f"  问：{question}\n  答：{answer.text}")
    print("\nthe quiz: questions that were kept out of training, right / asked")
    for relation, (n_right, n_asked) in sorted(result.by_relation.items()):
        print(f"  {relation:<20} {n_right:>3}/{n_asked}")
    for item, said in result.wrong[:5]:
        print(f"  wrong: {item['question']} -> {said!r}, expected {item['accept'][0]}")
    print(result)
    return 0


if __name__ == "__main__":
    run_main(main)
