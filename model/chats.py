"""Conversations as data: questions, versions of their answers, editing, files to keep them in.

The chat page and the terminal client share it; it knows neither streamlit nor a model.
"""

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
FORMAT = "minimind-chats"
MAX_FILE_BYTES = 20_000_000
ROLES = ("system", "user", "assistant")
SHOWN_IN_ERRORS = 60  # characters of a value that an error repeats


@dataclass
class Reply:
    """One version of an answer; its text grows while it is made.

    Attributes:
        model: the name of who answers.
        finish_reason: stop, length, cancelled or error; None: not asked for yet, or under way.
        error: what went wrong, for people, with its kind for labels.
        n_left_out: oldest messages that had no room in the prompt.
        job: whoever makes it, while it is made.
    """

    text: str = ""
    model: str = ""
    finish_reason: str | None = None
    error: str = ""
    error_kind: str = ""
    n_tokens: int = 0
    tokens_per_s: float | None = None
    first_token_s: float | None = None
    n_prompt: int | None = None
    n_cached: int | None = None
    n_left_out: int = 0
    job: Any = field(default=None, repr=False, compare=False)

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None


@dataclass
class Turn:
    """A question and the versions of its answer, of which one is shown and remembered."""

    question: str
    replies: list[Reply] = field(default_factory=list)
    shown: int = 0

    @property
    def reply(self) -> Reply | None:
        return self.replies[self.shown] if self.replies else None

    def answer_again(self) -> Reply:
        """Add a version and show it; one that failed without a word is not kept."""
        self.replies = [reply for reply in self.replies if reply.text or not reply.is_done]
        self.replies.append(Reply())
        self.shown = len(self.replies) - 1
        return self.replies[-1]

    def switch(self, step: int) -> None:
        """Show the version before (-1) or after (1), round the end."""
        self.shown = (self.shown + step) % max(1, len(self.replies))


@dataclass
class Chat:
    """A conversation; ``title`` is what the user called it."""

    title: str = ""
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12], compare=False)

    @property
    def name(self) -> str:
        """The title, else how the first question begins, else nothing."""
        first = self.turns[0].question.strip() if self.turns else ""
        line = first.splitlines()[0] if first else ""
        return self.title or (line if len(line) <= 24 else line[:23] + "…")

    def ask(self, question: str) -> Reply:
        """Add a question; return its answer, to be filled."""
        self.turns.append(Turn(question))
        return self.turns[-1].answer_again()

    def edit(self, index: int, question: str) -> Reply:
        """Ask question ``index`` in other words; what came after it belonged to the old ones."""
        self.stop_answers(index)
        self.turns[index:] = []
        return self.ask(question)

    def answer_again(self) -> Reply:
        """Ask the last question again, keeping the answers that are there."""
        self.stop_answers(len(self.turns) - 1)
        return self.turns[-1].answer_again()

    def stop_answers(self, start: int = 0) -> None:
        """Cancel the answers from turn ``start`` on that are under way."""
        for turn in self.turns[start:]:
            for reply in turn.replies:
                if reply.job is not None and not reply.is_done:
                    reply.job.cancel()

    def messages(self, history_cnt: int) -> list[Message]:
        """Return what is sent to have the last question answered.

        The system text, the last ``history_cnt`` messages before the question (whole turns, as they
        are shown; questions that got no answer are left out), the question.
        """
        answered = [turn for turn in self.turns[:-1] if turn.reply and turn.reply.text]
        messages = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for turn in answered[len(answered) - min(history_cnt // 2, len(answered)) :]:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.reply.text})
        return [*messages, {"role": "user", "content": self.turns[-1].question}]


class ChatList:
    """The conversations of one user, newest first; there is always one, and one is open."""

    def __init__(self) -> None:
        self.chats = [Chat()]
        self.open_id = self.chats[0].id

    @property
    def current(self) -> Chat:
        return next(chat for chat in self.chats if chat.id == self.open_id)

    def new(self) -> Chat:
        """Open an empty conversation: the one that is there, else a new one."""
        empty = [chat for chat in self.chats if not chat.turns and not chat.title]
        return self.add(empty or [Chat()])

    def add(self, chats: Sequence[Chat]) -> Chat:
        """Put ``chats`` at the top and open their first."""
        self.chats = [*chats, *(chat for chat in self.chats if chat not in chats)]
        self.open_id = chats[0].id
        return chats[0]

    def open(self, chat_id: str) -> None:
        if any(chat.id == chat_id for chat in self.chats):  # another click may have deleted it
            self.open_id = chat_id

    def delete(self, chat_id: str) -> None:
        """Delete a conversation; its neighbour is opened where it was the open one."""
        place = next((i for i, chat in enumerate(self.chats) if chat.id == chat_id), None)
        if place is None:
            return
        self.chats.pop(place).stop_answers()
        self.chats = self.chats or [Chat()]
        if self.open_id == chat_id:
            self.open_id = self.chats[min(place, len(self.chats) - 1)].id


# ---- files ----


def to_json(chats: Sequence[Chat]) -> str:
    """Return a file of conversations with all versions of the answers, for :func:`from_json`.

    Each has ``messages`` as OpenAI writes them, so other programs can read it.
    """
    content = {"format": FORMAT, "version": 1, "chats": [_chat_to_dict(chat) for chat in chats]}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _chat_to_dict(chat: Chat) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if chat.system.strip():
        messages.append({"role": "system", "content": chat.system})
    for turn in chat.turns:
        messages.append({"role": "user", "content": turn.question})
        kept = [reply for reply in turn.replies if reply.text]
        if not kept:
            continue
        shown = turn.reply if turn.reply in kept else kept[-1]
        message = {"role": "assistant", "content": shown.text}
        if len(kept) > 1:
            message["versions"] = [reply.text for reply in kept]
            message["shown"] = next(i for i, reply in enumerate(kept) if reply is shown)
        messages.append(message)
    return {"title": chat.name, "messages": messages}


def to_markdown(chat: Chat) -> str:
    """Return a conversation for people to read, with the answers that are shown."""
    parts = [f"# {chat.name or 'MiniMind'}"]
    if chat.system.strip():
        parts.append("\n".join(f"> {line}" for line in chat.system.strip().splitlines()))
    for turn in chat.turns:
        parts.append(f"## 用户\n\n{turn.question}")
        if turn.reply and turn.reply.text:
            parts.append(f"## {turn.reply.model or 'MiniMind'}\n\n{close_fences(turn.reply.text)}")
    return "\n\n".join(parts) + "\n"


def file_name(chat: Chat, suffix: str) -> str:
    """Return a name for a file of ``chat`` that every system allows."""
    stem = re.sub(r"[^\w-]+", "_", chat.name)[:40].strip("_")
    return f"{stem or 'minimind'}.{suffix}"


def from_json(data: bytes) -> list[Chat]:
    """Read conversations: a file of :func:`to_json`, ``{"messages": […]}``, or a list of messages.

    Raises:
        ValueError: not such a file; the message names the place.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"the file has {len(data):,} bytes, at most {MAX_FILE_BYTES:,} are read")
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is not UTF-8 text (byte {error.start}): export JSON") from None
    except RecursionError:
        raise ValueError("the file is not a conversation: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the file is not JSON: {error}") from None
    if isinstance(content, list):
        return [_chat_from_dict({"messages": content}, "")]
    if not isinstance(content, dict) or not {"chats", "messages"} & content.keys():
        raise ValueError(f'no "chats" or "messages" in the file (found: {_found(content)})')
    if "chats" not in content:
        return [_chat_from_dict(content, "")]
    chats = _typed(content["chats"], list, "chats")
    if not chats:
        raise ValueError("chats is empty: there is nothing to import")
    return [_chat_from_dict(chat, f"chats[{i}].") for i, chat in enumerate(chats)]


def _chat_from_dict(content: Any, where: str) -> Chat:
    content = _typed(content, dict, where.rstrip(".") or "the file")
    chat = Chat(_text(content.get("title") or "", f"{where}title"))
    messages = _typed(content.get("messages"), list, f"{where}messages")
    for i, message in enumerate(messages):
        place = f"{where}messages[{i}]"
        message = _typed(message, dict, place)
        role, text = message.get("role"), _text(message.get("content"), f"{place}.content")
        if role not in ROLES:
            raise ValueError(
                f'{place}.role is {_found(role)}; use "system" (first), "user" or "assistant"'
            )
        if role == "system":
            if i:
                raise ValueError(f"{place}: a system text is only at the beginning")
            chat.system = text
        elif role == "user":
            chat.turns.append(Turn(text))
        else:
            if not chat.turns or chat.turns[-1].replies:
                raise ValueError(f"{place} is an answer without a question before it")
            chat.turns[-1].replies, chat.turns[-1].shown = _versions(message, text, place)
    return chat


def _versions(message: dict[str, Any], text: str, place: str) -> tuple[list[Reply], int]:
    texts = _typed(message.get("versions", [text]), list, f"{place}.versions")
    texts = [_text(version, f"{place}.versions[{i}]") for i, version in enumerate(texts)]
    shown = message.get("shown", 0)
    if not isinstance(shown, int) or not 0 <= shown < len(texts) or texts[shown] != text:
        raise ValueError(f"{place}.shown is {_found(shown)}: its version is not the content")
    return [Reply(version, finish_reason="stop") for version in texts], shown


def _typed(value: Any, kind: type, place: str) -> Any:
    if not isinstance(value, kind):
        name = {list: "a list", dict: "an object", str: "a text"}[kind]
        raise ValueError(f"{place} is {_found(value)}, expected {name}")
    return value


def _text(value: Any, place: str) -> str:
    # half of a surrogate pair, which JSON can spell, is no character and cannot be sent on
    return _typed(value, str, place).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _found(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(map(str, list(value)[:5])) or "an empty object"
    text = "missing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_IN_ERRORS else text[: SHOWN_IN_ERRORS - 1] + "…"


# ---- Markdown ----


def escape(text: str) -> str:
    """Return ``text`` so that Markdown, streamlit's too, shows it as it is, line by line."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>~$:&])", r"\\\1", text).replace("\n", "  \n")


def without_images(text: str) -> str:
    """Return Markdown with its images as links, ``![alt](url)`` as ``[alt](url)``.

    A browser would load an image from wherever an answer says, and so tell that place what is in
    the address. Code stays as it is only in fences that are surely code: those that begin a line,
    with nothing before them (HTML, formulas, directives) that may hold a fence which is none.
    """
    if not re.search(r"\]\s*[(:\[]", text):  # no image has an address without one of these
        return text
    fence, is_sure, lines = "", True, []
    for line in re.split(r"(?<=\n)|(?<=\r)(?!\n)", text):  # CommonMark's lines, not splitlines()'s
        if fence:
            closing = re.fullmatch(r" {0,3}(`{3,}|~{3,})\s*", line)
            if closing and closing[1][0] == fence[0] and len(closing[1]) >= len(fence):
                fence = ""
        elif is_sure and (opening := re.match(r"`{3,}(?=[^`]*$)|~{3,}", line)):
            fence = opening[0]
        else:
            is_sure = is_sure and not re.match(r"[\s>*+\d.)-]*<|.*(\$\$|:::)", line)
            line = re.sub(r"!+\[", "[", line)
        lines.append(line)
    return "".join(lines)


# of text that has not fully arrived

# a fence may stand in lists and quotations, so behind their marks
FENCE = re.compile(r"^((?:[ >]|[-*+] |\d+[.)] )*)(`{3,}|~{3,})(.*)$")


def close_fences(text: str) -> str:
    """Close a code block or a formula that is still open at the end of ``text``.

    So that Markdown cut anywhere shows as what it will become, and nothing after it is swallowed.
    By CommonMark 0.31, section 4.5: the closing fence has the opening one's character, at least its
    length, and nothing after it.
    """
    fence, marks, in_formula = "", "", False
    for line in text.splitlines():
        found = FENCE.match(line)
        if fence:
            closes = found and found[2][0] == fence[0] and len(found[2]) >= len(fence)
            if closes and not found[3].strip():
                fence = ""
        elif found and not in_formula and not (found[2][0] == "`" and "`" in found[3]):
            marks, fence = found[1], found[2]
        elif line.count("$$") % 2:
            in_formula = not in_formula
    if not fence and not in_formula:
        return text
    closing = re.sub(r"[^ >]", " ", marks) + fence if fence else "$$"
    return text + ("" if text.endswith("\n") else "\n") + closing
