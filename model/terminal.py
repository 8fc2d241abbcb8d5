"""What the scripts that talk on a terminal share: sampling flags, questions, answers as they come.

Imports torch only inside its functions, so that ``--help`` and wrong flags answer at once.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .flags import non_negative, positive

if TYPE_CHECKING:
    from .checkpoint import Loaded
    from .generation import Answer, Engine
    from .sampling import SamplingOptions


def fraction(text: str) -> float:
    """Parse a number from 0 to 1, as an argparse type."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def sampling_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the flags of :class:`model.sampling.SamplingOptions`; ``defaults`` are the script's."""
    add = parser.add_argument_group("sampling").add_argument
    add("--max_new_tokens", type=positive(int), help="longest answer (default %(default)s)")
    add("--temperature", type=non_negative(float), help="0: greedy (default %(default)s)")
    add("--top_k", type=non_negative(int), help="0: off (default %(default)s)")
    add("--top_p", type=fraction, default=1.0, help="1: off (default %(default)s)")
    add("--min_p", type=fraction, default=0.0, help="0: off (default %(default)s)")
    add("--repetition_penalty", type=positive(float), default=1.0, help="1: off, over all the text")
    add("--presence_penalty", type=float, default=0.0, help="0: off, over the answer")
    add("--frequency_penalty", type=float, default=0.0, help="0: off, over the answer")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable")
    add("--seed", type=int, help="the same seed gives the same answers (default: another each run)")
    parser.set_defaults(**defaults)


def history_flag(parser: argparse._ActionsContainer, where: str = "") -> None:
    """Add ``--history_cnt``; :func:`check_history` says whether what was given makes sense."""
    parser.add_argument(
        "--history_cnt",
        type=non_negative(int),
        default=4,
        help=f"messages remembered{where}, questions and answers (default 4; 0: none)",
    )


def check_history(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error where half a turn is asked for."""
    if args.history_cnt % 2:
        parser.error(f"--history_cnt {args.history_cnt} is odd: a turn is a question and an answer")


def sampling_options(args: argparse.Namespace) -> "SamplingOptions":
    """Return the options that :func:`sampling_flags` parsed."""
    from .sampling import SamplingOptions

    names = SamplingOptions.__dataclass_fields__.keys() & vars(args).keys()
    return SamplingOptions(**{name: getattr(args, name) for name in names})


def introduce(loaded: "Loaded") -> None:
    """Print which file answers, and how."""
    model = loaded.model
    adapter = f" with the adapter {loaded.adapter}" if loaded.adapter else ""
    print(
        f"weights: {loaded.path}{adapter} ({loaded.n_params / 1e6:.1f} M parameters, context "
        f"{model.config.max_seq_len} tokens, {model.device}, {loaded.dtype})\n".replace(
            "torch.", ""
        )
    )


def prepare_input() -> None:
    """Let ``input()`` edit lines, wide characters too, and take any bytes."""
    with contextlib.suppress(ImportError):  # Windows has none
        importlib.import_module("readline")
    sys.stdin.reconfigure(errors="replace")


def ask(label: str) -> Iterator[str]:
    """Yield the lines that a user types, until exit, the end of the input, or Ctrl-C."""
    prepare_input()
    while True:
        try:
            line = input(label)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip() in ("exit", "quit"):
            return
        if line.strip():
            yield line


def show(engine: "Engine", answer: "Answer", *, interactive: bool) -> None:
    """Print an answer as it comes, and its speed; Ctrl-C ends the answer, and the program only if
    it is not ``interactive``.
    """
    try:
        for piece in engine.stream(answer):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not interactive:
            raise
        print(" … (已停止)", end="")
    print(f"\n[{answer.speed}]\n", flush=True)
