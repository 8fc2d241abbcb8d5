"""The course of a run: how many updates of how many rows, and how far it has come."""

import argparse
import math
from collections import Counter
from dataclasses import dataclass, field

from .optim import learning_rate_at

WARMUP_SHARE, MAX_WARMUP = 0.02, 200
LEAST_UPDATE = 1024  # positions; below, the optimizer takes longer than the rest


@dataclass
class Progress:
    """Where a run is: all that is counted, saved with every state.

    Attributes:
        step: updates made, skipped ones included.
        samples: rows seen, the place in the data.
        tokens: inputs seen, padding not counted.
        elapsed_s: seconds in the loop over all starts.
        skipped: updates left out because loss or gradient was not finite.
        loss, units, metrics, expert_load: sums since the last log line.
        validation_due: a stop came before this update's validation.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss: float = 0.0
    units: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    expert_load: list[float] = field(default_factory=list)
    validation_due: bool = False


class Schedule:
    """What the flags ask of a run on data of ``n_rows`` rows, with so many ranks.

    Attributes:
        update_rows: rows of an update, over all ranks.
        n_samples: rows of the whole run; an epoch is ``n_rows`` of them.
        n_steps: updates of the whole run.
        warmup: updates of warm-up.
    """

    def __init__(self, args: argparse.Namespace, n_rows: int, world_size: int) -> None:
        self.args, self.n_rows = args, n_rows
        self.update_rows = args.batch_size * args.accumulation_steps * world_size
        if args.max_steps:
            self.n_samples = args.max_steps * self.update_rows
        else:
            self.n_samples = max(1, round(args.epochs * n_rows))
        self.n_steps = math.ceil(self.n_samples / self.update_rows)
        self.warmup = args.warmup_iters
        if self.warmup is None:
            self.warmup = min(MAX_WARMUP, math.ceil(WARMUP_SHARE * self.n_steps))

    @property
    def n_epochs(self) -> int:
        """Passes begun over the data in the whole run."""
        return math.ceil(self.n_samples / self.n_rows)

    def go_on_from(self, progress: Progress) -> None:
        """Count the updates from where a run is: those before may have had another size."""
        if self.args.max_steps:
            left = max(0, self.args.max_steps - progress.step)
            self.n_samples = progress.samples + left * self.update_rows
        left = max(0, self.n_samples - progress.samples)
        self.n_steps = progress.step + math.ceil(left / self.update_rows)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update after ``step`` others."""
        args = self.args
        return learning_rate_at(step, self.n_steps, args.learning_rate, args.schedule, self.warmup)


def settle_batch_size(
    args: argparse.Namespace, n_rows: int, row_positions: int, world_size: int
) -> bool:
    """Take smaller updates where the recipe's own would be fewer than ``min_updates``, and return
    whether that was so: on little data their number counts for more than their size, down to
    ``LEAST_UPDATE`` (benchmarks/LOG.md).
    """
    is_open = "batch_size" in args.from_recipe and args.recipe == "best" and not args.max_steps
    if args.min_updates is None or not is_open or args.zero_stage > 0:
        return False
    ranks = args.accumulation_steps * world_size
    most = args.epochs * n_rows / (args.min_updates * ranks)
    least = math.ceil(LEAST_UPDATE / (row_positions * ranks))
    usual, args.batch_size = args.batch_size, min(args.batch_size, max(1, least, int(most)))
    return args.batch_size < usual


class TimeLeft:
    """How long a run still takes, from what its updates, validations and saves have taken.

    Args:
        pauses: how many updates lie between two of each kind of pause; the last update has all.
    """

    def __init__(self, n_steps: int, pauses: dict[str, int]) -> None:
        self.n_steps, self.pauses = n_steps, pauses
        self.first: dict[str, float] = {}
        self.count, self.total = Counter(), Counter()  # of those after the first

    def add(self, kind: str, seconds: float) -> None:
        """Count an ``update`` or a pause."""
        if kind not in self.first:
            self.first[kind] = seconds
            return
        self.count[kind] += 1
        self.total[kind] += seconds

    def mean(self, kind: str) -> float | None:
        """Return the seconds of a kind; the first, which has much to set up, only if alone."""
        if self.count[kind]:
            return self.total[kind] / self.count[kind]
        return self.first.get(kind)

    def seconds(self, step: int, guesses: dict[str, float]) -> float | None:
        """Return what is left after ``step`` updates; None before the first.

        Args:
            guesses: seconds of a pause that has not come yet.
        """
        update_s = self.mean("update")
        if update_s is None:
            return None
        if step >= self.n_steps:
            return 0.0
        left = (self.n_steps - step) * update_s
        for kind, interval in self.pauses.items():
            n_left = math.ceil(self.n_steps / interval) - step // interval
            pause_s = self.mean(kind)
            left += max(0, n_left) * (guesses.get(kind, 0.0) if pause_s is None else pause_s)
        return left
