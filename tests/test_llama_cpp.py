"""llama.cpp itself on exported GGUF files: the same text, the same tokens (make soak).

Needs llama-cpp-python, in this environment or in one whose python MINIMIND_LLAMA_CPP_PYTHON names.
"""

import argparse
import importlib.util
import json
import lzma
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from model.checkpoint import Loaded, load_model, read_sidecar
from model.export import export
from model.export_gguf import our_tensors, quantizations
from model.flags import model_flags
from model.generation import generate
from model.model import MiniMindForCausalLM
from model.sampling import SamplingOptions
from model.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
CORPORA = ROOT.parent / "shared" / "data"
DEMO = ROOT / "out" / "demo" / "multi_chat"
INSTALL = (
    "llama-cpp-python is not installed: pip install llama-cpp-python==0.3.36 (it is built, about "
    "15 minutes on two cores), or name a python that has it by MINIMIND_LLAMA_CPP_PYTHON"
)
N_NEW = 24
Build = Callable[..., MiniMindForCausalLM]

# Runs where llama.cpp is. Keys and values of attention are kept in fp32; its own default is fp16.
WORKER = """
import json, sys
import numpy as np
from llama_cpp import Llama, llama_get_logits_ith
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

job = json.load(sys.stdin)
llama = Llama(job["path"], n_ctx=job["n_ctx"], n_threads=1, type_k=0, type_v=0, verbose=False)
template = llama.metadata["tokenizer.chat_template"]
chat = Jinja2ChatFormatter(template, eos_token="</s>", bos_token="<s>")
answers, prompts, logits = [], [], []
for messages in job["chats"]:
    text = chat(messages=messages).prompt.encode()
    prompt = llama.tokenize(text, add_bos=True, special=True)  # the file says: none to add
    prompts.append(prompt)
    llama.reset()
    llama.eval(prompt)
    said = []
    while len(said) < job["n_new"]:
        row = np.ctypeslib.as_array(llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),))
        if not said:
            logits.append(row.tolist())
        said.append(int(row.argmax()))
        if said[-1] == llama.token_eos():
            break
        llama.eval(said[-1:])
    answers.append({"ids": said, "text": llama.detokenize(said).decode(errors="replace")})
tokens = [llama.tokenize(t.encode(), add_bos=True, special=False) for t in job["texts"]]
texts = [llama.detokenize(ids).decode() for ids in tokens]
json.dump(dict(answers=answers, prompts=prompts, logits=logits, tokens=tokens, texts=texts), sys.stdout)
"""  # noqa: E501


def llama_cpp(path: Path, config: Any, **job: Any) -> dict[str, Any]:
    """Run llama.cpp on a file; skip without it."""
    python = os.environ.get("MINIMIND_LLAMA_CPP_PYTHON")
    if python is None and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip(INSTALL)
    job = {"path": str(path), "n_ctx": config.max_seq_len, "chats": [], "texts": [], **job}
    done = subprocess.run(
        [python or sys.executable, "-c", WORKER],
        input=json.dumps({"n_new": N_NEW, **job}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def chats() -> list[list[dict[str, str]]]:
    """Return 60 conversations: one question, a system text before it, or a turn before it."""
    lines = (ROOT / "dataset" / "demo" / "quiz.jsonl").read_text("utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    picked = random.Random(0).sample(questions, 60)
    result = []
    for number, question in enumerate(picked):
        messages = [{"role": "user", "content": question}]
        if number % 3 == 1:
            messages.insert(0, {"role": "system", "content": "你是一个助手。"})
        if number % 3 == 2:
            messages.insert(0, {"role": "assistant", "content": "你好！"})
            messages.insert(0, {"role": "user", "content": "你好"})
        result.append(messages)
    return result


@torch.no_grad()
def compare(loaded: Loaded, path: Path, atol: float = 1e-4) -> list[str]:
    """Check that llama.cpp says of a file what the model says; return what was said."""
    theirs = llama_cpp(path, loaded.model.config, chats=chats())
    options = SamplingOptions(max_new_tokens=N_NEW, temperature=0.0)
    for messages, prompt, answer, logits in zip(
        chats(), theirs["prompts"], theirs["answers"], theirs["logits"], strict=True
    ):
        expected = loaded.tokenizer.encode_chat(messages, add_generation_prompt=True)
        assert prompt == expected
        ours = loaded.model(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(torch.tensor(logits), ours, rtol=0, atol=atol)
        said = [getattr(token, "id", token) for token in generate(loaded.model, prompt, options)]
        assert said == answer["ids"]  # the end token included
        assert loaded.tokenizer.decode(said) == answer["text"]
    return [answer["text"] for answer in theirs["answers"]]


def random_model(build: Build, **fields: Any) -> Loaded:
    """Return a model whose weights are so large that no two tokens are nearly as likely."""
    tokenizer = Tokenizer()
    model = build(vocab_size=tokenizer.vocab_size, max_seq_len=128, **fields)
    return Loaded(model, tokenizer, None)


@pytest.mark.soak
def test_a_trained_model_says_the_same_in_llama_cpp(tmp_path: Path) -> None:
    found = [p for p in sorted(DEMO.glob("full_sft_*.pth")) if fits(p)]
    if not found:
        pytest.skip(f"no weights for the shipped tokenizer in {DEMO}: run make demo")
    parser = argparse.ArgumentParser()
    model_flags(parser)
    loaded = load_model(found[0], parser.parse_args([]))
    loaded.model.eval()
    export(loaded, tmp_path / "demo.gguf", "gguf")
    said = compare(loaded, tmp_path / "demo.gguf")
    assert len(set(said)) > 30  # it speaks, each to its question


def fits(path: Path) -> bool:
    """Say whether weights were trained with the tokenizer that ships now."""
    return read_sidecar(path).get("tokenizer_sha256") == Tokenizer().sha256


VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "linear": {"rope_scaling": "linear:4"},
    "yarn": {"rope_scaling": "yarn:4"},
    "moe": {"use_moe": True},
    "moe, one shared": {"use_moe": True, "n_shared_experts": 1, "rope_scaling": "yarn:4"},
    "moe, not normalised": {"use_moe": True, "norm_topk_prob": False},
    "moe, one expert a token": {"use_moe": True, "num_experts_per_tok": 1},
    "moe, none shared": {"use_moe": True, "n_shared_experts": 0},
}


@pytest.mark.soak
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_each_kind_of_model_says_the_same_in_llama_cpp(
    build: Build, tmp_path: Path, fields: dict[str, Any]
) -> None:
    loaded = random_model(build, **fields)
    export(loaded, tmp_path / "model.gguf", "gguf")
    compare(loaded, tmp_path / "model.gguf")


@pytest.mark.soak
@pytest.mark.parametrize("kind", ("float16", "bfloat16", *quantizations()))
def test_llama_cpp_runs_each_precision(build: Build, tmp_path: Path, kind: str) -> None:
    loaded = random_model(build, dim=256, hidden_dim=512)  # rows divide into blocks of 256
    path = tmp_path / "model.gguf"
    export(loaded, path, "gguf", **{"dtype" if "float" in kind else "quantize": kind})
    theirs = llama_cpp(path, loaded.model.config, chats=chats()[:1], n_new=1)
    # our model with the weights as the file has them, so that their rounding is no difference
    rounded = {}
    for tensor in gguf.GGUFReader(path).tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        rounded |= our_tensors(tensor.name, torch.from_numpy(array.astype(np.float32)))
    loaded.model.load_state_dict(rounded | {"output.weight": rounded["tok_embeddings.weight"]})
    with torch.no_grad():
        ours = loaded.model(torch.tensor(theirs["prompts"])).logits[0, -1]
    similarity = torch.cosine_similarity(torch.tensor(theirs["logits"][0]), ours, dim=0)
    # llama.cpp rounds what it multiplies with such weights to 8 bits or to their float type
    assert similarity > 0.99


# ----------------------------------------------------------------------------- tokens

PIECES = (
    "中文分词测试", "繁體中文與標點，。！？", "日本語のテキストです。", "한국어 문장입니다.",
    "Привет, мир!", "مرحبا بالعالم", "שלום עולם", "สวัสดีชาวโลก", "नमस्ते दुनिया", "Ελληνικά",
    "Tiếng Việt có dấu", "naïve café déjà-vu", "e\u0301 combining", "ﬁ ligature", "Ⅷ ½ ①",
    "😀", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "🇨🇳🇫🇷", "👍🏽", "❤\ufe0f", "it’s",
    "don't we'll I'M they'VE", "12345 67,890.12 ٣٤٥ １２３", "'s", " 's", "...!!!???",
    "def f(x):\n    return x ** 2  # 平方\n", "\tif (a && b) { c(); }\r\n", "<unk>",
    "<s>user\n</s>", "  two  spaces   three ", "\n\n\n", "\t\t", " ", "\u3000全角空格\u3000",
    "\u00a0nbsp\u00a0", "\u2028line\u2029", "\x85next", "\u200bzero\u200dwidth", "“引号”『』",
    "a_b-c.d@e.com", "https://例子.中国/?q=%20", "$€£¥₿", "∑∫√∞≠", "\ufeffbom", "𠮷野家", "𝔘𝔫𝔦𝔠",
    "\x01\x7f", "\u0301", "\r", "x\r\ry",
)  # fmt: skip


def multilingual() -> list[str]:
    """Return the pieces, and 300 mixtures of them with and without white space between."""
    source = random.Random(0)
    mixed = [
        source.choice(("", " ", "\n", "  ", "\t")).join(source.choices(PIECES, k=5))
        for _ in range(300)
    ]
    return [*PIECES, *mixed]


def corpus_lines() -> list[str]:
    """Return 500 documents of the corpora for development, none where they are not."""
    path = CORPORA / "pretrain" / "seq_monkey_format_00.jsonl.xz"
    if not path.is_file():
        return []
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(next(file))["text"] for _ in range(500)]


@pytest.mark.soak
def test_llama_cpp_finds_the_same_tokens(build: Build, tmp_path: Path) -> None:
    loaded = random_model(build)
    export(loaded, tmp_path / "model.gguf", "gguf")
    texts = multilingual() + corpus_lines()
    theirs = llama_cpp(tmp_path / "model.gguf", loaded.model.config, texts=texts)
    ours = [loaded.tokenizer.encode(text) for text in texts]
    wrong = [t for t, a, b in zip(texts, ours, theirs["tokens"], strict=True) if a != b]
    assert wrong == []
    assert theirs["texts"] == texts
