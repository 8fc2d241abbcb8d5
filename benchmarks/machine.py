"""What a figure was measured on, and the memory of a process: what benchmarks share."""

import os
import platform
import resource
import sys
from pathlib import Path

import torch


def machine() -> dict[str, str | int | float]:
    """Return processor, cores, versions, and the load of the last minute, as a JSON object."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux alone has it
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count() or 1,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def describe(facts: dict[str, str | int | float]) -> str:
    """Return those facts as a line."""
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['system']}, Python "
        f"{facts['python']}, torch {facts['torch']}; load at start {facts['load']}"
    )


def memory_mb() -> float:
    """Return the most memory that this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would tell of the parent's, too
        fields = status.read_text("utf-8").split()
        return int(fields[fields.index("VmHWM:") + 1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
