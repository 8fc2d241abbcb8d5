"""Training states: whole or absent, whatever happens to the disk or the process."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import full_disk

from model.states import States, atomic_write


def make_states(folder: Path, keep_last: int = 2) -> tuple[States, list[str]]:
    warnings: list[str] = []
    return States(folder / "run", keep_last, warnings.append), warnings


def state(step: int) -> dict:
    """A state of 40 KB that tells its step."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]}
    model = {"w": torch.full((10_000,), float(step))}
    return {"model": model, "optimizer": optimizer, "progress": {"step": step, "loss": None}}


def step_of(states: States) -> int | None:
    found = states.load_newest()
    if found is None:
        return None
    assert torch.equal(found["model"]["w"], torch.full((10_000,), float(found["progress"]["step"])))
    return found["progress"]["step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    states, warnings = make_states(tmp_path)
    assert states.steps() == [] and states.load_newest() is None
    states.save(5, state(5))
    found = States(tmp_path / "run", 2, warnings.append).load_newest()
    assert torch.equal(found["model"]["w"], state(5)["model"]["w"])
    assert found["optimizer"] == state(5)["optimizer"] and found["progress"]["loss"] is None
    assert not warnings


@pytest.mark.parametrize("keep_last", (1, 2, 3))
def test_so_many_stay_as_are_asked_for(tmp_path: Path, keep_last: int) -> None:
    states, _ = make_states(tmp_path, keep_last)
    for step in (2, 9, 10, 100):  # by number, not by name
        states.save(step, state(step))
    assert states.steps() == [100, 10, 9][:keep_last]
    assert step_of(states) == 100


def truncate(folder: Path) -> None:
    path = folder / "state.pt"
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.pt").write_bytes(content)


DAMAGES = {
    "truncated": truncate,
    "empty": lambda folder: (folder / "state.pt").write_bytes(b""),
    "one bit": flip_a_bit,
    "no state": lambda folder: (folder / "state.pt").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"step": 3, "by'),
    "another manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
    "not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"),
    "of another step": lambda folder: shutil.copytree(
        folder.with_name("step_2"), folder, dirs_exist_ok=True
    ),
    "empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    states, warnings = make_states(tmp_path)
    for step in (2, 3):
        states.save(step, state(step))
    DAMAGES[damage](states.folder / "step_3")
    assert step_of(states) == 2
    assert len(warnings) == 1 and "step_3 is damaged" in warnings[0]
    assert "falling back" in warnings[0]


def test_where_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    states, warnings = make_states(tmp_path)
    for step in (2, 3):
        states.save(step, state(step))
        truncate(states.folder / f"step_{step}")
    assert states.load_newest() is None and len(warnings) == 2


def test_a_damaged_later_state_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    states, _ = make_states(tmp_path, keep_last=1)
    states.save(10, state(10))
    shutil.copytree(states.folder / "step_10", states.folder / "step_20")
    truncate(states.folder / "step_20")
    assert step_of(states) == 10
    states.save(11, state(11))  # the run went on from 10
    assert states.steps() == [11] and step_of(states) == 11


def test_damaged_states_do_not_count_among_those_that_stay(tmp_path: Path) -> None:
    states, _ = make_states(tmp_path, keep_last=2)
    for step in (4, 5):
        states.save(step, state(step))
    flip_a_bit(states.folder / "step_5")
    assert step_of(states) == 4
    states.save(6, state(6))
    assert states.steps() == [6, 4]


def test_a_state_is_saved_over_a_damaged_one_of_its_step(tmp_path: Path) -> None:
    states, _ = make_states(tmp_path)
    states.save(4, state(4))
    flip_a_bit(states.folder / "step_4")
    states.save(4, state(4))
    assert step_of(states) == 4


def test_leftovers_of_killed_saves_are_no_states_and_go(tmp_path: Path) -> None:
    states, warnings = make_states(tmp_path)
    states.save(1, state(1))
    leftover = states.folder / ".step_2.12345.tmp"
    shutil.copytree(states.folder / "step_1", leftover)
    (states.folder / "step_x").mkdir()  # of the user's, not ours
    assert step_of(states) == 1 and not warnings
    states.save(3, state(3))
    assert names(states.folder) == ["step_1", "step_3", "step_x"]


def test_a_full_disk_costs_no_earlier_state(tmp_path: Path) -> None:
    states, _ = make_states(tmp_path)
    states.save(1, state(1))
    with full_disk(20_000), pytest.raises(OSError, match="step_2.*could not be written"):
        states.save(2, state(2))
    assert names(states.folder) == ["step_1"] and step_of(states) == 1
    states.save(2, state(2))
    assert step_of(states) == 2


def test_a_manifest_knows_the_file_as_others_would(tmp_path: Path) -> None:
    import hashlib

    states, _ = make_states(tmp_path)
    folder = states.save(7, state(7))
    content = (folder / "state.pt").read_bytes()
    expected = {"step": 7, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert json.loads((folder / "manifest.json").read_text()) == expected


def test_a_state_holds_no_code(tmp_path: Path) -> None:
    """The file is hashed, but a hash beside it is no signature."""

    class Evil:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("run", "evil").touch, ())

    states, _ = make_states(tmp_path)
    states.save(1, {"model": Evil()})
    with pytest.raises(Exception, match="[Ww]eights"):
        states.load_newest()
    assert not (tmp_path / "run" / "evil").exists()


def test_an_atomic_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a[1].json"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyError
    assert path.read_text() == "old" and names(path.parent) == ["a[1].json"]
    (path.parent / ".a[1].json.999.tmp").write_text("of a killed process")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and names(path.parent) == ["a[1].json"]
