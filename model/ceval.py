"""The C-Eval exam (arXiv:2305.08322): its files, what the model is asked, how it answers.

Two methods in one run. *Letters* is v1's: the question with its options, and the likeliest of the
tokens ``A B C D``. *Option text*: the question alone, and the option whose text is the likeliest
answer per byte. A small model mostly has a favourite letter; the second method shows what it knows.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .evaluation import Progress, next_token_logprobs, option_logprobs
from .records import read_batches, read_records
from .tally import BadRecord, Place, Tally

LETTERS = ("A", "B", "C", "D")
CHANCE = 1 / len(LETTERS)
SYSTEM = "开始回答问题"
SPLITS = ("val", "dev", "test")
DEMO_EXAM = "dataset/demo/ceval-exam"
# C-Eval's own map (subject_mapping.json of its repository)
CATEGORIES = {
    "STEM": """computer_network operating_system computer_architecture college_programming
        college_physics college_chemistry advanced_mathematics probability_and_statistics
        discrete_mathematics electrical_engineer metrology_engineer high_school_mathematics
        high_school_physics high_school_chemistry high_school_biology middle_school_mathematics
        middle_school_biology middle_school_physics middle_school_chemistry veterinary_medicine""",
    "Social Science": """college_economics business_administration marxism mao_zedong_thought
        education_science teacher_qualification high_school_politics high_school_geography
        middle_school_politics middle_school_geography""",
    "Humanities": """modern_chinese_history ideological_and_moral_cultivation logic law
        chinese_language_and_literature art_studies professional_tour_guide legal_professional
        high_school_chinese high_school_history middle_school_history""",
    "Other": """civil_servant sports_science plant_protection basic_medicine clinical_medicine
        urban_and_rural_planner accountant fire_engineer environmental_impact_assessment_engineer
        tax_accountant physician""",
}
CATEGORY_OF = {subject: name for name, text in CATEGORIES.items() for subject in text.split()}
UNMAPPED = "not in C-Eval"  # subjects of other exams in the same format

Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """One question; ``answer`` is a letter, or None in the test split."""

    subject: str
    id: str
    text: str
    options: tuple[str, ...]
    answer: str | None = None

    @property
    def with_options(self) -> str:
        """What v1 asks."""
        listed = ", ".join(
            f"{letter}: {option}" for letter, option in zip(LETTERS, self.options, strict=True)
        )
        return f"{self.text}。选择 {listed}"

    @property
    def right_option(self) -> str:
        """The text of the right answer."""
        return self.options[LETTERS.index(self.answer)]


@dataclass
class Exam:
    """The questions of a split, and for each subject the solved examples to show before them."""

    questions: list[Question]
    shots: dict[str, list[Question]] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    empty: list[Path] = field(default_factory=list)  # files without a usable question

    @property
    def subjects(self) -> list[str]:
        """The subjects, in order."""
        return list(dict.fromkeys(question.subject for question in self.questions))


@dataclass(frozen=True)
class Reply:
    """What a model answered: by letters, and by the likeliest option (None where not measured).

    ``option_scores`` are the options' log probabilities in nats per byte.
    """

    question: Question
    letter: str
    option: str | None = None
    option_scores: tuple[float, ...] = ()


# ---- files ----


def load_exam(data_dir: str | Path, split: str = "val", n_shots: int = 0) -> Exam:
    """Read ``<data_dir>/<split>/<subject>_<split>.csv`` and ``n_shots`` of each subject from dev.

    Rows that cannot be used are left out and counted in the exam's tally.

    Raises:
        FileNotFoundError: no such folder, or no files of the split in it.
        ValueError: a file without C-Eval's columns, or no usable question at all.
    """
    exam = Exam([])
    for subject, path in find_subjects(data_dir, split).items():
        questions = list(read_questions(path, subject, exam.tally, has_answers=split != "test"))
        exam.questions += questions
        if not questions:
            exam.empty.append(path)
    if not exam.questions:
        raise ValueError(
            f"{Path(data_dir) / split} holds no usable question: {exam.tally.report()}"
        )
    if n_shots:
        files = find_subjects(data_dir, "dev")
        for subject in exam.subjects:
            if subject in files:
                solved = read_questions(files[subject], subject, exam.tally, has_answers=True)
                exam.shots[subject] = list(solved)[:n_shots]
    return exam


def find_subjects(data_dir: str | Path, split: str) -> dict[str, Path]:
    """Return the file of each subject, in the order of names.

    Raises:
        FileNotFoundError: the folder, the split's folder in it, or its files are missing.
    """
    root = Path(data_dir)
    expected = f"expected {root / split}/<subject>_{split}.csv"
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} does not exist, {expected}: get ceval-exam.zip from "
            f"https://huggingface.co/datasets/ceval/ceval-exam and unpack it there, or try the "
            f"small exam that ships: --data_dir {DEMO_EXAM}"
        )
    files = {
        path.name.removesuffix(f"_{split}.csv"): path
        for path in sorted((root / split).glob(f"*_{split}.csv"))
        if not path.name.startswith(".")  # such as the ._files of macOS archives
    }
    if files:
        return files
    looked = root / split if (root / split).is_dir() else root
    names = sorted(path.name for path in looked.iterdir())
    found = ", ".join(names[:6]) + (", …" if len(names) > 6 else "") if names else "nothing"
    hint = next(
        (
            f"; did you mean --data_dir {place}?"
            for place in (root.parent, *sorted(path for path in root.iterdir() if path.is_dir()))
            if any((place / split).glob(f"*_{split}.csv"))
        ),
        "",
    )
    raise FileNotFoundError(f"{looked} has no questions, {expected}; found: {found}{hint}")


def read_questions(
    path: Path, subject: str, tally: Tally, *, has_answers: bool
) -> Iterator[Question]:
    """Yield the usable questions of a file; the rest is counted by reason, file and line.

    Raises:
        ValueError: a column is missing.
    """
    columns = ["question", *LETTERS] + ["answer"] * has_answers
    number = 0
    for batch in read_batches(path):
        for place, row in read_records(batch, tally):
            missing = [name for name in columns if name not in row]
            if missing:
                raise ValueError(
                    f"{path} has no column {', '.join(missing)} (found: {', '.join(row)}); "
                    f"C-Eval's are id,{','.join(columns)}"
                )
            try:
                yield _question(row, subject, number, place, tally, has_answers)
            except BadRecord as bad:
                tally.skip(bad.reason, place, bad.detail)
            number += 1


def _question(
    row: dict[str, str], subject: str, number: int, place: Place, tally: Tally, has_answers: bool
) -> Question:
    for name in ("question", *LETTERS):
        if not row[name].strip():
            raise BadRecord("missing cell", name)
    answer = None
    if has_answers:
        answer = row["answer"].strip().upper()
        if answer not in LETTERS:
            raise BadRecord("the answer is none of A B C D", repr(row["answer"][:20]))
        if answer != row["answer"]:
            tally.change("answer in another spelling", place, repr(row["answer"]))
    options = tuple(row[letter] for letter in LETTERS)
    return Question(
        subject, row.get("id", "").strip() or str(number), row["question"], options, answer
    )


# ---- prompts ----


class Prompter:
    """Makes prompts that fit the context, and counts what had to be cut or left out."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.counts: Counter[str] = Counter()
        self._frame = tokenizer.encode_chat(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ""}],
            add_generation_prompt=True,
        )
        if 2 * len(self._frame) > context:
            raise ValueError(
                f"a context of max_seq_len={context} is too short for C-Eval: its prompt takes "
                f"{len(self._frame)} tokens without any question"
            )

    def prompt(
        self, method: str, content: str, shots: Iterable[tuple[str, str]], limit: int
    ) -> list[int]:
        """Return the ids of system text, solved examples, question and ``<s>assistant``.

        Args:
            method: what the counts are kept under.
            content: what the user asks; too long for ``limit`` tokens, it loses its beginning: the
                end asks, and holds v1's options.
            shots: (asked, answered); one that does not fit any more is left out.
        """
        encode_chat = self.tokenizer.encode_chat
        ids = self.tokenizer.encode(content)
        room = limit - len(self._frame) - len(ids)
        if room < 0:
            self.counts[f"{method}: questions cut at their beginning"] += 1
            ids = ids[-room:]
        examples: list[int] = []
        for asked, answered in shots:
            turn = encode_chat(
                [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            )
            if len(turn) > room:
                self.counts[f"{method}: examples left out"] += 1
                continue
            room -= len(turn)
            examples += turn
        system = encode_chat([{"role": "system", "content": SYSTEM}])
        question = self.tokenizer.encode_chat_masked([{"role": "user", "content": ""}], [ids])[0]
        # the text of a conversation is that of its messages, one after another
        return [*system, *examples, *question, *encode_chat([], add_generation_prompt=True)]

    def letters(self, question: Question, shots: Sequence[Question] = ()) -> list[int]:
        """Return v1's prompt: the question with its options; examples are answered by a letter."""
        examples = ((shot.with_options, shot.answer) for shot in shots)
        return self.prompt("letters", question.with_options, examples, self.context)

    def option_text(
        self, question: Question, shots: Sequence[Question] = ()
    ) -> tuple[list[int], list[list[int]]]:
        """Return the prompt of the question alone, and the ids of each option as its answer."""
        most = self.context + 1 - 2 * len(self._frame)  # leaves some room for the question
        options = []
        for option in question.options:
            ids = self.tokenizer.encode(option.strip())
            if len(ids) > most:
                self.counts["option text: options cut at their end"] += 1
            options.append(ids[:most])
        examples = ((shot.text, shot.right_option.strip()) for shot in shots)
        # the last token of an option is predicted and never read
        limit = self.context + 1 - max(map(len, options))
        return self.prompt("option text", question.text, examples, limit), options


# ---- asking ----


def ask(
    model: nn.Module, tokenizer: Any, exam: Exam, progress: Progress | None = None
) -> tuple[list[Reply], Counter[str]]:
    """Return the model's replies in the order of the exam, and counts of what did not fit.

    Letters: argmax of ``p(letter | system, question with options)``. Option text: argmax of
    ``log p(option | system, question) / bytes``. Without a division the shortest option would
    nearly always win. Bytes and not tokens: tokens would favour options of rare characters, whose
    later bytes are certain once the first is known, and the choice would hang on the tokenizer.

    Args:
        model: in eval mode.
        tokenizer: has ``encode encode_chat encode_chat_masked token_bytes``.
        progress: called with the answers that are ready; a question has two.

    Raises:
        ValueError: a context too short, a tokenizer without one token for each letter.
    """
    progress = progress or (lambda n_more: None)
    letter_ids = [tokenizer.encode(letter) for letter in LETTERS]
    if any(len(ids) != 1 for ids in letter_ids):
        raise ValueError(f"the tokenizer splits a letter of {LETTERS}: {letter_ids}")
    prompter = Prompter(tokenizer, model.config.max_position_embeddings)
    shots = [exam.shots.get(question.subject, []) for question in exam.questions]
    pairs = list(zip(exam.questions, shots, strict=True))
    prompts = [prompter.letters(*pair) for pair in pairs]
    candidates = [ids[0] for ids in letter_ids]
    by_letter = next_token_logprobs(model, prompts, candidates, progress=progress)
    asked = [prompter.option_text(*pair) for pair in pairs]
    prompts, options = [prompt for prompt, _ in asked], [texts for _, texts in asked]
    sums = option_logprobs(model, prompts, options, progress=progress)
    n_bytes = [[int(tokenizer.token_bytes[ids].sum()) for ids in texts] for texts in options]
    scores = torch.tensor(sums) / torch.tensor(n_bytes)  # (questions, 4)
    check_finite(by_letter)
    check_finite(scores)
    replies = [
        Reply(question, LETTERS[letter], LETTERS[option], tuple(values))
        for question, letter, option, values in zip(
            exam.questions,
            by_letter.argmax(dim=-1).tolist(),
            scores.argmax(dim=-1).tolist(),
            scores.tolist(),
            strict=True,
        )
    ]
    return replies, prompter.counts


def check_finite(values: torch.Tensor) -> None:
    """Raise ValueError if the model's numbers are none: they would all choose A."""
    if not torch.isfinite(values).all():
        raise ValueError(
            "the model's log probabilities are not finite: its weights are damaged, or overflow in "
            "this precision; try --dtype float32"
        )
