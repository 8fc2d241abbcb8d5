"""What a run says before its first step, and refuses there rather than later."""

import argparse
from pathlib import Path

import torch

from .console import human
from .course import Schedule
from .engine import Engine
from .estimate import Cost, process_memory, training_memory
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
    peak: str,
) -> None:
    """Print what the run called ``name`` is about to do.

    Args:
        described_data: the data in a line.
        row_positions: tokens of a row.
        peak: the device's arithmetic peak, in words.

    Raises:
        ValueError: the run cannot end well.
    """
    memory = training_memory(
        engine.model, args.batch_size * row_positions, runtime.dtype, runtime.world_size
    )
    if runtime.device.type == "cpu":
        memory += process_memory(engine.model)
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
    log(
        f"memory      about {human(memory, 'B')}; disk {human(needed, 'B')} for "
        f"{args.keep_last} states and the weights, {human(free, 'B')} free"
    )
    if free < needed:
        raise ValueError(
            f"{args.out_dir} has {human(free, 'B')} free, the run saves {human(needed, 'B')}: "
            "make room, lower --keep_last, or name another --out_dir"
        )
