"""The record of a run: whole lines, valid JSON, cut back on resume, drawn."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from tiny_runs import full_disk

from model.metrics import REFERENCES, Reference, RunLog, WandbLog


def lines(log: RunLog) -> list[str]:
    return log.path.read_text("utf-8").split("\n")[:-1]  # U+2028 ends no line


def make_log(folder: Path, steps: tuple[int, ...] = ()) -> RunLog:
    log = RunLog(folder / "logs" / "pretrain_64")
    log.start({"epochs": 1.0, "data_path": "数据.csv"}, lambda record: True)
    for step in steps:
        log.write({"step": step, "loss": step / 10, "tokens": 100 * step, "sample": "长江\u2028"})
    return log


def test_a_record_is_one_line_of_json_at_once(tmp_path: Path) -> None:
    log = make_log(tmp_path, (1, 2))
    found = [json.loads(line) for line in lines(log)]
    assert [record["step"] for record in found] == [1, 2] and found == log.records()
    assert found[0]["sample"] == "长江\u2028" and "长江" in log.path.read_text("utf-8")
    assert json.loads((log.folder / "config.json").read_text("utf-8"))["data_path"] == "数据.csv"


def test_a_start_keeps_only_what_it_is_told_to(tmp_path: Path) -> None:
    make_log(tmp_path, (5, 10, 15))
    log = RunLog(tmp_path / "logs" / "pretrain_64")
    log.start({}, lambda record: record["step"] <= 10)
    log.write({"step": 11})
    assert [record["step"] for record in log.records()] == [5, 10, 11]
    log.start({}, lambda record: False)
    assert lines(log) == []


@pytest.mark.parametrize(
    "torn", ('{"step": 3, "lo', "\0\0\0\0", "[3]", '{"step": "3"}', "\udcff", "[" * 100_000)
)
def test_a_line_torn_by_a_kill_is_left_out(tmp_path: Path, torn: str) -> None:
    log = make_log(tmp_path, (1, 2))
    with open(log.path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(torn)
    assert [record["step"] for record in log.records()] == [1, 2]
    log.start({}, lambda record: True)
    log.write({"step": 3})
    assert [json.loads(line)["step"] for line in lines(log)] == [1, 2, 3]


def test_no_nan_gets_into_the_json(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.write({"step": 1, "val_loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-3})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(lines(log)[0], parse_constant=refuse)
    assert found == {"step": 1, "val_loss": None, "grad_norm": None, "lr": 1e-3}


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    log = make_log(tmp_path, (1,))
    room = log.path.stat().st_size + 10
    with full_disk(room), pytest.raises(OSError):
        log.write({"step": 2, "sample": "long" * 100})
    log.write({"step": 3})
    assert [json.loads(line)["step"] for line in lines(log)] == [1, 3]


def test_the_curve_shows_training_and_validation(tmp_path: Path) -> None:
    def has_orange() -> bool:  # the second colour of the cycle, (255, 127, 14)
        r, g, b = (imread(log.draw())[..., i] for i in range(3))
        return bool(((r > 0.95) & (abs(g - 0.5) < 0.05) & (b < 0.1)).any())

    log = make_log(tmp_path, (1, 2, 3))
    assert not has_orange()
    log.write({"step": 3, "tokens": 300, "val_loss": 4.0})
    log.write({"step": 4, "tokens": 400, "loss": None})
    assert has_orange()
    names = sorted(path.name for path in log.folder.iterdir())
    assert names == ["config.json", "curve.png", "metrics.jsonl"]


def test_a_curve_of_nothing_is_drawn_too(tmp_path: Path) -> None:
    assert make_log(tmp_path).draw().read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_wandb_gets_the_numbers_and_a_resumed_run_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client, which writes its files here and sends nothing."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    warnings: list[str] = []
    ids = []
    for resumed in (False, True, False):
        settings = {"epochs": 1.0}
        log = WandbLog(tmp_path, "P", "run", settings, resumed=resumed, warn=warnings.append)
        log.write({"step": 3, "val_loss": 0.1234, "sample": "长江"})
        log.close(0)
        ids.append((tmp_path / "wandb_id").read_text("utf-8"))
    assert ids[0] == ids[1] != ids[2] and not warnings
    # a folder's name has the second it was made in, so two of one id may be one
    written = [path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert written
    data = b"".join(written)
    assert b"val_loss" in data and b"0.1234" in data and "长江".encode() in data


def test_wandb_that_is_missing_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now fails
    warnings: list[str] = []
    log = WandbLog(tmp_path, "P", "run", {}, resumed=False, warn=warnings.append)
    log.write({"step": 1, "loss": 1.0})
    log.close(0)
    assert len(warnings) == 1 and "wandb is left out, the run goes on (" in warnings[0]


def test_a_reference_is_read_between_its_validations(tmp_path: Path) -> None:
    log = make_log(tmp_path, (1, 2))
    tokens, losses = [100, 300, 900], [6.0, 5.0, 4.4]
    for step, (place, loss) in enumerate(zip(tokens, losses, strict=True), start=3):
        log.write({"step": step, "tokens": place, "val_loss": loss})
    for run in (log.folder, log.path):
        reference = Reference(str(run))
        assert reference.name == log.folder.name
        for place in (100, 150, 300, 301, 899, 900):
            expected = np.interp(place, tokens, losses)
            assert reference.loss_at(place) == pytest.approx(expected, abs=1e-9)
        assert reference.loss_at(99) is None and reference.loss_at(901) is None


def test_a_reference_is_drawn_in_gray(tmp_path: Path) -> None:
    def n_gray_pixels(log: RunLog) -> int:
        r, g, b = (imread(log.draw())[..., i] for i in range(3))
        return int(((abs(r - 0.5) < 0.02) & (abs(r - g) < 0.01) & (abs(g - b) < 0.01)).sum())

    other = make_log(tmp_path / "other", (1, 2, 3))
    for step in range(4, 14):
        other.write({"step": step, "tokens": 100 * step, "val_loss": 20.0 - step})
    log = make_log(tmp_path, (1, 2, 3))
    alone = n_gray_pixels(log)  # the rims of letters
    log.reference = Reference(str(other.folder))
    assert n_gray_pixels(log) > alone + 150


def test_a_reference_that_cannot_serve_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-run.*pretrain_512"):
        Reference("no-such-run")
    log = make_log(tmp_path, (1, 2))
    with pytest.raises(ValueError, match="holds no val_loss"):
        Reference(str(log.folder))


@pytest.mark.parametrize("path", sorted(REFERENCES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_shipped_references_fall(path: Path) -> None:
    losses = [loss for _, loss in Reference(path.stem).losses]
    assert len(losses) >= 4
    assert all(b < 1.05 * a for a, b in itertools.pairwise(losses))  # few documents: some noise
