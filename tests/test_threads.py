"""The number of threads: found by trying, on machines made up of numbers."""

import random
from collections.abc import Callable

import pytest
import torch

from model.threads import ThreadTuner


class Machine:
    """A clock and threads: a step takes what ``cost`` says of the number of threads."""

    def __init__(self, cost: Callable[[int], float], n_most: int) -> None:
        self.cost, self.now_s, self.n_threads = cost, 0.0, n_most
        self.used: list[int] = []
        self.tuner = ThreadTuner(n_most, lambda: self.now_s, self.set_threads)

    def set_threads(self, n: int) -> None:
        self.n_threads = n

    def run(self, n_steps: int, n_tokens: int = 1) -> float:
        """Return the seconds that steps took."""
        start_s = self.now_s
        for _ in range(n_steps):
            with self.tuner.step(n_tokens):
                self.used.append(self.n_threads)
                self.now_s += self.cost(self.n_threads)
        return self.now_s - start_s


@pytest.mark.parametrize("best", [1, 2, 4, 8, 12])
def test_the_fastest_number_is_found_and_kept(best: int) -> None:
    noise = random.Random(0)
    # work that is shared out, and waiting that grows
    machine = Machine(lambda n: (best / n + n / best) * noise.uniform(1, 1.05), 12)
    machine.run(400)
    machine.used.clear()
    machine.run(1000)
    assert machine.used.count(best) > 950


def test_a_busy_machine_costs_little_more_than_the_best() -> None:
    machine = Machine(lambda n: 20.0 if n > 1 else 1.0, 2)
    machine.run(100)  # until it is found
    assert machine.run(2000) < 2000 * 1.1


def test_what_changes_is_followed() -> None:
    costs = {1: 2.0, 2: 1.0}
    machine = Machine(lambda n: costs[n], 2)
    machine.run(600)
    assert machine.used[-1] == 2
    costs[2] = 30.0  # something else runs now
    machine.run(600)
    assert machine.used[-1] == 1
    costs[2] = 1.0
    machine.run(1200)
    assert machine.used[-1] == 2


def test_steps_of_different_sizes_have_their_own() -> None:
    machine = Machine(lambda n: 1.0, 2)

    def cost(n: int) -> float:
        return 1.0 if n == (2 if machine.n_tokens >= 64 else 1) else 1.5

    machine.cost = cost
    for i in range(900):
        machine.n_tokens = (1, 100)[i % 2]
        machine.run(1, machine.n_tokens)
    machine.used.clear()
    for machine.n_tokens in (1, 100, 1, 100):
        machine.run(1, machine.n_tokens)
    assert machine.used == [1, 2, 1, 2]


def test_torch_has_its_threads_back_after_a_step() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        tuner, seen = ThreadTuner(), set()
        for _ in range(40):
            with pytest.raises(RuntimeError), tuner.step(1):
                seen.add(torch.get_num_threads())
                raise RuntimeError("in the model")
            assert torch.get_num_threads() == 4
        assert len(seen) > 1
    finally:
        torch.set_num_threads(before)


def test_one_thread_leaves_no_choice() -> None:
    machine = Machine(lambda n: 1.0, 1)
    machine.run(50)
    assert machine.tuner.options == [1] and set(machine.used) == {1}
