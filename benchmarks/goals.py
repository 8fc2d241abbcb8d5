"""How benchmarks print their figures: medians with ranges, and what became of the goals."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Return the median and, in brackets, the range."""
    if len(values) == 1:
        return format(values[0], form)
    low, high = format(min(values), form), format(max(values), form)
    return f"{format(statistics.median(values), form)} ({low} to {high})"


def verdict(
    name: str,
    values: Sequence[float],
    must: float,
    aim: float,
    form: str = ".2f",
    *,
    at_least: bool = True,
) -> str:
    """Return a line that says whether the median of ``values`` reaches what it must, and the aim.

    Args:
        at_least: larger is better; if false, smaller.
    """
    found = statistics.median(values)
    better = (lambda limit: found >= limit) if at_least else (lambda limit: found <= limit)
    reached = "AIM    " if better(aim) else "reached" if better(must) else "MISSED "
    sign = ">=" if at_least else "<="
    limits = f"must {sign} {format(must, form)}, aim {sign} {format(aim, form)}"
    return f"{reached}  {name}: {spread(values, form)} ({limits})"
