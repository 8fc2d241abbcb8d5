"""Repetition: distinct n-grams counted another way, loops against a search of every substring."""

from itertools import product

import pytest

from model.repetition import distinct, longest_loop, units


def longest_loop_by_trying(text: str) -> int:
    """Try every substring and every period."""
    return max(
        (
            stop - start
            for start in range(len(text))
            for stop in range(start + 3, len(text) + 1)
            for period in range(1, (stop - start) // 3 + 1)
            if all(text[i] == text[i - period] for i in range(start + period, stop))
        ),
        default=0,
    )


def test_a_unit_is_a_latin_word_or_one_character() -> None:
    assert units("MiniMind v1，你好 100%") == ["MiniMind", "v1", "，", "你", "好", "100", "%"]


def test_distinct_counts_over_all_texts_together() -> None:
    assert distinct(["你好吗"], 1) == 1
    assert distinct(["你好", "你好"], 1) == 1 / 2
    assert distinct(["去去去去"], 2) == 1 / 3
    assert distinct(["a b a b", "b a"], 2) == 2 / 4  # ab ba ab, ba
    assert distinct(["好", ""], 2) == 0  # there is no pair
    assert distinct(["好好", "好好"], 2) == 1 / 2  # no pair reaches over the border


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0),
        ("爸爸", 0),
        ("去去去", 3),
        ("abcabcabc", 9),
        ("xabcabcabcabyy", 11),
        ("abcabcab", 0),
        ("1000 1000 1000 10", 17),  # the last time is cut
        ("哈哈哈，他说他说他说。", 6),
    ],
)
def test_a_loop_is_three_times_the_same(text: str, length: int) -> None:
    assert longest_loop(text) == length


def test_loops_are_those_of_a_search_of_every_substring() -> None:
    for letters in product("ab", repeat=9):
        text = "".join(letters)
        assert longest_loop(text) == longest_loop_by_trying(text), text
