"""Raw rows: every form, every kind of damage, nothing lost without a count."""

import gzip
import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import records
from model.rows import read_conversations, read_documents, read_preferences
from model.tally import Place, Tally


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(reader, path: Path) -> tuple[list, Tally]:
    tally = Tally()
    rows = list(reader(path, tally))
    assert tally.kept == len(rows)  # every record is a row or counted as lost
    return rows, tally


def counts(reasons: dict) -> dict[str, int]:
    return {reason: cases.count for reason, cases in reasons.items()}


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    """Contents by turns user and assistant, after a system text if there is one."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant") * len(contents)
    return messages + [
        {"role": role, "content": text} for role, text in zip(roles, contents, strict=False)
    ]


# --- documents ---


TEXTS = [
    "天地玄黄",
    '  indented, "quoted" \\N back\\slash ',
    "line\u2028sep\u0085nel\x0bvt",
    "NA",
    "nan",
]


@pytest.mark.parametrize("pack", [bytes, lzma.compress, gzip.compress])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, pack) -> None:
    suffix = {bytes: "", lzma.compress: ".xz", gzip.compress: ".gz"}[pack]
    quoted = "".join('"' + text.replace('"', '""') + '"\n' for text in TEXTS)
    for name, content in {
        "a.jsonl": json_lines(*({"text": text} for text in TEXTS)),
        "a.json": json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False),
        "b.csv": "text\n" + quoted,
        "c.txt": "\n".join(TEXTS),
    }.items():
        rows, tally = read(read_documents, write(tmp_path, name + suffix, pack(content.encode())))
        assert rows == TEXTS, name
        assert not tally.skipped and not tally.changed


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "broken JSON"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "broken JSON"),
        (b"\x80\x04binary\x00", "not valid UTF-8"),
        (b'{"text": "\xff\xfe"}', "not valid UTF-8"),
        (b'["text"]', "not an object with fields"),
        (b'"text"', "not an object with fields"),
        (b'{"content": "a"}', 'no "text"'),
        (b'{"text": null}', 'no "text"'),
        (b'{"text": 5}', '"text" is not a string'),
        (b'{"text": NaN}', '"text" is not a string'),
        (b'{"text": ["a"]}', '"text" is not a string'),
        (b'{"text": ""}', "empty text"),
        ('{"text": " \\n\\t\u3000"}'.encode(), "empty text"),
        (b'{"text": "\\u0000\\ud800"}', "empty text"),
        (b"", "blank line"),
        (b"  \t\r", "blank line"),
    ],
)
def test_a_bad_line_is_counted_and_the_rest_goes_on(tmp_path: Path, line, reason) -> None:
    content = b'{"text": "one"}\n' + line + b'\n{"text": "two"}'
    path = write(tmp_path, "a.jsonl", content)
    rows, tally = read(read_documents, path)
    assert rows == ["one", "two"]
    assert counts(tally.skipped) == {reason: 1}
    assert f"{path}:2" in tally.report()


def test_what_no_table_can_hold_is_taken_out_and_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.jsonl",
        r'{"text": "a\u0000b"}' "\n" r'{"text": "half \ud83d, whole \ud83d\ude00"}',
    )
    rows, tally = read(read_documents, path)
    assert rows == ["ab", "half , whole 😀"]
    assert counts(tally.changed) == {"NUL removed": 1, "lone surrogate removed": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "甲"}\r\n{"text": "乙"}\r\n'),
        ("a.csv", '"text"\r\n"甲"\r\n乙\r\n'),
        ("a.txt", "甲\r\n乙\r\n"),
        ("a.json", '[{"text": "甲"},\r\n{"text": "乙"}]\r\n'),
    ],
)
def test_a_byte_order_mark_and_crlf_are_not_part_of_the_text(tmp_path: Path, name, content) -> None:
    rows, tally = read(read_documents, write(tmp_path, name, b"\xef\xbb\xbf" + content.encode()))
    assert rows == ["甲", "乙"]
    assert counts(tally.changed) == {"byte order mark removed": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_a_giant_line_is_passed_over(tmp_path: Path, name: str) -> None:
    lines = {"a.jsonl": ('{"text": "%s"}', ""), "a.txt": ("%s", ""), "a.csv": ('"%s"', "text\n")}
    line, header = lines[name]
    giant = line % ("x" * (records.MAX_RECORD_BYTES + records.BATCH_BYTES))
    content = header + "\n".join((line % "one", giant, line % "two", ""))
    rows, tally = read(read_documents, write(tmp_path, name, content))
    assert rows == ["one", "two"]
    assert counts(tally.skipped) == {"longer than 32 MiB": 1}
    assert f":{3 if header else 2}" in tally.report()


def test_a_csv_row_that_holds_a_giant_line_is_not_kept_without_it(tmp_path: Path) -> None:
    giant = "x" * (records.MAX_RECORD_BYTES + records.BATCH_BYTES)
    table = f'text\n"one"\n"begin\n{giant}\nend"\n"two"\n'
    rows, tally = read(read_documents, write(tmp_path, "a.csv", table))
    assert rows == ["one", "two"]
    assert set(tally.skipped) == {"longer than 32 MiB", "CSV row with a line left out"}


@pytest.mark.parametrize("pack", [lzma.compress, gzip.compress])
def test_a_packed_file_that_breaks_off_gives_what_it_holds(tmp_path: Path, pack) -> None:
    texts = [f"{i} {i * 2**100 % 1_000_003}" for i in range(15_000)]
    packed = pack(json_lines(*({"text": text} for text in texts)).encode())
    suffix = "xz" if pack is lzma.compress else "gz"
    path = write(tmp_path, f"a.jsonl.{suffix}", packed[: len(packed) // 2])
    rows, tally = read(read_documents, path)
    assert len(rows) > 1000 and rows == texts[: len(rows)]
    assert counts(tally.skipped)["packed file breaks off here"] == 1


def test_a_stray_quote_costs_the_rows_it_touches_only(tmp_path: Path) -> None:
    table = 'text\n"one"\n"open\n"two"\n"three"\n"a, ""b""\nc"\n'
    rows, tally = read(read_documents, write(tmp_path, "a.csv", table))
    assert rows == ["one", "three", 'a, "b"\nc']
    assert counts(tally.skipped) == {"broken CSV row": 1}


def test_csv_rows_of_another_width_and_bytes_are_counted(tmp_path: Path) -> None:
    table = b'id,text\n1,one\n2,two,extra\n\n3\n4,\xff\n5,"f\0\nive"\n'
    rows, tally = read(read_documents, write(tmp_path, "a.csv", table))
    assert rows == ["one", "f\nive"]
    assert counts(tally.skipped) == {
        "wrong number of CSV fields": 2,
        "blank line": 1,
        "not valid UTF-8": 1,
    }
    assert counts(tally.changed) == {"NUL removed": 1}
    assert "a.csv:3 (3, expected 2), :5 (1, expected 2)" in tally.report()


EXPECTED_FORM = 'Expected {"text": …} a line (.jsonl)'


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", "question,answer\n1,2\n", "found: question, answer"),
        ("b.csv", "question,answer\n1,2\n", EXPECTED_FORM),
        ("b.jsonl", "plain text\n", EXPECTED_FORM),
        ("a.csv", "a document without a header\nanother one\n", 'no "text"'),
        ("a.jsonl", '{"content": "x", "id": 1}\n', 'no "text": '),
        ("a.jsonl", "plain text\n", "broken JSON"),
        ("a.json", '{\n  "data": [{"text": "a"}]\n}\n', "broken JSON"),
        ("a.jsonl", "天地玄黄\n".encode("gbk"), "not valid UTF-8"),
        ("a.csv", "text\n天地\n".encode("utf-16"), "holds UTF-16, expected text in UTF-8"),
        ("a.jsonl", b"PAR1....PAR1", "holds Parquet"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00garbage", "is not a readable xz file"),
        ("a.parquet", b"PAR1", "ends in '.parquet'; expected .jsonl .json"),
    ],
)
def test_another_format_is_an_error_that_names_it(tmp_path: Path, name, content, part) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        list(read_documents(path, Tally()))
    assert part in str(error.value) and str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone.jsonl is not a file"):
        list(read_documents(tmp_path / "gone.jsonl", Tally()))


def test_the_format_is_judged_early(tmp_path: Path) -> None:
    """A wrong file of any size is told after its first batch, not at its end."""
    path = write(tmp_path, "a.jsonl", '{"content": "x"}\n' * 200_000 + '{"text": "good"}\n')
    tally = Tally()
    with pytest.raises(ValueError, match="none of the first"):
        list(read_documents(path, tally))
    assert tally.read < 100_000


@given(st.lists(st.text(max_size=30), max_size=20), st.integers(1, 60))
@settings(max_examples=30)  # each writes a file
def test_cutting_into_batches_loses_no_line(tmp_path_factory, texts, n_bytes) -> None:
    texts = [*texts, "end"]
    path = write(
        tmp_path_factory.mktemp("cut"), "a.jsonl", json_lines(*({"text": t} for t in texts))
    )
    whole, _ = read(read_documents, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "BATCH_BYTES", n_bytes)
        cut, tally = read(read_documents, path)
    cleaned = [text.replace("\0", "") for text in texts]
    assert cut == whole == [text for text in cleaned if text.strip()]
    assert tally.read == len(texts)


# --- JSON arrays ---


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def array_elements(path: Path) -> tuple[list, Tally]:
    tally = Tally()
    values = []
    for batch in records.read_batches(path):
        values += [value for _, value in records.read_records(batch, tally)]
    return values, tally


@given(
    st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=12),
    st.sampled_from([None, 0, 4]),
    st.booleans(),
    st.integers(1, 50),
)
@settings(max_examples=50)
def test_an_array_read_in_pieces_is_what_json_reads(
    tmp_path_factory, values, indent, ensure_ascii, n_bytes
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ensure_ascii)
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "BATCH_BYTES", n_bytes)
        read_values, tally = array_elements(path)
    assert read_values == json.loads(text)
    assert not tally.skipped


@pytest.mark.parametrize("indent", [None, 2])
def test_a_broken_element_costs_itself_only(tmp_path: Path, indent) -> None:
    rows = [{"conversations": [{"a": i}, {"b": i}], "id": i} for i in range(6)]
    text = json.dumps(rows, indent=indent)
    text = text.replace('"id": 2', '"id" 2')
    values, tally = array_elements(write(tmp_path, "a.json", text))
    assert [value["id"] for value in values if "id" in value] == [0, 1, 3, 4, 5]
    assert tally.skipped["broken JSON"].count >= 1
    assert "#3 (Expecting ':' delimiter" in tally.report()


def test_an_element_nested_too_deeply_is_broken(tmp_path: Path) -> None:
    text = '[{"text": "a"},\n{"text": ' + "[" * 100_000 + '},\n{"text": "b"}]'
    rows, tally = read(read_documents, write(tmp_path, "a.json", text))
    assert rows == ["a", "b"]
    assert counts(tally.skipped) == {"broken JSON": 1}


def test_an_array_cut_off_gives_its_whole_elements(tmp_path: Path) -> None:
    text = json.dumps([{"text": str(i)} for i in range(9)], indent=1)
    rows, tally = read(read_documents, write(tmp_path, "a.json", text[: text.index('"7"') + 2]))
    assert rows == list("0123456")
    assert counts(tally.skipped) == {"broken JSON": 1, 'the array has no end ("]")': 1}


def test_text_after_an_array_is_not_lost_silently(tmp_path: Path) -> None:
    text = '[{"text": "a"},\n{"text": "b"}]\n[{"text": "c"},\n{"text": "d"}]'
    rows, tally = read(read_documents, write(tmp_path, "a.json", text))
    assert rows[:2] == ["a", "b"] and tally.skipped


# --- conversations ---


CONVERSATIONS = {
    "raw": (
        {"instruction": "", "input": "你好", "output": "好。", "history": []},
        turns("你好", "好。"),
    ),
    "history": (
        {"input": "3", "output": "4", "history": [["1", "2"]]},
        turns("1", "2", "3", "4"),
    ),
    "instruction beside a history": (
        {"instruction": "扮演李白", "input": "3", "output": "4", "history": [["1", "2"]]},
        turns("1", "2", "3", "4", system="扮演李白"),
    ),
    "instruction alone beside a history": (
        {"instruction": "3", "input": "", "output": "4", "history": [["1", "2"]]},
        turns("1", "2", "3", "4"),
    ),
    "alpaca": ({"instruction": "翻译", "input": "cat", "output": "猫"}, turns("翻译\ncat", "猫")),
    "alpaca without input": ({"instruction": "你好", "output": "好"}, turns("你好", "好")),
    "null fields": (
        {"instruction": None, "input": "你好", "output": "好", "history": None, "system": None},
        turns("你好", "好"),
    ),
    "q and a": ({"q": "你好", "a": "好", "history": ""}, turns("你好", "好")),
    "input with q": ({"input": "你", "q": "好", "output": "再", "a": "见"}, turns("你好", "再见")),
    "system": ({"system": "S", "q": "你好", "a": "好"}, turns("你好", "好", system="S")),
    "messages": ({"messages": turns("1", "2", "3", "4", system="S")}, turns(*"1234", system="S")),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]},
        turns("1", "2"),
    ),
    "sharegpt with a system field": (
        {
            "system": "S",
            "conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}],
        },
        turns("1", "2", system="S"),
    ),
    "history as JSON text": ({"q": "3", "a": "4", "history": '[["1", "2"]]'}, turns(*"1234")),
    "history as Python text": ({"q": "3", "a": "4", "history": "[['1', '2']]"}, turns(*"1234")),
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_every_form_of_conversation(tmp_path: Path, form: str) -> None:
    row, messages = CONVERSATIONS[form]
    for name, content in {"a.jsonl": json_lines(row), "a.json": json.dumps([row])}.items():
        rows, tally = read(read_conversations, write(tmp_path, name, content))
        assert rows == [messages]
        assert not tally.changed


def test_texts_come_out_as_they_stood(tmp_path: Path) -> None:
    question, answer = '  "\\N" NA\r\n', "nan\t\\n ’ \u2028 </s><s>assistant\n"
    row = {"input": question, "output": answer, "history": []}
    rows, _ = read(read_conversations, write(tmp_path, "a.jsonl", json_lines(row)))
    assert rows == [turns(question, answer)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input": "问"}, 'no answer ("output" or "a")'),
        ({"output": "答"}, 'no question ("input", "q" or "instruction")'),
        ({"input": "", "output": "答"}, "empty question"),
        ({"input": "问", "output": " \n"}, "empty answer"),
        ({"input": "问", "output": 5}, '"output" is not a string'),
        ({"input": ["问"], "output": "答"}, '"input" is not a string'),
        ({"input": "问", "output": "答", "history": [["1"]]}, "history is not a list of"),
        ({"input": "问", "output": "答", "history": [["1", None]]}, "history is not a list of"),
        ({"input": "问", "output": "答", "history": ["12"]}, "history is not a list of"),
        ({"input": "问", "output": "答", "history": {"1": "2"}}, "history is not a list"),
        ({"input": "问", "output": "答", "history": "[1"}, "history is neither JSON nor"),
        ({"input": "问", "output": "答", "history": "(" * 9999}, "history is neither JSON nor"),
        ({"input": "问", "output": "答", "history": [["", "2"]]}, "empty question"),
        ({"messages": []}, "no question"),
        ({"messages": "hello"}, '"messages" is not a list'),
        ({"messages": ["hello"]}, "not an object with fields"),
        ({"messages": [{"role": "bot?", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": [1]}]}, "a message is not text"),
        ({"messages": [{"role": "user", "content": "问"}]}, "no answer"),
        ({"messages": [{"role": "system", "content": "问"}]}, "no question"),
        ({"messages": turns("1", "2") + turns("3", "4", system="S")}, "system text is not first"),
    ],
)
def test_a_bad_conversation_is_counted(tmp_path: Path, row, reason) -> None:
    good = {"input": "问", "output": "答"}
    path = write(tmp_path, "a.jsonl", json_lines(good, row, good))
    rows, tally = read(read_conversations, path)
    assert rows == [turns("问", "答")] * 2
    assert len(tally.skipped) == 1 and next(iter(tally.skipped)).startswith(reason)
    assert next(iter(tally.skipped.values())).examples[0][0] == Place(str(path), 2)


@pytest.mark.parametrize(
    ("roles", "expected", "change"),
    [
        ("uau", turns("0", "1"), "question without an answer cut off at the end"),
        ("aua", turns("1", "2"), "opening answer to no question left out"),
        ("saua", turns("2", "3", system="0"), "opening answer to no question left out"),
        ("uuaa", turns("0\n1", "2\n3"), "messages of one speaker joined"),
    ],
)
def test_turns_are_put_in_order_and_it_is_counted(tmp_path, roles, expected, change) -> None:
    names = {"u": "human", "a": "gpt", "s": "system"}
    turns_ = [{"from": names[role], "value": str(i)} for i, role in enumerate(roles)]
    path = write(tmp_path, "a.jsonl", json_lines({"conversations": turns_}))
    rows, tally = read(read_conversations, path)
    assert rows == [expected]
    assert set(tally.changed) == {change}


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=3))))
@settings(max_examples=50)
def test_a_conversation_is_well_formed_or_counted(tmp_path_factory, pairs) -> None:
    row = {"messages": [{"role": role, "content": text} for role, text in pairs]}
    good = {"messages": turns("q", "a")}
    path = write(tmp_path_factory.mktemp("sft"), "a.jsonl", json_lines(row, good))
    rows, _ = read(read_conversations, path)
    for messages in rows:
        roles = [message["role"] for message in messages]
        if roles[0] == "system":
            del roles[0]
        assert roles and roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in messages)


def test_history_cells_are_read_and_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    cells = [
        f"__import__('pathlib').Path({str(trap)!r}).touch()",
        f"[[__import__('pathlib').Path({str(trap)!r}).touch(), 'a']]",
        "[['1', '2'], ('3', '4\\n\\'5\\'')]",  # v1 wrote str(list)
        "[]",
        "",
        "[['a' * 9, 'b']]",
        "[['1', '2']" + ", ['1', '2']" * 150_000 + "]",
    ]
    quoted = "".join('"' + cell.replace('"', '""') + '",q,a\n' for cell in cells)
    rows, tally = read(read_conversations, write(tmp_path, "a.csv", "history,q,a\n" + quoted))
    assert not trap.exists()
    assert rows == [turns("1", "2", "3", "4\n'5'", "q", "a"), turns("q", "a"), turns("q", "a")]
    assert counts(tally.skipped) == {
        "history is neither JSON nor a Python list": 3,
        "history of more than 1 MiB is not JSON": 1,
    }


def test_tables_that_pandas_wrote_for_v1(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    history = [["你'好\"", "a\\b\nc"], ["NA", "\\N"]]
    frame = pandas.DataFrame(
        {"history": [history, []], "q": ["  3,4\r\n", "nan"], "a": ['say "hi"', "\\n"]}
    )
    path = tmp_path / "sft_data.csv"
    frame.to_csv(path, index=False, lineterminator="\r\n")
    rows, tally = read(read_conversations, path)
    flat = [text for pair in history for text in pair]
    assert rows == [turns(*flat, "  3,4\r\n", 'say "hi"'), turns("nan", "\\n")]
    assert not tally.skipped and not tally.changed


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text\nhello\n"),
        ("a.jsonl", '{"text": "hello"}\n'),
        ("a.txt", "hello\n"),
    ],
)
def test_files_without_conversations_are_refused(tmp_path: Path, name, content) -> None:
    with pytest.raises(ValueError, match="none of the first 1 records.* columns history,q,a"):
        list(read_conversations(write(tmp_path, name, content), Tally()))


# --- preferences ---


PAIR = {"chosen": "好", "rejected": "坏"}
SHAREGPT = [
    {"from": "system", "value": "S"},
    {"from": "human", "value": "1"},
    {"from": "gpt", "value": "2"},
    {"from": "human", "value": "3"},
]
PREFERENCES = {
    "prompt": ({"prompt": "问", **PAIR}, "问"),
    "huozi": ({"prompt": "问", "chosen": "好", "reject": "坏"}, "问"),
    "message lists": (
        {
            "prompt": turns("1", "2", "3"),
            "chosen": [{"role": "assistant", "content": "好"}],
            "rejected": [{"role": "assistant", "content": "坏"}],
        },
        turns("1", "2", "3"),
    ),
    "one message": ({"prompt": turns("问"), **PAIR}, "问"),
    "whole conversations": (
        {
            "prompt": "3",
            "chosen": turns("1", "2", "3", "好"),
            "rejected": turns("1", "2", "3", "坏"),
        },
        turns("1", "2", "3"),
    ),
    "no prompt": ({"chosen": turns("问", "好"), "rejected": turns("问", "坏")}, "问"),
    "sharegpt": (
        {
            "conversations": SHAREGPT,
            "chosen": {"from": "gpt", "value": "好"},
            "rejected": {"from": "gpt", "value": "坏"},
        },
        turns("1", "2", "3", system="S"),
    ),
    "sharegpt, plain strings": ({"conversations": SHAREGPT[1:2], **PAIR}, "1"),
    "alpaca comparison": ({"instruction": "翻译", "input": "cat", **PAIR}, "翻译\ncat"),
    "alpaca comparison with a system field": (
        {"system": "S", "instruction": "翻译", "input": "", **PAIR},
        turns("翻译", system="S"),
    ),
}


@pytest.mark.parametrize("form", PREFERENCES)
def test_every_form_of_preference(tmp_path: Path, form: str) -> None:
    row, prompt = PREFERENCES[form]
    for name, content in {"a.jsonl": json_lines(row), "a.json": json.dumps([row])}.items():
        rows, _ = read(read_preferences, write(tmp_path, name, content))
        assert rows == [{"prompt": prompt, **PAIR}]
        again = write(tmp_path, "train_data.json", json.dumps(rows))
        assert read(read_preferences, again)[0] == rows  # what is written is read back


def test_ranked_answers_give_every_ordered_pair(tmp_path: Path) -> None:
    row = {
        "instruction": "问",
        "input": "",
        "output": ["1st", "2nd", "3rd"],
        "history": [["a", "b"]],
    }
    rows, tally = read(read_preferences, write(tmp_path, "a.json", json.dumps([row])))
    pairs = [(pair["chosen"], pair["rejected"]) for pair in rows]
    assert pairs == [("1st", "2nd"), ("1st", "3rd"), ("2nd", "3rd")]
    assert all(pair["prompt"] == turns("a", "b", "问") for pair in rows)
    assert (tally.read, tally.kept) == (1, 3)


def test_ranked_answers_are_bounded(tmp_path: Path) -> None:
    row = {"instruction": "问", "output": [str(i) for i in range(1000)]}
    rows, tally = read(read_preferences, write(tmp_path, "a.json", json.dumps([row])))
    assert len(rows) == 16 * 15 / 2
    assert counts(tally.changed) == {"ranked answers after the first 16 left out": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"第一行\n第二行\nNo. 3", "第一行\n第二行\nNo. 3"),
        (r"a\\nb", r"a\\nb"),  # an escaped backslash before an n
        ('real\nbreak and print("\\n")', 'real\nbreak and print("\\n")'),
        (r"$\nabla f \neq 0$", r"$\nabla f \neq 0$"),
        (r"see\nnext\nnot", "see\nnext\nnot"),
    ],
)
def test_huozi_escapes_become_line_breaks_where_they_are_escapes(tmp_path, text, expected) -> None:
    huozi = {"prompt": text, "chosen": text, "reject": "坏"}
    plain = {"prompt": text, "chosen": text, "rejected": "坏"}
    rows, _ = read(read_preferences, write(tmp_path, "a.jsonl", json_lines(huozi, plain)))
    assert rows[0] == {"prompt": expected, "chosen": expected, "rejected": "坏"}
    assert rows[1] == plain


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "问", "chosen": "好"}, 'no "rejected" or "reject"'),
        ({"prompt": "问", "rejected": "坏"}, 'no "chosen"'),
        (PAIR, 'no "prompt", "conversations" or "instruction"'),
        ({"prompt": "", **PAIR}, "empty question"),
        ({"prompt": "问", "chosen": "好", "rejected": " "}, "empty answer"),
        ({"prompt": "问", "chosen": "好", "rejected": "好"}, "chosen and rejected are the same"),
        ({"prompt": "问", "chosen": 1, "rejected": "坏"}, '"chosen" is not a list'),
        ({"prompt": 7, **PAIR}, '"prompt" is not a string'),
        ({"prompt": "问", "chosen": [], "rejected": []}, '"chosen" does not end with an answer'),
        ({"prompt": turns("1", "2"), **PAIR}, "the prompt ends with an answer"),
        (
            {"chosen": turns("1", "好"), "rejected": turns("2", "坏")},
            "chosen and rejected answer different questions",
        ),
        ({"instruction": "问", "output": ["好"]}, "fewer than two ranked answers"),
        ({"instruction": "问", "output": ["好", 2]}, "a ranked answer is not text"),
        ({"instruction": "问", "output": ["好", "好"]}, "chosen and rejected are the same"),
    ],
)
def test_a_bad_preference_is_counted(tmp_path: Path, row, reason) -> None:
    good = {"prompt": "问", **PAIR}
    path = write(tmp_path, "a.jsonl", json_lines(good, row, good))
    rows, tally = read(read_preferences, path)
    assert rows == [good, good]
    assert counts(tally.skipped) == {reason: 1}


# --- the tally ---


def test_tallies_of_parts_add_up_to_the_whole(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', "", "{", '{"text": 1}', '{"text": "b\\u0000"}'] * 4
    whole = read(read_documents, write(tmp_path, "a.jsonl", "\n".join(lines) + "\n"))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "BATCH_BYTES", 40)
        parts = read(read_documents, tmp_path / "a.jsonl")[1]
    assert parts == whole
    assert (whole.read, whole.kept, whole.n_skipped) == (20, 8, 12)
    assert f"blank line: {tmp_path}/a.jsonl:2, :7, :12, …" in whole.report()
