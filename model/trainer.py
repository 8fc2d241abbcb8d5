"""The one training loop: every stage, stop anywhere, go on bit for bit."""

import argparse
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .checkpoint import Loaded, width_name
from .console import human, progress_display
from .course import Progress, Schedule, TimeLeft, settle_batch_size
from .engine import Engine
from .estimate import model_cost, peak_flops
from .evaluation import evaluate
from .expert_load import ExpertLoad, spread
from .generation import generate
from .losses import IGNORED, Batch, LossFn, language_model_loss
from .memory import Budget
from .metrics import Reference, RunLog, WandbLog
from .model import MiniMindForCausalLM
from .order import Sampler
from .prefetch import prefetch
from .report import report
from .runtime import Runtime, StopRequest
from .sampling import SamplingOptions
from .saves import Saves, resume_command
from .text_stream import stream_text
from .zero import ZeroEngine

MAX_SKIPPED_IN_A_ROW = 10
SAMPLE_TOKENS = 48


class Data(Protocol):
    """What the loop needs of a stage's data."""

    n_rows: int
    row_positions: int
    fingerprint: dict[str, Any]

    def batch(self, rows: np.ndarray) -> Batch: ...
    def held_out_batches(self) -> list[Batch]: ...
    def describe(self) -> str: ...


def run_name(args: argparse.Namespace, stage: str, model: MiniMindForCausalLM) -> str:
    """Return the name of a run's folders, ``pretrain_512`` for example."""
    return "_".join(filter(None, (stage, width_name(model.config), args.run_name)))


def train(
    start: Loaded,
    data: Data,
    args: argparse.Namespace,
    runtime: Runtime,
    *,
    stage: str,
    loss_fn: LossFn = language_model_loss,
    sample_prompt: list[int] | None = None,
    validate_first: bool = False,
) -> int:
    """Train what is not frozen of a model on ``data`` and leave it under the stage's name.

    Args:
        start: the model to train, its tokenizer, and where it is from.
        args: of :func:`model.flags.training_parser`.
        stage: one of :data:`model.checkpoint.STAGE_STEMS`; names the files.
        sample_prompt: ids to continue after each validation, a text to look at.
        validate_first: validate before the first update too, to see what training changes.

    Returns:
        The process's exit code: 0, or 128 + the signal that stopped the run.

    Raises:
        ValueError: the run cannot start or go on; the message says what to do.
        OSError: the last save failed.
    """
    if settle_batch_size(args, data.n_rows, data.row_positions, runtime.world_size):
        runtime.log(
            f"batch       {args.batch_size} rows, for little data makes few updates; --batch_size "
            "sets it"
        )
    if args.auto_batch_size:
        schedule = Schedule(args, data.n_rows, runtime.world_size)
        reference = getattr(loss_fn, "reference", None)
        Budget(start.model, data.row_positions, schedule, args, runtime, reference).pick()
    run = Run(start, data, args, runtime, stage, loss_fn, sample_prompt)
    return run.run(validate_first)


class Run:
    """One training run from its report to its last save."""

    def __init__(
        self,
        start: Loaded,
        data: Data,
        args: argparse.Namespace,
        runtime: Runtime,
        stage: str,
        loss_fn: LossFn,
        sample_prompt: list[int] | None,
    ) -> None:
        self.start, self.data, self.args, self.runtime = start, data, args, runtime
        self.loss_fn, self.sample_prompt = loss_fn, sample_prompt
        make_engine = ZeroEngine if args.zero_stage else Engine
        self.engine = make_engine(start.model, args, runtime)
        if runtime.world_size > 1:  # from here on each rank draws its own dropout
            torch.manual_seed(args.seed + runtime.rank)
        self.model = model = self.engine.model
        self.name = run_name(args, stage, model)
        reference = Reference(args.compare_with) if args.compare_with else None
        self.log = RunLog(Path(args.out_dir) / "logs" / self.name, reference)
        self.wandb: WandbLog | None = None
        self.held_out = data.held_out_batches()[runtime.rank :: runtime.world_size]
        self.progress = Progress()
        self.stop = StopRequest(grace_s=3.0 if runtime.world_size > 1 else 0.0)
        self.stopping = False  # any rank was asked to
        self.schedule = Schedule(args, data.n_rows, runtime.world_size)
        self.saves = Saves(
            start,
            self.engine,
            self.schedule,
            args,
            runtime,
            stage=stage,
            log=self.log,
            data_fingerprint=data.fingerprint,
        )
        self.expert_load = ExpertLoad(model, runtime.device)
        self.peak_flops: float | None = None
        self.cost = model_cost(model, data.row_positions)

    # ------------------------------------------------------------------------- the whole run

    def run(self, validate_first: bool) -> int:
        """Report, go on from the last state if asked, train, save."""
        self.report()
        if self.args.dry_run:
            return 0
        with self.stop:
            code = 1
            try:
                with self.saves.states.locked() if self.runtime.is_main else nullcontext():
                    code = self.go(validate_first)
            finally:
                if self.wandb:
                    self.wandb.close(code)
            # launchers end the others when a rank ends, and rank 0 may still be saving
            self.runtime.wait_for_all()
        return code

    def report(self) -> None:
        """Say what the run is about to do; refuse what cannot end well."""
        peak = ""
        if not self.args.dry_run:
            self.peak_flops, source = peak_flops(self.runtime.device, self.runtime.dtype)
            if self.peak_flops:
                peak = f"; peak {human(self.peak_flops, 'FLOP/s')} ({source})"
        report(
            self.name,
            self.engine,
            self.schedule,
            self.cost,
            self.saves.states,
            self.args,
            self.runtime,
            described_data=self.data.describe(),
            row_positions=self.data.row_positions,
            reference=getattr(self.loss_fn, "reference", None),
            peak=peak,
        )
        if not self.held_out:
            self.runtime.log(
                "validation  none: no document is held out (a small file); see --val_data_path"
            )

    def go(self, validate_first: bool) -> int:
        """Run to the end or to a stop, with the folder to itself."""
        self.progress = self.saves.begin()
        is_new = self.progress.step == 0
        if is_new:
            self.progress.validation_due = validate_first
        self.start_log(resumed=not is_new)
        was_done = self.progress.step == self.schedule.n_steps
        self.engine.prepare()
        self.loop()
        if was_done:
            self.runtime.log(f"{self.name}: all {self.schedule.n_steps:,} updates are done already")
            with self.engine.whole() as model:
                if self.runtime.is_main:
                    self.saves.save_results(model, self.progress)  # a kill may have come before
        self.runtime.log(f"weights: {self.saves.weights}; record: {self.log.folder}")
        is_cut = self.progress.step < self.schedule.n_steps or self.progress.validation_due
        if self.stopping and is_cut:
            self.runtime.log(
                f"stopped at update {self.progress.step:,} of {self.schedule.n_steps:,}; go on "
                f"with: {resume_command()}"
            )
            return 128 + (self.stop.signal or signal.SIGTERM)
        return 0

    def loop(self) -> None:
        """Update until the schedule ends or a signal asks to stop; the last step always saves."""
        args, progress = self.args, self.progress
        runtime = self.runtime
        bar = progress_display(runtime.log, progress.step, self.schedule.n_steps, runtime.is_main)
        started, before = time.monotonic(), progress.elapsed_s
        logged_at, logged_tokens = time.monotonic(), progress.tokens
        pauses = {"validation": args.eval_interval, "save": args.save_interval}
        self.time_left = TimeLeft(self.schedule.n_steps, pauses)
        self.validate(bar)
        self.stopping = self.runtime.is_any(bool(self.stop))
        if self.stopping:
            bar.close()  # nothing is new since the last save
            return
        updates = self.updates()
        if runtime.device.type != "cpu":
            # on a CPU there is nothing to win, and a second thread that computes gets a team of
            # threads of its own: with more than cores, every operation waits (benchmarks/LOG.md)
            updates = prefetch(updates, depth=2)
        ready_at = time.monotonic()
        for batches in updates:
            lr = self.schedule.learning_rate(progress.step)
            try:
                norm = self.update(batches, lr)
            except torch.OutOfMemoryError as error:
                raise MemoryError(
                    f"the memory of {self.runtime.device} is full: lower --batch_size and raise "
                    "--accumulation_steps by as much, which trains the same"
                ) from error
            progress.elapsed_s = before + time.monotonic() - started
            is_last = progress.step == self.schedule.n_steps
            bar.update()
            if progress.step % args.log_interval == 0 or is_last:
                now = time.monotonic()
                speed = (progress.tokens - logged_tokens) / (now - logged_at)
                logged_at, logged_tokens = now, progress.tokens
                self.log_training(lr, norm, speed, bar)
            paused_at = time.monotonic()
            self.time_left.add("update", paused_at - ready_at)
            progress.validation_due = progress.step % args.eval_interval == 0 or is_last
            self.validate(bar)
            progress.elapsed_s = before + time.monotonic() - started
            self.stopping = self.runtime.is_any(bool(self.stop))
            if progress.step % args.save_interval == 0 or is_last or self.stopping:
                save_at = time.monotonic()
                self.saves.save(progress, must=is_last or self.stopping)
                self.time_left.add("save", time.monotonic() - save_at)
            ready_at = time.monotonic()
            logged_at += ready_at - paused_at  # speed is that of training alone
            if self.stopping:
                break
        updates.close()
        bar.close()

    # ------------------------------------------------------------------------- one update

    def updates(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of this rank for each update from where the run is."""
        size, sampler = self.args.batch_size, self.sampler
        for begin in range(
            self.progress.samples, self.schedule.n_samples, self.schedule.update_rows
        ):
            end = min(begin + self.schedule.update_rows, self.schedule.n_samples)
            everyones = range(begin, end)
            mine = everyones[self.runtime.rank :: self.runtime.world_size]
            rows = sampler.rows(np.array(mine or everyones[:1]))
            parts = [self.data.batch(rows[i : i + size]) for i in range(0, len(rows), size)]
            if not mine:  # a last update of fewer rows than ranks: take part, contribute nothing
                parts[0].targets.fill_(IGNORED)
                parts[0].n_units = parts[0].n_tokens = 0
            yield parts

    def update(self, batches: list[Batch], lr: float) -> float:
        """Make one update from the micro-batches of all ranks; return the gradient's norm.

        Loss and gradient are means over the units of the whole update: one count for all parts, so
        that no split changes them. An update that is not finite is left out and counted.

        Raises:
            ValueError: ten such updates in a row.
        """
        runtime, progress, engine = self.runtime, self.progress, self.engine
        schedule = self.schedule
        counts = [sum(b.n_units for b in batches), sum(b.n_tokens for b in batches)]
        n_units, n_tokens = map(int, runtime.sum_over_ranks(counts))
        loss_sum = torch.zeros((), device=runtime.device)
        metric_sums: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(batches, 1):
            batch = batch.to(runtime.device)
            with engine.part(is_last=number == len(batches)):
                with runtime.autocast():
                    sums = self.loss_fn(engine.compute, batch)
                loss = sums.loss / max(1, n_units)
                if sums.balance is not None:
                    loss = loss + sums.balance * (batch.n_tokens / max(1, n_tokens))
                engine.backward(loss)
            loss_sum += sums.loss.detach()
            for name, value in sums.metrics.items():
                metric_sums[name] = metric_sums.get(name, 0.0) + value
        values = [float(loss_sum), *(float(value) for value in metric_sums.values())]
        total, *others = runtime.sum_over_ranks(values + self.expert_load.take())
        metrics, loads = others[: len(metric_sums)], others[len(metric_sums) :]
        norm, is_made = engine.step(lr, math.isfinite(total))
        if is_made:
            progress.skipped_in_a_row = 0
            progress.loss += total
            progress.units += n_units
            for name, value in zip(metric_sums, metrics, strict=True):
                progress.metrics[name] = progress.metrics.get(name, 0.0) + value
            before = progress.expert_load or [0.0] * len(loads)
            progress.expert_load = [a + b for a, b in zip(before, loads, strict=True)]
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
        progress.step += 1
        progress.samples = min(progress.samples + schedule.update_rows, schedule.n_samples)
        progress.tokens += n_tokens
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise ValueError(
                f"loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} updates in a row, up "
                f"to update {progress.step:,}: lower --learning_rate, raise --warmup_iters, or use "
                "--dtype float32; the last save is whole"
            )
        return norm

    # ------------------------------------------------------------------------- watching

    def log_training(self, lr: float, norm: float, speed: float, bar: Any) -> None:
        """Write a line of means since the last one."""
        progress = self.progress
        mean = {
            name: value / max(1, progress.units)
            for name, value in {"loss": progress.loss, **progress.metrics}.items()
        }
        record: dict[str, Any] = {"step": progress.step, "epoch": self.epoch()}
        record |= {"samples": progress.samples, "tokens": progress.tokens}
        record |= mean if progress.units else {"loss": None}
        record |= {"lr": lr, "grad_norm": norm}
        record |= spread(progress.expert_load, self.model.config.n_layers)
        record |= {"tokens_per_s": round(speed, 1)}
        if self.peak_flops:
            peak = self.peak_flops * self.runtime.world_size
            record["mfu"] = round(speed * self.cost.flops_per_token / peak, 4)
        if (memory := self.runtime.peak_memory()) is not None:
            record["gpu_memory_gb"] = round(memory / 1e9, 3)
        record |= {"skipped": progress.skipped, "elapsed_s": round(progress.elapsed_s, 3)}
        progress.loss, progress.units, progress.metrics, progress.expert_load = 0.0, 0, {}, []
        self.write(record)
        bar.show(record, self.left_s())

    def left_s(self) -> float | None:
        """Return how long the run still takes, in seconds; None before its first update."""
        update_s = self.time_left.mean("update")
        if update_s is None:
            return None
        # a forward pass is a third of the work, until a validation has shown what it takes
        n_held_out = sum(batch.n_tokens for batch in self.held_out)
        n_trained = self.schedule.update_rows * self.data.row_positions / self.runtime.world_size
        guess = update_s * n_held_out / n_trained / 3
        return self.time_left.seconds(self.progress.step, {"validation": guess})

    @property
    def sampler(self) -> Sampler:
        """The order of rows, for as long as the run is now going to be."""
        return Sampler(self.data.n_rows, self.args.seed, epochs=self.schedule.n_epochs)

    def epoch(self) -> float:
        """Return how many times the data has been seen."""
        return round(self.progress.samples / self.data.n_rows, 4)

    def validate(self, bar: Any) -> None:
        """Where it is due, measure on the held-out documents and write a line.

        A request to stop does not wait for it: the resumed run makes up for it.
        """
        progress = self.progress
        if not progress.validation_due:
            return
        begun = time.monotonic()
        with self.engine.whole() as model:
            with self.runtime.autocast():
                result = evaluate(
                    model,
                    self.held_out,
                    self.loss_fn,
                    self.runtime.device,
                    should_stop=lambda: bool(self.stop),
                    gather=self.runtime.gather,
                )
            if result is None:
                return
            progress.validation_due = False
            if not result:
                return
            record = {"step": progress.step, "epoch": self.epoch(), "tokens": progress.tokens}
            record |= result | {"elapsed_s": round(progress.elapsed_s, 3)}
            if self.log.reference:
                record["reference_loss"] = self.log.reference.loss_at(progress.tokens)
            has_room = len(self.sample_prompt or ()) < model.config.max_seq_len
            if self.sample_prompt and has_room and self.runtime.is_main:
                record["sample"] = self.sample(model)
        self.time_left.add("validation", time.monotonic() - begun)
        self.write(record)
        bar.show(record, self.left_s())

    def start_log(self, resumed: bool) -> None:
        """Begin the record, or cut it back to where the run goes on."""
        progress = self.progress

        def is_kept(record: dict[str, Any]) -> bool:
            is_due = progress.validation_due and "val_loss" in record
            return resumed and record["step"] <= progress.step - is_due

        settings = {**vars(self.args), "config": self.model.config.to_diff_dict()}
        settings |= {
            "command": sys.argv,
            "n_steps": self.schedule.n_steps,
            "n_samples": self.schedule.n_samples,
        }
        if self.runtime.is_main:
            self.log.start(settings, is_kept)
        if self.runtime.is_main and self.args.use_wandb:
            self.wandb = WandbLog(
                self.log.folder,
                self.args.wandb_project,
                self.args.wandb_run_name or self.name,
                settings,
                resumed=resumed,
                warn=self.runtime.warn,
            )

    def write(self, record: dict[str, Any]) -> None:
        """Add a line to the record; a full disk loses the line, not the run."""
        if not self.runtime.is_main:
            return
        try:
            self.log.write(record)
        except OSError as error:
            self.runtime.warn(f"a line is missing in {self.log.path} ({error})")
        if self.wandb:
            self.wandb.write(record)

    def sample(self, model: MiniMindForCausalLM) -> str:
        """Return the likeliest continuation of the sample prompt."""
        options = SamplingOptions(max_new_tokens=SAMPLE_TOKENS, temperature=0.0)
        model.eval()
        tokens = generate(model, self.sample_prompt, options)
        text = "".join(stream_text(self.start.tokenizer, tokens))
        model.train()
        return text
