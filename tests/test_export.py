"""Exported folders in transformers' hands, what is left when writing fails, and the way back."""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import tokenizers
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny_runs import ROOT, full_disk, run, same_weights, write_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Ernie4_5_MoeForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from model.checkpoint import Loaded, save_weights
from model.export import check_output, export
from model.flags import model_flags
from model.generation import generate
from model.hub import CARD_TAG
from model.model import MiniMindForCausalLM
from model.readback import read_back
from model.sampling import SamplingOptions
from model.tokenizer import EOS_ID, Tokenizer

TEXTS = ("river mountain 长江", "the city, 北京 walks!", "  a b\n\n", "😀 unseen é", "")
CHAT = [
    {"role": "system", "content": "the river"},
    {"role": "user", "content": "长江 walks ?"},
    {"role": "assistant", "content": "北京"},
    {"role": "user", "content": "and a city"},
]
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "linear": {"rope_scaling": "linear:4"},
    "yarn": {"rope_scaling": "yarn:4", "n_kv_heads": 1},
    "moe": {"use_moe": True},
    "moe, none shared": {"use_moe": True, "n_shared_experts": 0, "rope_scaling": "yarn:4"},
}
Make = Callable[..., Loaded]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def make(build: Callable[..., MiniMindForCausalLM], tokenizer: Tokenizer) -> Make:
    """Return a function that makes a tiny model with a tokenizer that fits."""

    def loaded(**fields: Any) -> Loaded:
        return Loaded(build(vocab_size=tokenizer.vocab_size, **fields), tokenizer, None)

    return loaded


def ids(n: int = 40) -> Tensor:
    """Return tokens beyond the 16 positions that yarn:4 takes for the trained ones."""
    return torch.randint(3, 300, (2, n), generator=torch.Generator().manual_seed(1))


def flags(*given: str) -> Namespace:
    parser = ArgumentParser()
    model_flags(parser)
    return parser.parse_args(given)


# ----------------------------------------------------------------------------- in transformers


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_a_llama_folder_gives_our_logits(
    make: Make, tmp_path: Path, fields: dict[str, Any]
) -> None:
    loaded = make(**fields)
    export(loaded, tmp_path / "out", "llama")
    peer, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    kind = Ernie4_5_MoeForCausalLM if loaded.model.config.use_moe else LlamaForCausalLM
    assert type(peer) is kind
    assert not any(report.values())
    ours, theirs = loaded.model(ids()).logits, peer(ids()).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert peer.lm_head.weight is peer.model.embed_tokens.weight
    assert not list((tmp_path / "out").glob("*.py"))


def test_a_folder_has_the_tokenizer(make: Make, tmp_path: Path) -> None:
    loaded = make()
    export(loaded, tmp_path / "out", "llama")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert theirs(text).input_ids == loaded.tokenizer.encode(text)
    for prompt in (True, False):
        ours = loaded.tokenizer.encode_chat(CHAT, add_generation_prompt=prompt)
        said = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=False)
        assert said == ours
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert theirs.model_max_length == loaded.model.config.max_seq_len


def test_vocabulary_and_merges_alone_make_the_tokenizer(make: Make, tmp_path: Path) -> None:
    loaded = make()
    export(loaded, tmp_path / "out", "minimind")
    files = (str(tmp_path / "out" / name) for name in ("vocab.json", "merges.txt"))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert [bpe.encode(text).ids for text in TEXTS] == list(map(loaded.tokenizer.encode, TEXTS))


@pytest.mark.parametrize("kind", ("minimind", "llama"))
@pytest.mark.parametrize("dtype", ("auto", "float32", "bfloat16", "float16"))
def test_tensors_have_the_precision_asked(
    make: Make, tmp_path: Path, kind: str, dtype: str
) -> None:
    loaded = make()
    export(loaded, tmp_path / "out", kind, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    name = "tok_embeddings.weight" if kind == "minimind" else "model.embed_tokens.weight"
    assert torch.equal(tensors[name], loaded.model.tok_embeddings.weight.to(expected))
    stored = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert stored["dtype"] == str(expected).removeprefix("torch.")
    assert loaded.model.dtype == torch.float32  # the caller's model is as it was


def test_weights_that_a_precision_cannot_hold_are_refused(make: Make, tmp_path: Path) -> None:
    loaded = make()
    loaded.model.norm.weight.data[0] = 1e5
    with pytest.raises(ValueError, match=r"norm.weight does not fit float16 .largest 1e\+05"):
        export(loaded, tmp_path / "out", "minimind", dtype="float16")
    export(loaded, tmp_path / "out", "minimind", dtype="bfloat16")
    loaded.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"norm.weight is not finite"):
        export(loaded, tmp_path / "other", "gguf")


@pytest.mark.parametrize("fields", ({"norm_topk_prob": False}, {"num_experts_per_tok": 1}))
def test_routing_that_no_class_has_is_refused(
    make: Make, tmp_path: Path, fields: dict[str, Any]
) -> None:
    name = next(iter(fields))
    with pytest.raises(ValueError, match=f"no class of transformers has {name}.*--format minimind"):
        export(make(use_moe=True, **fields), tmp_path / "out", "llama")
    assert list(tmp_path.iterdir()) == []


def test_generation_goes_by_the_context(make: Make, tmp_path: Path) -> None:
    export(make(), tmp_path / "out", "minimind")
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.pad_token_id, settings.max_new_tokens) == (2, 0, 32)
    settings.validate(strict=True)


# A process that has never seen this project: it loads each folder, and says what it computes.
STRANGER = """
import importlib.util, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

assert importlib.util.find_spec("model") is None
job = json.load(sys.stdin)
logits = {}
for name, folder in job["folders"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits[name] = model(torch.tensor(job["ids"])).logits
torch.save(logits, job["logits"])
folder = job["folders"]["dense"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
texts = [tokenizer(text).input_ids for text in job["texts"]]
prompts = [tokenizer.apply_chat_template(job["chat"], add_generation_prompt=p, return_dict=False)
           for p in (False, True)]
prompt = torch.tensor([job["prompt"]])
said = model.generate(prompt, do_sample=False)[0, len(job["prompt"]):].tolist()
chat = pipeline("text-generation", model=folder, trust_remote_code=True)
replies = [chat(job["chat"], do_sample=False)[0]["generated_text"],
           chat(job["chat"], max_new_tokens=4)[0]["generated_text"]]
module = type(model).__module__
json.dump(dict(said=said, replies=replies, module=module, texts=texts, prompts=prompts), sys.stdout)
"""


@pytest.mark.slow
@torch.no_grad()
def test_a_stranger_loads_the_folder_and_talks(make: Make, tmp_path: Path) -> None:
    models = {name: make(**fields) for name, fields in KINDS.items()}
    dense = models["dense"]
    prompt = dense.tokenizer.encode("river mountain the city")
    # </s> becomes what a fifth token would be, so that an answer ends before its limit
    greedy = SamplingOptions(max_new_tokens=4, temperature=0.0)
    begun = [*prompt, *(token.id for token in generate(dense.model, prompt, greedy))]
    last = dense.model.hidden_states(torch.tensor([begun])).last_hidden_state[0, -1]
    dense.model.tok_embeddings.weight[EOS_ID] = 4 * last / last.norm()
    folders = {}
    for name, loaded in models.items():
        folders[name] = str(tmp_path / f"a {name.replace(', ', '-')}.v1")  # not a Python name
        export(loaded, Path(folders[name]), "minimind", binary=name == "linear")
    job = {
        "folders": folders, "ids": ids().tolist(), "prompt": prompt, "chat": CHAT,
        "logits": str(tmp_path / "logits.pt"), "texts": TEXTS,
    }  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER],
        input=json.dumps(job), capture_output=True, text=True, cwd=elsewhere,
        env=environment | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logits, answer = torch.load(job["logits"]), json.loads(done.stdout)
    for name, loaded in models.items():
        assert torch.equal(logits[name], loaded.model(ids()).logits), name
    assert answer["module"].startswith("transformers_modules.")
    assert answer["texts"] == [dense.tokenizer.encode(text) for text in TEXTS]
    assert answer["prompts"] == [
        dense.tokenizer.encode_chat(CHAT, add_generation_prompt=asked) for asked in (False, True)
    ]

    def ours(prompt_ids: list[int]) -> list[int]:
        options = SamplingOptions(max_new_tokens=32, temperature=0.0)
        return [token.id for token in generate(dense.model, prompt_ids, options)]

    assert answer["said"] == ours(prompt)
    assert answer["said"][-1] == EOS_ID and len(answer["said"]) < 32
    reply, sampled = answer["replies"]
    assert reply[:-1] == sampled[:-1] == CHAT
    said = ours(dense.tokenizer.encode_chat(CHAT, add_generation_prompt=True))
    assert reply[-1] == {"role": "assistant", "content": dense.tokenizer.decode(said)}
    assert sampled[-1]["role"] == "assistant"


# ----------------------------------------------------------------------------- whole or absent


@pytest.mark.parametrize("kind", ("minimind", "llama", "gguf"))
def test_a_full_disk_leaves_nothing(make: Make, tmp_path: Path, kind: str) -> None:
    with full_disk(100_000), pytest.raises(OSError, match=r"out could not be written.*may be full"):
        export(make(), tmp_path / "out", kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ("out", "out.gguf"))
def test_what_is_there_stays_unless_asked(make: Make, tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    export(make(), output, "gguf")

    def content() -> list[bytes]:
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        return [path.read_bytes() for path in sorted(files)]

    before = content()
    with pytest.raises(FileExistsError, match=f"{name} exists: .*--overwrite"):
        export(make(seed=1), output, "gguf")
    with full_disk(100_000), pytest.raises(OSError, match="could not be written"):
        export(make(seed=1), output, "gguf", overwrite=True)
    assert content() == before
    export(make(seed=1), output, "gguf", overwrite=True)
    assert content() != before
    assert len(content()) == len(before) == 2
    if output.is_file():
        output.unlink()  # the recipe beside it is not overwritten unasked either
        with pytest.raises(FileExistsError, match="out.Modelfile exists"):
            export(make(), output, "gguf")


def test_a_folder_with_anything_else_is_never_replaced(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(make(), tmp_path / "out", "minimind")  # an empty folder is no obstacle
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds thesis.txt, which no export writes"):
        export(make(), tmp_path / "out", "llama", overwrite=True)
    with pytest.raises(ValueError, match=r"--output . has no name of its own"):
        export(make(), Path("."), "llama", overwrite=True)
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "folder.gguf" / "file").touch()
    with pytest.raises(FileExistsError, match="is a folder, which is never replaced"):
        export(make(), tmp_path / "folder.gguf", "gguf", overwrite=True)


# ----------------------------------------------------------------------------- and back


@pytest.mark.parametrize("kind", ("minimind", "llama", "gguf"))
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_there_and_back_is_the_same_bit_for_bit(
    make: Make, tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    loaded = make(**fields, dropout=0.1 if kind == "llama" and "use_moe" not in fields else 0.0)
    save_weights(loaded.model, tmp_path / "before.pth", loaded.tokenizer)
    output = tmp_path / ("out.gguf" if kind == "gguf" else "out")
    export(loaded, output, kind, binary=kind == "llama" and "linear" in str(fields))
    back = read_back(output, flags("--tokenizer", str(loaded.tokenizer.folder)))
    save_weights(back.model, tmp_path / "after.pth", back.tokenizer)
    assert same_weights(tmp_path / "before.pth", tmp_path / "after.pth")
    before, after = (
        json.loads((tmp_path / f"{name}.json").read_text("utf-8"))["config"]
        for name in ("before", "after")
    )
    unused = set() if loaded.model.config.use_moe else {"n_shared_experts"}
    assert {k: v for k, v in after.items() if before.get(k) != v and k not in unused} in (
        {}, {"architectures": ["MiniMindForCausalLM"]},
    )  # fmt: skip


def llama(**fields: Any) -> LlamaForCausalLM:
    tiny = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=300)
    return LlamaForCausalLM(
        LlamaConfig(**{"intermediate_size": 64, "tie_word_embeddings": True} | tiny | fields)
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    (
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 32}, "head_dim=32"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope_type='llama3'",
        ),
    ),
)  # fmt: skip
def test_what_ours_cannot_express_is_refused_by_name(
    tokenizer: Tokenizer, tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    llama(**fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"our model has no .*{named}"):
        read_back(tmp_path, flags("--tokenizer", str(tokenizer.folder)))


@torch.no_grad()
def test_a_foreign_llama_comes_in(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = llama(num_key_value_heads=2, rope_theta=5e5).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")  # several files and an index
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    given = ("--tokenizer", str(tokenizer.folder))
    ours = read_back(tmp_path, flags(*given)).model.eval()
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=0, atol=1e-5)
    longer = read_back(tmp_path, flags(*given, "--rope_scaling", "linear:4")).model.config
    assert (longer.max_seq_len, longer.rope_parameters["factor"]) == (4 * 2048, 4.0)
    with pytest.raises(ValueError, match="dim=64, not 32"):
        read_back(tmp_path, flags(*given, "--dim", "32"))


def test_a_folder_that_is_not_whole_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    given = flags("--tokenizer", str(tokenizer.folder))
    with pytest.raises(FileNotFoundError, match="--from .* does not exist"):
        read_back(tmp_path / "nothing", given)
    model = llama()
    state = model.state_dict()
    del state["model.layers.0.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"missing model.layers.0.mlp.up_proj.weight"):
        read_back(tmp_path, given)
    settings = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for kind in ("gpt2", "no_such_model"):
        (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": kind}))
        with pytest.raises(ValueError, match=kind):
            read_back(tmp_path, given)


# ----------------------------------------------------------------------------- the script


def run_script(*given: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "export_model.py", *map(str, given)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "says"),
    (
        ("--output x", "give --format to export, or --from"),
        ("--output x --format llama --quantize q8_0", "--quantize goes with --format gguf"),
        ("--output x --format gguf --bin", "--bin goes with"),
        ("--output x --from y", "does not end in .pth"),
        ("--output x.pth --from y --weights z", "--weights and --from exclude one another"),
        ("--output x.gguf --format gguf --push_to_hub me/it", "--push_to_hub uploads a folder"),
        ("--output x --format onnx", "invalid choice: 'onnx'"),
    ),
)
def test_flags_that_contradict_are_told(given: str, says: str) -> None:
    done = run_script(*given.split())
    assert done.returncode == 2
    assert says in done.stderr


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as an upload of small files needs."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.path.split("/")[-1] if "create" in self.path else self.path.split("/")[-2]
        self.server.seen.append((kind, body, self.headers["Authorization"]))
        base = f"http://{self.headers['Host']}"
        answer: dict[str, Any] = {"url": f"{base}/me/it", "name": "me/it", "id": "1"}
        if kind == "preupload":
            files = json.loads(body)["files"]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"], **how} for file in files]}
        elif kind == "commit":
            answer = {"commitUrl": f"{base}/me/it/commit/0", "commitOid": "0" * 40}
        self.reply(answer)

    def do_GET(self) -> None:
        self.reply({"id": "me/it", "sha": "0" * 40, "siblings": []})

    def reply(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def test_the_script_exports_and_reads_back(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, weights = make(), tmp_path / "weights.pth"
    save_weights(loaded.model, weights, loaded.tokenizer)
    given = ("--weights", weights, "--tokenizer", loaded.tokenizer.folder)
    run("export_model.py", *given, "--format minimind --bin --output", tmp_path / "out")
    said = capsys.readouterr().out
    assert "pytorch_model.bin" in said and "trust_remote_code=True" in said
    run("export_model.py", "--from", tmp_path / "out", "--output", tmp_path / "back.pth")
    assert same_weights(weights, tmp_path / "back.pth")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run("export_model.py", "--from", tmp_path / "out", "--output", tmp_path / "back.pth")
    with pytest.raises(ValueError, match="--quantize q4_k_m is not offered: .*llama-quantize"):
        run("export_model.py", *given, "--format gguf --quantize Q4_K_M --output", tmp_path / "q")
    run("export_model.py", *given, "--format gguf --quantize Q8_0 --output", tmp_path / "q")
    said = capsys.readouterr().out
    assert "q-q8_0.gguf" in said and "ollama create" in said and "llama-cli" in said


@torch.no_grad()
def test_an_adapter_is_merged(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, weights = make(), tmp_path / "weights.pth"
    save_weights(loaded.model, weights, loaded.tokenizer)
    settings = LoraConfig(r=4, target_modules=["wq", "wv", "w2"], init_lora_weights=False)
    theirs = get_peft_model(loaded.model, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    run(
        "export_model.py", "--weights", weights, "--tokenizer", loaded.tokenizer.folder,
        "--lora", tmp_path / "adapter", "--format llama --output", tmp_path / "out",
    )  # fmt: skip
    assert f"with the adapter {tmp_path / 'adapter'} merged" in capsys.readouterr().out
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(ids()).logits, theirs(ids()).logits, rtol=0, atol=1e-4)
    assert (theirs(ids()).logits - make().model(ids()).logits).abs().max() > 0.1


def test_a_folder_is_pushed_to_a_hub(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, weights = make(), tmp_path / "weights.pth"
    save_weights(loaded.model, weights, loaded.tokenizer)
    given = ("--weights", weights, "--tokenizer", loaded.tokenizer.folder, "--push_to_hub me/it")
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    try:
        run("export_model.py", *given, "--format minimind --output", tmp_path / "out")
    finally:
        server.shutdown()
        server.server_close()
    assert capsys.readouterr().out.splitlines()[-1].endswith("/me/it")
    assert all(header == "Bearer hf_secret" for _, _, header in server.seen)
    commit = {kind: body for kind, body, _ in server.seen}["commit"]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert sent == {path.name for path in (tmp_path / "out").iterdir()}
    assert "pipeline_tag: text-generation" in (tmp_path / "out" / "README.md").read_text("utf-8")

    # the hub is gone now: the folder stays, and the message says how to go on
    with pytest.raises(OSError, match=r"is written, but not pushed to me/it .*Connection refused"):
        run("export_model.py", *given, "--format llama --output", tmp_path / "kept")
    assert (tmp_path / "kept" / "model.safetensors").is_file()
    with pytest.raises(OSError, match=r"third is written, but not pushed to a/b/c .*Repo id must"):
        run("export_model.py", *given[:-1], "--push_to_hub a/b/c --format llama --output",
            tmp_path / "third")  # fmt: skip


# ----------------------------------------------------------------------------- what is not ours


def test_a_folder_is_never_written_under_the_name_of_a_gguf_file(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for kind in ("minimind", "llama"):
        with pytest.raises(SystemExit) as caught:
            run("export_model.py", f"--format {kind} --output {tmp_path}/my.gguf")
        assert caught.value.code == 2
        assert f"my.gguf: {kind} is a folder" in capsys.readouterr().err


def test_overwrite_takes_nothing_that_no_export_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("other-model.gguf", "README.md"):
        (folder / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"holds {name}, which no export writes"):
            check_output(folder, overwrite=True)
        (folder / name).unlink()
    (folder / "models-q8_0.gguf").write_text("ours")
    (folder / "README.md").write_text(f"---\n{CARD_TAG}\n---\n")
    check_output(folder, overwrite=True)
