"""GGUF files read back by the gguf package and by transformers; ollama's Modelfile."""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiny_runs import write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.checkpoint import Loaded
from model.export import export
from model.export_gguf import OLLAMA_TEMPLATE, architecture, plain_template, quantizations
from model.flags import MODEL_NAMES, model_flags
from model.LMConfig import MODELS, LMConfig
from model.model import MiniMindForCausalLM
from model.readback import read_back
from model.tokenizer import Tokenizer

TEXTS = ("river mountain 长江", "the city, 北京 walks!", "  a b\n\n", "😀 unseen é", "it's 12 3")
CHATS = (
    [{"role": "user", "content": "长江 walks ?"}],
    [
        {"role": "system", "content": " the river\n"},
        {"role": "user", "content": "\n长江 walks ? "},
        {"role": "assistant", "content": "北京"},
        {"role": "user", "content": "and a city"},
    ],
)
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


def flags(tokenizer: Tokenizer) -> Namespace:
    """Return what a script parses where it is told the tokenizer alone."""
    parser = ArgumentParser()
    model_flags(parser)
    return parser.parse_args(["--tokenizer", str(tokenizer.folder)])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata and the tensors of a file."""
    reader = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    return facts, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor: Any) -> Tensor:
    """Return a tensor of a file in fp32, rows as they are written."""
    return torch.from_numpy(
        gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    )


# ----------------------------------------------------------------------------- by transformers


@torch.no_grad()
def test_transformers_reads_the_file(make: Make, tmp_path: Path) -> None:
    loaded = make(rope_theta=5e4)
    export(loaded, tmp_path / "model.gguf", "gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs(ids).logits, loaded.model(ids).logits, rtol=0, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        assert tokenizer(text).input_ids == loaded.tokenizer.encode(text)
    for messages in CHATS:
        said = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert said == loaded.tokenizer.encode_chat(messages, add_generation_prompt=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


# ----------------------------------------------------------------------------- as it is written


def test_a_dense_file_is_llama(make: Make, tmp_path: Path) -> None:
    loaded = make(rope_scaling="yarn:4", n_kv_heads=1, norm_eps=1e-6)
    export(loaded, tmp_path / "model.gguf", "gguf")
    facts, tensors = read(tmp_path / "model.gguf")
    assert facts["general.architecture"] == "llama"
    assert facts["general.file_type"] == gguf.LlamaFileType.ALL_F32
    config = {k.removeprefix("llama."): v for k, v in facts.items() if k.startswith("llama.")}
    assert config == {
        "vocab_size": 300,
        "context_length": 64,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 192,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "rope.dimension_count": 16,
        "rope.freq_base": 1e4,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16,
    }
    state = loaded.model.state_dict()
    assert torch.equal(values(tensors["token_embd.weight"]), state["tok_embeddings.weight"])
    # llama.cpp's llama turns neighbouring pairs, as v1: no row is moved
    for ours, theirs in (("wq", "q"), ("wk", "k"), ("wv", "v"), ("wo", "output")):
        written = values(tensors[f"blk.1.attn_{theirs}.weight"])
        assert torch.equal(written, state[f"layers.1.attention.{ours}.weight"])
    assert "output.weight" not in tensors  # tied: llama.cpp takes the embedding
    assert len(tensors) == 2 + 9 * 2


@pytest.mark.parametrize("norm_topk_prob", (True, False))
def test_shared_experts_make_it_bailingmoe(
    make: Make, tmp_path: Path, norm_topk_prob: bool
) -> None:
    loaded = make(use_moe=True, norm_topk_prob=norm_topk_prob)
    export(loaded, tmp_path / "model.gguf", "gguf", dtype="float16")
    facts, tensors = read(tmp_path / "model.gguf")
    assert facts["general.architecture"] == "bailingmoe"
    said = {k.removeprefix("bailingmoe.expert_"): v for k, v in facts.items() if "expert" in k}
    assert said == {
        "count": 4,
        "used_count": 2,
        "shared_count": 2,
        "feed_forward_length": 192,
        "weights_scale": 1.0,
        "weights_norm": norm_topk_prob,
    }
    state = loaded.model.state_dict()
    for expert in range(4):
        written = values(tensors["blk.0.ffn_down_exps.weight"])[expert]
        ours = state[f"layers.0.feed_forward.experts.{expert}.w2.weight"]
        assert torch.equal(written, ours.half().float())
    assert tuple(values(tensors["blk.0.ffn_gate_shexp.weight"]).shape) == (2 * 192, 64)
    assert "output.weight" in tensors  # bailingmoe asks for it, tied or not
    router = tensors["blk.0.ffn_gate_inp.weight"]
    assert router.tensor_type.name == "F32"
    assert torch.equal(values(router), state["layers.0.feed_forward.gate.weight"])


def test_without_shared_experts_it_is_llama_or_nothing(make: Make, tmp_path: Path) -> None:
    bare = dict(use_moe=True, n_shared_experts=0)
    export(make(**bare), tmp_path / "model.gguf", "gguf")
    facts, tensors = read(tmp_path / "model.gguf")
    assert (facts["general.architecture"], facts["llama.expert_count"]) == ("llama", 4)
    assert "blk.1.ffn_up_exps.weight" in tensors
    for fields in ({"norm_topk_prob": False}, {"num_experts_per_tok": 1}):
        with pytest.raises(ValueError, match=f"no architecture .*{next(iter(fields))}"):
            export(make(**bare, **fields), tmp_path / "other.gguf", "gguf")


def test_a_setting_of_yarn_that_llama_cpp_does_not_read_is_refused(
    make: Make, tmp_path: Path
) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    export(make(rope_scaling=yarn | {"beta_fast": 32}), tmp_path / "usual.gguf", "gguf")
    with pytest.raises(ValueError, match=r"reads no beta_fast.*and uses 32.*=16"):
        export(make(rope_scaling=yarn | {"beta_fast": 16}), tmp_path / "model.gguf", "gguf")


def test_the_tokenizer_is_in_the_file(make: Make, tmp_path: Path) -> None:
    loaded = make()
    export(loaded, tmp_path / "model.gguf", "gguf")
    facts, _ = read(tmp_path / "model.gguf")
    said = {k.removeprefix("tokenizer.ggml."): v for k, v in facts.items() if "tokenizer" in k}
    assert (said["model"], said["pre"]) == ("gpt2", "gpt-2")
    assert (said["add_bos_token"], said["add_eos_token"]) == (False, False)
    ids = [said[f"{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")]
    assert ids == [1, 2, 0, 0]
    assert said["tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert len(said["tokens"]) == len(said["token_type"]) == loaded.tokenizer.vocab_size
    assert said["token_type"][:4] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL]


def test_a_tokenizer_that_gguf_has_no_name_for_is_refused(make: Make, tmp_path: Path) -> None:
    loaded = make()
    text = (loaded.tokenizer.folder / "tokenizer.json").read_text("utf-8")
    (tmp_path / "other").mkdir()
    edited = text.replace('"add_prefix_space": false', '"add_prefix_space": true', 1)
    assert edited != text
    (tmp_path / "other" / "tokenizer.json").write_text(edited, "utf-8")
    loaded.tokenizer = Tokenizer(tmp_path / "other")
    with pytest.raises(ValueError, match="splits text in a way that GGUF has no name for"):
        export(loaded, tmp_path / "model.gguf", "gguf")


# ----------------------------------------------------------------------------- the chat text


def test_any_jinja_engine_can_render_the_chat(make: Make, tmp_path: Path) -> None:
    loaded = make()
    export(loaded, tmp_path / "model.gguf", "gguf")
    template = read(tmp_path / "model.gguf")[0]["tokenizer.chat_template"]
    assert "generation %" not in template and "generation -%" not in template
    engine = ImmutableSandboxedEnvironment()  # without transformers' {% generation %}
    for messages in CHATS:
        text = engine.from_string(template).render(messages=messages, add_generation_prompt=True)
        ours = loaded.tokenizer.encode_chat(messages, add_generation_prompt=True)
        assert text == loaded.tokenizer.decode(ours, skip_special_tokens=False)


@pytest.mark.parametrize("dashes", ("  ", "- ", " -", "--"))
def test_taking_out_the_tags_keeps_their_white_space(dashes: str) -> None:
    left, right = dashes.replace(" ", "") and dashes[0].strip(), dashes[1].strip()
    template = f"a \n{{%{left} generation {right}%}} b \n{{%{left}endgeneration{right}%}} c"
    a, b, c = ("a \n", " b \n", " c")  # Jinja: a dash takes all white space on its side
    a, b = (a.rstrip(), b.rstrip()) if left else (a, b)
    b, c = (b.lstrip(), c.lstrip()) if right else (b, c)
    assert jinja2.Template(plain_template(template)).render() == a + b + c


def as_jinja(template: str) -> str:
    """Translate the part of Go's template language that the Modelfile uses; white space and
    dashes mean the same in both.
    """
    opened: list[str] = []

    def tag(match: re.Match[str]) -> str:
        left, words, right = match[1], match[2].split(), match[3]
        match words:
            case ["range", ".Messages"]:
                opened.append("endfor")
                return f"{{%{left} for message in messages {right}%}}"
            case ["if", "eq", ".Role", text]:
                opened.append("endif")
                return f"{{%{left} if message.role == {text} {right}%}}"
            case ["else"]:
                return f"{{%{left} else {right}%}}"
            case ["end"]:
                return f"{{%{left} {opened.pop()} {right}%}}"
            case [name] if name in (".Role", ".Content"):
                return f"{{{{{left} message{name.lower()} {right}}}}}"
        raise AssertionError(f"not translated: {words}")

    return re.sub(r"\{\{(-?) *(.*?) *(-?)\}\}", tag, template)


def test_ollama_makes_v1s_chat_text(make: Make, tmp_path: Path) -> None:
    loaded = make()
    export(loaded, tmp_path / "out", "gguf")
    recipe = (tmp_path / "out" / "Modelfile").read_text("utf-8")
    found = re.fullmatch(
        r'FROM \./(\S+)\nTEMPLATE """(.*?)"""\n((?:PARAMETER .+\n)+)', recipe, re.S
    )
    assert (tmp_path / "out" / found[1]).is_file()
    assert found[2] == OLLAMA_TEMPLATE
    assert 'PARAMETER stop "</s>"\n' in found[3]
    assert "PARAMETER num_ctx 64\n" in found[3]
    engine = jinja2.Environment(keep_trailing_newline=True)
    for messages in CHATS:
        text = engine.from_string(as_jinja(found[2])).render(messages=messages)
        ours = loaded.tokenizer.encode_chat(messages, add_generation_prompt=True)
        assert text == loaded.tokenizer.decode(ours, skip_special_tokens=False)


# ----------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", ("auto", "float32", "float16", "bfloat16"))
def test_matrices_have_the_precision_asked(make: Make, tmp_path: Path, dtype: str) -> None:
    loaded = make()
    export(loaded, tmp_path / "model.gguf", "gguf", dtype=dtype)
    _, tensors = read(tmp_path / "model.gguf")
    expected = {"float16": "F16", "bfloat16": "BF16"}.get(dtype, "F32")
    kinds = {len(t.shape): set() for t in tensors.values()}
    for tensor in tensors.values():
        kinds[len(tensor.shape)].add(tensor.tensor_type.name)
    assert kinds == {1: {"F32"}, 2: {expected}}
    ours = loaded.model.layers[1].feed_forward.w2.weight
    rounded = ours if expected == "F32" else ours.to(getattr(torch, dtype)).float()
    assert torch.equal(values(tensors["blk.1.ffn_down.weight"]), rounded)


# the step between two values, in units of the largest of a block of 32
STEPS = {"q8_0": 1 / 127, "q5_1": 2 / 31, "q5_0": 1 / 16, "q4_1": 2 / 15, "q4_0": 1 / 8}


@pytest.mark.parametrize("kind", STEPS)
def test_a_quantized_weight_is_off_by_a_step_at_most(make: Make, tmp_path: Path, kind: str) -> None:
    loaded = make()
    made = export(loaded, tmp_path / "out", "gguf", quantize=kind)
    facts, tensors = read(tmp_path / "out" / f"out-{kind}.gguf")
    assert made.notes == []
    assert facts["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    assert facts["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    for name, ours in (
        ("token_embd", loaded.model.tok_embeddings.weight),
        ("blk.0.ffn_down", loaded.model.layers[0].feed_forward.w2.weight),
    ):
        written = tensors[f"{name}.weight"]
        assert written.tensor_type.name == kind.upper()
        blocks = ours.detach().unflatten(-1, (-1, 32))
        off = (values(written).unflatten(-1, (-1, 32)) - blocks).abs().amax(-1)
        # the steps are stored in fp16
        assert (off <= blocks.abs().amax(-1) * STEPS[kind] * 1.01).all()
        assert off.max() > 0
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    with pytest.raises(ValueError, match=f"is quantized .*{kind.upper()}"):
        read_back(tmp_path / "out" / f"out-{kind}.gguf", flags(loaded.tokenizer))


def test_rows_that_do_not_divide_stay_and_are_told(make: Make, tmp_path: Path) -> None:
    loaded = make(dim=48, n_heads=3, n_kv_heads=1, hidden_dim=96)
    made = export(loaded, tmp_path / "model.gguf", "gguf", quantize="q8_0")
    _, tensors = read(tmp_path / "model.gguf")
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"  # rows of 96
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "F16"  # rows of 48
    assert len(made.notes) == 1
    assert made.notes[0].startswith("13 tensors stay float16: rows of 48 do not divide into q8_0's")
    made = export(loaded, tmp_path / "full.gguf", "gguf", quantize="q8_0", dtype="float32")
    assert "13 tensors stay float32" in made.notes[0]


def test_the_offer_is_what_the_package_can_write(make: Make, tmp_path: Path) -> None:
    assert set(STEPS) <= set(quantizations())
    for kind in ("q4_k", "q6_k", "q4_k_m", "iq4_xs", "int8"):
        with pytest.raises(
            ValueError, match=rf"{kind} is not offered: use one of .*q8_0.*quantize"
        ):
            export(make(), tmp_path / "model.gguf", "gguf", quantize=kind)
    assert list(tmp_path.iterdir()) == []


def test_every_named_model_has_an_architecture() -> None:
    found = [architecture(LMConfig(**MODELS[name])) for name in MODEL_NAMES]
    assert found == ["llama", "llama", "bailingmoe"]


# ----------------------------------------------------------------------------- and back


def test_a_file_with_other_tokens_is_refused(make: Make, tmp_path: Path) -> None:
    loaded = make()
    export(loaded, tmp_path / "model.gguf", "gguf")
    with pytest.raises(ValueError, match="has other tokens than .*--tokenizer"):
        read_back(tmp_path / "model.gguf", flags(Tokenizer()))
    whole = (tmp_path / "model.gguf").read_bytes()
    for content in (b"not a GGUF file, but long enough to look like one" * 9, whole[:-200_000]):
        (tmp_path / "damaged.gguf").write_bytes(content)
        with pytest.raises(ValueError, match="damaged.gguf is not a whole GGUF file"):
            read_back(tmp_path / "damaged.gguf", flags(loaded.tokenizer))
