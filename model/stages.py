"""What each stage of training changed: the same measures of several weights, side by side."""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .ceval import CHANCE, Exam, ask
from .ceval_report import methods_of, share_right
from .checkpoint import ADAPTER_STAGES, STAGE_STEMS, Loaded
from .evaluation import Share, measure_text
from .quiz import QuizItem, answer_greedily, take_quiz
from .repetition import distinct, longest_loop
from .rows import read_documents
from .tally import Tally

ADAPTER_FILE = "adapter_config.json"
NGRAMS = (1, 2, 3)


# ---- which weights ----


@dataclass(frozen=True)
class Stage:
    """Weights to measure: a file or an exported folder, or an adapter on the base that it names."""

    name: str
    weights: Path | None
    lora: Path | None = None


def stage_at(path: Path, out_dir: Path) -> Stage:
    """Return the stage of weights that are named, be it an adapter's folder.

    Its name is the path within ``out_dir``, elsewhere the last two parts of the path.
    """
    whole = path.resolve()
    if whole.is_relative_to(out_dir.resolve()):
        shown = whole.relative_to(out_dir.resolve())
    else:
        shown = Path(*whole.parts[-2:])
    name = (shown.with_suffix("") if shown.suffix == ".pth" else shown).as_posix()
    is_adapter = (path / ADAPTER_FILE).is_file()
    return Stage(name, None, path) if is_adapter else Stage(name, path)


def find_stages(out_dir: Path, width: str | None = None) -> list[Stage]:
    """Return what the stages left in ``out_dir``, or else in its ``demo``, in training's order.

    Args:
        width: only weights of this name, such as ``512`` or ``512_moe``; None: all.

    Raises:
        FileNotFoundError: there are none.
    """
    for root in (out_dir, out_dir / "demo"):
        stages = []
        for stage, stem in STAGE_STEMS.items():
            is_adapter = stage in ADAPTER_STAGES
            # a width, so that lora_512 is found and lora_rl_512 is not
            end = "" if is_adapter else r"\.pth"
            name = re.compile(rf"{Path(stem).name}_{width or '[0-9]+'}(_.*)?{end}")
            for path in sorted((root / stem).parent.glob("*")):
                exists = (path / ADAPTER_FILE).is_file() if is_adapter else path.is_file()
                if exists and name.fullmatch(path.name):
                    stages.append(stage_at(path, out_dir))
        if stages:
            return stages
    names = ", ".join(f"{stem}_{width or '*'}" for stem in STAGE_STEMS.values())
    raise FileNotFoundError(
        f"{out_dir} holds no weights of any stage (looked for {names}, and the demo's): run "
        "1-pretrain.py or `make demo`, or name files with --weights"
    )


# ---- measures ----


@dataclass
class Tasks:
    """What is measured; what is empty is left out."""

    prompts: Sequence[str] = ()
    max_new_tokens: int = 128
    texts: Sequence[str] = ()
    quizzes: dict[str, list[QuizItem]] = field(default_factory=dict)
    exam: Exam | None = None


def read_texts(path: str | Path, max_bytes: int, tally: Tally) -> list[str]:
    """Return the first whole documents of a file, until they hold ``max_bytes`` (0: all)."""
    texts, n_bytes = [], 0
    for text in read_documents(path, tally):
        texts.append(text)
        n_bytes += len(text.encode())
        if max_bytes and n_bytes >= max_bytes:
            break
    return texts


def measure(loaded: Loaded, tasks: Tasks, log: Callable[[str], None]) -> dict[str, Any]:
    """Return a model's measures, as a JSON object."""
    model, tokenizer = loaded.model, loaded.tokenizer
    found: dict[str, Any] = {"parameters": loaded.n_params}
    if tasks.texts:
        log("bits per byte")
        found["text"] = measure_text(model, tokenizer, tasks.texts).as_json()
    for name, items in tasks.quizzes.items():
        log(f"quiz {name}")
        result = take_quiz(loaded, items)
        share = Share(result.n_right, result.n_asked)
        found.setdefault("quiz", {})[name] = share.as_json()
    if tasks.exam:
        log("C-Eval")
        replies, counts = ask(model, tokenizer, tasks.exam)
        found["ceval"] = {
            method: share_right(replies, method).as_json() for method in methods_of(replies)
        }
        found["ceval_did_not_fit"] = dict(counts)
    if tasks.prompts:
        log("answers")
        found["answers"] = answer_each(loaded, tasks.prompts, tasks.max_new_tokens)
        found["repetition"] = measure_repetition(found["answers"])
    return found


def answer_each(
    loaded: Loaded, prompts: Sequence[str], max_new_tokens: int
) -> list[dict[str, Any]]:
    """Return the greedy answers to questions in the chat form, and whether the limit cut them."""
    asked = ([{"role": "user", "content": prompt}] for prompt in prompts)
    answers = answer_greedily(loaded, asked, max_new_tokens)
    return [
        {
            "prompt": prompt,
            "answer": answer.text,
            "tokens": len(answer.tokens),
            "is_cut": answer.finish_reason == "length",
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def measure_repetition(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return distinct-n, the longest loop and the share of answers that the limit cut."""
    texts = [answer["answer"] for answer in answers]
    return {
        **{f"distinct_{n}": distinct(texts, n) for n in NGRAMS},
        "longest_loop": max(map(longest_loop, texts), default=0),
        "characters": sum(map(len, texts)) / max(1, len(texts)),
        "cut": Share(sum(answer["is_cut"] for answer in answers), len(answers)).as_json(),
    }


# ---- the report ----


def cell_of_share(entry: dict[str, Any]) -> str:
    return f"{entry['right']}/{entry['asked']} = {Share(entry['right'], entry['asked'])}"


def measure_rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the rows of the table: a measure and its cell for each stage."""
    first = results[0]
    rows = [("parameters", [f"{r['parameters'] / 1e6:.1f} M" for r in results])]
    if "text" in first:
        label = f"bits per byte, {first['text']['n_bytes']:,} bytes"
        rows.append((label, [f"{r['text']['bits_per_byte']:.4f}" for r in results]))
    for name in first.get("quiz", {}):
        label = name if "quiz" in name else f"quiz {name}"
        rows.append((label, [cell_of_share(r["quiz"][name]) for r in results]))
    for method in first.get("ceval", {}):
        label = f"C-Eval by {method} (chance {100 * CHANCE:.0f} %)"
        rows.append((label, [cell_of_share(r["ceval"][method]) for r in results]))
    if "repetition" in first:
        parts = [r["repetition"] for r in results]
        for n in NGRAMS:
            rows.append(
                (f"distinct-{n} of the answers", [f"{p[f'distinct_{n}']:.3f}" for p in parts])
            )
        rows.append(("longest loop, characters", [str(p["longest_loop"]) for p in parts]))
        rows.append(("mean answer, characters", [f"{p['characters']:.0f}" for p in parts]))
        rows.append(("answers cut by the limit", [cell_of_share(p["cut"]) for p in parts]))
    return rows


def report(results: Sequence[dict[str, Any]]) -> str:
    """Return the measures of all stages as a Markdown table, and below it their answers."""
    lines = markdown_table(["", *(r["stage"] for r in results)], measure_rows(results))
    lines += ["", "In brackets: 95 % interval (Wilson)."]
    steps = [changes(*pair) for pair in itertools.pairwise(results)]
    lines += ["", *(f"- {step}" for step in steps)] if steps else []
    for index, answer in enumerate(results[0].get("answers", ())):
        lines += ["", f"**{answer['prompt']}**", ""]
        for result in results:
            said = result["answers"][index]
            text = " ⏎ ".join(said["answer"].splitlines())
            lines.append(f"- {result['stage']}: {text}{' … (cut)' * said['is_cut']}")
    return "\n".join(lines) + "\n"


def changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return in a line what a stage changed; a difference of shares is in points."""
    parts = []
    if "text" in after:
        more = after["text"]["bits_per_byte"] - before["text"]["bits_per_byte"]
        parts.append(f"bits per byte {more:+.4f}")
    shares = [(f"quiz {name}", "quiz", name) for name in after.get("quiz", {})]
    shares += [(f"C-Eval by {method}", "ceval", method) for method in after.get("ceval", {})]
    for label, kind, name in shares:
        old, new = before[kind][name], after[kind][name]
        is_apart = old["high"] < new["low"] or new["high"] < old["low"]
        hint = "" if is_apart else " (the intervals overlap)"
        parts.append(f"{label} {100 * (new['share'] - old['share']):+.1f} points{hint}")
    if "repetition" in after:
        more = after["repetition"]["distinct_2"] - before["repetition"]["distinct_2"]
        parts.append(f"distinct-2 {more:+.3f}")
    return f"{before['stage']} → {after['stage']}: {'; '.join(parts) or 'nothing was measured'}"


def markdown_table(header: Sequence[str], rows: Iterable[tuple[str, list[str]]]) -> list[str]:
    """Return the lines of a Markdown table whose columns also stand in line as plain text."""
    table = [list(header), *([name, *cells] for name, cells in rows)]
    table = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        return f"| {' | '.join(cells)} |"

    rule = [("-" * widths[0]), *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(table[0]), line(rule), *map(line, table[1:])]
