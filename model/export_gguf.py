"""GGUF files for llama.cpp and ollama, written and read with the ``gguf`` package.

A dense model is llama.cpp's ``llama``, whose rope turns neighbouring pairs as v1's does: rows go in
as they are. A mixture of experts is its ``bailingmoe`` (softmax router, weights of the chosen ones
normalised or not, shared experts as one SwiGLU of their width), and without shared experts
``llama`` too, which has experts as Mixtral. Format: ggml's docs/gguf.md.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .export_folder import tokenizer_settings, vocabulary
from .llama import StateDict, stacked, unnormalised
from .LMConfig import LMConfig
from .tokenizer import BOS_ID, EOS_ID, UNK_ID, Tokenizer

FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
PARTS = {  # ours to theirs, within a layer
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.shared_experts.w1": "ffn_gate_shexp",
    "feed_forward.shared_experts.w2": "ffn_down_shexp",
    "feed_forward.shared_experts.w3": "ffn_up_shexp",
}
EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
WHOLE = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}


def architecture(config: LMConfig) -> str:
    """Return the architecture of llama.cpp that computes the same.

    Raises:
        ValueError: none does; the message says what is missing.
    """
    if not config.use_moe:
        return "llama"
    if config.n_shared_experts:
        return "bailingmoe"
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        return "llama"
    raise ValueError(
        f"--format gguf: llama.cpp has no architecture without shared experts for "
        f"{unnormalised(config)}: its llama normalises always; use --format minimind"
    )


def gguf_tensors(state: StateDict, config: LMConfig) -> StateDict:
    """Return the tensors by llama.cpp's names, the experts of a layer in one."""
    result = {
        f"{theirs}.weight": state[f"{ours}.weight"]
        for ours, theirs in WHOLE.items()
        # what is tied is stored once, but bailingmoe asks for its head
        if ours != "output" or architecture(config) == "bailingmoe"
    }
    for i in range(config.n_layers):
        for ours, theirs in PARTS.items():
            if (name := f"layers.{i}.{ours}.weight") in state:
                result[f"blk.{i}.{theirs}.weight"] = state[name]
        for ours, theirs in EXPERTS.items() if config.use_moe else ():
            result[f"blk.{i}.{theirs}.weight"] = stacked(state, i, ours, config.n_routed_experts)
    return result


def write_gguf(
    path: Path,
    state: StateDict,
    config: LMConfig,
    tokenizer: Tokenizer,
    *,
    dtype: str = "float32",
    quantize: str | None = None,
) -> list[str]:
    """Write weights, configuration, tokenizer and chat template; return what differs from the type
    asked, a line each.

    Args:
        state: the weights in fp32.
        dtype: precision of the matrices; norms and routers are always fp32, as llama.cpp wants.
        quantize: the type of the matrices whose rows divide into its blocks, one of
            :func:`quantizations`; the others have ``dtype``.

    Raises:
        OSError: the disk is full.
        ValueError: no architecture fits, or a tokenizer that GGUF has no name for.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture(config))
    asked = (quantize or FLOATS[dtype]).upper()
    writer.add_name(f"MiniMind {config.dim}x{config.n_layers}{' MoE' * config.use_moe}")
    writer.add_file_type(file_type(asked))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_config(writer, config)
    add_tokenizer(writer, tokenizer)
    kept: dict[str, list[str]] = {}
    for name, tensor in gguf_tensors(state, config).items():
        array = tensor.contiguous().numpy()
        kind = asked
        if array.ndim == 1 or "ffn_gate_inp." in name:
            kind = "F32"
        elif quantize and array.shape[-1] % block_size(asked):
            kind = FLOATS[dtype]
            kept.setdefault(f"rows of {array.shape[-1]}", []).append(name)
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:  # numpy's, which says how many numbers it could not write
        raise OSError(f"{path.name}, the disk may be full ({error})") from error
    finally:
        writer.close()
    return [
        f"{len(names)} tensors stay {dtype}: {rows} do not divide into {asked.lower()}'s blocks "
        f"of {block_size(asked)} ({names[0]}, …)"
        for rows, names in kept.items()
    ]


def quantizations() -> list[str]:
    """Return the types that the installed ``gguf`` package can write, in lower case."""
    import gguf

    found = []
    for kind in gguf.GGMLQuantizationType:
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        try:
            if block > 1:
                gguf.quants.quantize(np.zeros((1, block), np.float32), kind)
                found.append(kind.name.lower())
        except NotImplementedError:
            continue
    return found


def block_size(kind: str) -> int:
    """Return how many weights a block of a type has."""
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]


def file_type(kind: str) -> int:
    """Return what ``general.file_type`` calls a file whose matrices are of ``kind``."""
    import gguf

    names = gguf.LlamaFileType.__members__
    fitting = (f"ALL_{kind}", f"MOSTLY_{kind}", f"MOSTLY_{kind}_MOE")
    return next((names[name] for name in fitting if name in names), gguf.LlamaFileType.GUESSED)


def add_config(writer: Any, config: LMConfig) -> None:
    """Write the configuration under llama.cpp's keys.

    Raises:
        ValueError: a setting of YaRN that llama.cpp does not read from a file.
    """
    import gguf

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    rope = config.rope_parameters
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
        usual |= dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"))
        for name, value in usual.items():
            if rope.get(name) not in (None, value):
                raise ValueError(
                    f"--format gguf: llama.cpp reads no {name} from a file and uses {value}; these "
                    f"weights have rope_parameters[{name!r}]={rope[name]!r}; use --format llama"
                )
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.use_moe:
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture(config) == "bailingmoe":
        writer.add_leading_dense_block_count(0)
        writer.add_expert_feed_forward_length(config.hidden_dim)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(1.0)
        writer.add_expert_weights_norm(config.norm_topk_prob and config.num_experts_per_tok > 1)


def add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    """Write tokens, types, merges, special ids and the chat template.

    Raises:
        ValueError: text is split otherwise than GGUF's ``gpt-2`` does.
    """
    import gguf

    spec = json.loads((tokenizer.folder / "tokenizer.json").read_text("utf-8"))
    splits = spec["pre_tokenizer"] or {}
    as_gpt2 = (splits.get("type"), splits.get("add_prefix_space"), splits.get("use_regex", True))
    if spec["normalizer"] is not None or as_gpt2 != ("ByteLevel", False, True):
        raise ValueError(
            f"--format gguf: {tokenizer.folder}/tokenizer.json splits text in a way that GGUF has "
            "no name for: expected no normalizer and ByteLevel(add_prefix_space=False, "
            "use_regex=True), as train_tokenizer.py makes it"
        )
    vocab, merges = vocabulary(tokenizer)
    added = {token["id"]: token["special"] for token in spec["added_tokens"]}
    types = {None: gguf.TokenType.NORMAL, True: gguf.TokenType.CONTROL}
    types[False] = gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(vocab))
    writer.add_token_types([types[added.get(i)] for i in vocab.values()])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_unk_token_id(UNK_ID)
    writer.add_pad_token_id(UNK_ID)
    writer.add_add_bos_token(False)  # the chat template makes every <s> and </s>
    writer.add_add_eos_token(False)
    writer.add_chat_template(plain_template(tokenizer_settings(tokenizer)["chat_template"]))


def plain_template(template: str) -> str:
    """Take out ``{% generation %}``, which transformers alone knows; the trimming of white space
    that its tags may do stays.
    """
    opened = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", opened)


# v1's chat text in Go's template language. A dash trims the white space on its side.
OLLAMA_TEMPLATE = """{{- range .Messages }}
{{- if eq .Role "system" }}{{ .Content }}
{{- else }}<s>{{ .Role }}
{{ .Content }}</s>
{{ end }}
{{- end }}<s>assistant
"""


def modelfile(gguf_name: str, config: LMConfig) -> str:
    """Return the file of ``ollama create NAME -f Modelfile``; it samples as ``2-eval.py`` does."""
    quoted = f'"""{OLLAMA_TEMPLATE}"""'
    return (
        f'FROM ./{gguf_name}\nTEMPLATE {quoted}\nPARAMETER stop "</s>"\nPARAMETER stop "<s>"\n'
        f"PARAMETER num_ctx {config.max_seq_len}\nPARAMETER temperature 0.7\nPARAMETER top_k 16\n"
    )


# ----------------------------------------------------------------------------- and back


def read_gguf(path: Path, tokenizer: Tokenizer) -> tuple[LMConfig, StateDict]:
    """Read the configuration and the tensors of a file of :func:`write_gguf`, in fp32.

    Raises:
        ValueError: not a GGUF file, quantized, of another architecture, or with other tokens than
            ``tokenizer`` has.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # gguf raises many kinds for a damaged file
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error
    kind = facts.get("general.architecture")
    if kind not in ("llama", "bailingmoe"):
        raise ValueError(f'{path} is of architecture "{kind}", expected llama or bailingmoe')
    if facts.get("tokenizer.ggml.tokens") != list(vocabulary(tokenizer)[0]):
        raise ValueError(
            f"{path} has other tokens than {tokenizer.folder}: name its tokenizer by --tokenizer"
        )
    state: StateDict = {}
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in FLOATS.values():
            raise ValueError(
                f"{path} is quantized ({tensor.name} is {tensor.tensor_type.name}): what was "
                "rounded away does not come back; use a file exported without --quantize"
            )
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        state |= our_tensors(tensor.name, torch.from_numpy(array.astype(np.float32)))
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    return config_of_gguf(facts, kind), state


def our_tensors(name: str, tensor: Tensor) -> StateDict:
    """Return a tensor of a GGUF file by our name, or one for each expert; unknown names stay."""
    stem = name.removesuffix(".weight")
    for ours, theirs in WHOLE.items():
        if stem == theirs:
            return {f"{ours}.weight": tensor}
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if found is None:
        return {name: tensor}
    layer = f"layers.{found[1]}"
    for ours, theirs in EXPERTS.items():
        if found[2] == theirs:
            experts = f"{layer}.feed_forward.experts"
            return {f"{experts}.{e}.{ours}.weight": matrix for e, matrix in enumerate(tensor)}
    names = {theirs: ours for ours, theirs in PARTS.items()}
    return {f"{layer}.{names[found[2]]}.weight": tensor} if found[2] in names else {name: tensor}


def config_of_gguf(facts: dict[str, Any], kind: str) -> LMConfig:
    """Return our configuration of a file's metadata.

    Raises:
        ValueError: one of llama.cpp's settings that our model lacks.
    """

    def fact(name: str, default: Any = None) -> Any:
        return facts.get(f"{kind}.{name}", default)

    rope = {"rope_type": fact("rope.scaling.type", "default")}
    rope["rope_theta"] = fact("rope.freq_base", 1e4)
    if rope["rope_type"] != "default":
        rope["factor"] = fact("rope.scaling.factor")
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = fact("rope.scaling.original_context_length")
    n_experts = fact("expert_count", 0)
    fields: dict[str, Any] = {}
    if n_experts:
        fields = dict(
            use_moe=True,
            n_routed_experts=n_experts,
            num_experts_per_tok=fact("expert_used_count"),
            n_shared_experts=fact("expert_shared_count", 0),
            # one alone is never normalised, whatever this field says
            norm_topk_prob=fact("expert_weights_norm", True) or fact("expert_used_count") == 1,
        )
    return LMConfig(
        dim=fact("embedding_length"),
        n_layers=fact("block_count"),
        n_heads=fact("attention.head_count"),
        n_kv_heads=fact("attention.head_count_kv"),
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_dim=fact("feed_forward_length"),
        norm_eps=shortest_float(fact("attention.layer_norm_rms_epsilon")),
        max_seq_len=fact("context_length"),
        rope_scaling=rope,
        **fields,
    )


def shortest_float(value: float) -> float:
    """Return the shortest decimal that fp32 rounds to ``value``: 1e-05 for 9.99999974737875e-06."""
    return float(str(np.float32(value)))
