"""The record of a run: metrics.jsonl, config.json, curve.png, and a copy for Weights & Biases."""

import bisect
import json
import math
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .states import atomic_write, write_json

FAINT = {"color": "gray", "linewidth": 1, "markersize": 3}  # how a reference is drawn
REFERENCES = Path(__file__).resolve().parents[1] / "docs" / "reference"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return all whole lines of a ``metrics.jsonl``; the last may have been cut by a kill."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def points(records: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return ``key`` over the tokens seen, in millions, where it was measured."""
    found = [r for r in records if r.get(key) is not None and r.get("tokens") is not None]
    return [(r["tokens"] / 1e6, r[key]) for r in found]


class Reference:
    """The record of another run, to see whether one's own goes as it should.

    Args:
        run: its folder or its ``metrics.jsonl``, or the name of a run in ``docs/reference/``.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: it was never validated.
    """

    def __init__(self, run: str) -> None:
        places = (Path(run, "metrics.jsonl"), Path(run), REFERENCES / f"{run}.jsonl")
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            shipped = ", ".join(sorted(file.stem for file in REFERENCES.glob("*.jsonl")))
            raise FileNotFoundError(
                f"{run} is no run to compare with: name its folder in out/logs/, its metrics.jsonl"
                + (f", or one that ships with the project ({shipped})" if shipped else "")
            )
        is_log = path.name == "metrics.jsonl"
        self.name = path.resolve().parent.name if is_log else path.stem
        self.records = read_records(path)
        self.losses = points(self.records, "val_loss")
        if not self.losses:
            raise ValueError(f"{path} holds no val_loss: compare with a run that was validated")

    def loss_at(self, tokens: int) -> float | None:
        """Return its held-out loss after as many tokens, between two validations on a line."""
        place = tokens / 1e6
        after = bisect.bisect_left(self.losses, (place, -math.inf))
        if after == len(self.losses):
            return None
        (x1, y1) = self.losses[after]
        if x1 == place:
            return y1
        if after == 0:
            return None
        (x0, y0) = self.losses[after - 1]
        return y0 + (y1 - y0) * (place - x0) / (x1 - x0)


class RunLog:
    """The folder ``out/logs/<run>/``; one object a line in ``metrics.jsonl``, each written at
    once. The curve shows the ``reference`` too.
    """

    def __init__(self, folder: Path, reference: Reference | None = None) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.reference = reference

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
        """Return all whole lines."""
        return read_records(self.path)

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
            if found := points(records, key):
                axes.plot(*zip(*found, strict=True), style, label=label, linewidth=1, markersize=3)
        if self.reference:
            label = f"held out, {self.reference.name}"
            axes.plot(*zip(*self.reference.losses, strict=True), "s--", label=label, **FAINT)
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
