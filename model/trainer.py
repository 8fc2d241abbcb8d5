"""The one training loop: every stage, stop anywhere, go on bit for bit."""

import argparse
import math
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .checkpoint import Loaded, save_trained, weights_path, width_name
from .console import progress_display
from .engine import Engine
from .evaluation import evaluate
from .generation import SamplingOptions, generate, stream_text
from .losses import IGNORED, Batch, LossFn, language_model_loss
from .metrics import RunLog, WandbLog
from .model import MiniMindForCausalLM
from .optim import learning_rate_at
from .order import Sampler
from .prefetch import prefetch
from .report import human, model_cost, peak_flops, process_memory, training_memory
from .runtime import Runtime, StopRequest, random_state, set_random_state
from .states import States, free_bytes
from .zero import ZeroEngine

MAX_SKIPPED_IN_A_ROW = 10
WARMUP_SHARE, MAX_WARMUP = 0.02, 200
SAMPLE_TOKENS = 48
# The flags that a resumed run must share with its beginning, as far as its stage has them
DECISIVE = (
    "learning_rate optimizer weight_decay grad_clip schedule seed recipe dtype "
    "beta label_smoothing lora_rank lora_alpha lora_dropout lora_targets"
).split()


class Data(Protocol):
    """What the loop needs of a stage's data."""

    n_rows: int
    row_positions: int
    fingerprint: dict[str, Any]

    def batch(self, rows: np.ndarray) -> Batch: ...
    def held_out_batches(self) -> list[Batch]: ...
    def describe(self) -> str: ...


@dataclass
class Progress:
    """Where a run is: all that is counted, saved with every state.

    Attributes:
        step: updates made, skipped ones included.
        samples: rows seen, the place in the data.
        tokens: inputs seen, padding not counted.
        elapsed_s: seconds in the loop over all starts.
        skipped: updates left out because loss or gradient was not finite.
        loss, units, metrics: sums since the last log line.
        validation_due: a stop came before this update's validation.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss: float = 0.0
    units: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    validation_due: bool = False


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
    run = Run(start, data, args, runtime, stage, loss_fn, sample_prompt)
    run.progress.validation_due = validate_first
    return run.run()


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
        self.stage, self.loss_fn, self.sample_prompt = stage, loss_fn, sample_prompt
        make_engine = ZeroEngine if args.zero_stage else Engine
        self.engine = make_engine(start.model, args, runtime)
        if runtime.world_size > 1:  # from here on each rank draws its own dropout
            torch.manual_seed(args.seed + runtime.rank)
        self.model = model = self.engine.model
        self.name = run_name(args, stage, model)
        out = Path(args.out_dir)
        self.log = RunLog(out / "logs" / self.name)
        self.wandb: WandbLog | None = None
        self.states = States(out / "checkpoints" / self.name, args.keep_last, runtime.warn)
        self.weights = weights_path(out, stage, model.config, args.run_name)
        self.held_out = data.held_out_batches()[runtime.rank :: runtime.world_size]
        self.progress = Progress()
        self.stop = StopRequest()
        self.stopping = False  # any rank was asked to

        self.update_rows = args.batch_size * args.accumulation_steps * runtime.world_size
        if args.max_steps:
            self.n_samples = args.max_steps * self.update_rows
        else:
            self.n_samples = max(1, round(args.epochs * data.n_rows))
        self.n_steps = math.ceil(self.n_samples / self.update_rows)
        self.sampler = Sampler(
            data.n_rows, args.seed, epochs=math.ceil(self.n_samples / data.n_rows)
        )
        self.warmup = args.warmup_iters
        if self.warmup is None:
            self.warmup = min(MAX_WARMUP, math.ceil(WARMUP_SHARE * self.n_steps))
        self.peak_flops: float | None = None
        self.cost = model_cost(model, data.row_positions)

    # ------------------------------------------------------------------------- the whole run

    def run(self) -> int:
        """Report, go on from the last state if asked, train, save."""
        self.report()
        if self.args.dry_run:
            return 0
        with self.states.locked() if self.runtime.is_main else nullcontext():
            code = self.go()
        if self.wandb:
            self.wandb.close(code)
        return code

    def go(self) -> int:
        """Run to the end or to a stop, with the folder to itself."""
        resumed = self.resume() if self.args.resume else False
        if not resumed:
            self.refuse_to_overwrite()
        self.start_log(resumed)
        was_done = self.progress.step == self.n_steps
        self.engine.prepare()
        with self.stop:
            self.loop()
        if was_done:
            self.runtime.log(f"{self.name}: all {self.n_steps:,} updates are done already")
            with self.engine.whole() as model:
                if self.runtime.is_main:
                    self.save_results(model)  # a kill may have come before these
        self.runtime.log(f"weights: {self.weights}; record: {self.log.folder}")
        if self.stopping and (self.progress.step < self.n_steps or self.progress.validation_due):
            self.runtime.log(
                f"stopped at update {self.progress.step:,} of {self.n_steps:,}; go on with: "
                f"{resume_command()}"
            )
            return 128 + (self.stop.signal or signal.SIGTERM)
        return 0

    def loop(self) -> None:
        """Update until the schedule ends or a signal asks to stop; the last step always saves."""
        args, progress = self.args, self.progress
        runtime = self.runtime
        bar = progress_display(runtime.log, progress.step, self.n_steps, runtime.is_main)
        started, before = time.monotonic(), progress.elapsed_s
        logged_at, logged_tokens = time.monotonic(), progress.tokens
        self.validate(bar)
        self.stopping = self.runtime.is_any(bool(self.stop))
        if self.stopping:
            bar.close()  # nothing is new since the last save
            return
        updates = prefetch(self.updates(), depth=2)
        for batches in updates:
            lr = learning_rate_at(
                progress.step, self.n_steps, args.learning_rate, args.schedule, self.warmup
            )
            try:
                norm = self.update(batches, lr)
            except torch.OutOfMemoryError as error:
                raise MemoryError(
                    f"the memory of {self.runtime.device} is full: lower --batch_size and raise "
                    "--accumulation_steps by as much, which trains the same"
                ) from error
            progress.elapsed_s = before + time.monotonic() - started
            is_last = progress.step == self.n_steps
            bar.update()
            if progress.step % args.log_interval == 0 or is_last:
                now = time.monotonic()
                speed = (progress.tokens - logged_tokens) / (now - logged_at)
                logged_at, logged_tokens = now, progress.tokens
                self.log_training(lr, norm, speed, bar)
            paused_at = time.monotonic()
            progress.validation_due = progress.step % args.eval_interval == 0 or is_last
            self.validate(bar)
            progress.elapsed_s = before + time.monotonic() - started
            self.stopping = self.runtime.is_any(bool(self.stop))
            if progress.step % args.save_interval == 0 or is_last or self.stopping:
                self.save(must=is_last or self.stopping)
            logged_at += time.monotonic() - paused_at  # speed is that of training alone
            if self.stopping:
                break
        updates.close()
        bar.close()

    # ------------------------------------------------------------------------- one update

    def updates(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of this rank for each update from where the run is."""
        size = self.args.batch_size
        for begin in range(self.progress.samples, self.n_samples, self.update_rows):
            end = min(begin + self.update_rows, self.n_samples)
            everyones = range(begin, end)
            mine = everyones[self.runtime.rank :: self.runtime.world_size]
            rows = self.sampler.rows(np.array(mine or everyones[:1]))
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
        total, *metrics = runtime.sum_over_ranks(values)
        norm, is_made = engine.step(lr, math.isfinite(total))
        if is_made:
            progress.skipped_in_a_row = 0
            progress.loss += total
            progress.units += n_units
            for name, value in zip(metric_sums, metrics, strict=True):
                progress.metrics[name] = progress.metrics.get(name, 0.0) + value
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
        progress.step += 1
        progress.samples = min(progress.samples + self.update_rows, self.n_samples)
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
        record |= {"tokens_per_s": round(speed, 1)}
        if self.peak_flops:
            record["mfu"] = round(speed * self.cost.flops_per_token / self.peak_flops, 4)
        record |= {"skipped": progress.skipped, "elapsed_s": round(progress.elapsed_s, 3)}
        progress.loss, progress.units, progress.metrics = 0.0, 0, {}
        self.write(record)
        bar.show(record)

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
            has_room = len(self.sample_prompt or ()) < model.config.max_seq_len
            if self.sample_prompt and has_room and self.runtime.is_main:
                record["sample"] = self.sample(model)
        self.write(record)
        bar.show(record)

    def start_log(self, resumed: bool) -> None:
        """Begin the record, or cut it back to where the run goes on."""
        progress = self.progress

        def is_kept(record: dict[str, Any]) -> bool:
            is_due = progress.validation_due and "val_loss" in record
            return resumed and record["step"] <= progress.step - is_due

        settings = {**vars(self.args), "config": self.model.config.to_diff_dict()}
        settings |= {"command": sys.argv, "n_steps": self.n_steps, "n_samples": self.n_samples}
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

    def report(self) -> None:
        """Say what the run is about to do; refuse what cannot end well."""
        args, runtime, model = self.args, self.runtime, self.model
        T = self.data.row_positions
        tokens_per_batch = args.batch_size * T
        memory = training_memory(model, tokens_per_batch, runtime.dtype, runtime.world_size)
        if runtime.device.type == "cpu":
            memory += process_memory(model)
        n_trained = sum(p.numel() for p in self.engine.parameters)
        state_bytes = 12 * n_trained  # weights and two moments
        n_new = max(1, args.keep_last + 1 - len(self.states.steps()))  # the old go after the new
        needed = n_new * state_bytes + 2 * 4 * n_trained
        free = free_bytes(Path(args.out_dir))
        if not args.dry_run:
            self.peak_flops, source = peak_flops(runtime.device, runtime.dtype)
            peak = (
                f"; peak {human(self.peak_flops, 'FLOP/s')} ({source})" if self.peak_flops else ""
            )
        else:
            peak = ""
        dtype = str(runtime.dtype).removeprefix("torch.")
        log = runtime.log
        log(f"run         {self.name} ({args.recipe} recipe, seed {args.seed})")
        log(
            f"model       {self.cost.n_params:,} parameters ({n_trained:,} trained, "
            f"{human(self.cost.n_active)} active a token), context {model.config.max_seq_len}"
        )
        log(f"data        {self.data.describe()}")
        log(
            f"schedule    {self.n_samples / self.data.n_rows:.4g} epochs = {self.n_steps:,} "
            f"updates of {self.update_rows} rows ({self.update_rows * T:,} positions); "
            f"{args.optimizer}, rate {args.learning_rate:g} {args.schedule}, warm-up {self.warmup}"
        )
        log(f"device      {runtime.device}, {dtype}, threads: {torch.get_num_threads()}{peak}")
        log(
            f"memory      about {human(memory, 'B')}; disk {human(needed, 'B')} for "
            f"{args.keep_last} states and the weights, {human(free, 'B')} free"
        )
        if not self.held_out:
            log("validation  none: no document is held out (a small file); see --val_data_path")
        if free < needed:
            raise ValueError(
                f"{args.out_dir} has {human(free, 'B')} free, the run saves {human(needed, 'B')}: "
                "make room, lower --keep_last, or name another --out_dir"
            )

    # ------------------------------------------------------------------------- saving

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must share with the one that saved."""
        settings = vars(self.args)
        chosen = {name: settings[name] for name in DECISIVE if name in settings}
        chosen |= {"rows an update": self.update_rows, "rows in all": self.n_samples}
        chosen |= {"warmup_iters": self.warmup, **self.data.fingerprint}
        ignored = {"transformers_version", "dtype", "_name_or_path"}
        config = self.model.config.to_diff_dict().items()
        if self.engine.frozen:  # not in the states, so it must be the same again
            chosen["frozen weights"] = self.start.base_digest
        return chosen | {f"config.{k}": v for k, v in config if k not in ignored}

    def save(self, must: bool) -> None:
        """Write state and weights; a full disk is a warning unless the run ends here."""
        random = self.runtime.gather(random_state(self.runtime.device))
        state = {
            **self.engine.state(),
            "random": random,  # of each rank
            "progress": asdict(self.progress),
            "identity": self.identity(),
        }
        with self.engine.whole() as model:
            if not self.runtime.is_main:
                return
            try:
                self.states.save(self.progress.step, state)
                self.save_results(model)
            except OSError as error:
                if must:
                    raise
                self.runtime.warn(
                    f"update {self.progress.step:,} is not saved ({error}); older states stay, the "
                    "run goes on and tries again at the next save"
                )

    def save_results(self, model: MiniMindForCausalLM) -> None:
        """Write the weights under v1's name, and the curve."""
        save_trained(
            replace(self.start, model=model),
            self.weights,
            stage=self.stage,
            step=self.progress.step,
            tokens=self.progress.tokens,
        )
        if not self.log.draw() and self.progress.step == self.n_steps:
            self.runtime.log("no curve.png is drawn: pip install matplotlib")

    def refuse_to_overwrite(self) -> None:
        """Start anew only where no run would be lost.

        Raises:
            ValueError: states of a run are there, and ``--overwrite`` is not given.
        """
        steps = self.states.steps()
        if not steps:
            return
        if not self.args.overwrite:
            raise ValueError(
                f"{self.states.folder} holds a run that came to update {steps[0]:,}: go on with "
                "--resume, start anew with --overwrite, or keep both apart with --run_name"
            )
        shutil.rmtree(self.states.folder)

    def resume(self) -> bool:
        """Take up the newest whole state; False where there is none.

        Raises:
            ValueError: it was made with other data or settings.
        """
        state = self.states.load_newest()
        if state is None:
            if self.states.steps():
                raise ValueError(
                    f"no state in {self.states.folder} is whole: start anew with --overwrite in "
                    "place of --resume"
                )
            self.runtime.log(f"nothing to resume in {self.states.folder}: starting anew")
            return False
        was, now = state["identity"], self.identity()
        if (n_ranks := len(state["random"])) != self.runtime.world_size:
            # the data's order does not depend on it, so the run goes on along the same rows
            self.runtime.log(
                f"saved by {n_ranks} ranks, going on with {self.runtime.world_size}: "
                f"{self.update_rows} rows an update"
            )
            for name in ("rows an update", "rows in all"):
                was[name] = now[name]
        changed = [
            f"{key}: {was.get(key)!r} then, {now.get(key)!r} now"
            for key in {**was, **now}
            if was.get(key) != now.get(key)
        ]
        if changed and not self.args.resume_anyway:
            raise ValueError(
                f"{self.states.folder} was made with other settings ({'; '.join(changed)}): use "
                "the same ones, accept the change with --resume_anyway, or name another --run_name"
            )
        for difference in changed:
            self.runtime.warn(f"resuming with a change: {difference}")
        self.restore(state)
        self.runtime.log(f"going on from update {self.progress.step:,} of {self.n_steps:,}")
        return True

    def restore(self, state: dict[str, Any]) -> None:
        """Put everything back to where ``state`` was saved.

        Raises:
            ValueError: it is of a model of another shape.
        """
        try:
            self.engine.load_state(state)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the states in {self.states.folder} are of a model of another shape: give the "
                "flags it was started with, or name another --run_name"
            ) from error
        random = state["random"]
        if len(random) == self.runtime.world_size:
            set_random_state(random[self.runtime.rank], self.runtime.device)
        self.progress = Progress(**state["progress"])
        # counted from here: the updates may have had another size before
        left = max(0, self.n_samples - self.progress.samples)
        self.n_steps = self.progress.step + math.ceil(left / self.update_rows)


def resume_command() -> str:
    """Return the command line that goes on with this run."""
    arguments = [a for a in sys.argv if a != "--overwrite"]
    return shlex.join(["python", *arguments, *([] if "--resume" in arguments else ["--resume"])])
