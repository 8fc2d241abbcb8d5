"""Exported folders and files back into this project's weights."""

import argparse
from pathlib import Path
from typing import Any

import torch

from .checkpoint import (
    Loaded,
    check_against_flags,
    check_tokenizer,
    extend_context,
    load_model,
    load_strictly,
    read_json,
)
from .export_gguf import read_gguf
from .llama import StateDict, config_of_peer, from_peer
from .LMConfig import LMConfig
from .model import MiniMindForCausalLM
from .tokenizer import DEFAULT_TOKENIZER, Tokenizer


def read_back(source: Path, args: argparse.Namespace) -> Loaded:
    """Read a folder of :mod:`model.export`, the original's or a plain Llama's, or a GGUF file.

    Args:
        args: the model flags; the tokenizer is the folder's own, else ``--tokenizer``.

    Raises:
        FileNotFoundError: nothing there, or no weights in it.
        ValueError: a model that ours cannot express, or another tokenizer than its own.
    """
    if not source.exists():
        raise FileNotFoundError(f"--from {source} does not exist")
    own_tokenizer = source if (source / "tokenizer.json").is_file() else None
    if source.is_file():
        if source.suffix != ".gguf":
            raise ValueError(f"--from {source} is neither a folder nor a .gguf file")
        tokenizer = Tokenizer(args.tokenizer or DEFAULT_TOKENIZER)
        config, state = read_gguf(source, tokenizer)
    else:
        settings = source / "config.json"
        kind = read_json(settings).get("model_type") if settings.is_file() else None
        if kind in (None, "minimind"):
            return load_model(source, args)
        tokenizer = Tokenizer(args.tokenizer or own_tokenizer or DEFAULT_TOKENIZER)
        config, state = read_peer(source)
    check_against_flags(config, args, source)
    if args.rope_scaling:
        extend_context(config, args.rope_scaling)
    config.max_seq_len = args.max_seq_len or config.max_seq_len
    check_tokenizer(config, None, tokenizer, source)
    model = MiniMindForCausalLM(config)
    load_strictly(model, state, source)
    return Loaded(model, tokenizer, source)


def read_peer(folder: Path) -> tuple[LMConfig, StateDict]:
    """Read a model of one of transformers' own classes, whatever files it is spread over.

    Raises:
        ValueError: a model that ours cannot express, or weights that do not fill it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        peer_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{folder}/config.json is of no model that can be read: {reason}"
        ) from error
    config = config_of_peer(peer_config)
    peer, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    problems: dict[str, Any] = {
        kind: sorted(report[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")
    }
    problems = {kind: names for kind, names in problems.items() if names}
    if problems:
        listed = "; ".join(f"{kind} {names[0]}" for kind, names in problems.items())
        raise ValueError(f"the weights in {folder} do not fit its config.json: {listed}")
    return config, from_peer(peer.state_dict(), config)
