"""How a run shows itself on a terminal and elsewhere."""

import io
import sys

import pytest

from model.console import PlainLines, TerminalBar, clock, human, line, progress_display

TRAINING = {"step": 5, "epoch": 0.5, "tokens": 12_345, "loss": 3.25, "lr": 1e-3,
            "tokens_per_s": 2000.0, "mfu": 0.31, "skipped": 0}  # fmt: skip
VALIDATION = {"step": 5, "epoch": 0.5, "tokens": 12_345, "val_loss": 3.0, "val_bpb": 1.5,
              "sample": "长江\n"}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_says_what_matters() -> None:
    assert line(TRAINING) == (
        "epoch 0.50  12.3 K tokens  loss 3.2500  lr 1.00e-03  tokens/s 2,000  MFU 31 %"
    )
    assert line(VALIDATION) == "epoch 0.50  12.3 K tokens  val_loss 3.0000  bits/byte 1.5000"
    assert "loss" not in line(TRAINING | {"loss": None}) and "skipped 2" in line(
        TRAINING | {"skipped": 2}
    )


def test_plain_lines_count_and_tell_the_time_left() -> None:
    lines: list[str] = []
    shown = PlainLines(lines.append, 100)
    shown.update()
    shown.show(TRAINING, 61.0)
    shown.show(VALIDATION, 60.0)
    shown.show(VALIDATION | {"step": 3}, None)  # before the first update: no speed yet
    shown.close()
    assert lines[0].startswith("[  5/100] epoch 0.50") and lines[0].endswith("  left 1m01s")
    assert lines[2] == "  sample: '长江\\n'" and "left" not in lines[3]


def test_a_terminal_has_a_bar_and_keeps_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = progress_display(print, 3, 10)
    assert isinstance(shown, TerminalBar)
    for record in (TRAINING, VALIDATION):
        shown.update()
        shown.show(record, 61.0)
    shown.close()
    assert "5/10" in terminal.getvalue() and "left 1m01s" in terminal.getvalue()
    assert "loss 3.2500" in terminal.getvalue()


def test_elsewhere_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress_display(print, 0, 10), PlainLines)


@pytest.mark.parametrize(
    ("number", "text"),
    ((0, "0"), (7, "7"), (999, "999"), (1000, "1 K"), (999_999, "1 M"), (26_878_464, "26.9 M"),
     (0.5, "0.5"), (1.5e12, "1.5 T"), (-2000, "-2 K")),
)  # fmt: skip
def test_numbers_have_three_digits(number: float, text: str) -> None:
    assert human(number) == text
    assert human(2048, "B") == "2.05 KB" and human(3, "B") == "3 B"


def test_times_are_short() -> None:
    assert [clock(s) for s in (0.4, 59.4, 59.6, 61, 3599.6, 3660, 90_000)] == [
        "0s", "59s", "1m00s", "1m01s", "1h00m", "1h01m", "25h00m",
    ]  # fmt: skip
