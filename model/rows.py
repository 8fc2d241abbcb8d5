"""Raw rows of every format people bring, as documents, conversations and preference pairs.

Values come out as they stood, spaces, quotes and backslashes included; what cannot be used is
counted.
"""

import ast
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .records import Batch, read_batches, read_records
from .tally import BadRecord, Place, Tally

FORMAT_PROBE = 1_000  # so many records without a usable one: a wrong file, not a few bad lines
MAX_RANKED = 16  # answers of one question that are paired: 120 pairs
MAX_LITERAL_CHARS = 1 << 20  # Python literals take a hundred times their size while they are parsed

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}
Note = Callable[..., None]  # counts a change of the row at hand: note(reason, detail)

ROLE_OF = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}

DOCUMENT_FORMS = (
    '{"text": …} a line (.jsonl), a column "text" (.csv), or one document a line (.txt)'
)
CONVERSATION_FORMS = (
    '"instruction"/"input"/"output"/"history", "messages" or ShareGPT "conversations" '
    "(.jsonl, .json), or columns history,q,a (.csv)"
)
PREFERENCE_FORMS = (
    '"prompt"/"chosen"/"rejected" (or "reject"), "conversations" with "chosen" and "rejected", '
    '"instruction"/"chosen"/"rejected", or "instruction" with ranked answers in "output" '
    "(.json, .jsonl)"
)


def read_documents(path: str | Path, tally: Tally) -> Iterator[str]:
    """Yield the documents of a ``.jsonl .json .csv .txt`` file, also packed as ``.xz`` or ``.gz``.

    Plain text has one document a line.

    Raises:
        FileNotFoundError, ValueError: no such file, or a file of another format.
    """
    yield from _read(path, tally, documents_of, DOCUMENT_FORMS)


def read_conversations(path: str | Path, tally: Tally) -> Iterator[list[Message]]:
    """Yield conversations: perhaps a system text, then question and answer in turn, an answer last.

    An ``instruction`` beside a history and a question is a system text; otherwise it stands before
    ``input``, with a line break.

    Raises:
        FileNotFoundError, ValueError: no such file, or a file of another format.
    """
    yield from _read(path, tally, conversations_of, CONVERSATION_FORMS)


def read_preferences(path: str | Path, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield ``{"prompt", "chosen", "rejected"}``; a prompt of several messages is their list.

    Raises:
        FileNotFoundError, ValueError: no such file, or a file of another format.
    """
    yield from _read(path, tally, preferences_of, PREFERENCE_FORMS)


def holds_documents(path: str | Path) -> bool:
    """Tell, by its first good record, whether a file holds documents rather than conversations."""
    for batch in read_batches(path):
        for _, record in read_records(batch, Tally()):
            return batch.kind == "text" or (isinstance(record, dict) and "text" in record)
    return True


class FormatCheck:
    """Tells a few bad records from a file of another format, from the tallies of its batches."""

    def __init__(self, path: str | Path, expected: str) -> None:
        self.path, self._expected = str(path), expected
        self._tally = Tally()

    def add(self, tally: Tally) -> None:
        """Take in the next batch; raise after ``FORMAT_PROBE`` records without one of use."""
        self._tally.merge(tally)
        if self._tally.read >= FORMAT_PROBE:
            self.finish()

    def finish(self) -> None:
        """Raise if there were records, and none of use."""
        if self._tally.read and not self._tally.usable:
            reasons = "; ".join(
                f"{reason}: {cases.first}" for reason, cases in self._tally.skipped.items()
            )
            raise ValueError(
                f"{self.path}: none of the first {self._tally.read:,} records can be used: "
                f"{reasons}. Expected {self._expected}"
            )


def _read(path: str | Path, tally: Tally, parse: Callable, expected: str) -> Iterator[Any]:
    check = FormatCheck(path, expected)
    for batch in read_batches(path):
        counted = Tally()
        try:
            for _, row in parse(batch, counted):
                yield row
        finally:  # also when the caller has enough
            tally.merge(counted)
        check.add(counted)
    check.finish()


def documents_of(batch: Batch, tally: Tally) -> Iterator[tuple[Place, str]]:
    """Yield the documents of one batch with their places."""
    for place, record in read_records(batch, tally):
        try:
            text = record if batch.kind == "text" else _string(_fields(record), "text")
            if text is None:
                raise _missing('"text"', record)
            text = _clean(text, _noter(place, tally))
            if not text or text.isspace():
                raise BadRecord("empty text")
        except BadRecord as bad:
            tally.skip(bad.reason, place, bad.detail)
        else:
            yield place, text


def conversations_of(batch: Batch, tally: Tally) -> Iterator[tuple[Place, list[Message]]]:
    """Yield the conversations of one batch with their places."""
    for place, record in read_records(batch, tally):
        try:
            messages = _conversation(_fields(record), _noter(place, tally))
        except BadRecord as bad:
            tally.skip(bad.reason, place, bad.detail)
        else:
            tally.forms[conversation_form(record)] += 1
            yield place, messages


def preferences_of(batch: Batch, tally: Tally) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield the preference pairs of one batch with their places; ranked answers give several."""
    for place, record in read_records(batch, tally):
        try:
            pairs = _preferences(_fields(record), _noter(place, tally))
        except BadRecord as bad:
            tally.skip(bad.reason, place, bad.detail)
            continue
        tally.forms[preference_form(record)] += 1
        tally.extra += len(pairs) - 1
        for pair in pairs:
            yield place, pair


def conversation_form(row: dict[str, Any]) -> str:
    """Return the name of the form in which a row holds a conversation."""
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "ShareGPT conversations"
    return "columns history, q, a" if "q" in row else "instruction, input, output"


def preference_form(row: dict[str, Any]) -> str:
    """Return the name of the form in which a row holds preferences."""
    if "chosen" not in row:
        return "instruction and ranked answers"
    if "conversations" in row or "messages" in row:
        return "conversations, chosen, rejected"
    rejected = "reject" if "reject" in row and "rejected" not in row else "rejected"
    if "prompt" not in row and isinstance(row["chosen"], list):
        return f"whole conversations in chosen, {rejected}"
    return f"{'prompt' if 'prompt' in row else 'instruction'}, chosen, {rejected}"


def _noter(place: Place, tally: Tally) -> Note:
    return lambda reason, detail="": tally.change(reason, place, detail)


def _fields(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadRecord("not an object with fields", f"found {_type(record)}")
    return record


def _missing(what: str, row: dict[str, Any]) -> BadRecord:
    names = ", ".join(name[:30] for name in itertools.islice(row, 12))
    return BadRecord(f"no {what}", f"found: {names or 'no fields'}")


def _type(value: Any) -> str:
    names = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def _string(row: dict[str, Any], name: str) -> str | None:
    """Return a field's text, None if it is absent or null."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value
    raise BadRecord(f'"{name}" is not a string', f"found {_type(value)}")


def _clean(text: str, note: Note) -> str:
    """Return the text without NUL and lone surrogates, which neither CSV nor UTF-8 carries."""
    if "\0" in text:
        note("NUL removed")
        text = text.replace("\0", "")
    try:
        text.encode()
    except UnicodeEncodeError:
        note("lone surrogate removed")
        text = re.sub("[\ud800-\udfff]", "", text)
    return text


# --- conversations ---


def _conversation(row: dict[str, Any], note: Note) -> list[Message]:
    if "messages" in row or "conversations" in row:
        messages = _tidy(_listed_turns(row), note)
    else:
        answer = _joined(row, "output", "a")
        if answer is None:
            raise _missing('answer ("output" or "a")', row)
        messages = _tidy([*_question_turns(row), _turn("assistant", answer)], note)
    if messages[-1]["role"] == "user":
        note("question without an answer cut off at the end")
        messages.pop()
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRecord("no answer")
    return messages


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _joined(row: dict[str, Any], *names: str) -> str | None:
    """Return the fields' texts as one, as v1 did (``input`` + ``q``); None if there are none."""
    texts = [text for name in names if (text := _string(row, name)) is not None]
    return "".join(texts) if texts else None


def _question_turns(row: dict[str, Any]) -> list[Message]:
    """Return system text, history and last question of an ``instruction input q history`` row."""
    instruction, question = _string(row, "instruction") or "", _joined(row, "input", "q")
    if question is None and "instruction" not in row:
        raise _missing('question ("input", "q" or "instruction")', row)
    question = question or ""
    history = _history(row.get("history"))
    turns = _system_turn(row)
    if instruction and question.strip() and history and not turns:
        turns = [_turn("system", instruction)]
    elif instruction:
        question = f"{instruction}\n{question}" if question else instruction
    for asked, answered in history:
        turns += (_turn("user", asked), _turn("assistant", answered))
    return [*turns, _turn("user", question)]


def _history(value: Any) -> list[tuple[str, str]]:
    """Return the pairs of a history: a list, its JSON, or v1's Python literal (read, never run)."""
    if isinstance(value, str):
        value = _parse_cell(value.strip())
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise BadRecord("history is not a list", f"found {_type(value)}")
    for pair in value:
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(isinstance(t, str) for t in pair)
        ):
            raise BadRecord("history is not a list of [question, answer]")
    return [(asked, answered) for asked, answered in value]


def _parse_cell(cell: str) -> Any:
    if cell in ("", "[]"):
        return []
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    if len(cell) > MAX_LITERAL_CHARS:
        raise BadRecord("history of more than 1 MiB is not JSON")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Python's remarks on escapes such as "\d" inside the data
            return ast.literal_eval(cell)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise BadRecord(
            "history is neither JSON nor a Python list", f"found {cell[:30]!r}"
        ) from None


def _listed_turns(row: dict[str, Any]) -> list[Message]:
    """Return the turns of ``messages`` or ``conversations``, a ``system`` field before them."""
    name = "messages" if "messages" in row else "conversations"
    return [*_system_turn(row), *_turns(row[name], name)]


def _system_turn(row: dict[str, Any]) -> list[Message]:
    system = _string(row, "system")
    return [_turn("system", system)] if system else []


def _turns(items: Any, name: str) -> list[Message]:
    """Return ``[{"role", "content"}]`` or ShareGPT's ``[{"from", "value"}]`` as turns."""
    if not isinstance(items, list):
        raise BadRecord(f'"{name}" is not a list', f"found {_type(items)}")
    turns = []
    for item in items:
        item = _fields(item)
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or role.lower() not in ROLE_OF:
            raise BadRecord("unknown role", str(role)[:30])
        if not isinstance(content, str):
            raise BadRecord("a message is not text", f"found {_type(content)}")
        turns.append(_turn(ROLE_OF[role.lower()], content))
    return turns


def _tidy(turns: list[Message], note: Note) -> list[Message]:
    """Return the turns as question and answer by turns, after at most one system text."""
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        role, content = turn["role"], _clean(turn["content"], note)
        is_empty = not content or content.isspace()
        if role == "system":
            if index:
                raise BadRecord("system text is not first")
            if is_empty:
                continue
        elif role == "assistant" and (not messages or messages[-1]["role"] == "system"):
            note("opening answer to no question left out")
            continue
        elif is_empty:
            raise BadRecord("empty question" if role == "user" else "empty answer")
        if messages and messages[-1]["role"] == role:
            note("messages of one speaker joined")
            messages[-1]["content"] += "\n" + content
        else:
            messages.append(_turn(role, content))
    if not messages or messages[-1]["role"] == "system":
        raise BadRecord("no question")
    return messages


# --- preferences ---


def _preferences(row: dict[str, Any], note: Note) -> list[dict[str, Any]]:
    if "reject" in row and "rejected" not in row:
        row = {name: _unescaped(value, note) for name, value in row.items()}
    if isinstance(row.get("output"), list) and "chosen" not in row:
        answers = _ranked(row["output"], note)
        context = None
    else:
        (before, chosen), (before_rejected, rejected) = (
            _answer(row, "chosen"),
            _answer(row, "rejected", "reject"),
        )
        if before != before_rejected:
            raise BadRecord("chosen and rejected answer different questions")
        answers, context = [chosen, rejected], before or None
    answers = [_clean(answer, note) for answer in answers]
    prompt = _prompt(row, context, note)
    if any(not answer or answer.isspace() for answer in answers):
        raise BadRecord("empty answer")
    is_one_question = len(prompt) == 1
    pairs = [
        {
            "prompt": prompt[0]["content"] if is_one_question else prompt,
            "chosen": better,
            "rejected": worse,
        }
        for better, worse in itertools.combinations(answers, 2)
        if better != worse
    ]
    if not pairs:
        raise BadRecord("chosen and rejected are the same")
    return pairs


def _answer(row: dict[str, Any], *names: str) -> tuple[list[Message], str]:
    """Return an answer and what stands before it, where a list holds the whole conversation."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise _missing(" or ".join(f'"{name}"' for name in names), row)
    value = row[name]
    if isinstance(value, str):
        return [], value
    turns = _turns([value] if isinstance(value, dict) else value, name)
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRecord(f'"{name}" does not end with an answer')
    return turns[:-1], turns[-1]["content"]


def _ranked(answers: list[Any], note: Note) -> list[str]:
    if not all(isinstance(answer, str) for answer in answers):
        raise BadRecord("a ranked answer is not text")
    if len(answers) < 2:
        raise BadRecord("fewer than two ranked answers")
    if len(answers) > MAX_RANKED:
        note(f"ranked answers after the first {MAX_RANKED} left out", f"{len(answers)} answers")
    return answers[:MAX_RANKED]


def _prompt(row: dict[str, Any], context: list[Message] | None, note: Note) -> list[Message]:
    """Return the messages that chosen and rejected answer; ``context`` stood in front of them."""
    if context:
        turns = context
    elif "conversations" in row or "messages" in row:
        turns = _listed_turns(row)
    elif isinstance(row.get("prompt"), list):
        turns = [*_system_turn(row), *_turns(row["prompt"], "prompt")]
    elif (prompt := _string(row, "prompt")) is not None:
        turns = [*_system_turn(row), _turn("user", prompt)]
    elif any(name in row for name in ("instruction", "input", "q")):
        turns = _question_turns(row)
    else:
        raise _missing('"prompt", "conversations" or "instruction"', row)
    prompt = _tidy(turns, note)
    if prompt[-1]["role"] != "user":
        raise BadRecord("the prompt ends with an answer")
    return prompt


# huozi's texts were escaped once too often. LaTeX commands that begin with n keep their backslash.
ESCAPED_BREAK = re.compile(
    r"(?<!\\)\\n(?!(?:abla|eq|e|earrow|exists|mid|ot|otin|u|ewline|ewcommand|oindent)(?![a-z]))"
)


def _unescaped(text: Any, note: Note) -> Any:
    """Return huozi's text with the two characters ``\\n`` as line breaks.

    A text that has real line breaks means what it says and stays.
    """
    if not isinstance(text, str) or "\\n" not in text or "\n" in text:
        return text
    text, n_breaks = ESCAPED_BREAK.subn("\n", text)
    if n_breaks:
        note('"\\n" in huozi\'s text read as a line break')
    return text
