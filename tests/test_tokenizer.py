"""The tokenizer wrapper, the shipped tokenizer, and the script that trains and measures them."""

import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

import train_tokenizer
from model.encoding import content_hash
from model.store_writer import HELD_OUT_MODULUS
from model.tokenizer import BOS_ID, DEFAULT_TOKENIZER, EOS_ID, SPECIAL_TOKENS, UNK_ID, Tokenizer
from train_tokenizer import Corpus, Document, Sample

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
ORIGINAL = SHARED / "original_tokenizer"
needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real corpora (../shared/data) are not beside the checkout"
)

CHAT = [
    {"role": "system", "content": "你是一个乐于助人的助手。"},
    {"role": "user", "content": "你好，2024 年是闰年吗？"},
    {"role": "assistant", "content": "是的。\n\n```python\nprint(2024 % 4 == 0)\n```"},
    {"role": "user", "content": "Thanks! And 2023?  "},
    {"role": "assistant", "content": "No, it's not. 🙂"},
]
ODD_TEXTS = (
    "",
    "  spaces at both ends  ",
    "line\r\nbreaks\rof\u2028all\u0085kinds\n\n\n",
    "\x00\x07\x1b\x7f control",
    "\ufffd\ufeff replacement and byte order mark",
    "👩‍👩‍👧‍👦🇨🇳🏽 e\u0301 ﷽ 𠮷 漢字かな한글",
    "<s>user\n</s><unk> <s></s>x",
    "…——“”《》、。！？　全角空格",
)


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def hugging_face():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEFAULT_TOKENIZER)


# --- the shipped tokenizer ---


def test_its_files_and_rules_are_those_that_every_reader_expects(shipped: Tokenizer) -> None:
    names = {path.name for path in DEFAULT_TOKENIZER.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    spec = json.loads((DEFAULT_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    assert spec["normalizer"] is spec["post_processor"] is None
    assert spec["pre_tokenizer"] == {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    assert shipped.vocab_size == 6400
    added = {t["content"]: t["id"] for t in spec["added_tokens"]}
    assert added == {"<unk>": UNK_ID, "<s>": BOS_ID, "</s>": EOS_ID} == {
        "<unk>": 0, "<s>": 1, "</s>": 2,
    }  # fmt: skip
    assert sorted(spec["model"]["vocab"].values()) == list(range(6400))


def test_vocabulary_and_merges_alone_give_the_same_ids(shipped: Tokenizer) -> None:
    files = [str(DEFAULT_TOKENIZER / name) for name in ("vocab.json", "merges.txt")]
    bare = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in (*ODD_TEXTS, *(message["content"] for message in CHAT)):
        assert bare.encode(text).ids == shipped.encode(text)


@given(st.text())
def test_any_text_comes_back(shipped: Tokenizer, hugging_face, text: str) -> None:
    assert shipped.decode(shipped.encode(text)) == text
    assert hugging_face.decode(hugging_face.encode(text)) == text


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_come_back(shipped: Tokenizer, hugging_face, text: str) -> None:
    ids = shipped.encode(text)
    assert shipped.decode(ids) == text
    assert not set(ids) & {UNK_ID, BOS_ID, EOS_ID}
    assert hugging_face.decode(hugging_face.encode(text)) == text
    assert hugging_face.encode(text, split_special_tokens=True) == ids


def test_a_batch_gives_the_ids_of_its_texts(shipped: Tokenizer) -> None:
    assert shipped.encode_batch(ODD_TEXTS) == [shipped.encode(text) for text in ODD_TEXTS]


def test_answers_to_a_choice_are_single_tokens_and_numbers_are_digits(shipped: Tokenizer) -> None:
    assert all(len(shipped.encode(letter)) == 1 for letter in "ABCD")
    assert len(shipped.encode("2024")) == 4
    assert len(shipped.encode(" 31415926535")) == 12  # the space is a token of its own


@pytest.mark.slow
def test_transformers_loads_it_without_a_warning() -> None:
    program = (
        "import sys, transformers; t = transformers.AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(t.bos_token_id, t.eos_token_id, t.unk_token_id, t.pad_token_id, len(t));"
        "t.apply_chat_template([{'role': 'user', 'content': '你好'}] * 2000)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program, str(DEFAULT_TOKENIZER)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "info", "HF_HUB_OFFLINE": "1"},
    )
    assert (done.stdout.split(), done.returncode) == (["1", "2", "0", "0", "6400"], 0)
    ours = [line for line in done.stderr.splitlines() if re.search("token|template", line, re.I)]
    assert not ours, done.stderr


def documents_of_shard_5() -> Iterator[str]:
    path = SHARED / "pretrain" / "seq_monkey_format_05.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        yield from (json.loads(line)["text"] for line in islice(lines, 1000))


def held_out_chats() -> Iterator[str]:
    for document in train_tokenizer.read_all([str(SHARED / "sft" / "sft_data_zh.jsonl.xz")]):
        if content_hash("\x1e".join(document.contents)) % HELD_OUT_MODULUS == 0:
            yield from document.contents


@needs_data
@pytest.mark.parametrize(
    ("texts", "at_least"),
    [(documents_of_shard_5, 1.1), pytest.param(held_out_chats, 1.08, marks=pytest.mark.slow)],
)
def test_it_needs_fewer_tokens_for_unseen_chinese_than_the_original(
    shipped: Tokenizer, texts, at_least: float
) -> None:
    chinese = [text for text in texts() if Document((text,)).language == "Chinese"]
    ours, theirs = (sum(map(len, t.encode_batch(chinese))) for t in (shipped, Tokenizer(ORIGINAL)))
    assert theirs / ours > at_least  # measured 1.16 and 1.12


@needs_data
@pytest.mark.soak
def test_the_documented_command_makes_it_again(tmp_path: Path) -> None:
    shards = [SHARED / "pretrain" / f"seq_monkey_format_0{n}.jsonl.xz" for n in range(5)]
    data = [*shards, SHARED / "sft" / "sft_data_zh.jsonl.xz"]
    done = run("--data_path", *data, "--output_dir", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    for path in DEFAULT_TOKENIZER.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


# --- the chat text ---


@pytest.mark.parametrize("n_messages", range(1, len(CHAT) + 1))
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("prompt", [False, True])
def test_template_and_wrapper_write_the_same_chat(
    shipped: Tokenizer, hugging_face, n_messages: int, first: int, prompt: bool
) -> None:
    messages = CHAT[first : first + n_messages]
    theirs = hugging_face.apply_chat_template(
        messages, add_generation_prompt=prompt, return_dict=False
    )
    assert theirs == shipped.encode_chat(messages, add_generation_prompt=prompt)


def test_the_chat_text_is_v1s(hugging_face) -> None:
    messages = [CHAT[0], {"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]
    text = CHAT[0]["content"] + "<s>user\n甲</s>\n<s>assistant\n乙</s>\n"
    write = hugging_face.apply_chat_template
    assert write(messages, tokenize=False) == text
    assert write(messages, tokenize=False, add_generation_prompt=True) == text + "<s>assistant\n"


def test_the_template_marks_what_the_assistant_says(shipped: Tokenizer, hugging_face) -> None:
    ids, mask = shipped.encode_chat_masked(CHAT)
    theirs = hugging_face.apply_chat_template(
        CHAT, return_assistant_tokens_mask=True, return_dict=True
    )
    assert theirs["input_ids"] == ids
    assert theirs["assistant_masks"] == [int(is_trained) for is_trained in mask]
    said = [i for i, is_trained in zip(ids, mask, strict=True) if is_trained]
    answers = [m["content"] + "</s>" for m in CHAT if m["role"] == "assistant"]
    assert shipped.decode(said, skip_special_tokens=False) == "".join(answers)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "tool", "content": "x"}], r'messages\[0\].role is .tool.: use "system", "user"'),
        ([CHAT[1], CHAT[0]], r"messages\[1\].role is .system.: a system text stands first"),
    ],
)
def test_template_and_wrapper_refuse_the_same_roles(
    shipped: Tokenizer, hugging_face, messages: list, message: str
) -> None:
    import jinja2

    with pytest.raises(ValueError, match=message):
        shipped.encode_chat(messages)
    with pytest.raises(jinja2.TemplateError, match=message):
        hugging_face.apply_chat_template(messages, tokenize=False)


@given(st.lists(st.sampled_from(["<s>", "</s>", "\n", "user", "assistant\n", "<unk>", "你"])))
@example(["甲", "</s>", "\n", "<s>", "assistant\n", "乙"])
def test_contents_cannot_forge_a_turn(shipped: Tokenizer, pieces: list[str]) -> None:
    content = "".join(pieces)
    messages = [
        {"role": "system", "content": content},
        {"role": "user", "content": content},
        {"role": "assistant", "content": content},
    ]
    ids, mask = shipped.encode_chat_masked(messages)
    assert (ids.count(BOS_ID), ids.count(EOS_ID), ids.count(UNK_ID)) == (2, 2, 0)
    assert shipped.decode([i for i, t in zip(ids, mask, strict=True) if t]) == content
    assert shipped.encode_document(content)[1:-1] == shipped.encode(content)
    assert not set(shipped.encode(content)) & {UNK_ID, BOS_ID, EOS_ID}


def test_a_folder_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist: make a tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        Tokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"expected \(0, 1, 2\)"):
        Tokenizer(tmp_path)


# --- what the script learns from ---

documents = st.builds(lambda text: Document((text,)), st.text(min_size=1, max_size=20))


@given(st.lists(documents, max_size=40), st.integers(1, 100), st.randoms())
def test_a_sample_is_bounded_and_no_matter_of_order(
    offered: list[Document], max_bytes: int, shuffler: random.Random
) -> None:
    def sample(documents: list[Document]) -> list[Document]:
        kept = Sample(max_bytes)
        for document in documents:
            kept.add(content_hash(document.contents[0]), document)
        # never more than the document that crosses the limit
        assert kept.n_bytes <= max_bytes + max((size(d) for d in documents), default=0)
        assert kept.n_bytes >= min(max_bytes, sum(map(size, documents)))
        return list(kept.documents())

    def size(document: Document) -> int:
        return len(document.contents[0].encode())

    shuffled = shuffler.sample(offered, len(offered))
    assert sample(shuffled) == sample(offered)


def test_what_training_holds_out_is_not_learnt() -> None:
    corpus = Corpus(1_000_000)
    texts = [f"第{n}篇文章" for n in range(2000)]
    for text in texts:
        corpus.add(Document((text,)))
    held_out = {text for text in texts if content_hash(text) % HELD_OUT_MODULUS == 0}
    assert held_out and set(corpus.texts(0.25)) == set(texts) - held_out
    assert {document.contents[0] for document in corpus.held_out.documents()} == held_out


@pytest.mark.parametrize(
    ("n_chinese", "n_english", "asked", "share"),
    [
        (3000, 1000, 0.5, 0.5),  # English repeated
        (3000, 100, 0.5, 400 / 3400),  # at most four times
        (1000, 3000, 0.25, 0.75),  # there is enough of it
        (3000, 1000, 0, 0.25),
        (3000, 0, 0.25, 0.0),
        (0, 3000, 0.25, 1.0),
    ],
)
def test_english_gets_its_share(n_chinese: int, n_english: int, asked: float, share: float) -> None:
    corpus = Corpus(1_000_000)
    for n in range(n_chinese):
        corpus.add(Document((f"汉字{n:04}甲乙",)))  # 16 bytes
    for n in range(n_english):
        corpus.add(Document((f"twelve words{n:04}",)))
    texts = list(corpus.texts(asked))
    found = sum(text.isascii() for text in texts) / len(texts)
    assert n_chinese or len(texts) == len(set(texts))  # nothing to balance, nothing repeated
    assert found == pytest.approx(share, abs=0.02)
    assert len({text for text in texts if not text.isascii()}) >= 0.98 * n_chinese


def test_dialogues_are_learnt_as_the_template_writes_them() -> None:
    corpus = Corpus(1_000_000)
    for n in range(10):
        corpus.add(Document(("你是医生", f"问{n}", f"答{n}"), ("system", "user", "assistant")))
    texts = list(corpus.texts(0.25))
    assert texts.count("你是医生") == 1  # not once a conversation
    assert texts.count("user\n") == texts.count("assistant\n") == 10


# --- the script ---


def run(*arguments: object, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "train_tokenizer.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | env,
    )


def sentences(seed: int, n: int) -> list[str]:
    chooser = random.Random(seed)
    words = "今天 天气 很好 我们 一起 学习 语言 模型 the cat sat on a mat 2024 年".split()
    return ["".join(chooser.choices(words, k=12)) + "。" for _ in range(n)]


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(0, 1200)))
    return path


@pytest.fixture
def dialogues_file(tmp_path: Path) -> Path:
    path = tmp_path / "sft.jsonl"
    rows = [
        {"instruction": "", "input": asked, "output": answered, "history": [["在吗", "在的"]]}
        for asked, answered in zip(sentences(1, 100), sentences(2, 100), strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_the_same_text_gives_the_same_tokenizer(
    tmp_path: Path, corpus_file: Path, dialogues_file: Path
) -> None:
    packed = tmp_path / "reversed.jsonl.xz"
    lines = corpus_file.read_bytes().splitlines(keepends=True)
    packed.write_bytes(lzma.compress(b"".join(reversed(lines))))
    runs = {
        "one": ((corpus_file, dialogues_file), {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}),
        "two": ((dialogues_file, packed), {"RAYON_NUM_THREADS": "4", "PYTHONHASHSEED": "2"}),
    }
    for name, (files, env) in runs.items():
        output = tmp_path / "made" / name
        done = run("--data_path", *files, "--output_dir", output, "--vocab_size", 380, **env)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in output.parent.iterdir()) == ["one", "two"]
    assert {path.name for path in output.iterdir()} == set(train_tokenizer.TOKENIZER_FILES)
    for path in output.iterdir():
        assert path.read_bytes() == (tmp_path / "made" / "one" / path.name).read_bytes()
    made = Tokenizer(output)
    assert made.vocab_size == 380
    for text in ODD_TEXTS:
        assert made.decode(made.encode(text)) == text


def test_measuring_counts_what_it_says(
    tmp_path: Path, corpus_file: Path, shipped: Tokenizer
) -> None:
    chats = tmp_path / "chats.csv"
    chats.write_text('history,q,a\n"[[""早"", ""你好""]]",<s>好吗</s>,再见\n', encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    done = run("--compare", DEFAULT_TOKENIZER, "--held_out", corpus_file, chats)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    cells = {}
    for line in done.stdout.splitlines():
        if line.startswith("|"):
            name, *values = (cell.strip() for cell in line.strip("|").split("|"))
            cells[name] = values
    texts, messages = sentences(0, 1200), ["早", "你好", "<s>好吗</s>", "再见"]
    n_tokens = [len(ids) for ids in shipped.encode_batch([*texts, *messages])]
    used = {i for text in (*texts, *messages) for i in shipped.encode(text)}
    everything = "".join((*texts, *messages))
    ratios = [len(whole) / sum(n_tokens) for whole in (everything, everything.encode())]
    ratio = "{:.3f} / {:.3f}".format(*ratios)
    assert cells["all"] == ["1,201", f"{len(everything):,}", ratio]
    assert cells["chats, mixed"][:2] == ["1", "14"]
    assert cells["ids that occur"][2] == f"{len(used)} of 6,397 ({len(used) / 6397:.1%})"
    assert cells["ids that never occur"][2] == f"{6397 - len(used):,}"


def test_bad_lines_are_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": \n{"content": "x"}\n\xff\xfe\n{"text": "two"}\n')
    done = run("--held_out", path, "--compare", DEFAULT_TOKENIZER)
    assert done.returncode == 0, done.stderr
    assert "read 5 records; kept 2" in done.stdout and "skipped 3" in done.stdout
    for line in (2, 3, 4):
        assert f"{path}:{line}" in done.stdout


def test_too_little_text_is_said_and_still_makes_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("你好 你好\n再见 再见\n", encoding="utf-8")
    done = run("--data_path", path, "--output_dir", tmp_path / "made", "--vocab_size", 300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"warning: the text gave only 2\d\d tokens of --vocab_size 300", done.stderr)
    assert "give --held_out" in done.stdout  # nothing to measure on
    assert Tokenizer(tmp_path / "made").decode(Tokenizer(tmp_path / "made").encode("é")) == "é"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "nothing to do: --output_dir DIR trains, --compare DIR... measures"),
        (["--output_dir", "TMP/x"], 2, "--output_dir needs --data_path FILE..."),
        (["--compare", "TMP"], 2, "nothing to measure on"),
        (["--output_dir", "TMP/x", "--data_path", "TMP/a", "--vocab_size", "100"], 2, "259 (256"),
        (["--output_dir", "TMP/x", "--data_path", "TMP/a", "--vocab_size", "70000"], 2, "to 65536"),
        (["--output_dir", "TMP/x", "--data_path", "TMP/a", "--english_share", "1"], 2, "0 to 0.9"),
        (["--output_dir", "TMP/x", "--data_path", "TMP/a", "--held_out", "TMP/a"], 2, "learn from"),
        (["--output_dir", "TMP/x", "--data_path", "TMP/b.jsonl"], 1, "b.jsonl does not exist"),
        (["--output_dir", "TMP/x", "--data_path", "TMP/a"], 1, "expected .jsonl"),
        (["--output_dir", "TMP/x", "--data_path", "TMP/other.jsonl"], 1, '{"text": …} a line'),
        (["--output_dir", "TMP/x", "--data_path", "TMP/empty.jsonl"], 1, "holds no text to learn"),
        (["--output_dir", "TMP", "--data_path", "TMP/a"], 1, "holds 'a', which is no tokenizer"),
        (["--output_dir", "TMP/a", "--data_path", "TMP/a"], 1, "is a file: name a folder"),
        (["--output_dir", "TMP/a/b", "--data_path", "TMP/a"], 1, "cannot be made"),
        (["--output_dir", "SHIPPED", "--data_path", "TMP/a"], 1, "replace it with --overwrite"),
        (["--compare", "TMP", "--held_out", "TMP/a"], 1, "tokenizer.json does not exist"),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_message(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "a").write_text("not a corpus")
    (tmp_path / "other.jsonl").write_text('{"content": "x"}\n' * 3)
    (tmp_path / "empty.jsonl").touch()
    places = {"TMP": str(tmp_path), "SHIPPED": str(DEFAULT_TOKENIZER)}
    before = sorted(tmp_path.rglob("*"))
    done = run(*(re.sub("TMP|SHIPPED", lambda m: places[m[0]], word) for word in arguments))
    assert done.returncode == code
    assert message in done.stderr and "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_replacing_needs_the_flag_and_leaves_only_the_new_one(
    tmp_path: Path, corpus_file: Path
) -> None:
    output = tmp_path / "made" / "tokenizer"
    shutil.copytree(DEFAULT_TOKENIZER, output)
    (output / "special_tokens_map.json").write_text("{}")  # as older versions of transformers leave
    arguments = ["--data_path", corpus_file, "--output_dir", output, "--vocab_size", 300]
    assert run(*arguments).returncode == 1
    assert Tokenizer(output).vocab_size == 6400
    done = run(*arguments, "--overwrite", "--compare", output)
    assert done.returncode == 0, done.stderr
    assert "tokenizer (new)" in done.stdout  # beside the one it replaces
    assert Tokenizer(output).vocab_size == 300
    assert {path.name for path in output.iterdir()} == set(train_tokenizer.TOKENIZER_FILES)
    assert [path.name for path in output.parent.iterdir()] == ["tokenizer"]


def test_a_failing_save_leaves_the_old_folder(tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "tokenizer"
    shutil.copytree(DEFAULT_TOKENIZER, output)
    new = tokenizers.Tokenizer.from_file(str(DEFAULT_TOKENIZER / "tokenizer.json"))
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "new":  # between the two moves, the worst moment
            assert not output.exists()
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer.save(new, output)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    assert Tokenizer(output).vocab_size == 6400


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_the_training_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    chooser = random.Random(0)
    path = tmp_path / "text.txt"
    characters = [chr(code) for code in range(0x4E00, 0x5E00)]
    lines = ("".join(chooser.choices(characters, k=2000)) + "\n" for _ in range(500))
    path.write_text("".join(lines), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "train_tokenizer.py", "--data_path", path, "--vocab_size", "60000",
         "--output_dir", tmp_path / "made" / "tokenizer"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not process.stdout.readline().startswith("learning from"):
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=20) == -number
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_special_tokens_are_the_ones_that_the_template_writes() -> None:
    assert set(re.findall("</?s>", train_tokenizer.CHAT_TEMPLATE)) == set(SPECIAL_TOKENS[1:])
    config = (DEFAULT_TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8")
    assert json.loads(config) == train_tokenizer.tokenizer_config()  # made by the script as it is
