"""Write the demo corpus from its tables: python dataset/demo/generate.py

The same tables give the same bytes on every machine: order and choices come from hashes, not from
a random generator. Needs the standard library only. README.md beside this file describes what is
written.
"""

import argparse
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import chat
from phrasings import RELATIONS, Fact, Relation

Row = dict[str, Any]
T = TypeVar("T")

PHRASINGS_PER_FACT = 5  # of a relation's six to eight; the others stay unseen with this fact
QUIZ_PER_RELATION = 0.36  # share of a relation's facts that the quiz asks
HELDOUT_PAIRS = 0.2  # share of the facts that only held-out preference pairs ask
EXAM_PER_SUBJECT = 24


def draw(*parts: object) -> int:
    """Return a number that depends on ``parts`` alone, as if drawn at random."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8])


def shuffled(items: Iterable[T], *salt: object) -> list[T]:
    """Return the items in an order that depends on them and ``salt`` alone."""
    return sorted(items, key=lambda item: draw(item, *salt))


def curt(relation: Relation, fact: Fact) -> str:
    """Return the answer in one word."""
    return fact.answer + relation.stop


def reply(relation: Relation, fact: Fact, complete: str, *salt: object) -> str:
    """Return the complete or the curt answer, evenly: which one is better, SFT leaves to DPO."""
    if draw("style", relation.name, fact.subject, *salt) % 2:
        return relation.fill(complete, fact)
    return curt(relation, fact)


def split_phrasings(relation: Relation, index: int) -> tuple[list[int], list[int]]:
    """Return which questions the relation's fact number ``index`` is trained with, and which never.

    The choice moves on by one with each fact, so that every phrasing is trained with most facts and
    unseen with some.
    """
    n = len(relation.questions)
    order = [(index + step * step_size(n)) % n for step in range(n)]
    return sorted(order[:PHRASINGS_PER_FACT]), order[PHRASINGS_PER_FACT:]


def step_size(n: int) -> int:
    """Return a step that visits all of ``n`` phrasings and is not 1, so that neighbours part."""
    return 3 if n % 3 else 5


def ordered(relation: Relation) -> list[Fact]:
    """Return the relation's facts in the order that decides who is held out where."""
    return shuffled(relation.facts, relation.name)


# -- pretraining --


def pretrain_rows() -> list[Row]:
    """Return short documents: statements of a relation, paragraphs on one subject, texts."""
    documents = list(chat.TEXTS)
    documents += [answer for answer in chat.IDENTITY_ANSWERS.values()]
    for relation in RELATIONS:
        space = " " if relation.language == "en" else ""
        for number, statement in enumerate(relation.statements):
            group: list[str] = []
            for fact in shuffled(relation.facts, "pretrain", number):
                group.append(relation.fill(statement, fact))
                if len(group) == 3:
                    documents.append(space.join(group))
                    group = []
            if group:
                documents.append(space.join(group))
    documents += subject_paragraphs()
    return [{"text": text} for text in shuffled(dict.fromkeys(documents), "pretrain order")]


def subject_paragraphs() -> list[str]:
    """Return a paragraph for each subject of several relations, with all that is known about it."""
    known: dict[tuple[str, str], list[str]] = {}
    for relation in RELATIONS:
        for fact in relation.facts:
            statement = relation.statements[
                draw("paragraph", fact.subject) % len(relation.statements)
            ]
            known.setdefault((relation.kind, fact.subject), []).append(
                relation.fill(statement, fact)
            )
    return ["".join(sentences) for sentences in known.values() if len(sentences) > 1]


# -- chats --


def sft_row(
    question: str, answer: str, history: Sequence[Sequence[str]] = (), system: str = ""
) -> Row:
    """Return a raw row in the form of ``sft_data_zh.jsonl``."""
    return {
        "instruction": system,
        "input": question,
        "output": answer,
        "history": [list(turn) for turn in history],
    }


def single_rows() -> list[Row]:
    """Return the single-turn chats: each fact in its trained phrasings, small talk, identity."""
    rows = []
    for relation in RELATIONS:
        for index, fact in enumerate(ordered(relation)):
            for position, number in enumerate(split_phrasings(relation, index)[0]):
                question, complete = relation.questions[number]
                text = relation.fill(complete, fact)
                if (
                    index + position
                ) % 2:  # evenly within a fact and, over the facts, within a phrasing
                    text = curt(relation, fact)
                rows.append(sft_row(relation.fill(question, fact), text))
    for questions, answer in chat.SMALL_TALK:
        rows += [sft_row(question, answer) for question in questions]
    for topic, question in identity_questions()[0]:
        rows.append(sft_row(question, chat.IDENTITY_ANSWERS[topic]))
    return shuffled(rows, "single")


def identity_questions() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (topic, question) about the model: those for training, those for the quiz."""
    trained, heldout = [], []
    index = 0
    for topic, (asked, requested) in chat.IDENTITY_CORES.items():
        for cores, frames in ((asked, chat.ASKING), (requested, chat.REQUESTING)):
            for core in cores:
                for number in range(len(frames)):
                    question = frames[(index + number) % len(frames)].format(core=core)
                    (trained if number < 4 else heldout).append((topic, question))
                index += 1
    return trained, heldout


def multi_quiz() -> list[tuple[Relation, Fact, Relation, Fact, int]]:
    """Return the follow-ups kept for the quiz: from one fact to another, in which phrasing."""
    moves = []
    for relation in RELATIONS:
        chosen = ordered(relation)
        for index in range(2):
            before, after = chosen[index], chosen[-1 - index]
            moves.append((relation, before, relation, after, index % len(relation.next)))
    for first, second in related():
        for fact in ordered(second):
            before = next((f for f in first.facts if f.subject == fact.subject), None)
            if before is not None:
                moves.append((first, before, second, fact, draw(fact.subject) % len(second.it)))
                break
    return moves


def related() -> list[tuple[Relation, Relation]]:
    """Return the pairs of relations between which a pronoun can lead."""
    return [
        (first, second)
        for first in RELATIONS
        for second in RELATIONS
        if first.kind == second.kind and first is not second and second.it
    ]


def follow_up(relation: Relation, fact: Fact, pronoun: bool, salt: object) -> tuple[str, str]:
    """Return a question that is clear only after what was said, and its answer."""
    if pronoun:
        question, complete = relation.it[draw("it", fact.subject, salt) % len(relation.it)]
    else:
        question = relation.next[draw("next", fact.subject, salt) % len(relation.next)]
        complete = relation.questions[0][1]
    return relation.fill(question, fact), reply(relation, fact, complete, salt, pronoun)


def opening(relation: Relation, fact: Fact, salt: object) -> tuple[str, str]:
    """Return a whole question about ``fact`` in one of its trained phrasings, and its answer."""
    trained = split_phrasings(relation, ordered(relation).index(fact))[0]
    question, complete = relation.questions[
        trained[draw("open", fact.subject, salt) % len(trained)]
    ]
    return relation.fill(question, fact), reply(relation, fact, complete, salt)


def multi_rows() -> list[Row]:
    """Return the chats with a history: of another subject, of the same one, of both."""
    kept = {(a.name, b.subject, c.name, d.subject) for a, b, c, d, _ in multi_quiz()}

    def allowed(before: Relation, was: Fact, after: Relation, now: Fact) -> bool:
        return (before.name, was.subject, after.name, now.subject) not in kept

    chats: list[list[tuple[str, str]]] = []
    for relation in RELATIONS:
        chain = shuffled(relation.facts, "next")
        for start in range(0, len(chain), 2):
            turns = [opening(relation, chain[start], "next")]
            for step in (1, 2):  # the third subject opens the next chat: each is asked in both ways
                was, now = (
                    chain[(start + step - 1) % len(chain)],
                    chain[(start + step) % len(chain)],
                )
                if allowed(relation, was, relation, now):
                    turns.append(follow_up(relation, now, False, "next"))
            chats.append(turns)
    for first, second in related():
        by_subject = {fact.subject: fact for fact in second.facts}
        for fact in first.facts:
            asked = by_subject.get(fact.subject)
            if asked is None or not allowed(first, fact, second, asked):
                continue
            turns = [opening(first, fact, second.name), follow_up(second, asked, True, first.name)]
            other = shuffled((f for f in second.facts if f is not asked), fact.subject)[0]
            if draw("then", first.name, fact.subject) % 2 and allowed(second, asked, second, other):
                turns.append(follow_up(second, other, False, first.name))
            chats.append(turns)

    rows = []
    for turns in chats:
        chance = draw("frame", turns) % 10
        system = ""
        if chance == 0:
            greeting = chat.GREETINGS[draw("hello", turns) % len(chat.GREETINGS)]
            turns = [small_talk(greeting), *turns]
        elif chance == 1:
            thanks = chat.THANKS[draw("thanks", turns) % len(chat.THANKS)]
            turns = [*turns, small_talk(thanks)]
        elif chance == 2 and len(turns) > 1:
            system = chat.SYSTEM_TEXTS[draw("system", turns) % len(chat.SYSTEM_TEXTS)]
        *history, (question, answer) = turns
        rows.append(sft_row(question, answer, history, system))
    return shuffled((row for row in rows if row["history"]), "multi")


def small_talk(said: str) -> tuple[str, str]:
    """Return ``said`` with the model's answer."""
    return next((said, answer) for questions, answer in chat.SMALL_TALK if said in questions)


# -- preferences --


def preference_rows() -> tuple[list[Row], list[Row]]:
    """Return pairs in which a sentence beats a bare word, and held-out ones on other subjects."""
    train, heldout = [], []
    for relation in RELATIONS:
        for index, fact in enumerate(ordered(relation)):
            unseen = split_phrasings(relation, index)[1]
            number = unseen[0]  # unseen[-1] is the quiz's
            if len(unseen) == 1:
                number = split_phrasings(relation, index)[0][0]
            question, complete = relation.questions[number]
            row = {
                "prompt": relation.fill(question, fact),
                "chosen": relation.fill(complete, fact),
                "reject": curt(relation, fact),
            }
            apart = draw("pairs", relation.kind, fact.subject) % 100 < HELDOUT_PAIRS * 100
            (heldout if apart else train).append(row)
    return shuffled(train, "dpo"), shuffled(heldout, "dpo")


# -- quiz and exam --


def wrong_answers(relation: Relation, fact: Fact, *shown: str) -> list[str]:
    """Return the answers to other facts of the relation, which a right answer does not contain."""
    said = [*shown, *fact.accept]
    others = dict.fromkeys(text for other in relation.facts for text in other.accept)
    return [text for text in others if not any(text in right for right in said)]


def quiz_row(
    relation: Relation, fact: Fact, phrasing: str, complete: str, history: list[list[str]]
) -> Row:
    """Return a question of the quiz, with what a right answer contains and what it does not."""
    question, answer = relation.fill(phrasing, fact), relation.fill(complete, fact)
    row: Row = {"relation": relation.name, "subject": fact.subject, "phrasing": phrasing}
    if history:
        row["history"] = history
    row |= {"question": question, "answer": answer, "accept": list(fact.accept)}
    row["reject"] = wrong_answers(relation, fact, question, answer)
    return row


def quiz_rows() -> list[Row]:
    """Return the held-out questions: phrasings that their fact never had, follow-ups never made."""
    rows = []
    for relation in RELATIONS:
        chosen = ordered(relation)
        for index in range(max(4, round(QUIZ_PER_RELATION * len(chosen)))):
            question, complete = relation.questions[split_phrasings(relation, index)[1][-1]]
            rows.append(quiz_row(relation, chosen[index], question, complete, []))
    for before, was, after, now, number in multi_quiz():
        question, complete = relation_turn(before, after, number)
        history = [list(opening(before, was, "quiz"))]
        rows.append(quiz_row(after, now, question, complete, history))
    return rows


def relation_turn(before: Relation, after: Relation, number: int) -> tuple[str, str]:
    """Return phrasing ``number`` that leads from one relation to the other, and the answer."""
    if before is after:
        return after.next[number], after.questions[0][1]
    return after.it[number]


def exam_tables() -> dict[str, str]:
    """Return the exam as C-Eval's files, name -> text; the five dev questions have explanations."""
    questions: dict[str, list[tuple[Relation, Fact]]] = {}
    for relation in RELATIONS:
        if relation.exam:
            subject = questions.setdefault(relation.exam, [])
            subject += [(relation, fact) for fact in relation.facts]
    tables = {}
    for subject, asked in questions.items():
        asked = shuffled(asked, "exam", subject)[: EXAM_PER_SUBJECT + 5]
        tables[f"dev/{subject}_dev.csv"] = exam_csv(asked[:5], explained=True)
        tables[f"val/{subject}_val.csv"] = exam_csv(asked[5:], explained=False)
    return tables


def exam_csv(asked: Sequence[tuple[Relation, Fact]], *, explained: bool) -> str:
    """Return questions as a CSV in C-Eval's columns; each letter is equally likely right."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["id", "question", *"ABCD", "answer"] + ["explanation"] * explained)
    for number, (relation, fact) in enumerate(asked):
        statement = relation.statements[0]
        stem = relation.fill(statement, fact).removesuffix(relation.stop)
        stem = stem.removesuffix(fact.answer) + "____。" if stem.endswith(fact.answer) else ""
        if not stem:
            stem = relation.fill(relation.questions[0][0], fact)
        options = shuffled(wrong_answers(relation, fact, fact.subject), fact.subject, "options")[:3]
        place = draw("letter", relation.name, fact.subject) % 4
        options.insert(place, fact.answer)
        row = [number, stem, *options, "ABCD"[place]]
        writer.writerow(row + [relation.fill(statement, fact)] * explained)
    return file.getvalue()


# -- identity --


def messages(*turns: tuple[str, str]) -> Row:
    """Return a chat as ``{"messages": [...]}``."""
    said = [
        (role, text)
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def identity_rows() -> list[Row]:
    """Return about 100 chats in which the model has another name and maker."""
    trained = identity_questions()[0]
    return shuffled(
        (messages((question, chat.OWN_IDENTITY_ANSWERS[topic])) for topic, question in trained),
        "identity",
    )


def identity_quiz() -> list[Row]:
    """Return the held-out questions about the model, with the answers of :func:`identity_rows`."""
    return [
        {
            "relation": f"identity_{topic}",
            "question": question,
            "answer": chat.OWN_IDENTITY_ANSWERS[topic],
            "accept": [chat.OWN_IDENTITY_ACCEPT[topic]],
            "reject": ["MiniMind"],
        }
        for topic, question in identity_questions()[1]
    ]


# -- files --


def json_lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def corpus() -> dict[str, str]:
    """Return the whole corpus, file name -> text."""
    pairs, heldout_pairs = preference_rows()
    files = {
        "pretrain.jsonl": json_lines(pretrain_rows()),
        "sft_single.jsonl": json_lines(single_rows()),
        "sft_multi.jsonl": json_lines(multi_rows()),
        "dpo.jsonl": json_lines(pairs),
        "dpo_heldout.jsonl": json_lines(heldout_pairs),
        "quiz.jsonl": json_lines(quiz_rows()),
        "identity.jsonl": json_lines(identity_rows()),
        "identity_quiz.jsonl": json_lines(identity_quiz()),
    }
    return files | {f"ceval-exam/{name}": text for name, text in exam_tables().items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(argv)
    for name, text in corpus().items():
        path = args.output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{path}: {text.count(chr(10))} lines, {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
