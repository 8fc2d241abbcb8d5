"""Where a run takes place: device, precision, seeds, ranks, log."""

import contextlib
import os
import signal
import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Runtime:
    """The place of this process in a run.

    ``dtype`` is what matrices are multiplied in; the weights that the optimizer updates stay fp32.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

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
        """Return each value summed over all ranks."""
        return values  # one rank


class StopRequest:
    """Is set by SIGINT or SIGTERM within its ``with`` block; a second signal ends at once."""

    def __init__(self) -> None:
        self.signal = 0
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
            raise KeyboardInterrupt
        self.signal = number
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
    """
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def setup(device: str, dtype: str, seed: int, num_workers: int | None = None) -> Runtime:
    """Find this process's place, seed its generators, limit the threads that tokenise.

    Raises:
        ValueError: a device or precision that is not to be had, or a launcher with several
            processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != 1:
        raise ValueError(
            f"WORLD_SIZE={world_size}: this version trains in one process; start it with python"
        )
    picked = pick_device(device)
    torch.manual_seed(seed)
    if num_workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(num_workers)  # read when the tokenizer first runs
    return Runtime(picked, training_dtype(dtype, picked))
