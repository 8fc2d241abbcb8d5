"""Does a run fit? What the device has left, what each rank needs, and the batch that fits."""

import argparse
import math
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .console import human
from .course import Schedule
from .engine import is_fused
from .estimate import process_memory, training_memory
from .fused import can_fuse
from .LMConfig import LMConfig
from .model import MiniMindForCausalLM
from .runtime import Runtime

MARGIN = 0.1  # of the room, which --batch_size auto leaves: the estimate is not exact


class Budget:
    """What training takes at its peak, and what there is; for the rank that is worst off.

    Every rank must make one, and all find the same figures in it.

    Args:
        model: what is going to be trained, with what is frozen in it frozen.
        row_positions: tokens of a row.
        schedule: of the run; its last update, which may be the first, can have fewer rows.
        args: ``zero_stage``, ``offload``, ``batch_size`` and ``accumulation_steps`` are used.
        reference: a second model that is held beside it.

    Attributes:
        room: bytes that a rank can have, with what its process has taken already; None: unknown.
    """

    def __init__(
        self,
        model: MiniMindForCausalLM,
        row_positions: int,
        schedule: Schedule,
        args: argparse.Namespace,
        runtime: Runtime,
        reference: nn.Module | None = None,
    ) -> None:
        self.model, self.reference, self.row_positions = model, reference, row_positions
        self.args, self.runtime = args, runtime
        self.most_rows = math.ceil(schedule.n_samples / runtime.world_size)
        on_cpu = runtime.device.type == "cpu"
        self.beside = max(runtime.gather(process_memory(model, reference) if on_cpu else 0))
        rooms = [room for room in runtime.gather(own_room(runtime)) if room is not None]
        self.room = min(rooms) if rooms else None

    def needed(self, batch_size: int) -> int:
        """Return the bytes that a rank takes with so many rows at once."""
        return self.beside + training_memory(
            self.model,
            min(batch_size, self.most_rows) * self.row_positions,
            self.runtime.dtype,
            self.runtime.world_size,
            zero_stage=self.args.zero_stage,
            offload=self.args.offload and self.runtime.device.type != "cpu",
            reference=self.reference,
            fused=is_fused(self.args, self.runtime) and can_fuse(self.model),
            whole_logits="beta" in self.args,  # preferences
        )

    def fitting(self) -> int | None:
        """Return the most rows at once that fit and make the same update; None: not even one."""
        n_rows = self.args.batch_size * self.args.accumulation_steps
        return fitting_batch(n_rows, self.needed, self.room)

    def pick(self) -> None:
        """Settle ``--batch_size auto``: the same rows an update, as many of them at once as fit."""
        if self.room is None:
            return  # the usual batch size
        n_rows = self.args.batch_size * self.args.accumulation_steps
        self.args.batch_size = self.fitting() or 1
        self.args.accumulation_steps = n_rows // self.args.batch_size

    def refuse_what_does_not_fit(self) -> None:
        """See that the run has room.

        Raises:
            ValueError: it has not; with the figures, and what would fit.
        """
        args, runtime = self.args, self.runtime
        needed = self.needed(args.batch_size)
        if self.room is None or needed <= self.room:
            return
        where = f"each of {runtime.world_size} ranks has" if runtime.world_size > 1 else "there is"
        message = (
            f"--batch_size {args.batch_size} takes about {human(needed, 'B')} of memory on "
            f"{runtime.device}, {where} {human(self.room, 'B')}: "
        )
        if fitting := self.fitting():
            times = args.batch_size * args.accumulation_steps // fitting
            raise ValueError(
                f"{message}use --batch_size {fitting} --accumulation_steps {times}, which trains "
                f"the same and takes {human(self.needed(fitting), 'B')}, or --batch_size auto"
            )
        raise ValueError(
            f"{message}one row of {self.row_positions} tokens alone takes "
            f"{human(self.needed(1), 'B')}. Lower --max_seq_len or take a smaller model (--dim, "
            "--n_layers); over several devices --zero_stage 3 and --offload spread the model"
        )


def refuse_what_is_too_large(runtime: Runtime, config: LMConfig) -> None:
    """See that there is room for a model's weights, before any is taken; every rank must ask.

    Raises:
        ValueError: there is none.
    """
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    n_params = sum(p.numel() for p in model.parameters())
    rooms = [room for room in runtime.gather(own_room(runtime)) if room is not None]
    if rooms and 4 * n_params > min(rooms):
        raise ValueError(
            f"the weights of {n_params:,} parameters alone take {human(4 * n_params, 'B')} of "
            f"memory on {runtime.device}, there is {human(min(rooms), 'B')} for each rank: take a "
            "smaller model (--dim, --n_layers)"
        )


def fitting_batch(n_rows: int, needed: Callable[[int], int], room: int | None) -> int | None:
    """Return the largest divisor of ``n_rows`` that takes no more than the room less its margin.

    Args:
        n_rows: rows of an update on one rank.
        needed: bytes for so many rows at once; grows with them.
        room: bytes; None: unknown, and nothing is known to fit.
    """
    if room is None:
        return None
    small = [size for size in range(1, math.isqrt(n_rows) + 1) if n_rows % size == 0]
    divisors = {*small, *(n_rows // size for size in small)}
    return next(
        (size for size in sorted(divisors, reverse=True) if needed(size) <= (1 - MARGIN) * room),
        None,
    )


# ----------------------------------------------------------------------------- what there is


def own_room(runtime: Runtime) -> int | None:
    """Return the bytes that this rank can have, with those it has taken; None: no one tells.

    Ranks on one machine share what is free of its memory; a GPU belongs to one rank. Every rank
    must ask.
    """
    if runtime.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(runtime.device)
        return free + torch.cuda.memory_reserved(runtime.device)
    here = machine()
    n_sharing = runtime.gather(here).count(here)
    free = free_on_machine() if runtime.device.type == "cpu" else None
    return None if free is None else free // n_sharing + process_memory()


def machine() -> tuple[str, str]:
    """Return what tells this machine, or container, from others."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return boot_id.read_text() if boot_id.is_file() else "", socket.gethostname()


def free_on_machine(root: Path = Path("/")) -> int | None:
    """Return the bytes that processes here can still get; None where the system does not tell.

    The kernel's own figure, or less where a control group (a container, a job of a cluster) has a
    limit: what it has left, its cached files not counted, for those give way.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    if "MemAvailable" not in fields:
        return None
    return min([int(fields["MemAvailable"].split()[0]) * 1024, *left_in_groups(root)])


def left_in_groups(root: Path) -> list[int]:
    """Return what is left of each limit that a control group above this process sets, in bytes."""
    membership = root / "proc/self/cgroup"
    if not membership.is_file():
        return []
    left = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        # a container may see its own group at the top, under a path that is not there
        for folder in (group, *group.parents):
            if folder.is_relative_to(base) and (folder / names[0]).is_file():
                left += left_in_group(folder, *names)
    return left


def left_in_group(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> list[int]:
    """Return what is left of one group's limit; empty where it has none."""
    limit = (folder / limit_name).read_text().strip()
    if limit == "max" or not (folder / usage_name).is_file():
        return []
    lines = (folder / "memory.stat").read_text().splitlines()
    cached = dict(line.split() for line in lines)
    used = int((folder / usage_name).read_text()) - int(cached.get(cache_name, 0))
    return [max(0, int(limit) - used)]
