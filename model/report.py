"""What a run says before its first step, and refuses there rather than later."""

import argparse
from pathlib import Path

import torch
from torch import nn

from .console import human
from .course import Schedule
from .engine import Engine
from .estimate import Cost
from .memory import Budget
from .runtime import Runtime
from .states import States, free_bytes


def report(
    name: str,
    engine: Engine,
    schedule: Schedule,
    cost: Cost,
    states: States,
    args: argparse.Namespace,
    runtime: Runtime,
    *,
    described_data: str,
    row_positions: int,
    reference: nn.Module | None,
    peak: str,
) -> None:
    """Print what the run called ``name`` is about to do.

    Args:
        described_data: the data in a line.
        row_positions: tokens of a row.
        reference: a second model that the loss compares with.
        peak: the device's arithmetic peak, in words.

    Raises:
        ValueError: the run cannot end well.
    """
    budget = Budget(engine.model, row_positions, schedule, args, runtime, reference)
    n_trained = sum(p.numel() for p in engine.parameters)
    state_bytes = 12 * n_trained  # weights and two moments
    n_new = max(1, args.keep_last + 1 - len(states.steps()))  # the old go after the new
    needed = n_new * state_bytes + 2 * 4 * n_trained
    free = free_bytes(Path(args.out_dir))
    dtype = str(runtime.dtype).removeprefix("torch.")
    log = runtime.log
    log(f"run         {name} ({args.recipe} recipe, seed {args.seed})")
    log(
        f"model       {cost.n_params:,} parameters ({n_trained:,} trained, "
        f"{human(cost.n_active)} active a token), context {engine.model.config.max_seq_len}"
    )
    log(f"data        {described_data}")
    log(
        f"schedule    {schedule.n_samples / schedule.n_rows:.4g} epochs = {schedule.n_steps:,} "
        f"updates of {schedule.update_rows} rows ({schedule.update_rows * row_positions:,} "
        f"positions); {args.optimizer}, rate {args.learning_rate:g} {args.schedule}, warm-up "
        f"{schedule.warmup}"
    )
    log(f"device      {runtime.device}, {dtype}, threads: {torch.get_num_threads()}{peak}")
    if args.auto_batch_size:
        log(
            f"batch       {args.batch_size} rows at once, {args.accumulation_steps} times an "
            "update (--batch_size auto: what fits with a tenth to spare)"
        )
    each = " a rank" if runtime.world_size > 1 else ""
    room = "" if budget.room is None else f" of {human(budget.room, 'B')}"
    taken = f", {human(budget.beside, 'B')} of it beside the model" if budget.beside else ""
    log(f"memory      about {human(budget.needed(args.batch_size), 'B')}{each}{room}{taken}")
    log(
        f"disk        {human(needed, 'B')} for {args.keep_last} states and the weights, "
        f"{human(free, 'B')} free"
    )
    budget.refuse_what_does_not_fit()
    if free < needed:
        raise ValueError(
            f"{args.out_dir} has {human(free, 'B')} free, the run saves {human(needed, 'B')}: "
            "make room, lower --keep_last, or name another --out_dir"
        )
