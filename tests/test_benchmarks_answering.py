"""The benchmark of the memory that answering takes: what it measures has to add up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "inference_memory.py"


@pytest.mark.slow
def test_memory_of_answering_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    flags = ["--quick", "--models", "minimind-v1-small", "--dtypes", "float32", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], stdout=subprocess.PIPE, text=True, check=True
    )
    assert "| minimind-v1-small float32 | 10" in done.stdout
    processes = json.loads(path.read_text("utf-8"))["processes"]
    (one,) = processes["minimind-v1-small float32"]
    assert one["imports_mb"] < one["loaded_mb"] <= one["peak_mb"]
    # the weights are somewhere in what is held, and the peak is the most that was ever held
    assert one["imports_mb"] + one["weights_mb"] < one["held_mb"] < one["peak_mb"] + 1
