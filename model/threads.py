"""How many threads a step of the engine is computed with: what is fastest now, found by trying.

More threads halve a step on an idle machine and make it twenty times slower on a busy one, where
each of the hundred operations of a step waits for a thread that has no core (benchmarks/LOG.md).
Only the clock knows.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

N_TRIED = 3  # steps that another number of threads is tried for
N_COMPARED = 8  # newest steps it is compared with
SOONEST, LATEST = 8, 512  # steps until the next trial; twice as many after each that failed
WIDE = 32  # tokens, from where on all threads are tried first, below one
CLEARLY = 0.95  # of the time, so that chance alone seldom changes anything


@dataclass
class Choice:
    """What is known of steps of about one size."""

    option: int  # index into the numbers of threads
    times_s: deque[float] = field(default_factory=lambda: deque(maxlen=N_COMPARED))
    wait: int = SOONEST
    n_until_trial: int = N_COMPARED
    upwards: bool = False  # where the next trial looks first
    trial: int | None = None
    trial_s: list[float] = field(default_factory=list)


class ThreadTuner:
    """Chooses the number of threads for steps, apart for steps of different sizes.

    Args:
        n_most: threads at most; None: as many as torch uses.
        clock, set_threads: of the machine; a test has others.
    """

    def __init__(
        self,
        n_most: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        set_threads: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        n_most = n_most or torch.get_num_threads()
        self.options = [2**i for i in range(n_most.bit_length()) if 2**i < n_most] + [n_most]
        self._clock, self._set_threads = clock, set_threads
        self._choices: dict[int, Choice] = {}

    @contextmanager
    def step(self, n_tokens: int) -> Iterator[None]:
        """Compute what is inside, ``n_tokens`` wide, with the number of threads that is best."""
        if len(self.options) == 1:
            yield
            return
        size = n_tokens.bit_length()
        # a wide step gains by threads and loses little by them; a narrow one the other way round
        first = len(self.options) - 1 if n_tokens >= WIDE else 0
        choice = self._choices.setdefault(size, Choice(first, upwards=first == 0))
        option = choice.option if choice.trial is None else choice.trial
        self._set_threads(self.options[option])
        start = self._clock()
        try:
            yield
        finally:
            elapsed_s = self._clock() - start
            self._set_threads(self.options[-1])  # other work in this thread has what it had
            self._learn(choice, elapsed_s)

    def _learn(self, choice: Choice, elapsed_s: float) -> None:
        if choice.trial is None:
            choice.times_s.append(elapsed_s)
            choice.n_until_trial -= 1
            if choice.n_until_trial <= 0:
                choice.trial = self._next_trial(choice)
            return
        choice.trial_s.append(elapsed_s)
        usual_s = min(choice.times_s)
        is_hopeless = elapsed_s > 2 * usual_s  # and every such step costs
        if len(choice.trial_s) < N_TRIED and not is_hopeless:
            return
        if min(choice.trial_s) < CLEARLY * usual_s:
            choice.upwards = choice.trial > choice.option  # go on in this direction
            choice.option = choice.trial
            choice.times_s.clear()
            choice.wait = SOONEST
        else:
            choice.upwards = not choice.upwards
            choice.wait = min(2 * choice.wait, LATEST)
        choice.n_until_trial = max(choice.wait, N_COMPARED)
        choice.trial, choice.trial_s = None, []

    def _next_trial(self, choice: Choice) -> int:
        """Return the neighbour of a choice, or its other one at an end."""
        step = 1 if choice.upwards else -1
        beside = choice.option + step
        return beside if 0 <= beside < len(self.options) else choice.option - step
