"""Exported folders on a hub of models: a card, and the upload by ``huggingface_hub``."""

import os
from pathlib import Path

from .LMConfig import LMConfig

CARD_TAG = "tags: [minimind]"  # by which a card is known to be ours


def model_card(name: str, config: LMConfig, n_params: int, usage: list[str]) -> str:
    """Return the README.md of a model; its licence is for its maker to add.

    Args:
        name: of the repository, ``user/model``.
        usage: how to load it, a line of shell or Python each.
    """
    experts = (
        f", {config.n_routed_experts} routed experts ({config.num_experts_per_tok} a token) and "
        f"{config.n_shared_experts} shared"
        if config.use_moe
        else ""
    )
    lines = [
        "---",
        "language: [zh, en]",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        CARD_TAG,
        "---",
        "",
        f"# {name.split('/')[-1]}",
        "",
        f"A MiniMind language model of {n_params / 1e6:.1f} M parameters: width {config.dim}, "
        f"{config.n_layers} layers, {config.n_heads} query and {config.n_kv_heads} key-value heads"
        f"{experts}, context of {config.max_seq_len} tokens.",
        "",
        "```",
        *usage,
        "```",
    ]
    return "\n".join(lines) + "\n"


def push(folder: Path, name: str) -> str:
    """Upload a folder to the repository ``name``, made if there is none; return its address.

    ``HF_ENDPOINT`` names another hub than huggingface.co, ``HF_TOKEN`` or ``hf auth login`` give
    the right to write.

    Raises:
        OSError: no network, no token, or refused; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of httpx or httpx2, whichever it uses

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=name, commit_message="Upload MiniMind")
    except (OSError, ValueError, HTTPError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"{folder} is written, but not pushed to {name} on {api.endpoint}: {reason[:300]}; set "
            "HF_TOKEN or run `hf auth login`, then `hf upload` the folder"
        ) from error
    return str(address)
