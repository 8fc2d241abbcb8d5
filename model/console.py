"""How a run shows itself: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable
from typing import Any


def human(number: float, unit: str = "") -> str:
    """Return a number with three digits and K, M, G, T."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= 0.9995 * factor:  # what three digits round up to it
            return f"{number / factor:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".strip()


def clock(seconds: float) -> str:
    """Return a duration as 1h02m, 3m05s or 12s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def progress_display(
    log: Callable[[str], None], step: int, n_steps: int, is_main: bool = True
) -> "TerminalBar | PlainLines":
    """Return the display that fits where standard error goes; it begins at update ``step``.

    Only one of several ranks, ``is_main``, has a bar; the others' ``log`` says nothing.
    """
    if sys.stderr.isatty() and is_main:
        return TerminalBar(step, n_steps)
    return PlainLines(log, n_steps)


def line(record: dict[str, Any]) -> str:
    """Return a log record for people."""
    parts = [f"epoch {record['epoch']:.2f}", f"{human(record['tokens'])} tokens"]
    for key, label, form in (
        ("loss", "loss", ".4f"),
        ("val_loss", "val_loss", ".4f"),
        ("reference_loss", "reference", ".4f"),
        ("val_bpb", "bits/byte", ".4f"),
        ("accuracy", "accuracy", ".3f"),
        ("margin", "margin", "+.3f"),
        ("val_accuracy", "val_accuracy", ".3f"),
        ("val_margin", "val_margin", "+.3f"),
        ("lr", "lr", ".2e"),
        ("tokens_per_s", "tokens/s", ",.0f"),
    ):
        if record.get(key) is not None:
            parts.append(f"{label} {record[key]:{form}}")
    if record.get("mfu") is not None:
        parts.append(f"MFU {100 * record['mfu']:.0f} %")
    if "expert_load_min" in record:
        parts.append(f"experts {record['expert_load_min']:.2f}-{record['expert_load_max']:.2f}")
    if record.get("gpu_memory_gb") is not None:
        parts.append(f"{record['gpu_memory_gb']:.1f} GB")
    if record.get("skipped"):
        parts.append(f"skipped {record['skipped']}")
    return "  ".join(parts)


class PlainLines:
    """Progress as lines of text."""

    def __init__(self, log: Callable[[str], None], n_steps: int) -> None:
        self.log, self.n_steps = log, n_steps

    def update(self) -> None:
        """Nothing moves between lines."""

    def show(self, record: dict[str, Any], left_s: float | None) -> None:
        """Print a record, with the time that is left where it is known."""
        text = f"[{record['step']:>{len(str(self.n_steps))}}/{self.n_steps}] {line(record)}"
        self.log(text if left_s is None else f"{text}  left {clock(left_s)}")
        if "sample" in record:
            self.log(f"  sample: {record['sample']!r}")

    def close(self) -> None:
        """Nothing to tidy up."""


class TerminalBar:
    """Progress as a bar; validations as lines above it."""

    def __init__(self, step: int, n_steps: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=n_steps,
            initial=step,
            dynamic_ncols=True,
            # its own guess of the time left knows nothing of validations and saves
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )

    def update(self) -> None:
        """Move on by one update."""
        self.bar.update()

    def show(self, record: dict[str, Any], left_s: float | None) -> None:
        """Show the numbers beside the bar; keep a validation as a line."""
        if "val_loss" in record:
            self.bar.write(line(record))
            if "sample" in record:
                self.bar.write(f"  sample: {record['sample']!r}")
        else:
            left = "" if left_s is None else f"left {clock(left_s)}  "
            self.bar.set_postfix_str(left + line(record))

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()
