"""How far a run has come, and how long it still takes."""

import pytest

from model.course import Schedule, TimeLeft, settle_batch_size
from model.flags import parse_training_args, training_parser


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


@pytest.mark.parametrize("n_ranks", (1, 2))
@pytest.mark.parametrize(
    ("flags", "n_rows", "rows_an_update"),
    (
        ("", 4096, 16),
        ("", 1024, 8),
        ("--epochs 2", 1024, 16),
        ("--epochs 2", 300, 4),
        ("", 3, 2),  # 1,024 positions
        ("--zero_stage 1", 300, 16),
        ("--batch_size 16", 300, 16),  # was asked for
        ("--max_steps 30", 300, 16),  # the number of updates was
        ("--recipe v1 --accumulation_steps 1", 300, 64),
    ),
)
def test_little_data_makes_small_updates(
    flags: str, n_rows: int, rows_an_update: int, n_ranks: int
) -> None:
    parser = training_parser("", data_path="a.csv", v1={}, min_updates=128)
    args = parse_training_args(parser, flags.split())
    usual = args.batch_size
    assert settle_batch_size(args, n_rows, 512, n_ranks) == (args.batch_size < usual)
    is_settled = not flags or flags.startswith("--epochs")
    if is_settled:
        schedule = Schedule(args, n_rows, n_ranks)
        assert schedule.n_steps >= 128 or args.batch_size * n_ranks == 2
    if n_ranks == 1 or not is_settled:
        assert args.batch_size == rows_an_update
