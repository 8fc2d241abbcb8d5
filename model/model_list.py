"""Which chat models there are, for the server's and the page's users to choose from by name."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import (
    CHAT_STAGES,
    STAGE_STEMS,
    WEIGHTS_FILES,
    Loaded,
    find_weights,
    load_for_inference,
    read_json,
)
from .LMConfig import LMConfig
from .lora import CONFIG_FILE as ADAPTER_FILE
from .lora import read_adapter_config

USUAL_WIDTH = str(LMConfig().dim)


@dataclass(frozen=True)
class ModelChoice:
    """Weights to talk to, a file or an exported folder, and an adapter to put on them, if any."""

    name: str
    path: Path
    adapter: Path | None = None


def find_models(out_dir: str | Path) -> list[ModelChoice]:
    """Return the models below ``out_dir``: what the stages left there and in its ``demo``, chat
    stages first, in the order in which :func:`model.checkpoint.find_weights` prefers them; then
    adapters on the base that they name; then exported folders, at most two levels below.

    Nothing is loaded, and what is damaged is told when it is opened. The names are unique.
    """
    out_dir = Path(out_dir)
    found: list[tuple[Path, Path | None]] = []
    roots = [root for root in (out_dir, out_dir / "demo") if root.is_dir()]
    for stages in (CHAT_STAGES, ("pretrain",)):
        for root in roots:
            found += [(path, None) for stage in stages for path in _weights_of(root, stage)]
    folders = [folder for pattern in ("*/", "*/*/") for folder in sorted(out_dir.glob(pattern))]
    for folder in folders:
        if (folder / ADAPTER_FILE).is_file() and (base := _base_of(folder)):
            found.append((base, folder))
    found += [(folder, None) for folder in folders if _is_export(folder)]
    choices: dict[str, ModelChoice] = {}
    for path, adapter in found:
        name = _unique(_names(path, adapter, out_dir), choices)
        choices[name] = ModelChoice(name, path, adapter)
    return list(choices.values())


def parse_model(text: str) -> ModelChoice:
    """Parse ``NAME=PATH[+ADAPTER]`` or ``PATH[+ADAPTER]``, a path that holds ``=`` or ``+`` too.

    Raises:
        FileNotFoundError: no such path or adapter.
        ValueError: an empty name or path.
    """
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        name, rest = "", text
    elif not name.strip():
        raise ValueError(f"{text!r} has no name before '=': write NAME=PATH, or PATH alone")
    plus = [i for i, letter in enumerate(rest) if letter == "+"]
    readings = [(rest, ""), *((rest[:i], rest[i + 1 :]) for i in reversed(plus))]
    if not rest or any("" in reading for reading in readings[1:]):
        raise ValueError(f"{text!r} names no file or folder: write NAME=PATH or NAME=PATH+ADAPTER")
    for path, adapter in readings:
        if all(Path(place).exists() for place in (path, adapter or path)):
            break
    else:
        missing = next(p for p in readings[-1] if p and not Path(p).exists())
        raise FileNotFoundError(f"{missing} does not exist (of the model {text!r})")
    return named_choice(Path(path), Path(adapter) if adapter else None, name.strip())


def chosen_model(args: argparse.Namespace) -> ModelChoice:
    """Return what ``--weights``, ``--load_from`` and ``--lora`` say, or else the best chat model
    in ``--out_dir``.

    Raises:
        FileNotFoundError, ValueError: as :func:`model.checkpoint.find_weights`.
    """
    return named_choice(find_weights(args, "chat"), Path(args.lora) if args.lora else None)


def named_choice(path: Path, adapter: Path | None, name: str = "") -> ModelChoice:
    """Return a choice, by default named by its file or folder."""
    return ModelChoice(name or _names(path, adapter, path.parent)[0], path, adapter)


def open_model(choice: ModelChoice, args: argparse.Namespace) -> Loaded:
    """Load a choice to use it, where and in which precision ``args`` say.

    Raises:
        FileNotFoundError, ValueError: as :func:`model.checkpoint.load_for_inference`.
    """
    adapter = None if choice.adapter is None else str(choice.adapter)
    of_choice = {"weights": str(choice.path), "load_from": None, "lora": adapter}
    return load_for_inference(argparse.Namespace(**{**vars(args), **of_choice}))


def _weights_of(root: Path, stage: str) -> list[Path]:
    """Return a stage's weights files in ``root``; the usual width first, the dense model before the
    mixture, the nameless run before others.
    """
    stem = root / STAGE_STEMS[stage]
    name = re.compile(rf"{stem.name}_([0-9]+)(_.*)?\.pth")
    found = [(m, path) for path in stem.parent.glob("*.pth") if (m := name.fullmatch(path.name))]
    found.sort(key=lambda pair: (pair[0][1] != USUAL_WIDTH, int(pair[0][1]), pair[0][2] or ""))
    return [path for _, path in found]


def _base_of(adapter: Path) -> Path | None:
    """Return the weights an adapter was trained on, if they are still there."""
    try:
        base = read_adapter_config(adapter).get("base_model_name_or_path")
    except ValueError:
        return None
    return Path(base) if isinstance(base, str) and base and Path(base).exists() else None


def _is_export(folder: Path) -> bool:
    """Whether a folder holds a model in this project's own form."""
    if not any((folder / file).is_file() for file in WEIGHTS_FILES):
        return False
    try:
        return read_json(folder / "config.json").get("model_type") == LMConfig.model_type
    except (OSError, ValueError):
        return False


def _names(path: Path, adapter: Path | None, out_dir: Path) -> list[str]:
    """Return names for a model, the shortest first; a later one also says where it lies."""

    def names(place: Path) -> Iterator[str]:
        if place.name in WEIGHTS_FILES:
            place = place.parent
        place = place.absolute()
        place = place.with_suffix("") if place.suffix in (".pth", ".bin") else place
        yield place.name
        inside = place.is_relative_to(out_dir.absolute())
        yield (place.relative_to(out_dir.absolute()) if inside else place).as_posix()

    if adapter is None:
        return list(names(path))
    return [f"{a}+{b}" for a, b in zip(names(path), names(adapter), strict=True)]


def _unique(names: list[str], taken: dict[str, ModelChoice]) -> str:
    numbered = (f"{names[-1]} ({n})" for n in range(2, len(taken) + 3))
    return next(name for name in (*names, *numbered) if name not in taken)
