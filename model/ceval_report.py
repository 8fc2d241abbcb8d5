"""Results of C-Eval: a CSV a subject as v1 wrote them, tables, a summary, a chart, a submission."""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from .ceval import CATEGORIES, CATEGORY_OF, CHANCE, LETTERS, UNMAPPED, Question, Reply
from .evaluation import Share
from .states import write_json

V1_COLUMNS = ["question", *LETTERS, "answer", "llm_answer", "is_right"]
OPTION_COLUMNS = ["option_answer", "option_is_right", *(f"score_{letter}" for letter in LETTERS)]
METHODS: dict[str, Callable[[Reply], str | None]] = {
    "letters": lambda reply: reply.letter,
    "option text": lambda reply: reply.option,
}
SUFFIX = "_result.csv"


# ---- scores ----


def methods_of(replies: Iterable[Reply]) -> list[str]:
    """Return the methods that every reply was asked by."""
    return [name for name, said in METHODS.items() if all(said(reply) for reply in replies)]


def share_right(replies: Iterable[Reply], method: str) -> Share:
    """Return how many replies are right by a method."""
    right = [METHODS[method](reply) == reply.question.answer for reply in replies]
    return Share(sum(right), len(right))


def by_subject(replies: Iterable[Reply]) -> dict[str, list[Reply]]:
    """Return the replies of each subject, in the order of their first."""
    groups: dict[str, list[Reply]] = {}
    for reply in replies:
        groups.setdefault(reply.question.subject, []).append(reply)
    return groups


def by_category(subjects: Iterable[str]) -> dict[str, list[str]]:
    """Return the given subjects of each of C-Eval's categories, and of ``UNMAPPED``."""
    groups: dict[str, list[str]] = {name: [] for name in (*CATEGORIES, UNMAPPED)}
    for subject in subjects:
        groups[CATEGORY_OF.get(subject, UNMAPPED)].append(subject)
    return {name: members for name, members in groups.items() if members}


def summarize(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return for each method the total, categories and subjects, as a JSON object.

    A category has C-Eval's figure, the mean of its subjects' shares (``mean_of_subjects``), and
    the share over its questions, to which the 95 % interval belongs.
    """
    groups = by_subject(replies)
    summary: dict[str, Any] = {"chance": CHANCE, "questions": len(replies)}
    for method in methods_of(replies):
        shares = {subject: share_right(members, method) for subject, members in groups.items()}

        def over(subjects: Iterable[str], shares: dict[str, Share] = shares) -> dict[str, Any]:
            some = [shares[subject] for subject in subjects]
            mean = sum(share.value for share in some) / len(some)
            return {**reduce(add, some).as_json(), "mean_of_subjects": mean}

        answers = Counter(METHODS[method](reply) for reply in replies)
        summary[method] = {
            "total": over(shares),
            "answers": {letter: answers[letter] for letter in LETTERS},
            "categories": {name: over(names) for name, names in by_category(shares).items()},
            "subjects": {subject: share.as_json() for subject, share in shares.items()},
        }
    return summary


def table(summary: dict[str, Any]) -> str:
    """Return v1's table: subjects, then categories and the total, with intervals and chance."""
    methods = [method for method in METHODS if method in summary]
    first = summary[methods[0]]
    width = max(len(name) for name in (*first["subjects"], "mean of its subjects"))

    def line(name: str, cells: Iterable[str]) -> str:
        return f"{name:<{width}}" + "".join(f"  {cell:>35}" for cell in cells).rstrip()

    def right(entry: dict[str, Any]) -> str:
        low, high = 100 * entry["low"], 100 * entry["high"]
        count = f"{entry['right']}/{entry['asked']}"
        return f"{count:>9}{percent(entry['share'])}  [{low:5.1f}, {high:5.1f}]"

    def percent(share: float) -> str:
        return f"{100 * share:8.2f} %"

    lines = [line("right/asked, accuracy, 95 %", methods)]
    for subject in first["subjects"]:
        lines.append(line(subject, (right(summary[m]["subjects"][subject]) for m in methods)))
    lines.append("")
    for name in first["categories"]:
        entries = [summary[m]["categories"][name] for m in methods]
        lines.append(line(name, map(right, entries)))
        means = (percent(entry["mean_of_subjects"]) + " " * 16 for entry in entries)
        lines.append(line("  mean of its subjects", means))
    totals = [summary[m]["total"] for m in methods]
    lines += ["", line("total", map(right, totals))]
    means = (percent(entry["mean_of_subjects"]) + " " * 16 for entry in totals)
    lines.append(line("  mean of the subjects", means))
    chance = summary["chance"]
    lines.append(line("chance", [percent(chance) + " " * 16] * len(methods)))
    lines.append("")
    for method, total in zip(methods, totals, strict=True):
        answers = ", ".join(f"{k} {v}" for k, v in summary[method]["answers"].items())
        verdict = "not told apart from chance"
        if not total["low"] <= chance <= total["high"]:
            verdict = "above chance" if total["low"] > chance else "below chance"
        lines.append(f"{method}: {verdict}; answers given: {answers}")
    return "\n".join(lines)


# ---- files ----


def write_replies(replies: Sequence[Reply], folder: Path, split: str) -> None:
    """Write ``<subject>_<split>_result.csv`` for each subject: v1's columns, then option text's.

    Nothing is known to be right in the test split: there ``answer`` and ``is_right`` are empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob(f"*{SUFFIX}"):  # of another exam: what lies here is one exam's
        earlier.unlink()
    for subject, members in by_subject(replies).items():
        path = folder / f"{subject}_{split}{SUFFIX}"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*V1_COLUMNS, *OPTION_COLUMNS])
            for reply in members:
                question, right = reply.question, reply.question.answer
                writer.writerow(
                    [
                        question.text,
                        *question.options,
                        right,
                        reply.letter,
                        right and int(reply.letter == right),
                        reply.option,
                        right and reply.option and int(reply.option == right),
                        *(f"{score:.6f}" for score in reply.option_scores),
                    ]
                )


def read_replies(folder: str | Path) -> list[Reply]:
    """Read the CSVs of a folder that :func:`write_replies` or v1 wrote (v1: letters alone).

    v1's last row, dashes with the accuracy in words, is passed over.

    Raises:
        FileNotFoundError: no such files.
        ValueError: a file without v1's columns, a row that is not whole.
    """
    paths = sorted(Path(folder).glob(f"*{SUFFIX}"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no <subject>_val{SUFFIX}: name a folder that eval_ceval.py wrote"
        )
    replies = []
    for path in paths:
        subject = path.name.removesuffix(SUFFIX).removesuffix("_val").removesuffix("_dev")
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = set(V1_COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
            for row in reader:
                if row["question"] == "-" and row["llm_answer"] == "-":
                    continue
                if row["answer"] not in LETTERS or row["llm_answer"] not in LETTERS:
                    raise ValueError(
                        f"{path}:{reader.line_num}: answer {row['answer']!r}, llm_answer "
                        f"{row['llm_answer']!r}, expected letters of {LETTERS}"
                    )
                options = tuple(row[letter] for letter in LETTERS)
                number = str(len(replies))
                question = Question(subject, number, row["question"], options, row["answer"])
                replies.append(Reply(question, row["llm_answer"], row.get("option_answer") or None))
    return replies


def write_submission(replies: Sequence[Reply], folder: Path) -> list[Path]:
    """Write C-Eval's ``{subject: {id: letter}}``, a file for each method; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for method in methods_of(replies):
        answers: dict[str, dict[str, str]] = {}
        for reply in replies:
            answers.setdefault(reply.question.subject, {})[reply.question.id] = METHODS[method](
                reply
            )
        paths.append(folder / f"submission_{method.replace(' ', '_')}.json")
        write_json(answers, paths[-1])
    return paths


def draw(summary: dict[str, Any], path: Path, title: str) -> bool:
    """Draw a bar a subject with its interval, grouped by category; false without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    methods = [method for method in METHODS if method in summary]
    names, colors, legend = [], [], {}
    for index, (category, members) in enumerate(
        by_category(summary[methods[0]]["subjects"]).items()
    ):
        names += members
        colors += [f"C{index}"] * len(members)
        legend[category] = f"C{index}"
    figure, all_axes = pyplot.subplots(
        1, len(methods), sharey=True, squeeze=False, dpi=100,
        figsize=(4 + 4 * len(methods), 2.2 + 0.19 * len(names)), layout="constrained",
    )  # fmt: skip
    for axes, method in zip(all_axes[0], methods, strict=True):
        entries = [summary[method]["subjects"][name] for name in names]
        values = [100 * entry["share"] for entry in entries]
        reach = [[100 * (e["share"] - e["low"]) for e in entries],
                 [100 * (e["high"] - e["share"]) for e in entries]]  # fmt: skip
        axes.barh(names, values, color=colors, xerr=reach, error_kw={"alpha": 0.35, "lw": 1})
        axes.axvline(100 * CHANCE, color="black", linestyle="--", linewidth=1)
        total = summary[method]["total"]
        axes.set_title(
            f"{method}: {total['right']}/{total['asked']} = {100 * total['share']:.1f} % "
            f"[{100 * total['low']:.1f}, {100 * total['high']:.1f}]", fontsize=10,
        )  # fmt: skip
        axes.set_xlabel("right, % (line: chance)")
        axes.set_xlim(0, 100)
        axes.margins(y=0.01)
        axes.tick_params(axis="y", labelsize=8)
    all_axes[0][0].invert_yaxis()  # sharey: once for all
    handles = [Patch(color=color, label=name) for name, color in legend.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    pyplot.close(figure)
    return True


def results_name(path: Path, out_dir: Path, lora: str | None = None, n_shots: int = 0) -> str:
    """Return the folder name for a weights file: ``rl_512``, ``multi_chat_full_sft_512``, ….

    The folders under ``out_dir`` are part of it, as v1 keeps two ``full_sft_512.pth``; of weights
    elsewhere, and of a folder's ``model.safetensors``, the parent folder.
    """
    path, out_dir = path.resolve(), out_dir.resolve()
    if path.name in ("model.safetensors", "pytorch_model.bin"):
        parts = [path.parent.name]
    elif path.is_relative_to(out_dir):
        parts = [*path.relative_to(out_dir).parent.parts, path.stem]
    else:
        parts = [path.parent.name, path.stem]
    if lora:
        parts.append(Path(lora).resolve().name)
    if n_shots:
        parts.append(f"{n_shots}shot")
    return "_".join(filter(None, parts))
