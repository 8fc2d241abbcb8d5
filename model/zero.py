"""DeepSpeed's engine in place of ours: the state of training spread over the ranks.

ZeRO (arXiv:1910.02054, section 5): stage 1 keeps a part of the optimizer's states on each rank,
stage 2 also of the gradients, stage 3 also of the parameters. The mathematics stays that of one
process, and what is saved is whole: a run goes on under any engine.
"""

import argparse
import contextlib
import copy
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .engine import Engine
from .model import MiniMindForCausalLM
from .runtime import Runtime

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


class ZeroEngine(Engine):
    """One rank of a DeepSpeed engine.

    Raises:
        ValueError: DeepSpeed is not installed, or ``--deepspeed_config`` contradicts the flags.
    """

    def __init__(self, model: MiniMindForCausalLM, args: argparse.Namespace, runtime: Runtime):
        super().__init__(model, args, runtime)
        if runtime.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            import deepspeed
        except ImportError as error:
            raise ValueError(
                "DeepSpeed is not installed: pip install deepspeed (Linux), or start the script "
                "with torchrun and without --zero_stage"
            ) from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # On a CPU it exchanges through shared memory: compiles that at the first start, waits for
        # ever where one was killed meanwhile or a rank has died, leaves 70 MB a rank in /dev/shm
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.deepspeed = deepspeed
        self.config = deepspeed_config(args, runtime)
        self.stage = self.config["zero_optimization"]["stage"]
        # stage 3 leaves no rank a whole model: this is the form of one, without memory
        self.skeleton = copy.deepcopy(self.model).to("meta") if self.stage == 3 else None
        self.zero: Any = None

    def prepare(self) -> None:
        """Hand model and optimizer to DeepSpeed, with the values they have by now."""
        steps = [float(s["step"]) for s in self.optimizer.state.values() if "step" in s]
        moments = {self.names[id(p)]: dict(s) for p, s in self.optimizer.state.items()}
        self.optimizer.state.clear()
        try:
            self.zero, self.wrapped, *_ = self.deepspeed.initialize(
                model=self.model, optimizer=self.optimizer, config=self.config
            )
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            if self.args.deepspeed_config is None:
                raise
            raise ValueError(
                f"DeepSpeed refuses --deepspeed_config {self.args.deepspeed_config} "
                f"({' '.join(str(error).split())[:300]})"
            ) from error
        self.compute = self.zero
        self.make_states(max(steps, default=0.0))
        if steps:
            self.set_moments(moments)
        if self.args.compile:
            self.runtime.warn("--compile is left out under DeepSpeed")

    def part(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Return the context of a micro-batch; gradients are exchanged in the last one."""
        self.zero.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's part of the update's loss."""
        self.zero.backward(loss * self.runtime.world_size, scale_wrt_gas=False)
        if not self.zero.is_gradient_accumulation_boundary():
            self.zero.step()  # counts the micro-batch, changes nothing

    def step(self, lr: float, loss_is_finite: bool) -> tuple[float, bool]:
        """Make the update, unless loss or gradient is not finite."""
        for group in self.wrapped.param_groups:
            group["lr"] = lr if loss_is_finite else 0.0
        self.zero.step()
        norm = float(self.zero.get_global_grad_norm())
        return norm, bool(self.zero.was_step_applied()) and math.isfinite(norm) and loss_is_finite

    # ------------------------------------------------------------------------- states

    @contextlib.contextmanager
    def whole(self) -> Iterator[MiniMindForCausalLM]:
        """Yield a model with all parameters on this rank; every rank must ask for it."""
        if self.skeleton is None:
            yield self.model
            return
        model = copy.deepcopy(self.skeleton).to_empty(device=self.runtime.device)
        model.tie_weights()
        with torch.no_grad():
            own = dict(model.named_parameters())
            for name, parameter in self.model.named_parameters():
                own[name].copy_(self.full(parameter))
        yield model.train(self.model.training)

    def full(self, parameter: Tensor) -> Tensor:
        """Return a parameter in full, as the optimizer keeps it: fp32."""
        if parameter.requires_grad:
            value = self.deepspeed.utils.safe_get_full_fp32_param(parameter)
            return value.view(parameter.ds_shape if self.stage == 3 else parameter.shape)
        if self.stage == 3:
            with self.deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return parameter.detach()

    def state(self) -> dict[str, Any]:
        """Return what the next update depends on, whole, in the form of :meth:`Engine.state`."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        get = self.deepspeed.utils.safe_get_full_optimizer_state
        optimizer: dict[str, dict[str, Tensor]] = {}
        weights: dict[str, Tensor] = {}
        step = torch.tensor(self.n_steps())
        for name, parameter in trained.items():
            weights[name] = self.full(parameter).cpu()
            optimizer[name] = {"step": step.clone()}
            for key in MOMENTS:
                optimizer[name][key] = get(parameter, key).view(weights[name].shape).cpu().clone()
        if "tok_embeddings.weight" in weights:
            weights["output.weight"] = weights["tok_embeddings.weight"]  # tied
        return {"model": weights, "optimizer": optimizer if step else {}, "scaler": {}}

    def save_own(self, folder: Path, step: int, keep_last: int) -> None:
        """Write DeepSpeed's own checkpoint, ``folder/step_<n>``; every rank must ask.

        For its tools alone (``zero_to_fp32.py`` beside it, universal checkpoints): it is tied to
        this engine and number of ranks, which :meth:`state` is not.
        """
        self.zero.save_checkpoint(str(folder), tag=f"step_{step}")
        if self.runtime.is_main:
            tags = sorted(folder.glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
            for old in tags[:-keep_last]:
                shutil.rmtree(old)

    def n_steps(self) -> float:
        """Return how many updates the optimizer has made."""
        states = self.wrapped.optimizer.state.values()
        return max((float(state["step"]) for state in states if "step" in state), default=0.0)

    def make_states(self, step: float) -> None:
        """Make the states of Adam on this rank's flat parts of the parameters: moments of zero.

        DeepSpeed leaves that to the optimizer's first update, where it loses sight of those of all
        groups but the first (0.19.8, ``_lazy_init_hp_params_optimizer_state``), and it has no way
        to begin with states that are there already.
        """
        if self.stage == 3:
            flat_parts = self.wrapped.fp32_partitioned_groups_flat
        else:
            flat_parts = self.wrapped.single_partition_of_fp32_groups
        for flat in flat_parts:
            states = {key: torch.zeros_like(flat) for key in MOMENTS}
            states["step"] = torch.tensor(step, device=flat.device)
            self.wrapped.optimizer.state[flat] = states
        if self.stage < 3:
            self.wrapped._lazy_init_hp_params_optimizer_state()

    def set_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        """Give the optimizer of each rank its part of the moments."""
        put = self.deepspeed.utils.safe_set_full_optimizer_state
        for name, parameter in self.model.named_parameters():
            for key in MOMENTS if parameter.requires_grad else ():
                put(parameter, moments[name][key].to(self.runtime.device), key)


def deepspeed_config(args: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """Return DeepSpeed's settings: those of the file, filled up from the flags.

    Raises:
        ValueError: the file cannot be read, or says something else than the flags.
    """
    zero: dict[str, Any] = {"stage": args.zero_stage}
    if args.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if args.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": args.accumulation_steps,
        "train_batch_size": args.batch_size * args.accumulation_steps * runtime.world_size,
        "gradient_clipping": args.grad_clip or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # ours is torch's AdamW
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if runtime.dtype == torch.bfloat16:  # as everywhere: products in bf16, weights in fp32
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif runtime.dtype == torch.float16:
        ours["fp16"] = {"enabled": True}
    if args.deepspeed_config is None:
        return ours
    path = Path(args.deepspeed_config)
    try:
        given = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--deepspeed_config {path} is not JSON ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"--deepspeed_config {path} holds no JSON object")
    for owner in ("bf16", "fp16", "amp", "torch_autocast"):
        section = given.get(owner)
        is_on = isinstance(section, dict) and section.get("enabled") not in (None, False, "auto")
        if is_on and owner not in ours:
            dtype = str(runtime.dtype).removeprefix("torch.")
            raise ValueError(
                f"{path} turns {owner} on, --dtype says {dtype}: take it out of the file, the flag "
                "says it all"
            )
    return merged(given, ours, str(path))


def merged(given: dict[str, Any], ours: dict[str, Any], place: str) -> dict[str, Any]:
    """Return ``given`` with what it lacks, or calls "auto", from ``ours``.

    Raises:
        ValueError: both say something, and not the same.
    """
    for owner in ("optimizer", "scheduler"):
        if owner in given:
            raise ValueError(
                f"{place} has {owner!r}, which --optimizer, --learning_rate and --schedule say: "
                "take it out of the file"
            )
    result = dict(given)
    for key, value in ours.items():
        there = given.get(key, "auto")
        if isinstance(value, dict) and isinstance(there, dict):
            result[key] = merged(there, value, f"{place}: {key}")
        elif there == "auto":
            result[key] = value
        elif there != value and key not in ("steps_per_print", "zero_force_ds_cpu_optimizer"):
            raise ValueError(
                f"{place} has {key}={there!r}, the flags say {value!r}: give the same in both, or "
                'write "auto" in the file'
            )
    return result
