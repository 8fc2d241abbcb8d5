"""The flags that scripts share; argparse only, so that ``--help`` and wrong flags answer at
once.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from .script_parser import ScriptParser, boolean

LORA_TARGETS = "wq wk wv wo w1 w2 w3"  # attention and feed-forward, experts too
MODEL_NAMES = ("minimind-v1-small", "minimind-v1", "minimind-v1-moe")
# The usual settings of every stage; a stage passes what differs
DEFAULTS: dict[str, Any] = {
    "epochs": 1.0,
    "batch_size": 16,
    "accumulation_steps": 1,
    "learning_rate": 2e-3,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "schedule": "linear",
    "warmup_iters": None,
}
# What the documentation of v1 prescribes, for --recipe v1
V1_DEFAULTS: dict[str, Any] = {
    "batch_size": 64,
    "accumulation_steps": 8,
    "learning_rate": 1e-4,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "grad_clip": 1.0,
    "schedule": "cosine",
    "warmup_iters": 0,
}


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return an argparse type: a number of ``kind`` above zero."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0 or not finite")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def non_negative(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return an argparse type: a number of ``kind`` that is zero or more."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is below 0 or not finite")
        return value

    parse.__name__ = f"non-negative {kind.__name__}"
    return parse


def rows_or_auto(text: str) -> int | str:
    """Parse a number of rows, or ``auto``."""
    return text if text == "auto" else positive(int)(text)


rows_or_auto.__name__ = "positive int"


def seed(text: str) -> int:
    """Parse what PyTorch takes for a seed."""
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{text} does not fit 64 bits")
    return value


def add_switch(group: argparse._ArgumentGroup, name: str, help_text: str, **kwargs: Any) -> None:
    """Add a flag that is on by its name alone and also takes true or false."""
    group.add_argument(name, nargs="?", const=True, type=boolean, help=help_text, **kwargs)


def model_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that say which model it is; None stands for "not given"."""
    group = parser.add_argument_group("model (default: model/LMConfig.py, or what the weights say)")
    group.add_argument("--model", choices=MODEL_NAMES, help="a named model of v1")
    group.add_argument("--dim", type=positive(int), help="width of the residual stream")
    group.add_argument("--n_layers", type=positive(int))
    group.add_argument("--n_heads", type=positive(int), help="query heads")
    group.add_argument("--n_kv_heads", type=positive(int), help="key and value heads")
    group.add_argument("--hidden_dim", type=positive(int), help="width of the feed-forward")
    add_switch(group, "--use_moe", "mixture of experts: minimind-v1-moe")
    group.add_argument("--n_shared_experts", type=non_negative(int))
    group.add_argument("--max_seq_len", type=positive(int), help="context in tokens")
    group.add_argument("--dropout", type=non_negative(float))
    group.add_argument(
        "--rope_scaling", metavar="KIND:F", help="longer context: linear:4 or yarn:4"
    )
    group.add_argument("--tokenizer", metavar="DIR", help="default: model/minimind_tokenizer")
    return group


def device_flags(group: argparse._ArgumentGroup, *, answers: bool = False) -> None:
    """Add where and in which precision to compute; what only ``answers`` has one more."""
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    text = "auto: what the device is fast in"
    if answers:
        dtypes.append("int8")
        text = "auto: bfloat16 on CUDA, else float32; int8: weights of 8 bits, fastest on a CPU"
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=dtypes,
        help=text,
    )


def weights_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every script that reads weights to use them."""
    group = parser.add_argument_group("weights")
    group.add_argument("--weights", metavar="FILE", help="a .pth file of this project or of v1")
    group.add_argument(
        "--load_from", metavar="FOLDER", help="an exported folder, or the original's"
    )
    group.add_argument("--lora", metavar="FOLDER", help="an adapter of 4-lora_sft.py or of peft")
    group.add_argument("--out_dir", default="out", help="where the stages left their weights")
    device_flags(group, answers=True)
    model_flags(parser)


def lora_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that say what a new adapter is made of."""
    group = parser.add_argument_group("adapter (LoRA)")
    add = group.add_argument
    add("--lora_rank", type=positive(int), help="default 16")
    add("--lora_alpha", type=positive(float), help="scale times rank (default: twice the rank)")
    add("--lora_dropout", type=non_negative(float), help="default 0")
    add(
        "--lora_targets",
        nargs="+",
        metavar="NAME",
        help=f"layers to adapt (default {LORA_TARGETS})",
    )
    return group


def fill_lora(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what was not said of a new adapter; one that is there says it all itself."""
    names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    if args.lora and given:
        parser.error(f"--lora {args.lora} goes on from that adapter as it is: drop {given[0]}")
    rank = args.lora_rank or 16
    for name, usual in zip(names, (rank, 2.0 * rank, 0.0, LORA_TARGETS.split()), strict=True):
        if getattr(args, name) is None:
            setattr(args, name, usual)


def quiz_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the quizzes that are taken before and after training."""
    parser.add_argument(
        "--quiz",
        nargs="+",
        default=[],
        metavar="FILE",
        help="questions as in dataset/demo/quiz.jsonl, asked before and after training",
    )


def training_parser(
    description: str,
    *,
    data_path: str,
    v1: dict[str, Any],
    min_updates: int | None = None,
    **defaults: Any,
) -> argparse.ArgumentParser:
    """Return the parser of a training stage.

    Args:
        data_path: the stage's usual table.
        v1: in what the stage's documented recipe differs from ``V1_DEFAULTS``.
        min_updates: for which the recipe's batch size gets smaller where data is little.
        defaults: in what the stage differs from ``DEFAULTS``.
    """
    parser = ScriptParser(description)
    usual = {**DEFAULTS, **defaults}
    recipes = {"best": usual, "v1": {**usual, **V1_DEFAULTS, **v1}}
    parser.set_defaults(recipes=recipes, min_updates=min_updates)

    def shown(name: str, text: str) -> str:
        best, old = (recipes[r][name] for r in ("best", "v1"))
        return f"{text} (default {best}; v1: {old})" if best != old else f"{text} (default {best})"

    files = parser.add_argument_group("files")
    files.add_argument("--data_path", default=data_path, help="default: %(default)s")
    files.add_argument("--val_data_path", help="default: a share of the data is held out")
    files.add_argument("--out_dir", default="out")
    files.add_argument("--run_name", help="keeps runs of one width apart")
    files.add_argument("--init_from", metavar="FILE", help="weights to start from; 'none': random")
    model_flags(parser)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--recipe",
        default="best",
        choices=tuple(recipes),
        help="v1: what the original documents (Adam, cosine, padded rows)",
    )
    add = recipe.add_argument
    add("--epochs", type=positive(float), help=shown("epochs", "passes over the data"))
    add("--max_steps", type=positive(int), help="stop the schedule after this many updates")
    add(
        "--batch_size",
        type=rows_or_auto,
        help=shown("batch_size", "rows per device; auto: as many of an update's as fit at once")
        + ("; fewer where data is little" if min_updates else ""),
    )
    add(
        "--accumulation_steps",
        type=positive(int),
        help=shown("accumulation_steps", "batches an update"),
    )
    add(
        "--learning_rate",
        type=positive(float),
        help=shown("learning_rate", "peak rate"),
    )
    add(
        "--optimizer",
        choices=("adamw", "muon", "adam"),
        help=shown("optimizer", "muon: not with ZeRO"),
    )
    add("--weight_decay", type=non_negative(float), help=shown("weight_decay", "on matrices"))
    add("--grad_clip", type=non_negative(float), help=shown("grad_clip", "0: off"))
    add(
        "--warmup_iters",
        type=non_negative(int),
        help="updates of warm-up (default 2 %% of the run, at most 200; v1: 0)",
    )
    add(
        "--schedule",
        choices=("linear", "cosine", "constant"),
        help=shown("schedule", "linear: constant, then down to 0 over the last 60 %%"),
    )
    add("--seed", type=seed, default=1337)
    machine = parser.add_argument_group("machine")
    device_flags(machine)
    add_switch(machine, "--compile", "torch.compile the model; needs a C++ compiler on CPU")
    add_switch(
        machine,
        "--fused",
        "blocks with their backward written by hand, on CPUs (default true; false: plain autograd)",
        default=True,
    )
    machine.add_argument(
        "--num_workers", type=positive(int), help="threads that tokenise (default: every core)"
    )
    ranks = parser.add_argument_group("several processes (torchrun, deepspeed)")
    add = ranks.add_argument
    add_switch(ranks, "--ddp", "as in v1; under torchrun it goes without saying")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    add("--zero_stage", type=int, choices=range(4), help="DeepSpeed's ZeRO (default 1; 0: DDP)")
    add_switch(ranks, "--offload", "ZeRO: optimizer (stage 3: parameters too) in the CPU's memory")
    add("--deepspeed_config", metavar="FILE", help="DeepSpeed's JSON, for what has no flag")
    add_switch(
        ranks,
        "--deepspeed_checkpoints",
        "ZeRO: save DeepSpeed's own files too, for its tools; --resume needs only ours",
    )
    watching = parser.add_argument_group("watching and saving")
    add = watching.add_argument
    add("--log_interval", type=positive(int), default=10, help="updates between log lines")
    add("--eval_interval", type=positive(int), default=250, help="updates between validations")
    add("--save_interval", type=positive(int), default=250, help="updates between saves")
    add(
        "--compare_with",
        metavar="RUN",
        help="draw this run's held-out loss into curve.png: its folder in out/logs, or a name in "
        "docs/reference",
    )
    add("--keep_last", type=positive(int), default=2, help="training states kept on disk")
    add_switch(watching, "--resume", "go on from the last save, or start anew where there is none")
    add_switch(watching, "--resume_anyway", "resume although data or settings changed")
    add_switch(watching, "--overwrite", "start anew although there is a run of this name")
    add("--show_samples", type=positive(int), metavar="N", help="print N training rows and stop")
    add_switch(watching, "--use_wandb", "log to Weights & Biases too (WANDB_MODE=offline: on disk)")
    add("--wandb_project", default="MiniMind", help="default: %(default)s")
    add("--wandb_run_name", help="default: the run's name")
    add_switch(watching, "--dry_run", "print the report that comes before the first step and stop")
    return parser


def parse_training_args(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse, and fill what was not given from the recipe; ``from_recipe`` names those.

    With ``--batch_size auto`` the recipe says how many rows an update has, and ``auto_batch_size``
    that what fits is to be found out (:mod:`model.memory`).
    """
    args = parser.parse_args(argv)
    recipe = vars(args).pop("recipes")[args.recipe]
    args.auto_batch_size = args.batch_size == "auto"
    if args.auto_batch_size:
        args.batch_size = None
    args.from_recipe = [name for name in recipe if getattr(args, name) is None]
    for name in args.from_recipe:
        setattr(args, name, recipe[name])
    args.resume = args.resume or args.resume_anyway
    of_zero = ("offload", "deepspeed_config", "deepspeed_checkpoints")
    given = [f"--{name}" for name in of_zero if getattr(args, name)]
    if args.deepspeed_config and not os.path.isfile(args.deepspeed_config):
        parser.error(
            f"--deepspeed_config {args.deepspeed_config} is no file: name DeepSpeed's JSON"
        )
    if args.zero_stage is None:
        is_deepspeed = args.local_rank is not None or given
        args.zero_stage = stage_in(args.deepspeed_config) if is_deepspeed else 0
    if args.zero_stage > 0 and args.optimizer == "muon":
        if "optimizer" not in args.from_recipe:
            parser.error(
                "--optimizer muon needs whole matrices on each rank: use adamw under DeepSpeed, or "
                "start the script with torchrun"
            )
        args.optimizer = "adamw"
    if "learning_rate" in args.from_recipe and args.optimizer != recipe["optimizer"] == "muon":
        args.learning_rate = DEFAULTS["learning_rate"]
    if args.zero_stage == 0 and given:
        parser.error(
            f"{given[0]} needs ZeRO stage 1, 2 or 3; stage 0 keeps everything on every rank, which "
            "plain torchrun does too"
        )
    if "lora_rank" in args:
        fill_lora(parser, args)
    return args


def stage_in(path: str | None) -> int:
    """Return the ZeRO stage that a DeepSpeed configuration names, 1 where it names none."""
    try:
        with open(path or os.devnull, encoding="utf-8") as file:
            stage = json.load(file)["zero_optimization"]["stage"]
    except (ValueError, KeyError, TypeError, RecursionError):  # told of when the file is used
        return 1
    return stage if isinstance(stage, int) else 1


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Keep Python from looking for garbage while a script imports torch and transformers.

    What they make of objects (about a million) is there to stay, and looking through it over and
    over takes a quarter of the time that they take. It is left out of all later collections, too.
    """
    is_first = "torch" not in sys.modules
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        if was_enabled:
            gc.enable()


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and exit with its code.

    What the user can mend (a missing file, a bad value, a full disk, another rank that ended)
    becomes one message and exit code 1; ``MINIMIND_TRACEBACK=1`` shows where it came from. Anything
    else is a bug and keeps its traceback.
    """
    is_orderly = False  # the other ranks come to the same end
    try:
        code = main()
        is_orderly = True
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        is_lost_rank = is_of_a_lost_rank(error)
        is_bug = isinstance(error, RuntimeError) and not is_lost_rank
        if is_bug or os.environ.get("MINIMIND_TRACEBACK"):
            raise
        message = str(error) or type(error).__name__
        if is_lost_rank:
            message = "another rank has ended: see its message, or the launcher's"
        is_one_of_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        who = f" on rank {os.environ.get('RANK')}" if is_one_of_several else ""
        print(f"error{who}: {message}", file=sys.stderr)
        code = 1
    if "RANK" in os.environ and "torch" in sys.modules:
        end_rank(code or 0, is_orderly)
    sys.exit(code)


def is_of_a_lost_rank(error: Exception) -> bool:
    """Say whether an exchange failed because the process at its other end is gone."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def end_rank(code: int, is_orderly: bool) -> NoReturn:
    """End this process at once, parting from the other ranks unless they are left in the lurch.

    Python's own way out meets threads of gloo and DeepSpeed that may still be letting go of
    tensors: on a busy machine that aborted a rank whose work was done.
    """
    from .runtime import leave

    if is_orderly:
        leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
