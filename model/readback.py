"""Exported folders and files back into this project's weights."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .checkpoint import (
    WEIGHTS_FILES,
    Loaded,
    check_against_flags,
    check_size,
    check_tokenizer,
    extend_context,
    filled_model,
    load_model,
    read_json,
    read_state_dict,
    weights_in_folder,
)
from .export_gguf import read_gguf
from .llama import StateDict, config_of_peer, from_peer
from .LMConfig import LMConfig
from .tokenizer import DEFAULT_TOKENIZER, Tokenizer

OLD_FIELDS = ("rope_scaling", "rope_theta")  # in files of before transformers 5


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
    return Loaded(filled_model(config, state, source), tokenizer, source)


def read_peer(folder: Path) -> tuple[LMConfig, StateDict]:
    """Read a model of one of transformers' own classes, whatever files it is spread over.

    The class is chosen here and is given tensors and numbers. ``from_pretrained`` on the folder
    would also follow what its files name: code (``auto_map``), kernels of a hub
    (``attn_implementation``), the base of an adapter, weights anywhere (``weight_map``).

    Raises:
        ValueError: a model that ours cannot express, or weights that do not fill it.
    """
    from transformers import Ernie4_5_MoeForCausalLM, LlamaForCausalLM

    known = read_json(folder / "config.json")
    classes = {"llama": LlamaForCausalLM, "ernie4_5_moe": Ernie4_5_MoeForCausalLM}
    kind = known.get("model_type")
    if not isinstance(kind, str) or kind not in classes:
        raise ValueError(
            f"{folder}/config.json is of no model that can be read: model_type is {kind!r}, "
            f'expected "minimind", {" or ".join(map(json.dumps, classes))}'
        )
    config_class = classes[kind].config_class
    fields = {*config_class.__annotations__, *OLD_FIELDS}
    try:
        peer_config = config_class(**{k: v for k, v in known.items() if k in fields})
        config = config_of_peer(peer_config)
        state = read_shards(folder)
        check_size(config, state, folder)
        peer, report = classes[kind].from_pretrained(
            None,
            config=peer_config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:  # transformers raises many kinds for a value that makes no sense
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}/config.json is of no model that can be: {reason}") from error
    problems: dict[str, Any] = {
        name: sorted(map(str, report[f"{name}_keys"]))
        for name in ("missing", "unexpected", "mismatched")
    }
    problems = {name: keys for name, keys in problems.items() if keys}
    if problems:
        listed = "; ".join(f"{name} {keys[0]}" for name, keys in problems.items())
        raise ValueError(f"the weights in {folder} do not fit its config.json: {listed}")
    return config, from_peer(peer.state_dict(), config)


def read_shards(folder: Path) -> StateDict:
    """Return the tensors of a folder: of its one file, or of those that its index names.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: the index is damaged, or names a file that is not in the folder.
    """
    for name in WEIGHTS_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file() or not index.is_file():
            continue
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
            raise ValueError(f'{index} has no "weight_map" of names to files: copy it anew')
        state: StateDict = {}
        for file in dict.fromkeys(places.values()):
            if Path(file).name != file or "\\" in file or Path(file).suffix != Path(name).suffix:
                raise ValueError(
                    f"{index} names {file!r}, expected a {Path(name).suffix} file in that folder "
                    "itself: copy the model anew from where you trust it"
                )
            state |= read_state_dict(folder / file)
        return state
    return read_state_dict(weights_in_folder(folder))
