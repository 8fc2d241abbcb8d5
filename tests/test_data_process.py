"""data_process.py: what it keeps, whole files or none, and workers that change nothing."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data_process
from model import records, tables
from model.rows import read_conversations, read_documents, read_preferences
from model.tables import Filters, Job, chinese_ratio, convert
from model.tally import Tally

ROOT = Path(__file__).parents[1]
CORPORA = ROOT.parent / "shared" / "data"


def run(*args: object, cwd: Path, **kwargs: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data_process.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **kwargs)


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def read(reader, path: Path) -> list:
    tally = Tally()
    rows = list(reader(path, tally))
    assert not tally.skipped and not tally.changed  # our own tables hold nothing bad
    return rows


CHAT = [
    {"instruction": "", "input": "你好", "output": "好", "history": []},
    {
        "instruction": "扮演李白",
        "input": "再来",
        "output": "NA",
        "history": [["\\N", 'a,"b"\r\nc']],
    },
    {"instruction": "翻译", "input": "cat", "output": "nan"},
]
PAIRS = [{"prompt": "问\\n题", "chosen": "好", "reject": "坏"}]
MORE_PAIRS = [{"instruction": "问", "output": ["1", "2", "3"], "history": [["a", "b"]]}]


# --- without arguments ---


def test_everything_found_is_made(tmp_path: Path) -> None:
    data = tmp_path / "dataset"
    texts = ["天地", " NA ", "\\N\n'\"", "long " * 500]
    raw = write_lines(data / data_process.RAW_NAMES["pretrain"][0], [{"text": t} for t in texts])
    write_lines(data / "sft_data_zh.jsonl", [*CHAT, {"input": "x"}])
    write_lines(data / "dpo" / "b.jsonl", MORE_PAIRS)
    (data / "dpo" / "a.json.gz").write_bytes(gzip.compress(json.dumps(PAIRS).encode()))
    (data / "dpo" / "train_data.json").write_text("an older result, never an input")
    result = run(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert read(read_documents, data / "pretrain_data.csv") == texts
    everything = list(read_conversations(data / "sft_data_zh.jsonl", Tally()))
    assert read(read_conversations, data / "sft_data.csv") == everything
    assert read(read_conversations, data / "sft_data_single.csv") == [everything[0], everything[2]]
    pairs = json.loads((data / "dpo" / "train_data.json").read_text(encoding="utf-8"))
    assert pairs[0] == {"prompt": "问\n题", "chosen": "好", "rejected": "坏"}
    assert len(pairs) == 4 and pairs == read(read_preferences, data / "dpo" / "train_data.json")
    assert "dataset/sft_data.csv: 3 rows" in result.stdout
    assert 'no answer ("output" or "a"): dataset/sft_data_zh.jsonl:4' in result.stdout
    assert not list(data.rglob("*.tmp"))
    raw.unlink()
    again = run("sft", cwd=tmp_path)
    assert again.returncode == 0 and "pretrain" not in again.stdout


@pytest.mark.slow
def test_token_stores_come_to_lie_beside_their_tables(tmp_path: Path) -> None:
    data = tmp_path / "dataset"
    write_lines(data / "raw" / "a.jsonl", [{"text": "天地"}, {"text": "玄黄"}])
    write_lines(data / "sft_data_zh.jsonl", CHAT)
    assert run("sft", cwd=tmp_path).returncode == 0
    assert run("tokens", cwd=tmp_path).returncode == 0
    result = run("tokens", "--input", "dataset/raw/a.jsonl", cwd=tmp_path)
    assert "dataset/raw/a.tokens: 2 documents" in result.stdout
    stores = sorted(path.parent.name for path in data.rglob("manifest.json"))
    assert stores == ["a.tokens", "sft_data.tokens", "sft_data_single.tokens"]
    nothing = run("tokens", "--data_dir", "gone", cwd=tmp_path)
    assert nothing.returncode == 1 and "gone/pretrain_data.csv" in nothing.stderr


def test_nothing_found_says_what_goes_where(tmp_path: Path) -> None:
    result = run(cwd=tmp_path)
    assert result.returncode == 1
    assert "dataset/mobvoi_seq_monkey_general_open_corpus.jsonl" in result.stdout
    assert "dataset/sft_data_zh.jsonl" in result.stdout and "dataset/dpo/*.json" in result.stdout
    assert "no raw files" in result.stderr and "Traceback" not in result.stderr


def test_a_result_of_an_earlier_run_is_no_raw_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "dpo" / "train_data.json", [])
    assert data_process.find_raw(tmp_path, "rl") == []
    for name in ("b.json", "a.jsonl.xz", "b.json.gz"):
        write_lines(tmp_path / "dpo" / name, [])
    names = [path.name for path in data_process.find_raw(tmp_path, "rl")]
    assert names == ["a.jsonl.xz", "b.json"]


# --- flags ---


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["pretrain", "--input", "a.jsonl"], "--input and --output belong together"),
        (["--input", "a.jsonl", "--output", "b.csv"], "--input needs a stage"),
        (["pretrain", "--input", "a.jsonl", "--output", "b.jsonl"], "table ends in .csv"),
        (["rl", "--input", "a.json", "--output", "b.csv"], "the rl table ends in .json"),
        (["rl", "--input", "a.json", "--output", "./a.json"], "is also an input"),
        (["pretrain", "--turns", "single"], "--turns is for sft"),
        (["--workers", "0"], "--workers: 0 is not above 0"),
        (["--min_chars", "-1"], "--min_chars: -1 is below 0"),
        (["--min_chinese_ratio", "50"], "--min_chinese_ratio 50.0: expected 0 to 1"),
        (["tokens", "--max_chars", "9"], "--max_chars is not for tokens"),
        (["dpo"], "invalid choice: 'dpo'"),
    ],
)
def test_wrong_flags_are_told(args, part, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        data_process.main(args)
    assert stop.value.code == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", "", "no row is left"),
        ("a.jsonl", '{"content": "x"}\n', 'no "text": a.jsonl:1 (found: content)'),
        ("a.parquet", "PAR1", "a.parquet ends in '.parquet'"),
        ("b.jsonl", "", "a.jsonl is not a file"),
    ],
)
def test_inputs_that_hold_nothing_are_an_error_without_output(
    tmp_path, name, content, part
) -> None:
    (tmp_path / name).write_text(content)
    given_name = "a.jsonl" if name == "b.jsonl" else name
    result = run("pretrain", "--input", given_name, "--output", "out.csv", cwd=tmp_path)
    assert result.returncode == 1
    assert part in result.stderr and "Traceback" not in result.stderr
    assert sorted(os.listdir(tmp_path)) == [name]


def test_help_needs_nothing_heavy() -> None:
    code = "import sys, data_process; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not {"torch", "numpy", "pandas", "transformers", "tokenizers", "tqdm"} & set(modules)


# --- what is kept ---


EVERYTHING = Filters()


def made(folder: Path, stage: str, rows: list, filters=EVERYTHING, turns="all") -> tuple:
    """Return what ``rows`` become, read back from their table, and the counts."""
    out = folder / f"out{tables.STAGES[stage].suffix}"
    source = write_lines(folder / "raw.jsonl", rows)
    tally, _ = convert([source], [out], Job(stage, filters, (turns,)))
    reader = {"pretrain": read_documents, "sft": read_conversations, "rl": read_preferences}[stage]
    return read(reader, out), tally


def test_by_default_nothing_good_is_left_out(tmp_path: Path) -> None:
    texts = ["a", "你", "English only", "长" * 100_000, "!"]
    assert made(tmp_path, "pretrain", [{"text": text} for text in texts])[0] == texts
    chats = [
        {"input": q, "output": a} for q, a in [("你好", "在"), ("1+1=", "2"), ("hi", "x" * 9000)]
    ]
    assert len(made(tmp_path, "sft", chats)[0]) == 3


@pytest.mark.parametrize(
    ("filters", "kept", "reason"),
    [
        (Filters(min_answer=3), ["abc", "中文abcd", "中文ab"], "shorter than 3 characters"),
        (Filters(max_chars=3), ["ab", "abc", "中"], "longer than 3 characters"),
        (Filters(min_chinese_ratio=0.5), ["中文ab", "中"], "too little Chinese"),
        (Filters(min_chinese_ratio=0.51), ["中"], "too little Chinese"),
    ],
)
def test_filters_keep_what_they_say_and_count_the_rest(tmp_path, filters, kept, reason) -> None:
    texts = ["ab", "abc", "中文abcd", "中文ab", "中"]
    rows, tally = made(tmp_path, "pretrain", [{"text": text} for text in texts], filters)
    assert rows == kept
    (found,) = tally.filtered
    assert found.startswith(reason)
    assert tally.filtered[found].count == len(texts) - len(kept)
    assert (tally.read, tally.kept, tally.n_skipped) == (5, len(kept), 0)


@given(st.text(alphabet=st.sampled_from("中文字鿿一㐀A1，。 \n"), max_size=20))
def test_chinese_ratio_counts_the_characters(text: str) -> None:
    n = sum("\u4e00" <= character <= "\u9fff" for character in text)
    assert chinese_ratio(text) == (n / len(text) if text else 0)


def test_recipe_v1_filters_as_v1_did(tmp_path: Path) -> None:
    def v1_keeps(question: str, answer: str) -> bool:  # from its description in the README of v1
        def share(text: str) -> float:
            return sum("\u4e00" <= c <= "\u9fff" for c in text) / len(text)

        return (
            10 <= len(question) <= 512
            and 5 <= len(answer) <= 512
            and share(question) > 0.5
            and share(answer) > 0.5
        )

    texts = ["中" * n + "a" * m for n in (2, 3, 5, 6, 256, 512) for m in (0, 3, 4, 5, 256)]
    chats = [{"input": q, "output": a} for q in texts for a in texts]
    rows, _ = made(tmp_path, "sft", chats, tables.V1_FILTERS["sft"])
    expected = [(c["input"], c["output"]) for c in chats if v1_keeps(c["input"], c["output"])]
    assert [(m[0]["content"], m[1]["content"]) for m in rows] == expected


def test_flags_go_before_the_recipe() -> None:
    args = data_process.parse_args(["sft", "--recipe", "v1", "--min_chars", "2"])
    filters = data_process.filters_of(args, "sft")
    assert (filters.min_question, filters.min_answer, filters.max_chars) == (2, 2, 512)


@pytest.mark.parametrize(("turns", "kept"), [("all", 3), ("single", 2), ("multi", 1)])
def test_turns_choose_the_conversations(tmp_path: Path, turns, kept) -> None:
    rows, tally = made(tmp_path, "sft", CHAT, turns=turns)
    assert len(rows) == kept
    assert sum(cases.count for cases in tally.filtered.values()) == 3 - kept


# --- values survive the tables ---

# every character but NUL, which no table holds, and lone surrogates, which are no text
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
NASTY = st.sampled_from(
    [
        "\\N",
        "NA",
        "nan",
        "null",
        " x ",
        '"',
        '""',
        "\\",
        "a,b",
        "\r",
        "\r\n",
        "\n\n",
        "\ufeffx",
        "cr\rcr",
        "'",
        "#",
    ]
)
VALUES = st.lists(TEXT | NASTY | st.builds("".join, st.lists(NASTY, max_size=4)), max_size=12)


@settings(max_examples=40, deadline=None)  # each writes files
@example(["cr\rcr", " x", "\ufeffx", "\\", '"'])
@given(VALUES)
def test_documents_survive_for_us_csv_and_pandas(tmp_path_factory, values) -> None:
    pandas = pytest.importorskip("pandas")
    folder = tmp_path_factory.mktemp("values")
    texts = [*(value for value in values if value.strip()), "end"]
    assert made(folder, "pretrain", [{"text": text} for text in texts])[0] == texts
    frame = pandas.read_csv(folder / "out.csv", keep_default_na=False, dtype=str)
    assert frame["text"].tolist() == texts
    with (folder / "out.csv").open(encoding="utf-8", newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == texts


@settings(max_examples=40, deadline=None)
@given(VALUES, st.booleans())
def test_conversations_survive_for_us_and_pandas(tmp_path_factory, values, has_system) -> None:
    pandas = pytest.importorskip("pandas")
    folder = tmp_path_factory.mktemp("values")
    texts = [*(value for value in values if value.strip()), "q", "a"]
    texts = texts[len(texts) % 2 :]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    if has_system:
        messages.insert(0, {"role": "system", "content": texts[0]})
    assert made(folder, "sft", [{"messages": messages}])[0] == [messages]
    frame = pandas.read_csv(folder / "out.csv", keep_default_na=False, dtype=str)
    assert list(frame.columns) == ["history", "q", "a", "system"]
    row = frame.iloc[0]
    flat = [text for pair in json.loads(row["history"]) for text in pair] + [row["q"], row["a"]]
    assert flat == texts and row["system"] == (texts[0] if has_system else "")


@settings(max_examples=30, deadline=None)
@given(VALUES)
def test_preferences_survive(tmp_path_factory, values) -> None:
    texts = [value for value in values if value.strip()]
    pairs = [
        {"prompt": prompt, "chosen": chosen, "rejected": chosen + "!"}
        for prompt, chosen in zip(texts, reversed(texts), strict=True)
    ]
    pairs.append({"prompt": "end", "chosen": "a", "rejected": "b"})
    folder = tmp_path_factory.mktemp("values")
    assert made(folder, "rl", pairs)[0] == pairs
    assert json.loads((folder / "out.json").read_bytes()) == pairs


# --- several processes, whole files ---


def damaged_corpus(folder: Path, n_lines: int) -> Path:
    """Chats of which every tenth line is bad in one way or another."""
    bad = [b"", b"{", b'{"input": "\xff"}', b'{"input": "x"}', b"[" * 50]
    path = folder / "raw.jsonl"
    with path.open("wb") as file:
        for i in range(n_lines):
            row = {"input": f"第{i}个问题？", "output": f"答案{i}。" * 30, "history": []}
            if i % 3 == 0:
                row["history"] = [[f"问{i}", "答\\N"]]
            line = json.dumps(row, ensure_ascii=False).encode()
            file.write((bad[i // 10 % 5] if i % 10 == 7 else line) + b"\n")
    return path


def test_workers_change_neither_tables_nor_counts(tmp_path: Path) -> None:
    source = damaged_corpus(tmp_path, 3000)
    job = Job("sft", Filters(max_chars=200), ("single", "all"))
    results = []
    for workers, n_bytes in ((1, 1 << 20), (1, 50_000), (3, 50_000)):
        outputs = [tmp_path / f"{workers}_{n_bytes}_{turns}.csv" for turns in job.turns]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records, "BATCH_BYTES", n_bytes)
            tally, n_rows = convert([source, source], outputs, job, workers=workers)
        results.append((tally, n_rows, [path.read_bytes() for path in outputs]))
    assert results[0] == results[1] == results[2]
    assert results[0][0].n_skipped == 600


@pytest.mark.parametrize("stage", ["pretrain", "rl"])
def test_workers_change_nothing_in_tables_and_arrays(tmp_path: Path, stage: str) -> None:
    if stage == "pretrain":
        source = tmp_path / "raw.csv"
        source.write_text("text\n" + "".join(f'"{i},\n{i}"\nx,y\n' for i in range(2000)))
    else:
        source = tmp_path / "raw.json"
        pairs = [{"prompt": str(i), "chosen": "a", "reject": "b" * (i % 2)} for i in range(2000)]
        source.write_text(json.dumps(pairs))
    outputs = [tmp_path / f"{n}{tables.STAGES[stage].suffix}" for n in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "BATCH_BYTES", 9000)
        one, _ = convert([source], outputs[:1], Job(stage), workers=1)
        two, _ = convert([source], outputs[1:], Job(stage), workers=2)
    assert one == two and one.n_skipped
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_a_full_disk_is_one_clear_message(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    write_lines(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 100)
    (tmp_path / "out.csv").write_text("the table before")

    def limit() -> None:  # the system refuses the 50,001st byte of any file
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    args = ("pretrain", "--input", "a.jsonl", "--output", "out.csv")
    result = run(*args, cwd=tmp_path, preexec_fn=limit)
    assert result.returncode == 1
    assert "out.csv could not be written (File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out.csv"]
    assert (tmp_path / "out.csv").read_text() == "the table before"


def start_slow(folder: Path, n_lines: int = 40_000, written: int = 1_000_000) -> subprocess.Popen:
    """Start a run of some seconds with two workers and wait until it has written bytes."""
    damaged_corpus(folder, n_lines)
    command = [sys.executable, str(ROOT / "data_process.py"), "sft", "--workers", "2"]
    command += ["--input", "raw.jsonl", "raw.jsonl", "raw.jsonl", "--output", "out.csv"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    temporary = folder / "out.csv.tmp"
    deadline = time.monotonic() + 60
    while not (temporary.exists() and temporary.stat().st_size >= written):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    return process


def living(session: int) -> list[str]:
    """Command lines of the session's processes that are not zombies (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(stat.with_name("cmdline").read_text().replace("\0", " "))
        except (OSError, IndexError):
            continue  # it has just ended
    return found


def wait_for_end(session: int) -> None:
    deadline = time.monotonic() + 20
    while living(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert living(session) == []


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc (Linux)")


@pytest.mark.slow
@needs_proc
def test_kill_leaves_no_table_and_no_process_and_a_new_run_is_whole(tmp_path: Path) -> None:
    process = start_slow(tmp_path)
    process.kill()
    process.wait()
    wait_for_end(process.pid)
    assert not (tmp_path / "out.csv").exists()
    args = ["--input", *["raw.jsonl"] * 3, "--output"]
    assert run("sft", *args, "out.csv", cwd=tmp_path).returncode == 0
    assert run("sft", *args, "whole.csv", "--workers", 1, cwd=tmp_path).returncode == 0
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_cleans_up(tmp_path: Path, number: int) -> None:
    process = start_slow(tmp_path)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "sft: stopped, nothing written" in errors
    assert "Traceback" not in errors
    wait_for_end(process.pid)
    assert os.listdir(tmp_path) == ["raw.jsonl"]


@pytest.mark.slow
@needs_proc
def test_workers_that_are_starting_hear_no_interrupt(tmp_path: Path) -> None:
    process = start_slow(tmp_path, written=0)
    while len(living(process.pid)) < 4:  # the script, a resource tracker, workers that import
        time.sleep(0.001)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    wait_for_end(process.pid)
    assert os.listdir(tmp_path) == ["raw.jsonl"]


@pytest.mark.slow
@needs_proc
def test_a_killed_worker_is_told_and_does_not_hang(tmp_path: Path) -> None:
    process = start_slow(tmp_path)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            is_worker = "spawn_main" in stat.with_name("cmdline").read_text()
        except OSError:
            continue
        if int(fields[3]) == process.pid and is_worker:
            os.kill(int(stat.parent.name), signal.SIGKILL)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process was killed" in errors and "Traceback" not in errors
    assert os.listdir(tmp_path) == ["raw.jsonl"]


# --- real corpora ---


@pytest.mark.slow
@pytest.mark.skipif(not CORPORA.is_dir(), reason="no ../shared/data beside this checkout")
def test_the_real_corpora_give_the_numbers_they_are_known_for(tmp_path: Path) -> None:
    sft = [CORPORA / "sft" / "sft_data_zh.jsonl.xz"]

    def n_rows(stage: str, inputs: list[Path], filters: Filters, *turns: str) -> list[int]:
        outputs = [tmp_path / f"{i}{tables.STAGES[stage].suffix}" for i in range(len(turns))]
        tally, rows = convert(inputs, outputs, Job(stage, filters, turns))
        assert not tally.skipped and not tally.changed
        return rows

    documents = sorted((CORPORA / "pretrain").glob("*.jsonl.xz"))
    v1 = tables.V1_FILTERS
    assert n_rows("pretrain", documents, Filters(), "all") == [111_564]
    assert n_rows("sft", sft, Filters(), "single", "multi") == [94_934, 19_784]
    assert n_rows("sft", sft, v1["sft"], "all", "multi") == [88_064, 18_533]
    pairs = [CORPORA / "dpo" / "huozi_rlhf_data.json.xz"]
    assert n_rows("rl", pairs, Filters(), "all") == [4_160]
    assert n_rows("rl", pairs, v1["rl"], "all") == [3_584]


@pytest.mark.slow
@pytest.mark.skipif(not CORPORA.is_dir(), reason="no ../shared/data beside this checkout")
def test_every_real_preference_file_is_read(tmp_path: Path) -> None:
    n_records = {
        "huozi_rlhf_data.json.xz": 4_160,
        "dpo_train_data.json.xz": 3_997,
        "dpo_zh_demo.json.xz": 269,
        "dpo_zh_500.jsonl.xz": 443,
        "comparison_gpt4_data_zh.json.xz": 2_142,
        "oaast_rm_zh.json.xz": 738,
    }
    for name, n in n_records.items():
        tally = Tally()
        pairs = list(read_preferences(CORPORA / "dpo" / name, tally))
        assert tally.read == n and tally.kept == len(pairs)
        assert set(tally.skipped) <= {"chosen and rejected are the same"}, name
        assert tally.n_skipped < 0.01 * n
