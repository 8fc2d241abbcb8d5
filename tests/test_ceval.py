"""C-Eval: files in every state, prompts that are v1's, answers that are those of one by one."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model import ceval_report as report
from model.ceval import (
    CATEGORY_OF,
    LETTERS,
    UNMAPPED,
    Exam,
    Prompter,
    Question,
    Reply,
    ask,
    load_exam,
)
from model.model import MiniMindForCausalLM
from model.tally import Tally
from model.tokenizer import Tokenizer

Build = Callable[..., MiniMindForCausalLM]
DATA = Path(__file__).parents[2] / "shared" / "data" / "ceval"
DEMO = Path(__file__).parents[1] / "dataset" / "demo" / "ceval-exam"
needs_ceval = pytest.mark.skipif(not DATA.is_dir(), reason="C-Eval is not in ../shared/data")
HEADER = ["id", "question", "A", "B", "C", "D", "answer"]
ROW = ["0", "水的化学式是____。", "H2O", "CO2", "O2", "NaCl", "A"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def write(path: Path, *rows: list[str] | str, header: list[str] = HEADER) -> Path:
    """Write a CSV; a row that is a string stands as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        for row in (header, *rows):
            if isinstance(row, str):
                file.write(row + "\r\n")
            else:
                csv.writer(file).writerow(row)
    return path


def question(text: str, *options: str, answer: str | None = "A", subject: str = "law") -> Question:
    return Question(subject, "0", text, options or ("甲", "乙", "丙", "丁"), answer)


# ---- files ----


@needs_ceval
def test_the_whole_exam_is_read_and_every_subject_has_a_category() -> None:
    for split, n in (("dev", 260), ("val", 1346), ("test", 12342)):
        exam = load_exam(DATA / "ceval-exam", split)
        assert len(exam.questions) == n and not exam.tally.n_skipped and not exam.tally.changed
        assert set(exam.subjects) == CATEGORY_OF.keys()
        assert all((q.answer in LETTERS) == (split != "test") for q in exam.questions)
    counts = [len(names) for names in report.by_category(CATEGORY_OF).values()]
    assert counts == [20, 10, 11, 11]  # C-Eval's paper, section 2.2


@needs_ceval
def test_the_results_that_v1_recorded_add_up_to_what_it_reported() -> None:
    replies = report.read_replies(DATA / "ceval_result")
    assert str(report.share_right(replies, "letters")).startswith("24.5 %")
    summary = report.summarize(replies)
    assert summary["letters"]["total"]["right"] == 330 and summary["questions"] == 1346
    assert summary["letters"]["answers"] == {"A": 398, "B": 37, "C": 774, "D": 137}
    assert "option text" not in summary
    log = (DATA / "ceval_result" / "test.log").read_text("utf-8")
    recorded = dict(re.findall(r"文件 (\w+)_val\.csv 的正确率: ([0-9.]+%)", log))
    subjects = summary["letters"]["subjects"]
    assert {name: f"{100 * entry['share']:.2f}%" for name, entry in subjects.items()} == recorded


def test_the_demo_exam_is_read(tokenizer: Tokenizer) -> None:
    exam = load_exam(DEMO, "val", n_shots=2)
    assert len(exam.questions) > 100 and not exam.tally.n_skipped
    assert all(len(shots) == 2 for shots in exam.shots.values())
    assert exam.shots.keys() == set(exam.subjects) <= CATEGORY_OF.keys()


def test_rows_in_every_state_are_used_or_counted_with_their_place(tmp_path: Path) -> None:
    path = write(
        tmp_path / "val" / "law_val.csv",
        ROW,
        ["1", '他说"A, B"，\n然后？', "甲", "乙", "丙", "丁", " b "],
        ["2", "没有选项", "甲", "", "丙", "丁", "C"],
        ["3", "没有答案", "甲", "乙", "丙", "丁", ""],
        ["4", "别的答案", "甲", "乙", "丙", "丁", "E"],
        ["5", "少了一格", "甲", "乙"],
        '6,"没有关上的引号"x,甲,乙,丙,丁,A',
        ["7", "末行", "甲", "乙", "丙", "丁", "D"],
    )
    exam = load_exam(tmp_path)
    assert [q.answer for q in exam.questions] == ["A", "B", "D"]
    assert exam.questions[1].text == '他说"A, B"，\n然后？'
    assert exam.questions[2].id == "7"
    told = exam.tally.report()
    assert "skipped 5" in told and f"missing cell: {path}:5 (B)" in told
    assert f"the answer is none of A B C D: {path}:6 (''), :7 ('E')" in told
    assert f"{path}:8 (4, expected 7)" in told and f"broken CSV row: {path}:9" in told
    assert "answer in another spelling" in told


def test_a_question_without_an_id_has_its_number(tmp_path: Path) -> None:
    rows = (ROW[1:], ["缺", "", "", "", "", "A"], ROW[1:])
    write(tmp_path / "val" / "law_val.csv", *rows, header=HEADER[1:])
    assert [q.id for q in load_exam(tmp_path).questions] == ["0", "2"]


def test_an_empty_file_costs_its_subject_alone(tmp_path: Path) -> None:
    empty = write(tmp_path / "val" / "law_val.csv")
    write(tmp_path / "val" / "logic_val.csv", ROW)
    exam = load_exam(tmp_path)
    assert exam.subjects == ["logic"] and exam.empty == [empty]
    (tmp_path / "val" / "logic_val.csv").write_text("")
    with pytest.raises(ValueError, match="val holds no usable question"):
        load_exam(tmp_path)


def test_missing_columns_are_named_with_those_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "val" / "law_val.csv", ["a", "b", "c"], header=["question", "A", "B"])
    with pytest.raises(ValueError) as error:
        load_exam(tmp_path)
    assert str(error.value).startswith(f"{path} has no column C, D, answer (found: question, A, B)")


def test_a_wrong_folder_is_told_what_was_expected_and_found(tmp_path: Path) -> None:
    def told(data_dir: Path, split: str = "val") -> str:
        with pytest.raises(FileNotFoundError) as error:
            load_exam(data_dir, split)
        return str(error.value)

    root = tmp_path / "ceval-exam"
    absent = told(root)
    assert "does not exist" in absent and "huggingface.co/datasets/ceval/ceval-exam" in absent
    assert "--data_dir dataset/demo/ceval-exam" in absent
    write(root / "val" / "law_val.csv", ROW)
    (root / "val" / "._law_val.csv").write_bytes(b"\0\1")  # of a macOS archive
    exam = load_exam(root)
    assert exam.subjects == ["law"] and not exam.empty and not exam.tally.n_skipped
    for place in (tmp_path, root / "val"):
        assert f"did you mean --data_dir {root}?" in told(place)
    assert f"expected {root}/test/<subject>_test.csv; found: val" in told(root, "test")
    (tmp_path / "empty").mkdir()
    assert "found: nothing" in told(tmp_path / "empty")


# ---- prompts ----


def test_the_letters_prompt_is_v1s(tokenizer: Tokenizer) -> None:
    ids = Prompter(tokenizer, 512).letters(question("谁？", "甲", "乙", "丙", "丁"))
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "开始回答问题<s>user\n谁？。选择 A: 甲, B: 乙, C: 丙, D: 丁</s>\n<s>assistant\n"
    )
    messages = [
        {"role": "system", "content": "开始回答问题"},
        {"role": "user", "content": "谁？。选择 A: 甲, B: 乙, C: 丙, D: 丁"},
    ]
    assert ids == tokenizer.encode_chat(messages, add_generation_prompt=True)


def test_examples_are_turns_before_the_question(tokenizer: Tokenizer) -> None:
    shots = [question("一？", answer="B"), question("二？", answer="D")]
    prompter = Prompter(tokenizer, 512)
    letters = tokenizer.decode(prompter.letters(question("三？"), shots))
    assert [letters.index(part) for part in ("一？", "B\n", "二？", "D\n", "三？")] == sorted(
        letters.index(part) for part in ("一？", "B\n", "二？", "D\n", "三？")
    )
    ids, options = prompter.option_text(question("三？"), shots)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "开始回答问题<s>user\n一？</s>\n<s>assistant\n乙</s>\n<s>user\n二？</s>\n<s>assistant\n丁</s>\n"
        "<s>user\n三？</s>\n<s>assistant\n"
    )
    assert [tokenizer.decode(option) for option in options] == ["甲", "乙", "丙", "丁"]
    assert not prompter.counts


@pytest.mark.parametrize("context", (48, 64, 100, 200))
def test_what_does_not_fit_is_left_out_and_counted(tokenizer: Tokenizer, context: int) -> None:
    prompter = Prompter(tokenizer, context)
    long = question("开头" + "很长的问题" * 60 + "结尾？", "短", "长" * 90, "中等", "无")
    shots = [question("例子" * 4), question("例子" * 40), question("例子" * 4)]
    ids = prompter.letters(long, shots)
    assert len(ids) == context
    assert tokenizer.decode(ids).endswith("D: 无\nassistant\n")  # the end asks
    ids, options = prompter.option_text(long, shots)
    assert len(ids) + max(map(len, options)) - 1 <= context and all(options)
    assert "结尾？" in tokenizer.decode(ids) and "开头" not in tokenizer.decode(ids)
    counts = dict(prompter.counts)
    assert counts.pop("option text: options cut at their end", 0) == (context < 110)
    assert counts == {
        "letters: questions cut at their beginning": 1,
        "letters: examples left out": 3,
        "option text: questions cut at their beginning": 1,
        "option text: examples left out": 3,
    }


def test_an_example_that_is_too_long_leaves_room_for_a_shorter_one(tokenizer: Tokenizer) -> None:
    shots = [question("例子" * 4, answer="B"), question("例子" * 90), question("例子", answer="D")]
    prompter = Prompter(tokenizer, 160)
    text = tokenizer.decode(prompter.letters(question("三？"), shots))
    assert "assistant\nB\n" in text and "assistant\nD\n" in text and "A\n" not in text
    assert dict(prompter.counts) == {"letters: examples left out": 1}


def test_a_context_without_room_for_a_question_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="max_seq_len=16 is too short"):
        Prompter(tokenizer, 16)


# ---- answers ----


def exam_of(*questions: Question) -> Exam:
    return Exam(list(questions))


@pytest.mark.parametrize("n_shots", (0, 2))
def test_a_batched_exam_is_answered_as_one_by_one(
    build: Build, tokenizer: Tokenizer, n_shots: int
) -> None:
    model = build(vocab_size=6400, max_seq_len=192)
    exam = load_exam(DEMO, "val", n_shots)
    exam.questions = exam.questions[::11]
    replies, counts = ask(model, tokenizer, exam)
    assert not counts and [reply.question for reply in replies] == exam.questions
    prompter = Prompter(tokenizer, 192)
    for reply in replies:
        shots = exam.shots.get(reply.question.subject, [])
        with torch.no_grad():
            prompt = torch.tensor([prompter.letters(reply.question, shots)])
            logits = model(prompt).logits[0, -1]
        letter_ids = [tokenizer.encode(letter)[0] for letter in LETTERS]
        assert reply.letter == LETTERS[int(logits[letter_ids].argmax())]
        prompt, options = prompter.option_text(reply.question, shots)
        for text, ids, score in zip(
            reply.question.options, options, reply.option_scores, strict=True
        ):
            labels = torch.tensor([[-100] * len(prompt) + ids])
            with torch.no_grad():
                loss = float(model(torch.tensor([prompt + ids]), labels=labels).loss)
            assert score == pytest.approx(-loss * len(ids) / len(text.encode()), rel=1e-4)
        assert reply.option == LETTERS[reply.option_scores.index(max(reply.option_scores))]


@pytest.mark.parametrize("letter", LETTERS)
def test_a_model_that_always_says_one_thing_is_heard(
    build: Build, tokenizer: Tokenizer, letter: str
) -> None:
    """Without attention and feed-forward the last token alone decides: its nearest neighbour."""
    model = build(vocab_size=6400)
    text = dict(zip(LETTERS, "水火土木", strict=True))[letter]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                parameter.zero_()
        embedding = model.tok_embeddings.weight
        last = tokenizer.encode_chat([], add_generation_prompt=True)[-1]
        for said in (letter, text):
            (token,) = tokenizer.encode(said)
            embedding[token] = embedding[last]
    asked = exam_of(
        question("哪个？", "水", "火", "土", "木"), question("哪个？", "木", "土", "火", "水")
    )
    replies, _ = ask(model, tokenizer, asked)
    assert [reply.letter for reply in replies] == [letter, letter]
    assert [reply.question.options[LETTERS.index(reply.option)] for reply in replies] == [text] * 2


def test_a_model_of_no_numbers_is_an_error_and_not_an_a(build: Build, tokenizer: Tokenizer) -> None:
    model = build(vocab_size=6400)
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        ask(model, tokenizer, exam_of(question("谁？")))


# ---- results ----


def replies_of(**answers: str) -> list[Reply]:
    """Return replies by subject; the right answer is always A, by option text every B is right."""
    return [
        Reply(question("q", subject=subject), letter, "A" if letter == "B" else "C", (-1.0,) * 4)
        for subject, letters in answers.items()
        for letter in letters
    ]


def test_a_category_is_the_mean_of_its_subjects_and_the_total_of_its_questions() -> None:
    summary = report.summarize(replies_of(law="AAAA", logic="BA", marxism="BBC", my_exam="D"))
    letters = summary["letters"]
    assert letters["total"]["right"] == 5 and letters["total"]["asked"] == 10
    assert letters["total"]["mean_of_subjects"] == pytest.approx((1 + 1 / 2 + 0 + 0) / 4)
    humanities = letters["categories"]["Humanities"]
    assert humanities["mean_of_subjects"] == pytest.approx(3 / 4)
    assert humanities["share"] == pytest.approx(5 / 6)
    assert list(letters["categories"]) == ["Social Science", "Humanities", UNMAPPED]
    assert letters["answers"] == {"A": 5, "B": 3, "C": 1, "D": 1}
    assert summary["option text"]["subjects"]["marxism"]["right"] == 2
    json.dumps(summary)


def test_the_table_holds_subjects_categories_totals_and_chance() -> None:
    lines = report.table(summary := report.summarize(replies_of(law="AAAB", marxism="BB")))
    assert lines.splitlines()[1].split()[:4] == ["law", "3/4", "75.00", "%"]
    (total,) = [line for line in lines.splitlines() if line.startswith("total")]
    assert total.split()[1:4] == ["3/6", "50.00", "%"]
    low, high = summary["letters"]["total"]["low"], summary["letters"]["total"]["high"]
    assert f"[{100 * low:5.1f}, {100 * high:5.1f}]" in total
    assert "chance" in lines and "answers given: A 3, B 3, C 0, D 0" in lines


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    replies = replies_of(law="AAB", my_exam="D")
    report.write_replies(replies, tmp_path, "val")
    with open(tmp_path / "law_val_result.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:8] == report.V1_COLUMNS
    assert [row["is_right"] for row in rows] == ["1", "1", "0"]
    assert [row["option_is_right"] for row in rows] == ["0", "0", "1"]
    assert report.summarize(report.read_replies(tmp_path)) == report.summarize(replies)


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no <subject>_val_result.csv"):
        report.read_replies(tmp_path)
    write(tmp_path / "law_val_result.csv", header=["question", "A"])
    with pytest.raises(ValueError, match="has no column B, C, D, answer, is_right, llm_answer"):
        report.read_replies(tmp_path)
    row = ["q", *"甲乙丙丁", "A", "x", "0"]
    write(tmp_path / "law_val_result.csv", row, header=report.V1_COLUMNS)
    with pytest.raises(ValueError, match=r"law_val_result.csv:2: answer 'A', llm_answer 'x'"):
        report.read_replies(tmp_path)


def test_the_submission_has_every_id_of_every_subject(tmp_path: Path) -> None:
    asked = [Question("law", str(n), "q", ("甲",) * 4) for n in (0, 1, 5)]
    replies = [Reply(q, letter, "D") for q, letter in zip(asked, "ABC", strict=True)]
    paths = report.write_submission(replies, tmp_path)
    assert [path.name for path in paths] == [
        "submission_letters.json",
        "submission_option_text.json",
    ]
    assert json.loads(paths[0].read_text("utf-8")) == {"law": {"0": "A", "1": "B", "5": "C"}}
    report.write_replies(replies, tmp_path, "test")  # what is right is not known
    assert ",,A,,D,\n" in (tmp_path / "law_test_result.csv").read_text("utf-8")


@pytest.mark.parametrize(
    ("path", "flags", "name"),
    [
        ("out/rl_512.pth", {}, "rl_512"),
        ("out/multi_chat/full_sft_512.pth", {}, "multi_chat_full_sft_512"),
        ("out/rl_512.pth", {"lora": "out/lora_512/"}, "rl_512_lora_512"),
        ("out/pretrain_512.pth", {"n_shots": 5}, "pretrain_512_5shot"),
        ("minimind-v1/pytorch_model.bin", {}, "minimind-v1"),
        ("elsewhere/x.pth", {}, "elsewhere_x"),
    ],
)
def test_results_are_kept_apart_by_weights(path: str, flags: dict, name: str) -> None:
    assert report.results_name(Path(path), Path("out"), **flags) == name


def test_every_question_that_is_read_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "val" / "law_val.csv", ROW, ROW, ["x"])
    exam = load_exam(tmp_path)
    assert isinstance(exam.tally, Tally) and (exam.tally.read, exam.tally.n_skipped) == (3, 1)
