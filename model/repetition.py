"""How much answers repeat themselves: distinct n-grams and loops."""

import re
from collections.abc import Iterable

UNIT = re.compile(r"[A-Za-z0-9]+|\S")  # a Latin word or number, or one character of anything else
LOOP_TIMES = 3  # so often in a row makes a loop: 爸爸 and "very very" are none


def units(text: str) -> list[str]:
    """Return what n-grams are made of, the same for every tokenizer."""
    return UNIT.findall(text)


def distinct(texts: Iterable[str], n: int) -> float:
    """Return the share of different n-grams among all of ``texts``: 1 where none comes twice.

    distinct-n of Li et al. (arXiv:1510.03055, section 5.3), over all texts together, so that one
    answer to every question shows too. 0 where no text has n units.
    """
    seen: set[tuple[str, ...]] = set()
    n_all = 0
    for text in texts:
        parts = units(text)
        grams = [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]
        seen.update(grams)
        n_all += len(grams)
    return len(seen) / n_all if n_all else 0.0


def longest_loop(text: str) -> int:
    """Return the characters of the longest stretch that is one piece ``LOOP_TIMES`` or more times.

    The last time may be cut: 去去去 has 3, abcabcabca has 10, abcabcab has none (0).
    """
    longest = 0
    period = 1
    while LOOP_TIMES * period <= len(text):
        n_same = 0  # characters up to here that equal the one a period before
        for i in range(period, len(text)):
            n_same = n_same + 1 if text[i] == text[i - period] else 0
            if n_same >= (LOOP_TIMES - 1) * period:
                longest = max(longest, n_same + period)
        period += 1
    return longest
