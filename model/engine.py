"""What makes an update: the trained model, its optimizer, its loss scaler; one process or many."""

import argparse
import contextlib
import inspect
import math
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .fused import fuse
from .model import MiniMindForCausalLM
from .optim import make_optimizer
from .runtime import Runtime


def can_compile(device: str) -> bool:
    """Whether ``torch.compile`` has what it needs; on a CPU that is a compiler of C++."""
    return device != "cpu" or any(map(shutil.which, ("g++", "clang++")))


def is_fused(args: argparse.Namespace, runtime: Runtime) -> bool:
    """Whether blocks are computed by :mod:`model.fused`; DeepSpeed hands weights only to modules
    that are called, and compiled code has its own ways.
    """
    plain = args.compile or args.zero_stage > 0 or not args.fused
    return runtime.device.type == "cpu" and not plain


class Engine:
    """A model in training, in one process or, under ``torchrun``, as one of several equal ones.

    Attributes:
        model: what is trained, on the runtime's device.
        compute: the same parameters as they are called in training: compiled, or wrapped so that
            the ranks' gradients are averaged while they are computed.
        parameters: those that are trained.
        frozen: names of those that are not.
        names: of all parameters, by their id.
    """

    def __init__(self, model: MiniMindForCausalLM, args: argparse.Namespace, runtime: Runtime):
        self.args, self.runtime = args, runtime
        self.model = model.to(runtime.device).train()
        self.compute: nn.Module = self.model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.frozen = {
            name
            for name, p in model.named_parameters(remove_duplicate=False)
            if not p.requires_grad
        }
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.optimizer = make_optimizer(
            model, args.optimizer, args.learning_rate, args.weight_decay, runtime.dtype
        )
        self.scaler = torch.amp.GradScaler(
            runtime.device.type, enabled=runtime.dtype == torch.float16
        )

    def prepare(self) -> None:
        """Wrap and compile the model, once all its parameters have their values."""
        if self.runtime.world_size > 1:
            device = self.runtime.device
            # the buffers are RoPE's tables, the same everywhere; torch 2.13 has a new name for it
            known = inspect.signature(DistributedDataParallel).parameters
            sync_flag = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
            # a graph that is the same each time: an idle expert runs too, on no tokens
            self.compute = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                static_graph=self.args.accumulation_steps == 1,
                **{sync_flag: False},
            )
        if self.args.compile and not can_compile(self.runtime.device.type):
            self.runtime.warn("--compile needs g++ or clang++ on a CPU; going on without")
            self.args.compile = False
        if self.args.compile:
            self.compute = torch.compile(self.compute)
        elif is_fused(self.args, self.runtime):
            fuse(self.model)

    def part(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Return the context of a micro-batch; ranks exchange gradients in the last one alone."""
        if isinstance(self.compute, DistributedDataParallel) and not is_last:
            return self.compute.no_sync()
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's part of the update's loss.

        Ranks average their gradients, so each gives its part times their number.
        """
        self.scaler.scale(loss * self.runtime.world_size).backward()

    def step(self, lr: float, loss_is_finite: bool) -> tuple[float, bool]:
        """Make the update, unless loss or gradient is not finite.

        Returns:
            the gradient's norm before clipping, and whether the update was made.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("rate_factor", 1.0)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.args.grad_clip or math.inf))
        is_made = loss_is_finite and math.isfinite(norm)
        if is_made:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, is_made

    # ------------------------------------------------------------------------- states

    @contextlib.contextmanager
    def whole(self) -> Iterator[MiniMindForCausalLM]:
        """Yield the model with all its parameters, to measure or to save; every rank must ask."""
        yield self.model

    def state(self) -> dict[str, Any]:
        """Return what the next update depends on: trained weights, optimizer, loss scale.

        By the parameters' names, so that any engine can take it up; every rank must ask.
        """
        weights = self.model.state_dict().items()
        return {
            "model": {name: value for name, value in weights if name not in self.frozen},
            "optimizer": {self.names[id(p)]: state for p, state in self.optimizer.state.items()},
            "scaler": self.scaler.state_dict(),
        }

    def kept_by_optimizer(self) -> Iterator[tuple[str, set[str]]]:
        """Yield each trained parameter's name with the names of what is kept of it."""
        for group in self.optimizer.param_groups:
            is_matrix = group.get("orthogonal", False)
            keys = {"momentum_buffer"} if is_matrix else {"step", "exp_avg", "exp_avg_sq"}
            for parameter in group["params"]:
                yield self.names[id(parameter)], keys

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave; the optimizer's settings are this start's.

        Raises:
            RuntimeError, ValueError: it is of a model of another shape.
        """
        weights = {k: v for k, v in self.model.state_dict().items() if k in self.frozen}
        self.model.load_state_dict({**weights, **state["model"]})
        order = [
            self.names[id(p)] for group in self.optimizer.param_groups for p in group["params"]
        ]
        found = state["optimizer"]
        if found and set(found) != set(order):
            raise ValueError("the optimizer's state is of other parameters")
        if any(set(found[name]) != keys for name, keys in self.kept_by_optimizer() if found):
            self.runtime.warn("the state is of another optimizer: this one begins without any")
            found = {}
        kept = self.optimizer.state_dict()["param_groups"]  # settings: this start's
        numbered = {number: found[name] for number, name in enumerate(order) if found}
        self.optimizer.load_state_dict({"state": numbered, "param_groups": kept})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
