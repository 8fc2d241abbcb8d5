"""Batches made in a thread: the same, in order, and none is lost or waited for in vain."""

import threading
from collections.abc import Iterator

import pytest

from model.prefetch import prefetch


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", (1, 2, 100))
def test_items_come_in_order_and_the_thread_ends(depth: int) -> None:
    assert list(prefetch(iter(range(50)), depth)) == list(range(50))
    assert list(prefetch(iter([]), depth)) == []
    assert threads() == 0


def test_no_more_is_made_ahead_than_asked_for() -> None:
    made: list[int] = []
    reached = threading.Event()

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            if i == 3:
                reached.set()
            yield i

    ahead = prefetch(items(), depth=2)
    assert next(ahead) == 0
    assert reached.wait(10)  # 0 is out, 1 and 2 wait, 3 is in hand
    assert len(made) == 4
    ahead.close()
    assert threads() == 0 and len(made) <= 5


def test_an_error_in_the_thread_is_raised_where_the_items_are_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("row 7 is damaged")

    ahead = prefetch(items(), depth=2)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="row 7 is damaged"):
        next(ahead)
    assert threads() == 0


def test_leaving_early_ends_the_thread() -> None:
    for _ in prefetch(iter(range(10**9)), depth=2):
        break
    assert threads() == 0
