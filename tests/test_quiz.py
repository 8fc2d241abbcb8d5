"""Grading: what counts as a right answer, and what a damaged quiz file is told."""

import json
from pathlib import Path

import pytest

from model.quiz import conversation, is_right, load_quiz, load_quizzes, score

ITEM = {
    "question": "氦的元素符号是什么？",
    "accept": ["He"],
    "reject": ["H", "Ne"],
    "relation": "symbol",
}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("He。", True),
        ("氦的元素符号是He。", True),
        ("氦写作He，不是氢。", True),
        ("H。", False),
        ("Hes", False),  # inside another word
        ("CHe", False),
        ("氦的元素符号是Ne。", False),
        ("H、He、Ne", False),  # a list of everything
        ("he", False),
        ("", False),
    ],
)
def test_an_answer_is_right_if_it_says_what_is_accepted_and_nothing_else(
    answer: str, right: bool
) -> None:
    assert is_right(ITEM, answer) is right


def test_digits_are_compared_as_whole_numbers() -> None:
    item = {"question": "氢是几号元素？", "accept": ["1"], "reject": ["11", "2"]}
    assert is_right(item, "氢是1号元素。")
    assert not is_right(item, "氢是11号元素。")
    assert not is_right(item, "氢是12号元素。")


def test_any_accepted_text_will_do_and_patterns_mean_themselves() -> None:
    item = {"question": "谁发明了万维网？", "accept": ["伯纳斯-李", "Berners-Lee (Tim)"]}
    assert is_right(item, "是Berners-Lee (Tim)。")
    assert is_right(item, "伯纳斯-李。")
    assert not is_right(item, "Berners-Lee Tim")


def test_the_history_is_part_of_the_question_and_the_score_is_grouped() -> None:
    items = [
        ITEM,
        ITEM | {"history": [["氢呢？", "H。"]], "question": "那氦呢？"},
        ITEM | {"relation": "x"},
    ]
    assert [m["role"] for m in conversation(items[1])] == ["user", "assistant", "user"]
    assert [m["content"] for m in conversation(items[1])] == ["氢呢？", "H。", "那氦呢？"]
    result = score(items, ["Ne。", "He。", "Ne。"])
    assert str(result) == "quiz: 1/3"
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.by_relation == {"symbol": (1, 2), "x": (0, 1)}
    assert [text for _, text in result.wrong] == ["Ne。", "Ne。"]


def test_a_missing_answer_is_no_silent_loss() -> None:
    with pytest.raises(ValueError):
        score([ITEM, ITEM], ["He。"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "found list"),
        ('{"accept": ["He"]}', 'no text in "question" (found fields: accept)'),
        (json.dumps(ITEM | {"accept": "He"}), "\"accept\" must list at least one text, found 'He'"),
        (json.dumps(ITEM | {"accept": []}), '"accept" must list at least one text'),
        (json.dumps(ITEM | {"reject": [1]}), '"reject" must be a list of texts, found [1]'),
        (json.dumps(ITEM | {"history": ["a"]}), '"history" must be a list of [question, answer]'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "quiz.jsonl"
    path.write_text(json.dumps(ITEM) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_quiz(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


def test_an_empty_quiz_scores_nothing(tmp_path: Path) -> None:
    (tmp_path / "quiz.jsonl").write_text("")
    assert score(load_quiz(tmp_path / "quiz.jsonl"), []).accuracy == 0.0


def test_two_quizzes_of_one_name_stay_two(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "quiz.jsonl" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps(ITEM | {"question": path.parent.name}), "utf-8")
    loaded = load_quizzes([str(path) for path in paths])
    assert [items[0]["question"] for items in loaded.values()] == ["a", "b"]
    assert list(load_quizzes([str(paths[0])])) == ["quiz"]
