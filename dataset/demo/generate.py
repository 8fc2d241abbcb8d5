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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import chat
from phrasings import RELATIONS, Fact, Relation

Row = dict[str, Any]
Step = tuple[Relation, Fact]  # what one turn of a chat asks about
T = TypeVar("T")

PHRASINGS_PER_FACT = 5  # of a relation's six to eight; the others stay unseen with this fact
COMPLETE_OF_7 = 4  # complete answers: a few more, for each of their words can also be another
SMALL_RELATION = 20  # below so many facts a relation teaches all phrasings but one of each
QUIZ_PER_RELATION = 0.42  # share of a relation's facts that the quiz asks
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
    """Return the complete or the curt answer: which one is better, SFT leaves to DPO."""
    if draw("style", relation.name, fact.subject, *salt) % 7 < COMPLETE_OF_7:
        return relation.fill(complete, fact)
    return curt(relation, fact)


def split_phrasings(relation: Relation, index: int) -> tuple[list[int], list[int]]:
    """Return which questions the relation's fact number ``index`` is trained with, and which never.

    The choice moves on by one with each fact, so that every phrasing is trained with most facts and
    unseen with some.
    """
    n = len(relation.questions)
    n_trained = n - 1 if len(relation.facts) < SMALL_RELATION else PHRASINGS_PER_FACT
    order = [(index + step * step_size(n)) % n for step in range(n)]
    return sorted(order[:n_trained]), order[n_trained:]


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
            for number in split_phrasings(relation, index)[0]:
                question, complete = relation.questions[number]
                whole = relation.fill(question, fact)
                for said in (whole, varied(whole, relation)):
                    rows.append(sft_row(said, reply(relation, fact, complete, said)))
    for questions, answer in chat.SMALL_TALK:
        rows += [sft_row(question, answer) for question in questions]
    for topic, question in identity_questions()[0]:
        rows.append(sft_row(question, chat.IDENTITY_ANSWERS[topic]))
    return shuffled(rows, "single")


def varied(question: str, relation: Relation) -> str:
    """Return the question as people also type it: after a salutation, or without its last mark."""
    salutations = chat.SALUTATIONS[relation.language]
    choice = draw("varied", question) % (2 * len(salutations))
    return salutations[choice] + question if choice < len(salutations) else question[:-1]


def identity_questions() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (topic, question) about the model: those for training, those for the quiz."""
    trained, heldout = [], []
    index = 0
    for topic, (asked, requested) in chat.IDENTITY_CORES.items():
        for cores, frames in ((asked, chat.ASKING), (requested, chat.REQUESTING)):
            for core in cores:
                for number in range(len(frames)):
                    question = frames[(index + number) % len(frames)].format(core=core)
                    (trained if number < 3 else heldout).append((topic, question))
                index += 1
    return trained, heldout


def related() -> list[tuple[Relation, Relation]]:
    """Return the pairs of relations between which a pronoun can lead."""
    return [
        (first, second)
        for first in RELATIONS
        for second in RELATIONS
        if first.kind == second.kind and first is not second and second.it
    ]


def same_subject(fact: Fact, relation: Relation) -> Fact | None:
    """Return what ``relation`` knows about the subject of ``fact``."""
    return next((other for other in relation.facts if other.subject == fact.subject), None)


def quiz_moves() -> list[tuple[Step, Step]]:
    """Return the moves from one fact to another that only the quiz makes."""
    moves = []
    for relation in RELATIONS:
        chosen = ordered(relation)
        moves += [((relation, chosen[i]), (relation, chosen[-1 - i])) for i in range(2)]
    for first, second in related():
        asked = next(fact for fact in ordered(second) if same_subject(fact, first))
        moves.append(((first, same_subject(asked, first)), (second, asked)))
    return moves


def paths() -> Iterator[list[Step]]:
    """Yield what each chat with a history asks about, in turn."""
    for relation in RELATIONS:
        for salt, n_turns in (("long", 3), ("short", 2)):
            chain = shuffled(relation.facts, salt)
            for start in range(0, len(chain), n_turns - 1):  # the last fact opens the next chat
                yield [(relation, chain[(start + i) % len(chain)]) for i in range(n_turns)]
    for first, second in related():
        for fact in first.facts:
            if asked := same_subject(fact, second):
                path = [(first, fact), (second, asked)]
                if draw("on", first.name, fact.subject) % 2:  # and then the same of another subject
                    others = [other for other in second.facts if other is not asked]
                    path.append((second, shuffled(others, fact.subject)[0]))
                yield path


def opening(relation: Relation, fact: Fact, salt: object) -> tuple[str, str]:
    """Return a whole question about ``fact`` in a phrasing it is trained with, and an answer."""
    trained = split_phrasings(relation, ordered(relation).index(fact))[0]
    number = trained[draw("opening", fact.subject, salt) % len(trained)]
    question, complete = relation.questions[number]
    return relation.fill(question, fact), reply(relation, fact, complete, salt)


def follow_up(before: Step, after: Step, salt: object) -> tuple[str, str]:
    """Return a phrasing that leads from one fact to the other, and the complete answer to it."""
    relation, fact = after
    if before[1].subject == fact.subject:
        return relation.it[draw("it", fact.subject, salt) % len(relation.it)]
    number = draw("next", fact.subject, salt) % len(relation.next)
    return relation.next[number], relation.questions[0][1]


def multi_rows() -> list[Row]:
    """Return the chats with a history: of another subject, of the same one, of both."""
    kept = [[(r.name, fact.subject) for r, fact in move] for move in quiz_moves()]
    rows = []
    for salt, path in enumerate(paths()):
        turns = [opening(*path[0], salt)]
        last = path[0]
        for step in path[1:]:
            if [(r.name, fact.subject) for r, fact in (last, step)] in kept:
                continue
            question, complete = follow_up(last, step, salt)
            turns.append((step[0].fill(question, step[1]), reply(*step, complete, salt, "then")))
            last = step
        rows.append(framed(turns, salt))
    return shuffled((row for row in rows if row["history"]), "multi")


def framed(turns: list[tuple[str, str]], salt: object) -> Row:
    """Return the chat, now and then with a greeting, thanks or a system text around it."""
    frame = draw("frame", salt)
    system = ""
    if frame % 10 == 0:
        turns = [small_talk(chat.GREETINGS[frame // 10 % len(chat.GREETINGS)]), *turns]
    elif frame % 10 == 1:
        turns = [*turns, small_talk(chat.THANKS[frame // 10 % len(chat.THANKS)])]
    elif frame % 10 == 2 and len(turns) > 1:
        system = chat.SYSTEM_TEXTS[frame // 10 % len(chat.SYSTEM_TEXTS)]
    *history, (question, answer) = turns
    return sft_row(question, answer, history, system)


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
    for before, after in quiz_moves():
        question, complete = follow_up(before, after, "quiz")
        rows.append(quiz_row(*after, question, complete, [list(opening(*before, "quiz"))]))
    return rows


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
    """Return about 100 chats in which the model has another name and maker.

    A question of each relation keeps the adapter from forgetting what else the model knows.
    """
    rows = [messages((question, answer)) for question, answer in chat.OWN_SMALL_TALK]
    for topic, question in identity_questions()[0]:
        rows.append(messages((question, chat.OWN_IDENTITY_ANSWERS[topic])))
    for relation in RELATIONS:
        fact = ordered(relation)[-1]
        number = split_phrasings(relation, len(relation.facts) - 1)[0][0]
        question, complete = relation.questions[number]
        rows.append(messages((relation.fill(question, fact), relation.fill(complete, fact))))
    return shuffled(rows, "identity")


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
