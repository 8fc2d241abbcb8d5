"""Export: a model's weights as a folder or a file that others load, whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

import torch

from .checkpoint import Loaded
from .export_folder import CODE, TOKENIZER_FILES, write_llama, write_minimind
from .export_gguf import FLOATS, modelfile, quantizations, write_gguf
from .hub import CARD_TAG, model_card
from .llama import StateDict
from .states import sync

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What an export writes into a folder: only a folder of nothing else is ever replaced. A model card
# is not among them, nor a .gguf of another name: a user may have put those there.
OWN_FILES = {
    *CODE,
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "Modelfile",
}


@dataclass
class Export:
    """What was written.

    Attributes:
        files: each file.
        notes: what differs from what was asked for, a line each.
        usage: how to load it, a line each.
    """

    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    usage: list[str] = field(default_factory=list)


def export(
    loaded: Loaded,
    output: Path,
    kind: str,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    binary: bool = False,
    overwrite: bool = False,
    hub_name: str | None = None,
) -> Export:
    """Write a model under ``output`` as ``minimind``, ``llama`` or ``gguf``.

    Args:
        output: a folder; for ``gguf`` also a file that ends in ``.gguf``, whose ``Modelfile`` then
            has its name too.
        dtype: ``float32``, ``float16`` or ``bfloat16``; ``auto`` is fp32, as the weights were
            trained, and fp16 for what ``quantize`` leaves.
        quantize: gguf: the type of the matrices.
        binary: ``pytorch_model.bin`` in place of ``model.safetensors``.
        hub_name: adds a model card of this name.

    Raises:
        FileExistsError: something is there that is not to be replaced.
        OSError: it could not be written, and nothing is left.
        ValueError: the format cannot express the model, or the precision its weights.
    """
    is_file = output.suffix == ".gguf"
    for path in (output, output.with_suffix(".Modelfile")) if is_file else (output,):
        check_output(path, overwrite)
    if dtype == "auto":
        dtype = "float16" if quantize else "float32"
    if kind == "gguf":
        check_quantize(quantize)
    state = cast(loaded.model.state_dict(), DTYPES[dtype])
    config, tokenizer = loaded.model.config, loaded.tokenizer
    place = output.parent if is_file else output
    made = Export()
    with written_whole(output) as folder:
        if kind == "gguf":
            stem = output.stem if is_file else f"{output.name}-{quantize or FLOATS[dtype].lower()}"
            recipe = f"{stem}.Modelfile" if is_file else "Modelfile"
            # blocks are made from what was trained, not from what a smaller float kept of it
            state = cast(loaded.model.state_dict(), torch.float32)
            made.notes = write_gguf(
                folder / f"{stem}.gguf", state, config, tokenizer, dtype=dtype, quantize=quantize
            )
            (folder / recipe).write_text(modelfile(f"{stem}.gguf", config), "utf-8")
        else:
            write = {"minimind": write_minimind, "llama": write_llama}[kind]
            write(folder, state, config, tokenizer, binary=binary)
        if hub_name:
            n_params = sum(parameter.numel() for parameter in loaded.model.parameters())
            usage = usage_from_hub(kind, hub_name)
            card = model_card(hub_name, config, n_params, usage)
            (folder / "README.md").write_text(card, "utf-8")
        made.files = sorted(place / path.name for path in folder.iterdir())
    if kind == "gguf":
        made.usage = [
            f"llama.cpp: llama-cli -m {place / stem}.gguf -cnv --jinja",
            f"ollama: ollama create minimind -f {place / recipe} && ollama run minimind",
        ]
    else:
        made.usage = [f"transformers: {line}" for line in usage_in_python(kind, str(output))]
    return made


def usage_in_python(kind: str, name: str) -> list[str]:
    """Return how transformers loads a folder, or a repository of the hub."""
    trusted = ", trust_remote_code=True" if kind == "minimind" else ""
    classes = ("AutoModelForCausalLM", "AutoTokenizer")
    return [f'{auto}.from_pretrained("{name}"{trusted})' for auto in classes]


def usage_from_hub(kind: str, name: str) -> list[str]:
    """Return how others load what was pushed."""
    if kind == "gguf":
        return [f"llama-cli -hf {name} -cnv --jinja", f"ollama run hf.co/{name}"]
    return ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""] + [
        f"{variable} = {line}"
        for variable, line in zip(("model", "tokenizer"), usage_in_python(kind, name), strict=True)
    ]


def check_quantize(kind: str | None) -> None:
    """Refuse a type that the ``gguf`` package cannot write.

    Raises:
        ValueError: naming those it can, or that the package is missing.
    """
    try:
        offered = quantizations()
    except ImportError as error:
        raise ValueError(
            "--format gguf needs the gguf package: pip install -r requirements.txt"
        ) from error
    if kind is not None and kind not in offered:
        raise ValueError(
            f"--quantize {kind} is not offered: use one of {', '.join(offered)}; for K-quants "
            "export without --quantize and run llama.cpp's llama-quantize on the file"
        )


def cast(state: StateDict, dtype: torch.dtype) -> StateDict:
    """Return the weights in ``dtype``, on the CPU.

    Raises:
        ValueError: one that is not finite, or not any more in ``dtype``.
    """
    result = {}
    for name, tensor in state.items():
        result[name] = tensor.detach().to("cpu", dtype)
        if not result[name].isfinite().all():
            was = "is not finite" if not tensor.isfinite().all() else f"does not fit {dtype}"
            raise ValueError(
                f"{name} {was.replace('torch.', '')} (largest {tensor.abs().max().item():.3g}): "
                "use --dtype float32, or other weights"
            )
    return result


# ----------------------------------------------------------------------------- whole or absent


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        FileExistsError: without ``overwrite``; with it, a folder that holds more than an export,
            or a file where a folder is to be or the reverse.
        ValueError: a place that has no name, as ``.``, and cannot be renamed to.
    """
    if not output.name:
        raise ValueError(f"--output {output} has no name of its own: name a folder or a file")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists: name another --output, or add --overwrite")
    if output.is_dir() == (output.suffix in (".gguf", ".pth", ".Modelfile")):
        kind = "folder" if output.is_dir() else "file"
        raise FileExistsError(f"{output} is a {kind}, which is never replaced by another kind")
    if output.is_dir():
        foreign = sorted(
            path.name
            for path in output.iterdir()
            if path.name not in OWN_FILES and path.name not in own_names(output)
        )
        if foreign:
            raise FileExistsError(
                f"{output} holds {', '.join(foreign[:3])}, which no export writes: it is not "
                "replaced; name another --output"
            )


def own_names(folder: Path) -> set[str]:
    """Return which files of a folder have names that only an export of it gives them: its .gguf,
    and a model card that is ours.
    """
    names = {path.name for path in folder.glob(f"{escape(folder.name)}-*.gguf")}
    card = folder / "README.md"
    if card.is_file() and CARD_TAG in card.read_text("utf-8", errors="replace"):
        names.add(card.name)
    return names


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``output`` that takes its place when the block ends well.

    For an ``output`` that ends in ``.gguf`` the files in it take their places beside one another.

    Raises:
        OSError: what could not be written, and that nothing was left.
    """
    staging = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in (*staging.iterdir(), staging):
            sync(path)
        if output.suffix == ".gguf":
            for path in staging.iterdir():
                os.replace(path, output.with_name(path.name))
        else:
            replace_folder(staging, output)
        sync(output.parent)
    except OSError as error:
        raise OSError(
            f"{output} could not be written, and is as it was before: make room, or name another "
            f"--output ({error})"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_folder(new: Path, place: Path) -> None:
    """Rename ``new`` to ``place``; what was there stays until the new one has its name."""
    if not place.exists():
        os.replace(new, place)
        return
    old = new.with_suffix(".old")
    os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old)
