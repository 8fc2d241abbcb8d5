"""Conversations as data, and their files."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chats import (
    MAX_FILE_BYTES,
    Chat,
    ChatList,
    Reply,
    close_fences,
    file_name,
    from_json,
    to_json,
    to_markdown,
    without_images,
)

MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt  # streamlit brings it along
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


class Job:
    """What a page hangs on an answer under way."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


def talked(*texts: str, **facts: str) -> Chat:
    """Return a conversation of questions and their answers."""
    chat = Chat(**facts)
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        reply = chat.ask(question)
        reply.text, reply.finish_reason = answer, "stop"
    return chat


def contents(chat: Chat, history_cnt: int) -> list[str]:
    return [message["content"] for message in chat.messages(history_cnt)]


# ---- what is sent ----


def test_the_history_is_the_newest_whole_turns() -> None:
    chat = talked("q1", "a1", "q2", "a2", "q3", "a3", system="be kind")
    chat.ask("q4")
    assert contents(chat, 4) == ["be kind", "q2", "a2", "q3", "a3", "q4"]
    assert contents(chat, 0) == ["be kind", "q4"]
    assert contents(chat, 100) == ["be kind", "q1", "a1", "q2", "a2", "q3", "a3", "q4"]
    assert [m["role"] for m in chat.messages(2)] == ["system", "user", "assistant", "user"]


def test_a_question_without_an_answer_is_not_remembered() -> None:
    chat = talked("q1", "a1", "q2", "", "q3", "a3")
    chat.ask("q4")
    assert contents(chat, 100) == ["q1", "a1", "q3", "a3", "q4"]
    assert contents(chat, 4) == ["q1", "a1", "q3", "a3", "q4"]


def test_the_version_that_is_shown_is_the_one_remembered() -> None:
    chat = talked("q1", "first")
    chat.answer_again().text = "second"
    chat.turns[0].switch(-1)
    chat.ask("q2")
    assert contents(chat, 2) == ["q1", "first", "q2"]
    chat.turns[0].switch(1)
    assert contents(chat, 2) == ["q1", "second", "q2"]
    chat.turns[0].switch(1)
    assert contents(chat, 2) == ["q1", "first", "q2"], "switching goes round"


def test_answering_again_keeps_what_was_said_and_drops_what_only_failed() -> None:
    chat = talked("q", "good")
    failed = chat.answer_again()
    failed.finish_reason, failed.error = "error", "the server is away"
    cancelled = chat.answer_again()
    cancelled.text, cancelled.finish_reason = "half an ans", "cancelled"
    new = chat.answer_again()
    assert [reply.text for reply in chat.turns[0].replies] == ["good", "half an ans", ""]
    assert chat.turns[0].reply is new


def test_editing_a_question_cuts_what_came_after_and_stops_its_answers() -> None:
    chat = talked("q1", "a1", "q2", "a2")
    running = chat.ask("q3")
    running.job = Job()
    reply = chat.edit(1, "other")
    assert [turn.question for turn in chat.turns] == ["q1", "other"]
    assert chat.turns[1].reply is reply and not reply.is_done
    assert running.job.is_cancelled


# ---- several ----


def test_there_is_always_an_open_chat() -> None:
    chats = ChatList()
    first = chats.current
    assert chats.new() is first, "an empty chat is not doubled"
    first.ask("hello")
    first.turns[0].reply.job = job = Job()
    second = chats.new()
    assert chats.chats == [second, first] and chats.current is second
    chats.open(first.id)
    chats.delete(first.id)
    assert chats.current is second and job.is_cancelled
    chats.delete(second.id)
    assert len(chats.chats) == 1 and chats.current is not second
    chats.delete("long gone")
    chats.open("long gone")
    assert chats.current is chats.chats[0]


def test_a_chat_is_called_by_its_title_or_its_first_question() -> None:
    assert Chat().name == ""
    assert talked("天空为什么是蓝色的？\n请详细说", "a").name == "天空为什么是蓝色的？"
    assert talked("x" * 50, "a").name == "x" * 23 + "…"
    assert talked("q", "a", title="my title").name == "my title"
    assert talked("  \n ", "a").name == ""


@pytest.mark.parametrize(
    ("title", "expected"),
    [("a/b\\c: d?", "a_b_c_d.md"), ("水的化学式", "水的化学式.md"), ("../..", "minimind.md")],
)
def test_a_file_name_is_allowed_everywhere(title: str, expected: str) -> None:
    assert file_name(Chat(title), "md") == expected


# ---- files ----


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(TEXTS.filter(str.strip), st.lists(TEXTS.filter(bool), max_size=3)), max_size=4
    ),
    TEXTS.filter(str.strip),
    st.randoms(),
)
def test_what_is_exported_comes_back(turns, system, source) -> None:
    chat = Chat("a title", system)
    for question, versions in turns:
        chat.ask(question)
        turn = chat.turns[-1]
        turn.replies = [Reply(version, finish_reason="stop") for version in versions]
        turn.shown = source.randrange(len(versions)) if versions else 0
    assert from_json(to_json([chat, chat]).encode()) == [chat, chat]


def test_messages_of_other_programs_are_read() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "name": "unknown fields do not matter"},
        {"role": "user", "content": "left alone"},
        {"role": "user", "content": "q2"},
    ]
    for content in (messages, {"messages": messages, "model": "m"}):
        data = b"\xef\xbb\xbf" + json.dumps(content).encode()  # as Windows' editors save it
        [chat] = from_json(data)
        assert (chat.system, [turn.question for turn in chat.turns]) == (
            "s",
            ["q", "left alone", "q2"],
        )
        assert [bool(turn.reply) for turn in chat.turns] == [True, False, False]


def user(**fields: object) -> dict[str, object]:
    return {"role": "user", "content": "q", **fields}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe\x00", "not UTF-8 text (byte 0)"),
        (b"# a title", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * (MAX_FILE_BYTES + 1), "20,000,001 bytes"),
        ({"conversations": []}, 'no "chats" or "messages" in the file (found: conversations)'),
        (7, 'no "chats" or "messages" in the file (found: 7)'),
        ({"chats": {}}, "chats is an empty object, expected a list"),
        ({"chats": []}, "chats is empty"),
        ({"chats": [1]}, "chats[0] is 1, expected an object"),
        ({"chats": [{"messages": "x" * 99}]}, "chats[0].messages is"),
        ({"chats": [{}]}, "chats[0].messages is missing, expected a list"),
        ({"title": ["t"], "messages": []}, 'title is ["t"], expected a text'),
        ([user(), "hi"], 'messages[1] is "hi", expected an object'),
        ([user(role="bot")], 'messages[0].role is "bot"; use'),
        ([user(role=["user"])], 'messages[0].role is ["user"]; use'),
        ([user(content=None)], "messages[0].content is missing, expected a text"),
        ([user(content=[{"type": "text"}])], "messages[0].content is [{"),
        ([user(role="assistant")], "messages[0] is an answer without a question"),
        ([user(), user(role="assistant"), user(role="assistant")], "messages[2] is an answer"),
        ([user(), user(role="system")], "messages[1]: a system text is only at the beginning"),
        ([user(), user(role="assistant", versions=["a"], shown=0)], "messages[1].shown is 0"),
        ([user(), user(role="assistant", versions=["q"], shown=1)], "messages[1].shown is 1"),
        ([user(), user(role="assistant", versions=[], shown=0)], "messages[1].shown is 0"),
        ([user(), user(role="assistant", versions=[3])], "messages[1].versions[0] is 3"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused_by_the_place(content, expected) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(ValueError) as error:
        from_json(data)
    assert expected in str(error.value)
    assert len(str(error.value)) < 200, "no error repeats a whole file"


def test_half_a_surrogate_pair_becomes_a_character_that_can_be_sent() -> None:
    [chat] = from_json(b'[{"role": "user", "content": "a\\ud83d \\ud83d\\ude00"}]')
    assert chat.turns[0].question == "a\ufffd \U0001f600"


def test_markdown_holds_what_is_shown_and_no_answer_swallows_the_next_question() -> None:
    chat = talked("q1", "old", "q2", "```python\nprint(1)", "q3", "end", title="T", system="s1\ns2")
    chat.turns[0].answer_again().text = "new"
    text = to_markdown(chat)
    assert text.startswith("# T\n\n> s1\n> s2\n\n## 用户\n\nq1\n\n## MiniMind\n\nnew\n")
    assert "old" not in text
    headings = [t for t in MarkdownIt().parse(text) if t.type == "heading_open" and t.tag == "h2"]
    assert len(headings) == 6


# ---- text that has not fully arrived ----

ANSWER = """Look:
```python
x = "~~~"  # ```
```` not a closing one of ```
```
and ~~~ in words, `` `a` ``, ```inline``` too
~~~~
```
~~~
~~~~
1. ```sh
   ls
   ```
> - ~~~
>   quoted
>   ~~~

$$
x^2
$$
"""


@pytest.mark.parametrize("n", range(len(ANSWER) + 1))
def test_after_any_part_of_an_answer_a_heading_is_a_heading(n: int) -> None:
    # by a parser of CommonMark that others wrote
    text = close_fences(ANSWER[:n])
    assert text.startswith(ANSWER[:n])
    tokens = MarkdownIt().parse(text + "\n\n# END")
    assert tokens[-3].type == "heading_open" and tokens[-2].content == "END"
    assert text.count("$$") % 2 == 0 or not ANSWER[:n].endswith("$$")


def test_whole_text_is_left_alone() -> None:
    for text in ("", "plain", "a ``` b", "```\nx\n```", ANSWER, "costs $5"):
        assert close_fences(text) == text


def test_a_formula_is_closed() -> None:
    assert close_fences("so\n$$\nx^2") == "so\n$$\nx^2\n$$"
    assert close_fences("$$x$$ and") == "$$x$$ and"


IMAGE = "![a](http://x/y.png)"
LINK = "[a](http://x/y.png)"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"see {IMAGE}.", f"see {LINK}."),
        ("![a][r]\n\n[r]: http://x", "[a][r]\n\n[r]: http://x"),
        ("![r]\n\n[r]: http://x", "[r]\n\n[r]: http://x"),
        (f"[{IMAGE}](http://z)", f"[{LINK}](http://z)"),
        (f"!!{IMAGE}", LINK),  # what is left must not make a new one
        (f"```\n{IMAGE}\n```\n{IMAGE}\n", f"```\n{IMAGE}\n```\n{LINK}\n"),
        (f"~~~ md\r\n{IMAGE}", f"~~~ md\r\n{IMAGE}"),
        ("`#![allow(x)]` wow!", "`#![allow(x)]` wow!"),
        # these fences are none, or end before the image does
        (f"> ```\n{IMAGE}", f"> ```\n{LINK}"),
        (f"- a\n\n  ```\n\n{IMAGE}", f"- a\n\n  ```\n\n{LINK}"),
        (f"a\n    ```\n{IMAGE}", f"a\n    ```\n{LINK}"),
        (f"<!--\n```\n-->\n{IMAGE}", f"<!--\n```\n-->\n{LINK}"),
        (f"$$\n```\n$$\n{IMAGE}", f"$$\n```\n$$\n{LINK}"),
        (f"a\u2028```\n{IMAGE}", f"a\u2028```\n{LINK}"),
        (f"```\n   ```\n{IMAGE}", f"```\n   ```\n{LINK}"),
        (f"``` a`b\n{IMAGE}", f"``` a`b\n{LINK}"),
    ],
)
def test_images_become_links(text: str, shown: str) -> None:
    assert without_images(text) == shown
    assert without_images(shown) == shown


PIECES = (
    *(
        "```",
        "~~~",
        "````",
        "\n",
        "\n\n",
        "\r",
        " ",
        "  ",
        "    ",
        "\t",
        "> ",
        "- ",
        "1. ",
        "\\",
        "`",
    ),
    *("!", "<!--", "-->", "<pre>", "x", "[r]: http://x", "![r]", IMAGE, IMAGE),
)


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@settings(deadline=None, max_examples=500)
def test_no_image_is_left(text: str) -> None:
    assert "<img" not in MarkdownIt("commonmark").render(close_fences(without_images(text)))
