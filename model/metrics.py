"""The record of a run: metrics.jsonl, config.json, curve.png, and a copy for Weights & Biases."""

import json
import math
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .states import atomic_write, write_json


class RunLog:
    """The folder ``out/logs/<run>/``; one object a line in ``metrics.jsonl``, each written at
    once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"

    def start(self, settings: dict[str, Any], is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Write the settings; of the lines of an earlier start keep those that ``is_kept`` says."""
        write_json(settings, self.folder / "config.json")
        with atomic_write(self.path) as temporary:
            lines = (self._line(record) for record in self.records() if is_kept(record))
            temporary.write_text("".join(lines), "utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one object, whole or not at all.

        Raises:
            OSError: the disk is full.
        """
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._line(record))
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, size)
            raise

    @staticmethod
    def _line(record: dict[str, Any]) -> str:
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()  # JSON knows no NaN
        }
        return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"

    def records(self) -> list[dict[str, Any]]:
        """Return all whole lines; the last may have been cut by a kill."""
        if not self.path.is_file():
            return []
        records = []
        for line in self.path.read_text("utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def draw(self) -> Path | None:
        """Draw loss and validation loss over tokens; None where matplotlib is missing."""
        try:
            from matplotlib.figure import Figure  # without pyplot, which takes a second to import
        except ImportError:
            return None
        records = self.records()
        figure = Figure(figsize=(7, 4), dpi=120)
        axes = figure.subplots()
        for key, label, style in (("loss", "training", "-"), ("val_loss", "held out", "o-")):
            points = [(r["tokens"] / 1e6, r[key]) for r in records if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
        axes.set_xlabel("million tokens")
        is_of_pairs = any("margin" in record for record in records)
        axes.set_ylabel(f"loss, nats per {'pair' if is_of_pairs else 'trained token'}")
        axes.set_title(self.folder.name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        figure.tight_layout()
        path = self.folder / "curve.png"
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")
        return path


class WandbLog:
    """Sends the lines of a record to Weights & Biases too; whatever fails there is one warning.

    The run's id is kept beside the record, so that a resumed run goes on in the same place.
    ``WANDB_MODE=offline`` keeps the files here, to be sent by ``wandb sync``.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        name: str,
        settings: dict[str, Any],
        *,
        resumed: bool,
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._run: Any = None
        try:
            import wandb

            path = folder / "wandb_id"
            if not (resumed and path.is_file()):
                path.write_text(uuid.uuid4().hex[:8] + "\n", "utf-8")
            self._run = wandb.init(
                project=project,
                name=name,
                id=path.read_text("utf-8").strip(),
                resume="allow",
                config=settings,
                dir=str(folder),
            )
        except Exception as error:  # of many kinds: no package, no key, no network, no disk
            self._give_up(error)

    def write(self, record: dict[str, Any]) -> None:
        """Send one line, its numbers at its step and its text as it is."""
        if self._run is None:
            return
        try:
            self._run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
        except Exception as error:
            self._give_up(error)

    def close(self, exit_code: int) -> None:
        """Say that the run has ended."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        self._warn(f"wandb is left out, the run goes on ({reason})")
