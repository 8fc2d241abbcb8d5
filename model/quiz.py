"""Grading of short factual questions: a quiz is a file such as ``dataset/demo/quiz.jsonl``.

A line has ``question``, ``accept`` (texts of which a right answer contains one), and optionally
``history`` ([[question, answer], ...], what was said before), ``reject`` (texts that a right answer
does not contain: the answers to other questions, so that a list of everything is wrong) and
``relation`` (by which the score is grouped).
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .generation import Answer, Engine
from .prompts import Message, fit_messages, prompt_limit
from .sampling import SamplingOptions

if TYPE_CHECKING:
    from .checkpoint import Loaded
    from .runtime import Runtime

MAX_ANSWER_TOKENS = 64
BATCH = 16  # questions answered together
QuizItem = dict[str, Any]
ANY_RELATION = "other"


@dataclass
class QuizResult:
    """How many questions were answered rightly, in all and by relation, and the wrong answers."""

    n_right: int = 0
    n_asked: int = 0
    by_relation: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (right, asked)
    wrong: list[tuple[QuizItem, str]] = field(default_factory=list)  # (item, what was answered)

    @property
    def accuracy(self) -> float:
        """Share of right answers; 0 of an empty quiz."""
        return self.n_right / self.n_asked if self.n_asked else 0.0

    def __str__(self) -> str:
        return f"quiz: {self.n_right}/{self.n_asked}"


def load_quiz(path: str | Path) -> list[QuizItem]:
    """Return the items of a quiz file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not a quiz item, named by file and line.
    """
    items = []
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}:{number}: not JSON ({error}); a quiz has one object a line"
                ) from None
            check_item(item, f"{path}:{number}")
            items.append(item)
    return items


def check_item(item: Any, place: str) -> None:
    """Raise ValueError, beginning with ``place``, if ``item`` is not a quiz item."""
    if not isinstance(item, dict):
        raise ValueError(f"{place}: a quiz item is an object, found {type(item).__name__}")
    if not isinstance(item.get("question"), str):
        raise ValueError(
            f'{place}: no text in "question" (found fields: {", ".join(item) or "none"})'
        )
    if not is_texts(item.get("accept")) or not item["accept"]:
        raise ValueError(
            f'{place}: "accept" must list at least one text, found {item.get("accept")!r}'
        )
    if not is_texts(item.get("reject", [])):
        raise ValueError(f'{place}: "reject" must be a list of texts, found {item["reject"]!r}')
    history = item.get("history", [])
    if not isinstance(history, list) or not all(
        is_texts(turn) and len(turn) == 2 for turn in history
    ):
        raise ValueError(
            f'{place}: "history" must be a list of [question, answer], found {history!r}'
        )


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text for text in value)


def conversation(item: QuizItem) -> list[Message]:
    """Return the messages to put to the model: the history, then the question."""
    turns = [text for turn in item.get("history", []) for text in turn]
    roles = ("user", "assistant")
    return [
        {"role": roles[index % 2], "content": text}
        for index, text in enumerate([*turns, item["question"]])
    ]


def is_right(item: QuizItem, answer: str) -> bool:
    """Tell whether ``answer`` contains what is accepted and nothing that is rejected."""
    if not any(contains(answer, text) for text in item["accept"]):
        return False
    return not any(contains(answer, text) for text in item.get("reject", []))


def contains(answer: str, text: str) -> bool:
    """Tell whether ``text`` is in ``answer``; Latin and digits as whole words: He is not H."""
    pattern = re.escape(text)
    if re.match(r"[A-Za-z0-9]", text):
        pattern = r"(?<![A-Za-z0-9])" + pattern
    if re.search(r"[A-Za-z0-9]$", text):
        pattern += r"(?![A-Za-z0-9])"
    return re.search(pattern, answer) is not None


def score(items: Sequence[QuizItem], answers: Iterable[str]) -> QuizResult:
    """Return the result of ``answers``, one for each item in order."""
    result = QuizResult()
    for item, answer in zip(items, answers, strict=True):
        right = is_right(item, answer)
        name = item.get("relation", ANY_RELATION)
        n_right, n_asked = result.by_relation.get(name, (0, 0))
        result.by_relation[name] = (n_right + right, n_asked + 1)
        result.n_right += right
        result.n_asked += 1
        if not right:
            result.wrong.append((item, answer))
    return result


def answer_greedily(
    loaded: "Loaded", conversations: Iterable[Sequence[Message]], max_new_tokens: int
) -> list[Answer]:
    """Return the likeliest answer to each conversation; the model is in eval mode.

    Raises:
        ValueError: a question alone is too long for the model.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    limit = prompt_limit(model.config.max_seq_len, max_new_tokens)
    prompts = (
        tokenizer.encode_chat(
            fit_messages(tokenizer, messages, limit)[0], add_generation_prompt=True
        )
        for messages in conversations
    )
    options = SamplingOptions(temperature=0, max_new_tokens=max_new_tokens)
    return Engine(model, tokenizer, max_batch=BATCH).answer_all(prompts, options)


def take_quiz(loaded: "Loaded", items: Sequence[QuizItem]) -> QuizResult:
    """Return how a model does; its mode stays as it was."""
    was_training = loaded.model.training
    loaded.model.eval()
    answers = answer_greedily(loaded, map(conversation, items), MAX_ANSWER_TOKENS)
    loaded.model.train(was_training)
    return score(items, (answer.text for answer in answers))


def load_quizzes(paths: Sequence[str]) -> dict[str, list[QuizItem]]:
    """Return the items of quiz files by the file's name, or by its path where two share one."""
    stems = [Path(path).stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else paths
    return {name: load_quiz(path) for name, path in zip(names, paths, strict=True)}


class BeforeAndAfter:
    """Quizzes taken at once, on rank 0 alone, and again when training has come to its end."""

    def __init__(
        self, loaded: "Loaded", quizzes: dict[str, list[QuizItem]], runtime: "Runtime"
    ) -> None:
        self.loaded, self.runtime = loaded, runtime
        self.quizzes = quizzes if runtime.is_main else {}
        loaded.model.to(runtime.device)
        self.before = {name: take_quiz(loaded, items) for name, items in self.quizzes.items()}
        for name, result in self.before.items():
            runtime.log(f"quiz        {name}: {score_line(result)} before training")

    def tell(self) -> None:
        """Take them again and print both results."""
        for name, items in self.quizzes.items():
            before, after = self.before[name], take_quiz(self.loaded, items)
            points = 100 * (after.accuracy - before.accuracy)
            self.runtime.log(
                f"quiz        {name}: {score_line(before)} before, {score_line(after)} after "
                f"({points:+.1f} points)"
            )


def score_line(result: QuizResult) -> str:
    """Return right, asked and their share for people."""
    return f"{result.n_right}/{result.n_asked} ({100 * result.accuracy:.1f} %)"
