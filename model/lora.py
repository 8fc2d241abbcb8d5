"""Low-rank adapters (LoRA, arXiv:2106.09685), kept in PEFT's files."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .states import atomic_write, write_json

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")  # attention and feed-forward, experts too
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before the names of the model it wraps
# What PEFT can store beside plain LoRA, and the value under which it means nothing
PLAIN = {"bias": "none", "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None}
OTHER_KINDS = (
    "lora_bias use_qalora trainable_token_indices target_parameters use_bdlora arrow_config "
    "monteclora_config"
).split()


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is made of.

    Args:
        rank: r of section 4.1.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: on the input of the low-rank path, in training.
        targets: last names of the linear layers that get one.

    Raises:
        ValueError: a value that no adapter can be made from.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} is not a whole number of at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha!r} is not a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} is not in [0, 1)")
        if not self.targets:
            raise ValueError("targets is empty: name linear layers, for example wq wv")


class LoRALinear(nn.Linear):
    """A frozen linear layer W with a trained update of low rank: W x + scale * B A x (section 4.1).

    ``weight`` is the layer's own parameter under its own name, so the base's weights files load as
    ever; ``lora_A`` (rank, in) and ``lora_B`` (out, rank) are fp32 beside a base in any precision.
    B begins at zero, so an untrained adapter changes nothing.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        like = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
        nn.init.normal_(self.lora_A, std=linear.in_features**-0.5)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        down = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., rank)
        return F.linear(x, self.weight) + self.scale * F.linear(down, self.lora_B.to(x.dtype))

    def merged(self) -> Tensor:
        """Return W + scale * B A, (out, in), computed in fp32, in the precision of W."""
        update = self.scale * (self.lora_B.float() @ self.lora_A.float())
        return (self.weight.float() + update).to(self.weight.dtype)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield the adapted layers with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def has_adapter(model: nn.Module) -> bool:
    """Whether any layer has an adapter."""
    return next(adapters(model), None) is not None


def add_adapter(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze ``model`` and give the layers that ``config`` names an adapter to train.

    Raises:
        ValueError: a name that fits no linear layer, or the tied head, whose update would also
            change the embedding.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = model.get_output_embeddings()
    fitting = dict.fromkeys(
        name.rsplit(".", 1)[-1] for name, layer in layers.items() if layer is not head
    )
    for target in config.targets:
        if target not in fitting:
            raise ValueError(
                f"no linear layer can be adapted under the name {target!r}: "
                f"use some of {' '.join(fitting)}"
            )
    scale = config.alpha / config.rank
    model.requires_grad_(False)
    for name, layer in layers.items():
        if layer is not head and name.rsplit(".", 1)[-1] in config.targets:
            _replace(model, name, LoRALinear(layer, config.rank, scale, config.dropout))


def freeze_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep what is not trained in ``dtype``: nothing updates it, so it needs no more precision."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def merge_adapter(model: nn.Module) -> None:
    """Fold the adapter into the weights: a plain model again, with the same logits."""
    for name, layer in list(adapters(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.merged(), requires_grad=False)
        _replace(model, name, plain.train(layer.training))
    model.requires_grad_(True)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# ----------------------------------------------------------------------------- files


def save_adapter(model: nn.Module, folder: Path, base: Path | None) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` as ``peft`` reads them.

    Args:
        base: the weights that the adapter belongs to, recorded for whoever loads it.
    """
    from safetensors.torch import save_file

    layers = dict(adapters(model))
    tensors = {
        f"{PREFIX}{name}.{part}.weight": getattr(layer, part).detach().float().cpu().contiguous()
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }
    ranks = {name: layer.lora_A.shape[0] for name, layer in layers.items()}
    alphas = {name: round(layer.scale * ranks[name], 6) for name, layer in layers.items()}
    first = next(iter(layers))
    rank, alpha = ranks[first], alphas[first]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "lora_dropout": layers[first].dropout.p,
        "target_modules": _targets_of(model, set(layers)),
        "inference_mode": True,
        **PLAIN,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / WEIGHTS_FILE) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except Exception as error:  # safetensors has a kind of its own for a failed write
            raise OSError(
                f"{folder / WEIGHTS_FILE} could not be written, the disk may be full ({error})"
            ) from error
    write_json(config, folder / CONFIG_FILE)


def _targets_of(model: nn.Module, names: set[str]) -> list[str]:
    """Return the last names of layers where they say it all, whole names otherwise."""
    last = {name.rsplit(".", 1)[-1] for name in names}
    meant = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in last
    }
    return sorted(last if meant == names else names)


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """Return what an adapter says of itself.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: damaged, or of a kind that is not plain LoRA.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no adapter (no {CONFIG_FILE}): name the folder that 4-lora_sft.py or "
            "peft wrote"
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): copy or make it anew") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} is of an adapter of type {found!r}, expected LORA")
    other = [
        f"{k}={config[k]!r}" for k, plain in PLAIN.items() if config.get(k) not in (None, plain)
    ]
    other += [f"{k}={config[k]!r}" for k in OTHER_KINDS if config.get(k)]
    if config.get("init_lora_weights") not in (None, True, False, "gaussian"):
        other.append(f"init_lora_weights={config['init_lora_weights']!r}")  # may change the base
    if other:
        raise ValueError(f"{path} has {', '.join(other)}: only plain LoRA is read here")
    for name in ("r", "lora_alpha"):
        if not _is_scale(config.get(name)):
            raise ValueError(f"{path}: {name}={config.get(name)!r} is not a number above 0")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise ValueError(f"{path}: base_model_name_or_path={base!r} is not the name of a file")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{path}: lora_dropout={dropout!r} is not in [0, 1)")
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict) or not all(map(_is_scale, alphas.values())):
        raise ValueError(f"{path}: alpha_pattern is not an object of names with numbers above 0")
    for pattern in alphas:
        _check_pattern(pattern, path)
    return config


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < 2**63  # beyond, no float and no meaning


def _check_pattern(pattern: str, path: Path) -> None:
    """Raise ValueError for a regular expression that is none, or that could search for ever."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{path}: alpha_pattern has {pattern!r}: {error}") from error
    if len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+{]", pattern):
        raise ValueError(
            f"{path}: alpha_pattern has {pattern!r}, which could take for ever to compare: write "
            "the layers' names out"
        )


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Give ``model`` the adapter in a folder, ours or PEFT's, to train on or to merge.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: damaged, not plain LoRA, or of a model of another shape.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    pairs = _read_pairs(folder)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    model.requires_grad_(False)
    for name, (a, b) in pairs.items():
        layer = layers.get(name)
        expected = None if layer is None else (layer.in_features, layer.out_features)
        found = (a.shape[-1], b.shape[0])
        if layer is None or layer is model.get_output_embeddings() or expected != found:
            what = "no such layer" if layer is None else f"expected {expected}"
            raise ValueError(
                f"{folder} does not fit this model: {name} takes {found[0]} and gives {found[1]} "
                f"numbers, {what}; name the base weights it was trained on"
                f" ({config.get('base_model_name_or_path') or 'not recorded'})"
            )
        rank = a.shape[0]  # of this layer: PEFT's rank_pattern may give each its own
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank  # arXiv:2312.03732
        scale = _alpha_of(name, config) / divisor
        adapted = LoRALinear(layer, rank, scale, config.get("lora_dropout") or 0.0)
        with torch.no_grad():
            adapted.lora_A.copy_(a)
            adapted.lora_B.copy_(b)
        _replace(model, name, adapted)


def _alpha_of(name: str, config: dict[str, Any]) -> float:
    """Return a layer's alpha: of the first of PEFT's patterns that its name ends with, or the
    common one.
    """
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return alpha
    return config["lora_alpha"]


def _read_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each layer, by the layer's name in the model."""
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; an adapter_model.bin is not read, because it can hold code: "
            "save it anew with safe_serialization=True"
        )
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises a kind of its own for a damaged file
        raise ValueError(f"{path} is damaged ({error}): copy or make it anew") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", key)
        if match is None or tensor.dim() != 2:
            raise ValueError(
                f"{path} holds {key!r}: only lora_A and lora_B of linear layers are read"
            )
        parts.setdefault(match[1], {})[match[2]] = tensor
    for name, found in parts.items():
        ranks = {
            found[part].shape[axis]
            for axis, part in enumerate(("lora_A", "lora_B"))
            if part in found
        }
        if len(found) != 2 or len(ranks) != 1 or 0 in ranks:
            raise ValueError(f"{path}: lora_A and lora_B of {name} do not belong together")
    if not parts:
        raise ValueError(f"{path} holds no adapter")
    return {name: (found["lora_A"], found["lora_B"]) for name, found in parts.items()}


def describe(model: nn.Module) -> str:
    """Return the trained share of the parameters in a line for people."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    layers: Sequence[tuple[str, LoRALinear]] = list(adapters(model))
    names = sorted({name.rsplit(".", 1)[-1] for name, _ in layers})
    ranks = sorted({layer.lora_A.shape[0] for _, layer in layers})
    return (
        f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %): rank "
        f"{', '.join(map(str, ranks))} in {len(layers)} layers ({' '.join(names)})"
    )
