"""How far a run has come, and how long it still takes."""

import pytest

from model.course import TimeLeft


@pytest.mark.parametrize("n_steps", (100, 95))
def test_the_time_left_is_what_then_passes(n_steps: int) -> None:
    """Played through: updates of 2 s, validations of 30 s, saves of 5 s; the first update longer,
    as where it is compiled.
    """
    updates = [40.0, *[2.0] * (n_steps - 1)]
    pauses = {"validation": 20, "save": 10}
    cost = {"validation": 30.0, "save": 5.0}

    def is_due(kind: str, step: int) -> bool:
        return step % pauses[kind] == 0 or step == n_steps

    left = TimeLeft(n_steps, pauses)
    assert left.seconds(0, {}) is None, "nothing is known yet"
    for step in range(1, n_steps + 1):
        left.add("update", updates[step - 1])
        for kind in pauses:
            if is_due(kind, step):
                left.add(kind, cost[kind])
        if step in (3, 40, 60, 99, n_steps):
            to_come = sum(updates[step:])
            to_come += sum(
                cost[kind] * is_due(kind, later)
                for kind in pauses
                for later in range(step + 1, n_steps + 1)
            )
            assert left.seconds(step, cost) == pytest.approx(to_come), step


def test_what_has_not_come_yet_is_guessed() -> None:
    left = TimeLeft(10, {"validation": 5})
    left.add("update", 1.0)
    assert left.seconds(1, {}) == 9
    assert left.seconds(1, {"validation": 100.0}) == 209
    left.add("validation", 7.0)
    assert left.seconds(6, {"validation": 100.0}) == 4 + 7
