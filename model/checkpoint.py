"""Weights files: v1's names, atomic save, strict load with the configuration they know."""

import argparse
import hashlib
import inspect
import json
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .LMConfig import MODELS, LMConfig, parse_rope_scaling
from .lora import (
    LoRAConfig,
    add_adapter,
    freeze_in,
    has_adapter,
    load_adapter,
    merge_adapter,
    read_adapter_config,
    save_adapter,
)
from .model import MiniMindForCausalLM
from .packed import can_pack, pack
from .runtime import inference_dtype, pick_device
from .states import atomic_write, load_tensors, save_tensors, write_json
from .tokenizer import DEFAULT_TOKENIZER, Tokenizer

StateDict = dict[str, Tensor]
V1_BUFFERS = re.compile(r"(^|\.)(pos_cis|mask|freqs_cis)$")  # stored by v1, computed here
# The flags that say which model it is. Two of them are instructions for use, not claims about a
# file.
CONFIG_FLAGS = (
    "dim n_layers n_heads n_kv_heads hidden_dim use_moe n_shared_experts max_seq_len dropout"
).split()
INSTRUCTIONS = {"max_seq_len", "dropout"}
KNOWN_FIELDS = {*inspect.signature(LMConfig).parameters, "rope_parameters"} - {"kwargs"}
STAGE_STEMS = {
    "pretrain": "pretrain",
    "full_sft_single": "single_chat/full_sft",
    "full_sft_multi": "multi_chat/full_sft",
    "dpo": "rl",
    "lora": "lora",  # adapters last: they may lie on any of those above
    "lora_dpo": "lora_rl",
}
ADAPTER_STAGES = ("lora", "lora_dpo")  # they leave a folder with an adapter
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # of an exported folder
ADAPTER_FACTS = "minimind.json"  # in that folder: what PEFT's files have no place for
CHAT_STAGES = ("dpo", "full_sft_multi", "full_sft_single")  # in order of preference


@dataclass
class Loaded:
    """A model with the tokenizer that fits it, and where they are from.

    Attributes:
        path: of the weights; None: random ones.
        adapter: folder of the adapter that was put on or merged, if any.
        base_digest: of the weights without an adapter, where one is trained on them.
        n_params: the model's parameters as it was loaded.
        dtype: what its weights are in; a packed model's does not say it.
    """

    model: MiniMindForCausalLM
    tokenizer: Tokenizer
    path: Path | None
    adapter: Path | None = None
    base_digest: str | None = None

    def __post_init__(self) -> None:
        self.n_params = sum(parameter.numel() for parameter in self.model.parameters())
        self.dtype = self.model.dtype


def weights_path(
    out_dir: str | Path, stage: str, config: LMConfig, run_name: str | None = None
) -> Path:
    """Return where a stage leaves its weights, by v1's names; ``run_name`` keeps runs apart.

    ``stage`` is one of ``STAGE_STEMS``; those that train an adapter leave a folder.
    """
    name = "_".join(filter(None, (STAGE_STEMS[stage], width_name(config), run_name)))
    return Path(out_dir) / (name if stage in ADAPTER_STAGES else f"{name}.pth")


def width_name(config: LMConfig) -> str:
    """Return the part of file names that tells models apart: ``512`` or ``512_moe``."""
    return f"{config.dim}{'_moe' if config.use_moe else ''}"


def sidecar(path: Path) -> Path:
    """Return the JSON beside a weights file: its configuration and its tokenizer's hash."""
    return path.with_suffix(".json")


def save_weights(
    model: MiniMindForCausalLM, path: Path, tokenizer: Tokenizer, **facts: Any
) -> None:
    """Write the ``state_dict`` and, beside it, the configuration, tokenizer hash and ``facts``."""
    known = {"config": model.config.to_diff_dict(), "tokenizer_sha256": tokenizer.sha256, **facts}
    known["tokenizer"] = str(tokenizer.folder)
    with atomic_write(path) as temporary:
        save_tensors(model.state_dict(), temporary)
        # the disk had room for the weights: now both files get their names, one after the other
        write_json(known, sidecar(path))


def save_trained(loaded: Loaded, path: Path, **facts: Any) -> None:
    """Write what a run trained: a weights file, or the folder of an adapter."""
    model, tokenizer = loaded.model, loaded.tokenizer
    if not has_adapter(model):
        save_weights(model, path, tokenizer, **facts)
        return
    save_adapter(model, path, loaded.path)
    known = {"tokenizer_sha256": tokenizer.sha256, "base_digest": loaded.base_digest, **facts}
    write_json(known, path / ADAPTER_FACTS)


def weights_digest(model: MiniMindForCausalLM) -> str:
    """Return a hash of all parameters, names and numbers: 0.1 s for 100 MB."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_state_dict(path: Path) -> StateDict:
    """Read the tensors of a ``.pth``, ``.bin`` or ``.safetensors`` file, never any code.

    Prefixes that ``torch.compile`` and DDP leave are taken off and v1's stored tables are dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of named tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = load_tensors(path)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a readable weights file: it is damaged, or holds more than tensors, "
            "which could be code and is never loaded; save the model's state_dict()"
        ) from error
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not a readable weights file ({reason}); it may be truncated: make it anew"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path} holds no state_dict (expected names with tensors)")
    clean = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}
    clean = {name: value for name, value in clean.items() if not V1_BUFFERS.search(name)}
    for name, value in clean.items():
        if not holds_numbers(value):
            raise ValueError(
                f"{path}: {name!r} is no plain tensor of floating point numbers that are all in "
                "the file: save the model's state_dict()"
            )
    if "output.weight" not in clean and "tok_embeddings.weight" in clean:  # tied, so stored once
        clean["output.weight"] = clean["tok_embeddings.weight"]
    return clean


def holds_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter with all its numbers: a file of a kilobyte can claim a
    shape of any size by strides of zero, and models are built by the shapes that are found.
    """
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def read_sidecar(path: Path) -> dict[str, Any]:
    """Return what the JSON beside a weights file says, ``{}`` where there is none.

    Raises:
        ValueError: the JSON is damaged.
    """
    if not sidecar(path).is_file():
        return {}
    known = read_json(sidecar(path))
    if not isinstance(known.get("config"), dict):
        raise ValueError(f'{sidecar(path)} has no "config": remove it to go by flags')
    return known


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): copy or make it anew") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object of settings")
    return value


def config_of_shapes(state: StateDict, stated: dict[str, Any], path: Path) -> dict[str, Any]:
    """Read from the shapes of v1's parameters what they tell; ``stated`` gives the number of heads.

    Raises:
        ValueError: the names are not v1's.
    """
    n_heads = stated.get("n_heads", LMConfig().n_heads)
    try:
        vocab_size, dim = state["tok_embeddings.weight"].shape
        kv_dim = state["layers.0.attention.wk.weight"].shape[0]
        gate = state.get("layers.0.feed_forward.gate.weight")
        first = "w1" if gate is None else "experts.0.w1"
        hidden_dim = state[f"layers.0.feed_forward.{first}.weight"].shape[0]
    except KeyError as error:
        raise ValueError(
            f"{path} has no parameter {error}: it is not a MiniMind v1 model "
            f"(found: {', '.join(list(state)[:3])}, …)"
        ) from error
    layers = {int(m[1]) for name in state if (m := re.match(r"layers\.(\d+)\.", name))}
    found = {
        "vocab_size": vocab_size,
        "dim": dim,
        "n_layers": len(layers),
        "n_heads": n_heads,
        "n_kv_heads": max(1, kv_dim // max(1, dim // n_heads)),
        "hidden_dim": hidden_dim,
        "use_moe": gate is not None,
    }
    if gate is not None:
        shared = state.get("layers.0.feed_forward.shared_experts.w1.weight")
        found["n_routed_experts"] = gate.shape[0]
        found["n_shared_experts"] = 0 if shared is None else shared.shape[0] // hidden_dim
    return found


def stated_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that the command line fixes: the named model's under the flags given."""
    named = {"use_moe": False, **MODELS[args.model]} if args.model else {}
    given = {name: getattr(args, name) for name in CONFIG_FLAGS}
    return {**named, **{name: value for name, value in given.items() if value is not None}}


def new_config(args: argparse.Namespace, tokenizer: Tokenizer) -> LMConfig:
    """Return the configuration of a model to be made: defaults, then the named model, then
    flags.
    """
    fields = stated_config(args)
    return LMConfig(
        **{"vocab_size": tokenizer.vocab_size, **fields, "rope_scaling": args.rope_scaling}
    )


def check_against_flags(config: LMConfig, args: argparse.Namespace, path: Path) -> None:
    """Refuse flags that contradict a configuration which is known.

    Raises:
        ValueError: with each difference.
    """
    wrong = [
        f"{name}={getattr(config, name)!r}, not {value!r}"
        for name, value in stated_config(args).items()
        if name not in INSTRUCTIONS and getattr(config, name) != value
    ]
    if wrong:
        raise ValueError(
            f"{path} has {'; '.join(wrong)} as --model or --{wrong[0].split('=')[0]} says: "
            "drop the flag, or name other weights"
        )


def extend_context(config: LMConfig, scaling: str) -> None:
    """Scale the rotary positions of a trained configuration, ``linear:4`` or ``yarn:4``.

    Raises:
        ValueError: an unknown scaling, or a model that is scaled already in another way.
    """
    parameters = parse_rope_scaling(scaling, config.rope_theta, 1)
    present = config.rope_parameters
    if present["rope_type"] != "default":
        if (present["rope_type"], present["factor"]) == (
            parameters["rope_type"],
            parameters["factor"],
        ):
            return
        raise ValueError(
            f"--rope_scaling {scaling}: these weights are scaled by {present['rope_type']}:"
            f"{present['factor']:g} already; drop the flag"
        )
    trained = config.max_seq_len
    config.max_seq_len = round(trained * parameters["factor"])
    config.rope_parameters = parse_rope_scaling(scaling, config.rope_theta, config.max_seq_len)


def load_model(path: str | Path, args: argparse.Namespace) -> Loaded:
    """Load weights with ``strict=True``, with the configuration they know or the one flags give.

    Args:
        path: a ``.pth`` file, or a folder with ``config.json`` and weights (exported, or the
            original's; code in it is never run).
        args: the model flags.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: unreadable, of another shape or tokenizer, or a flag contradicts them.
    """
    path = Path(path)
    known: dict[str, Any] = {}
    own_tokenizer = None
    if path.is_dir():
        file = weights_in_folder(path)
        if (path / "config.json").is_file():
            known = {"config": read_json(path / "config.json")}
            kind = known["config"].get("model_type", LMConfig.model_type)
            if kind != LMConfig.model_type:
                raise ValueError(
                    f"{path} is a model of type {kind!r}: make a weights file of it first, python "
                    f"export_model.py --from {path} --output FILE.pth"
                )
        if (path / "tokenizer.json").is_file():
            own_tokenizer = path
    else:
        file, known = path, read_sidecar(path)
    tokenizer = Tokenizer(args.tokenizer or own_tokenizer or DEFAULT_TOKENIZER)
    state = read_state_dict(file)
    stated = stated_config(args)
    # of what a config.json says, only LMConfig's own fields count
    fields = known.get("config") or {**stated, **config_of_shapes(state, stated, file)}
    try:
        config = LMConfig(**{k: v for k, v in fields.items() if k in KNOWN_FIELDS})
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"the configuration of {path} is wrong: {error}") from error
    check_against_flags(config, args, path)
    if args.rope_scaling:
        extend_context(config, args.rope_scaling)
    for name in INSTRUCTIONS & stated.keys():
        setattr(config, name, stated[name])
    check_tokenizer(config, known.get("tokenizer_sha256"), tokenizer, path)
    return Loaded(filled_model(config, state, file), tokenizer, file)


def weights_in_folder(folder: Path) -> Path:
    """Return the weights file of an exported or original folder.

    Raises:
        FileNotFoundError: none of the names that exports use.
    """
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{folder} holds neither model.safetensors nor pytorch_model.bin; found: "
        f"{', '.join(sorted(p.name for p in folder.iterdir())[:6]) or 'nothing'}"
    )


def check_size(config: LMConfig, state: StateDict, path: Path) -> None:
    """Raise ValueError for a configuration of a model that weights are far from filling.

    Before any memory is taken for it: a file can claim a model of any size.
    """
    experts = config.n_routed_experts + config.n_shared_experts if config.use_moe else 1
    a_layer = 2 * config.dim**2 + 3 * config.dim * config.hidden_dim * experts
    claimed = config.vocab_size * config.dim + config.n_layers * a_layer
    found = sum(tensor.numel() for tensor in state.values())
    if config.n_layers > len(state) or claimed > 2 * found + 10**8:
        raise ValueError(
            f"{path} does not fit dim={config.dim}, n_layers={config.n_layers}, hidden_dim="
            f"{config.hidden_dim}: it has {found:,} numbers in {len(state)} tensors, which fill no "
            "such model; check the configuration beside it, or the model flags"
        )


def filled_model(config: LMConfig, state: StateDict, path: Path) -> MiniMindForCausalLM:
    """Return the model of a configuration, with these weights.

    Raises:
        ValueError: they do not fit.
    """
    check_size(config, state, path)
    with Unfilled():
        model = MiniMindForCausalLM(config)
    load_strictly(model, state, path)
    return model


class Unfilled(TorchFunctionMode):
    """A context in which new parameters get no random numbers, because weights follow.

    To draw them takes as long as to read and check the weights, and no draw is made before the
    first that counts.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]  # a Tensor's own, or of torch.nn.init
        return function(*args, **kwargs)


def load_strictly(model: MiniMindForCausalLM, state: StateDict, path: Path) -> None:
    """Load every parameter, or none.

    Raises:
        ValueError: a name that is missing, unexpected or of another shape; never random weights.
    """
    own = model.state_dict()
    problems = [f'missing "{name}"' for name in own if name not in state]
    problems += [f'unexpected "{name}"' for name in state if name not in own]
    problems += [
        f'"{name}" is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}'
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        config = model.config
        hint = "try --use_moe" if any("experts" in p for p in problems) else "check the model flags"
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{path} does not fit dim={config.dim}, n_layers={config.n_layers}, "
            f"n_heads={config.n_heads}: {'; '.join(problems[:3])}{more}; {hint}"
        )
    model.load_state_dict(state, strict=True)


def check_tokenizer(
    config: LMConfig, recorded_sha256: str | None, tokenizer: Tokenizer, path: Path | None
) -> None:
    """Refuse a tokenizer that is not the one the weights were trained with.

    Raises:
        ValueError: another hash, or another number of ids than the embedding has.
    """
    if recorded_sha256 is not None and recorded_sha256 != tokenizer.sha256:
        raise ValueError(
            f"{path} was trained with another tokenizer (hash {str(recorded_sha256)[:12]}…) than "
            f"{tokenizer.folder} (hash {tokenizer.sha256[:12]}…): name the right one by --tokenizer"
        )
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{tokenizer.folder} has {tokenizer.vocab_size} ids, the model's embedding "
            f"{config.vocab_size}: name the tokenizer it was trained with by --tokenizer"
        )


def start_model(
    args: argparse.Namespace,
    after: str | None,
    check_room: Callable[[LMConfig], None] = lambda config: None,
) -> Loaded:
    """Return the model that a stage begins with: ``--init_from``, else what stage ``after`` left.

    Args:
        after: the stage before; None: a new model with random weights.
        check_room: is asked before memory is taken for a new model, and raises where there is none.

    Raises:
        FileNotFoundError: the stage before has not been run.
        ValueError: flags or tokenizer contradict the weights.
    """
    if args.init_from not in (None, "none"):
        if not Path(args.init_from).exists():
            raise FileNotFoundError(f"--init_from {args.init_from} does not exist")
        return load_model(args.init_from, args)
    if after is None or args.init_from == "none":
        tokenizer = Tokenizer(args.tokenizer or DEFAULT_TOKENIZER)
        config = new_config(args, tokenizer)
        check_tokenizer(config, None, tokenizer, None)
        check_room(config)
        return Loaded(MiniMindForCausalLM(config), tokenizer, None)
    like = expected_config(args)
    names = dict.fromkeys((args.run_name, None))  # this run's own, else the unnamed one
    candidates = [weights_path(args.out_dir, after, like, name) for name in names]
    for candidate in candidates:
        if candidate.is_file():
            return load_model(candidate, args)
    script = {"pretrain": "1-pretrain.py", "full_sft_single": "3-full_sft.py --chat single"}[after]
    raise FileNotFoundError(
        f"{candidates[0]} does not exist: run {script} first, or name other weights with "
        "--init_from ('none' starts from random ones)"
    )


def start_adapter(start: Loaded, args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Freeze the model that a stage begins with and put on it the adapter to train.

    Args:
        args: ``lora`` names an adapter to go on with, otherwise ``lora_rank``, ``lora_alpha``,
            ``lora_dropout``, ``lora_targets`` say what a new one is made of.
        dtype: the precision to keep the frozen weights in.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_adapter` and :func:`add_adapter`.
    """
    start.base_digest = weights_digest(start.model)
    if args.lora:
        attach_adapter(start, Path(args.lora))
    else:
        targets = tuple(args.lora_targets)
        config = LoRAConfig(args.lora_rank, args.lora_alpha, args.lora_dropout, targets)
        add_adapter(start.model, config)
    freeze_in(start.model, dtype)


def attach_adapter(loaded: Loaded, folder: Path) -> None:
    """Put the adapter in ``folder`` on a loaded model; a base it was not trained on is told.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_adapter`, or another tokenizer.
    """
    facts: dict[str, Any] = {}
    if (folder / ADAPTER_FACTS).is_file():
        facts = read_json(folder / ADAPTER_FACTS)
    tokenizer = facts.get("tokenizer_sha256")
    check_tokenizer(loaded.model.config, tokenizer, loaded.tokenizer, folder)
    loaded.base_digest = loaded.base_digest or weights_digest(loaded.model)
    load_adapter(loaded.model, folder)
    loaded.adapter = folder
    if facts.get("base_digest") not in (None, loaded.base_digest):
        recorded = read_adapter_config(folder).get("base_model_name_or_path")
        print(
            f"warning: {folder} was trained on other weights ({recorded}) than {loaded.path}; it "
            "fits their shape, but may not mean the same on them",
            file=sys.stderr,
        )


def expected_config(args: argparse.Namespace) -> LMConfig:
    """Return a configuration of the width that the flags say, to name files by."""
    fields = stated_config(args)
    named = {k: v for k, v in fields.items() if k in ("dim", "use_moe")}
    return LMConfig(**named, n_heads=1, n_kv_heads=1)  # heads are not in names: any that fit


def find_weights(args: argparse.Namespace, purpose: str) -> Path:
    """Return the weights that the flags name, or the best that the stages left.

    ``chat`` takes preference-tuned, multi-turn, single-turn, then the demo, never by time;
    ``pretrain`` the pretrained ones.

    Raises:
        FileNotFoundError: none; the message says what to run.
        ValueError: both ``--weights`` and ``--load_from``.
    """
    if args.weights and args.load_from:
        raise ValueError("--weights and --load_from exclude one another: name one place")
    if args.weights or args.load_from:
        path = Path(args.weights or args.load_from)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: run the stage that makes it, or name another"
            )
        return path
    if args.lora and (base := read_adapter_config(args.lora).get("base_model_name_or_path")):
        if not Path(base).exists():
            raise FileNotFoundError(
                f"{base}, on which {args.lora} was trained, does not exist: name its weights with "
                "--weights"
            )
        return Path(base)
    stages = CHAT_STAGES if purpose == "chat" else ("pretrain",)
    roots = [Path(args.out_dir), Path(args.out_dir) / "demo"]
    like = expected_config(args)
    candidates = [weights_path(root, stage, like) for root in roots for stage in stages]
    if "dim" not in stated_config(args):  # the demo's width is its own
        candidates += [
            path
            for stage in stages
            for path in sorted(roots[1].glob(f"{STAGE_STEMS[stage]}_*.pth"))
        ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    scripts = "1-pretrain.py" if purpose == "pretrain" else "1-pretrain.py and 3-full_sft.py"
    raise FileNotFoundError(
        f"no weights: looked for {', '.join(map(str, candidates[: len(stages)]))} and the demo's; "
        f"run {scripts} or `make demo`, or name a file with --weights"
    )


def load_for_inference(
    args: argparse.Namespace, purpose: str = "chat", *, packed: bool = True
) -> Loaded:
    """Load what :func:`find_weights` finds, in eval mode, on the device and in the precision
    asked; the adapter that ``--lora`` names is merged into it.

    Args:
        packed: lay the weights out for speed, where the device allows; they cannot be read then,
            and all else is in fp32.

    Raises:
        ValueError: int8 where it cannot be: unpacked, or without the kernels.
    """
    device = pick_device(args.device)
    dtype = inference_dtype(args.dtype, device)
    if dtype == torch.int8 and not (packed and can_pack(dtype)):
        why = "this processor's torch has no such kernels" if packed else "it only answers"
        raise ValueError(f"--dtype int8: {why}; use bfloat16 or float32")
    loaded = load_model(find_weights(args, purpose), args)
    if args.lora:
        attach_adapter(loaded, Path(args.lora))
        merge_adapter(loaded.model)
    loaded.model.to(device=device).eval()
    if not (packed and pack(loaded.model, dtype)):
        loaded.model.to(dtype=dtype)
    loaded.dtype = dtype
    return loaded
