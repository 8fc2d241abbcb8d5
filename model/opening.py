"""How every training stage begins: this process's place, the model it starts from, its data."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from .checkpoint import Loaded, start_model
from .memory import refuse_what_is_too_large
from .runtime import Runtime, setup

Data = TypeVar("Data")


def open_stage(
    args: argparse.Namespace, *, after: str | None, make_data: Callable[..., Data]
) -> tuple[Runtime, Loaded, Data]:
    """Set up the process, load or make the model, and read the data with its tokenizer.

    Args:
        args: of :func:`model.flags.training_parser`.
        after: the stage whose weights this one starts from; None: random ones.
        make_data: reads a table: :func:`model.dataset.pretrain_data` and its like.

    Raises:
        ValueError, FileNotFoundError: of a device, model, weights or data that do not serve.
    """
    where = args.device, args.dtype, args.seed, args.num_workers
    runtime = setup(*where, zero_stage=args.zero_stage)
    start = start_model(args, after, partial(refuse_what_is_too_large, runtime))
    if after is not None:
        runtime.log(f"starting from {start.path or 'random weights'}")
    with runtime.main_first():  # the others find the token store that it makes
        data = make_data(
            Path(args.data_path),
            start.tokenizer,
            start.model.config.max_seq_len,
            val_path=args.val_data_path and Path(args.val_data_path),
            recipe=args.recipe,
            log=runtime.log,
        )
    return runtime, start, data
