"""What a figure was measured on: the facts that every benchmark says beside its table."""

import os
import platform
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
