"""Folders that transformers loads: with v1's own code, or as one of transformers' own models."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from .llama import StateDict, peer_config, to_peer
from .LMConfig import LMConfig
from .states import save_tensors
from .tokenizer import DEFAULT_TOKENIZER, SPECIAL_TOKENS, Tokenizer

CODE = ("LMConfig.py", "model.py")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


def write_minimind(
    folder: Path, state: StateDict, config: LMConfig, tokenizer: Tokenizer, *, binary: bool = False
) -> None:
    """Write v1's files: ``AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)``.

    Args:
        state: the weights in the precision they are to have.
        binary: ``pytorch_model.bin`` in place of ``model.safetensors``.

    Raises:
        OSError: the disk is full.
    """
    own = copy.deepcopy(config)  # the caller's stays as it is
    own.architectures = ["MiniMindForCausalLM"]
    own.auto_map = {
        "AutoConfig": "LMConfig.LMConfig",
        "AutoModelForCausalLM": "model.MiniMindForCausalLM",
    }
    own.dtype = state["norm.weight"].dtype
    own.save_pretrained(folder)
    for name in CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    write_tensors(folder, state, "output.weight", binary)
    write_generation_config(folder, config)
    write_tokenizer(folder, tokenizer, config.max_seq_len)


def write_llama(
    folder: Path, state: StateDict, config: LMConfig, tokenizer: Tokenizer, *, binary: bool = False
) -> None:
    """Write what ``LlamaForCausalLM`` (dense) or ``Ernie4_5_MoeForCausalLM`` loads, without code.

    Raises:
        OSError: the disk is full.
        ValueError: a mixture of experts that transformers has no class for.
    """
    peer = peer_config(config)
    peer.architectures = [
        "Ernie4_5_MoeForCausalLM" if config.use_moe else "LlamaForCausalLM",
    ]
    peer.dtype = state["norm.weight"].dtype
    peer.save_pretrained(folder)
    write_tensors(folder, to_peer(state, config), "lm_head.weight", binary)
    write_generation_config(folder, config)
    write_tokenizer(folder, tokenizer, config.max_seq_len)


def write_tensors(folder: Path, state: StateDict, tied: str, binary: bool) -> None:
    """Write the weights; the ``tied`` head is the embedding and is stored once."""
    if binary:
        save_tensors(state, folder / "pytorch_model.bin")  # keeps what is shared shared
        return
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored = {name: tensor.contiguous() for name, tensor in state.items() if name != tied}
    try:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"model.safetensors, the disk may be full ({error})") from error
    # safetensors makes it for its owner alone; a server may run as another user
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def write_generation_config(folder: Path, config: LMConfig) -> None:
    """Write how ``generate`` samples unless told otherwise: as ``2-eval.py`` does, up to half of
    the context.
    """
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "do_sample": True,
            "temperature": 0.7,
            "top_k": 16,
            "max_new_tokens": max(1, config.max_seq_len // 2),
        },
    )


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Write the tokenizer's files; those that its folder lacks are made from the others."""
    shutil.copyfile(tokenizer.folder / "tokenizer.json", folder / "tokenizer.json")
    settings = tokenizer_settings(tokenizer)
    write_json(folder / "tokenizer_config.json", {**settings, "model_max_length": max_seq_len})
    unk, bos, eos = SPECIAL_TOKENS
    named = {"bos_token": bos, "eos_token": eos, "pad_token": unk, "unk_token": unk}
    write_json(folder / "special_tokens_map.json", named)
    vocab, merges = vocabulary(tokenizer)
    write_json(folder / "vocab.json", vocab, indent=None)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")


def tokenizer_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the ``tokenizer_config.json`` of a tokenizer, or the shipped one's where it has none:
    v1's chat text belongs to the model and not to the vocabulary.
    """
    own = tokenizer.folder / "tokenizer_config.json"
    path = own if own.is_file() else DEFAULT_TOKENIZER / own.name
    try:
        settings = json.loads(path.read_text("utf-8"))
        settings.pop("auto_map", None)  # names code for transformers to run: ours needs none
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is not a JSON object ({error}): copy it anew, or remove it"
        ) from error
    if not isinstance(settings.get("chat_template"), str):
        shipped = json.loads((DEFAULT_TOKENIZER / own.name).read_text("utf-8"))
        settings["chat_template"] = shipped["chat_template"]
    return settings


def vocabulary(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the tokens by id, special ones included, and the merges in order."""
    spec = json.loads((tokenizer.folder / "tokenizer.json").read_text("utf-8"))
    vocab = dict(spec["model"]["vocab"])
    vocab |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    merges = [m if isinstance(m, list) else m.split(" ") for m in spec["model"]["merges"]]
    by_id = sorted(vocab.items(), key=lambda item: item[1])
    return dict(by_id), [(first, second) for first, second in merges]


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", "utf-8")
