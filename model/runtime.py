"""Where a run takes place: device, precision, seeds, ranks, log."""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Ranks wait for one another while one builds a token store or saves; a lost one is noticed by the
# launcher, which ends them all, so nothing depends on this being short
PATIENCE = timedelta(hours=12)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Runtime:
    """The place of this process in a run.

    Attributes:
        dtype: what matrices are multiplied in; the weights that the optimizer updates stay fp32.
        rank, world_size: which of how many processes this is.
        local_rank, local_world_size: which of how many on this machine.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Only rank 0 prints and writes."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which forward and loss are computed."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def log(self, message: str) -> None:
        """Print a line, on rank 0 only."""
        if self.is_main:
            print(message, flush=True)

    def warn(self, message: str) -> None:
        """Print a warning beside the results, on rank 0 only."""
        if self.is_main:
            print(f"warning: {message}", file=sys.stderr, flush=True)

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Return each value summed over all ranks, the same on each of them."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks, on each of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_rank(self, rank: int, make: Callable[[], Any]) -> Any:
        """Return what one rank makes, on every rank."""
        if self.world_size == 1:
            return make()
        made = [make() if self.rank == rank else None]
        dist.broadcast_object_list(made, src=rank, device=self.device)
        return made[0]

    def peak_memory(self) -> int | None:
        """Return the bytes of this rank's GPU that were in use at once; None without one."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device)

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def is_any(self, claim: bool) -> bool:
        """Say whether the claim holds on any rank."""
        return self.sum_over_ranks([float(claim)])[0] > 0

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let rank 0 go through the block, then one rank of every other machine, then the rest:
        each finds on its disk what those before it made.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for wave in range(3):
            if wave == turn:
                yield
            self.wait_for_all()


class StopRequest:
    """Is set by SIGINT or SIGTERM within its ``with`` block; a second signal ends at once.

    Args:
        grace_s: for so long after the first, further ones count as the same: launchers send two.
    """

    def __init__(self, grace_s: float = 0.0) -> None:
        self.grace_s = grace_s
        self.signal = 0
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal != 0

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self:
            if time.monotonic() - self._asked_at < self.grace_s:
                return
            raise KeyboardInterrupt
        self.signal, self._asked_at = number, time.monotonic()
        with contextlib.suppress(OSError):  # not print(): that may be what was interrupted
            os.write(2, "\nstopping after this update …\n".encode())


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        ValueError: unknown, or not on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"--device {name} is unknown: use auto, cpu, cuda, cuda:1 or mps"
        ) from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ValueError(f"--device {name} is not on this machine: use --device cpu or auto")
    return device


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of ``--dtype``; ``auto`` is bf16 where the device is fast in it.

    Raises:
        ValueError: fp16 on a CPU, whose gradients it cannot hold and which is slow in it.
    """
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            raise ValueError(
                "--dtype float16 trains on a GPU only: use float32 or bfloat16 on a CPU"
            )
        return DTYPES[name]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type == "cuda":
        return torch.float16
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def inference_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of the weights for inference; ``auto`` is bf16 on CUDA, fp32
    elsewhere.

    Raises:
        ValueError: int8 elsewhere than on a CPU.
    """
    if name == "int8":
        if device.type != "cpu":
            raise ValueError(
                f"--dtype int8 is for CPUs, this is {device.type}: use bfloat16, or --device cpu"
            )
        return torch.int8
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def setup(
    device: str, dtype: str, seed: int, num_workers: int | None = None, *, zero_stage: int = 0
) -> Runtime:
    """Find this process's place, join the other ranks, seed, limit the threads that tokenise.

    Under ``torchrun`` (or anything else that sets its environment) every rank takes a GPU of its
    own, or a share of the CPU, and meets the others: nccl with GPUs, gloo without. DeepSpeed
    (``zero_stage``) wants such a meeting of one rank, too.

    Raises:
        ValueError: a device or precision that is not to be had.
    """
    rank, world_size = place("RANK", 0), place("WORLD_SIZE", 1)
    local_rank = place("LOCAL_RANK", rank)
    local_world_size = place("LOCAL_WORLD_SIZE", place("LOCAL_SIZE", world_size))  # DeepSpeed's
    picked = pick_device(device)
    if world_size > 1 or zero_stage:
        if picked.type == "mps":
            raise ValueError("--device mps trains in one process: start it with python")
        if "RANK" not in os.environ:
            raise ValueError(
                "--zero_stage, --offload and --deepspeed_config need a launcher: "
                f"deepspeed --num_gpus=1 {sys.argv[0]} …"
            )
        if picked.type == "cuda":
            picked = pick_device(f"cuda:{local_rank}")
            torch.cuda.set_device(picked)
        backend = "nccl" if picked.type == "cuda" else "gloo"
        if not dist.is_initialized():
            meet(backend)
            end_with_launcher()
    torch.manual_seed(seed)  # the same on each rank: random weights begin equal
    if num_workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(num_workers)  # read when the tokenizer first runs
    return Runtime(
        picked, training_dtype(dtype, picked), rank, world_size, local_rank, local_world_size
    )


def meet(backend: str) -> None:
    """Join the other ranks where the launcher says.

    Raises:
        ValueError: there is no meeting there.
    """
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (dist.DistError, RuntimeError) as error:
        where = ":".join(os.environ.get(n, "?") for n in ("MASTER_ADDR", "MASTER_PORT"))
        raise ValueError(
            f"the ranks cannot meet at {where} ({str(error).splitlines()[0]}): see that all are "
            "started, and give the launcher another --master_port if that one is taken"
        ) from error
    atexit.register(leave)


def end_with_launcher() -> None:
    """Have Linux ask this rank to stop, with a save, when its launcher is killed.

    Nobody would look after it any more, nor end it when another rank is lost.
    """
    is_known = "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_SIZE" in os.environ  # or DeepSpeed's
    if sys.platform == "linux" and is_known:
        parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


def place(name: str, otherwise: int) -> int:
    """Return one of the numbers that launchers leave in the environment."""
    return int(os.environ.get(name, otherwise))


def leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of the random generators that training on ``device`` draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put the generators back to what :func:`random_state` gave, as far as the device is alike."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
