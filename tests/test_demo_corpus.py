"""The demo corpus: what the README of dataset/demo promises, read from the files that ship."""

import csv
import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from model import quiz

DEMO = Path(__file__).parents[1] / "dataset" / "demo"
TABLE_ROW = re.compile(r"^\| `([^`]+)` \| ([\d,]+) \|", re.MULTILINE)


@cache
def rows(name: str) -> list[dict]:
    with open(DEMO / name, encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def demo_module(name: str) -> ModuleType:
    """A module beside the generator: a folder of scripts, not a package."""
    sys.path.insert(0, str(DEMO))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DEMO))


@cache
def relations() -> dict:
    return {relation.name: relation for relation in demo_module("phrasings").RELATIONS}


@cache
def salutations() -> list[str]:
    return [text for texts in demo_module("chat").SALUTATIONS.values() for text in texts]


@cache
def sft_turns() -> list[tuple[str, str]]:
    """Every question and answer of the SFT files, those of the histories included."""
    turns = []
    for row in rows("sft_single.jsonl") + rows("sft_multi.jsonl"):
        turns += [tuple(turn) for turn in row["history"]]
        turns.append((row["input"], row["output"]))
    return turns


def bare(question: str) -> str:
    """The question without a salutation before it and a mark after it."""
    for salutation in salutations():
        question = question.removeprefix(salutation)
    return question.rstrip("？。?.")


@cache
def training_questions() -> set[str]:
    questions = {question for question, _ in sft_turns()}
    questions |= {
        row["prompt"] for name in ("dpo.jsonl", "dpo_heldout.jsonl") for row in rows(name)
    }
    for row in rows("identity.jsonl"):
        questions |= {
            message["content"] for message in row["messages"] if message["role"] == "user"
        }
    return questions


def test_tracked_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO / "generate.py"), "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env={"PYTHONHASHSEED": "7"})
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")}
    tracked = {
        path.relative_to(DEMO): path.read_bytes()
        for pattern in ("*.jsonl", "ceval-exam/*/*.csv")
        for path in DEMO.glob(pattern)
    }
    assert written.keys() == tracked.keys()
    assert [name for name in written if written[name] != tracked[name]] == []
    assert sum(map(len, written.values())) < 3_000_000


def test_size_is_what_the_demo_promises() -> None:
    facts = {
        (name, fact.subject) for name, relation in relations().items() for fact in relation.facts
    }
    assert len(facts) >= 500
    assert len(facts) == sum(len(relation.facts) for relation in relations().values())  # none twice
    assert min(len(relation.questions) for relation in relations().values()) >= 6
    assert len(rows("quiz.jsonl")) >= 150
    assert {item["relation"] for item in rows("quiz.jsonl")} == set(relations())
    assert 90 <= len(rows("identity.jsonl")) <= 130


def test_readme_counts_the_rows() -> None:
    readme = (DEMO / "README.md").read_text(encoding="utf-8")
    told = {name: int(count.replace(",", "")) for name, count in TABLE_ROW.findall(readme)}
    counted = {path.name: len(rows(path.name)) for path in DEMO.glob("*.jsonl")}
    for split in ("dev", "val"):
        tables = [path.read_text("utf-8") for path in (DEMO / "ceval-exam" / split).glob("*.csv")]
        counted[f"ceval-exam/{split}"] = sum(text.count("\n") - 1 for text in tables)
    assert told == counted
    facts = sum(len(relation.facts) for relation in relations().values())
    phrasings = sum(len(relation.questions) for relation in relations().values())
    assert f"{facts} facts in {len(relations())} relations" in readme
    assert f"{phrasings} phrasings" in readme


def test_quiz_questions_occur_in_no_training_file() -> None:
    """Whole questions only: a follow-up such as 那法国呢？ needs what went before."""
    whole = {item["question"] for item in rows("quiz.jsonl") if not item.get("history")}
    assert len(whole) >= 150
    assert whole & training_questions() == set()
    assert set(map(bare, whole)) & set(map(bare, training_questions())) == set()
    texts = "\n".join(row["text"] for row in rows("pretrain.jsonl"))
    assert [question for question in whole if bare(question) in texts] == []
    identity = {item["question"] for item in rows("identity_quiz.jsonl")}
    assert identity & training_questions() == set()


@cache
def meanings() -> dict[str, set[tuple[str, str]]]:
    """Every way of asking -> the (relation, subject) it may mean; 它在哪个洲？ may mean many."""
    meant = {}
    for name, relation in relations().items():
        whole_or_pronoun = [question for question, _ in relation.questions + relation.it]
        for fact in relation.facts:
            for form in [*whole_or_pronoun, *relation.next]:
                meant.setdefault(relation.fill(form, fact), set()).add((name, fact.subject))
    return meant


def understand(questions: list[str]) -> list[tuple[str, str]]:
    """What a chat's questions mean, each in the light of the one before; small talk left out."""
    facts = []
    for question in questions:
        meant = meanings().get(question, set())
        if facts:  # a follow-up keeps the relation or the subject
            name, subject = facts[-1]
            meant = {fact for fact in meant if (fact[0] == name) != (fact[1] == subject)}
        assert len(meant) == (question in meanings()), (questions, meant)
        facts += meant
    return facts


def test_quiz_follow_ups_were_never_made() -> None:
    """In whatever phrasing: no training chat goes from that fact straight to that fact."""
    made = set()
    for row in rows("sft_multi.jsonl"):
        facts = understand([*(question for question, _ in row["history"]), row["input"]])
        made |= set(zip(facts, facts[1:], strict=False))
    assert len(made) > 500
    items = [item for item in rows("quiz.jsonl") if item.get("history")]
    assert len(items) >= 40
    assert sum(item["subject"] not in item["question"] for item in items) >= 10  # pronouns
    for item in items:
        before, after = understand([item["history"][-1][0], item["question"]])
        assert after == (item["relation"], item["subject"])
        assert (before, after) not in made


def test_quiz_facts_and_phrasings_are_trained_apart() -> None:
    """A question of the quiz is new, but its fact is known, and its phrasing from other facts."""
    turns = sft_turns()
    for item in rows("quiz.jsonl"):
        relation, subject = relations()[item["relation"]], item["subject"]
        known = [q for q, a in turns if subject in q and any(text in a for text in item["accept"])]
        assert len(set(known)) >= 3, item["question"]
        others = {
            relation.fill(item["phrasing"], fact)
            for fact in relation.facts
            if fact.subject != subject
        }
        assert others & training_questions(), item["phrasing"]


def test_reference_answers_are_right_and_others_are_wrong() -> None:
    for name in ("quiz.jsonl", "identity_quiz.jsonl"):
        for item in quiz.load_quiz(DEMO / name):
            assert quiz.is_right(item, item["answer"]), item
            assert quiz.is_right(item, item["accept"][0]), item
            assert not quiz.is_right(item, item["question"]), item
            assert not quiz.is_right(item, item["answer"] + " ".join(item["reject"])), item
            assert not any(quiz.is_right(item, wrong) for wrong in item["reject"]), item


def test_sft_answers_are_about_as_often_curt_as_complete() -> None:
    """DPO must find the model undecided between the two styles, in every relation."""
    curt, complete = Counter(), Counter()
    answers = {}  # question -> relation, complete answer, curt answer
    for name, relation in relations().items():
        for fact in relation.facts:
            for question, answer in relation.questions:
                styles = relation.fill(answer, fact), fact.answer + relation.stop
                answers[bare(relation.fill(question, fact))] = name, *styles
    for question, answer in sft_turns():
        name, full, short = answers.get(bare(question), ("", "", ""))
        assert answer in (full, short) or not name, (question, answer)
        complete[name] += answer == full
        curt[name] += answer == short
    for name in relations():
        assert 0.3 <= curt[name] / (curt[name] + complete[name]) <= 0.6, name
    assert 0.4 <= curt.total() / (curt.total() + complete.total()) <= 0.5


def test_preference_pairs_differ_in_style_not_in_truth() -> None:
    train, heldout = rows("dpo.jsonl"), rows("dpo_heldout.jsonl")
    assert len(train) >= 300 and len(heldout) >= 80
    for row in train + heldout:
        assert row.keys() == {"prompt", "chosen", "reject"}
        bare = row["reject"].rstrip("。.")
        assert bare in row["chosen"] and len(row["chosen"]) > len(row["reject"])
    subjects = [
        {
            (relation.kind, fact.subject)
            for relation in relations().values()
            for fact in relation.facts
            for question, _ in relation.questions
            if relation.fill(question, fact) in {row["prompt"] for row in part}
        }
        for part in (train, heldout)
    ]
    assert subjects[0] & subjects[1] == set()


def test_raw_rows_have_the_fields_of_their_formats() -> None:
    assert all(row.keys() == {"text"} and row["text"] for row in rows("pretrain.jsonl"))
    for name in ("sft_single.jsonl", "sft_multi.jsonl"):
        for row in rows(name):
            assert row.keys() == {"instruction", "input", "output", "history"}
            assert row["input"] and row["output"]
            assert bool(row["history"]) == (name == "sft_multi.jsonl")
            assert (
                not row["instruction"] or row["history"]
            )  # beside a history it is the system text
    for row in rows("identity.jsonl"):
        assert [message["role"] for message in row["messages"]][-2:] == ["user", "assistant"]


@pytest.mark.parametrize("split", ["dev", "val"])
def test_exam_is_sound(split: str) -> None:
    answers, truths = set(), {}
    for relation in relations().values():
        for fact in relation.facts:
            answers |= set(fact.accept)
            truths[relation.fill(relation.statements[0], fact)] = fact.answer
            truths[relation.fill(relation.questions[0][0], fact)] = fact.answer
    letters = Counter()
    for path in sorted((DEMO / "ceval-exam" / split).glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        assert [row["id"] for row in table] == [str(number) for number in range(len(table))]
        assert len(table) == 5 or split == "val"
        for row in table:
            options = [row[letter] for letter in "ABCD"]
            assert len(set(options)) == 4 and set(options) <= answers, row
            filled = {row["question"].replace("____", option): option for option in options}
            right = {option for text, option in filled.items() if truths.get(text) == option}
            if "____" not in row["question"]:
                right = {truths[row["question"]]}
            assert right == {row[row["answer"]]}, row
            assert split == "val" or row[row["answer"]] in row["explanation"], row
            letters[row["answer"]] += 1
    assert len(letters) == 4
    assert split == "dev" or max(letters.values()) < 0.4 * letters.total()
