"""What a run leaves on disk and goes on from: its states, its weights, its curve.

One rank reads the newest state for all and rank 0 alone writes, so machines need not share a disk.
"""

import argparse
import os
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .checkpoint import Loaded, save_trained, weights_digest, weights_path
from .course import Progress, Schedule
from .engine import Engine
from .metrics import RunLog
from .model import MiniMindForCausalLM
from .runtime import Runtime, random_state, set_random_state
from .states import States
from .zero import ZeroEngine

# The flags that a resumed run must share with its beginning, as far as its stage has them
DECISIVE = (
    "learning_rate optimizer weight_decay grad_clip schedule seed recipe dtype "
    "beta label_smoothing lora_rank lora_alpha lora_dropout lora_targets"
).split()


class Saves:
    """The files of one run.

    Attributes:
        states: its training states.
        weights: where its trained weights go, under v1's name.
    """

    def __init__(
        self,
        start: Loaded,
        engine: Engine,
        schedule: Schedule,
        args: argparse.Namespace,
        runtime: Runtime,
        *,
        stage: str,
        log: RunLog,
        data_fingerprint: dict[str, Any],
    ) -> None:
        self.start, self.engine, self.schedule = start, engine, schedule
        self.args, self.runtime, self.stage, self.log = args, runtime, stage, log
        self.data_fingerprint = data_fingerprint
        out = Path(args.out_dir)
        self.states = States(out / "checkpoints" / log.folder.name, args.keep_last, runtime.warn)
        self.weights = weights_path(out, stage, engine.model.config, args.run_name)

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must share with the one that saved."""
        settings, schedule = vars(self.args), self.schedule
        chosen = {name: settings[name] for name in DECISIVE if name in settings}
        chosen |= {"rows an update": schedule.update_rows, "max_steps": self.args.max_steps}
        if self.args.max_steps is None:  # which a stage may have counted from the ranks
            is_counted = "epochs" in self.args.from_recipe
            chosen["epochs"] = "of the recipe" if is_counted else self.args.epochs
        chosen |= {"warmup_iters": self.args.warmup_iters, **self.data_fingerprint}
        ignored = {"transformers_version", "dtype", "_name_or_path"}
        config = self.engine.model.config.to_diff_dict().items()
        if self.engine.frozen:  # not in the states, so it must be the same again
            chosen["frozen weights"] = self.start.base_digest
        return chosen | {f"config.{k}": v for k, v in config if k not in ignored}

    # ------------------------------------------------------------------------- saving

    def save(self, progress: Progress, *, must: bool) -> None:
        """Write state and weights; every rank takes part.

        Raises:
            OSError: the disk is full, and it ``must`` succeed; otherwise that is a warning.
        """
        random = self.runtime.gather(random_state(self.runtime.device))
        state = {
            **self.engine.state(),
            "random": random,  # of each rank
            "progress": asdict(progress),
            "identity": self.identity(),
        }
        with self.engine.whole() as model:
            if self.runtime.is_main:
                self.write(state, model, progress, must=must)
        if isinstance(self.engine, ZeroEngine) and self.args.deepspeed_checkpoints:
            folder = self.states.folder / "deepspeed"
            self.engine.save_own(folder, progress.step, self.args.keep_last)

    def write(
        self, state: dict[str, Any], model: MiniMindForCausalLM, progress: Progress, *, must: bool
    ) -> None:
        """Write state, weights and curve."""
        try:
            self.states.save(progress.step, state)
            self.save_results(model, progress)
        except OSError as error:
            if must:
                raise
            self.runtime.warn(
                f"update {progress.step:,} is not saved ({error}); older states stay, the run goes "
                "on and tries again at the next save"
            )

    def save_results(self, model: MiniMindForCausalLM, progress: Progress) -> None:
        """Write the weights under v1's name, and the curve."""
        save_trained(
            replace(self.start, model=model),
            self.weights,
            stage=self.stage,
            step=progress.step,
            tokens=progress.tokens,
        )
        if not self.log.draw() and progress.step == self.schedule.n_steps:
            self.runtime.log("no curve.png is drawn: pip install matplotlib")

    # ------------------------------------------------------------------------- going on

    def begin(self) -> Progress:
        """Return where the run begins: at its newest whole state with ``--resume``, or anew.

        Raises:
            ValueError: the state was made with other data or settings, or starting anew would lose
                a run.
        """
        self.check_agreement()
        state = None
        if self.args.resume:
            # machines need not share a disk, and rank 0 may be on another one than before
            newest = self.runtime.gather(max(self.states.steps(), default=-1))
            state = self.runtime.from_rank(newest.index(max(newest)), self.newest_state)
        if state is None:
            if self.runtime.is_main:
                self.make_room()
            return Progress()
        self.compare(state)
        progress = self.restore(state)
        self.runtime.log(f"going on from update {progress.step:,} of {self.schedule.n_steps:,}")
        return progress

    def check_agreement(self) -> None:
        """See that all ranks are about to train the same model on the same data.

        Raises:
            ValueError: another machine has other files or flags than this one.
        """
        own = self.identity()
        if self.runtime.world_size > self.runtime.local_world_size:  # one disk gives one file
            own["start weights"] = weights_digest(self.engine.model)
        for rank, theirs in enumerate(self.runtime.gather(own)):
            if others := differences(theirs, own, f"on rank {rank}", "here"):
                raise ValueError(
                    f"the ranks do not agree ({'; '.join(others)}): give every machine the same "
                    "command and the same files"
                )

    def newest_state(self) -> dict[str, Any] | None:
        """Return the newest whole state, None where there never was one.

        Raises:
            ValueError: all are damaged.
        """
        state = self.states.load_newest()
        if state is None and self.states.steps():
            raise ValueError(
                f"no state in {self.states.folder} is whole: start anew with --overwrite in place "
                "of --resume"
            )
        if state is None:
            self.runtime.log(f"nothing to resume in {self.states.folder}: starting anew")
        return state

    def make_room(self) -> None:
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

    def compare(self, state: dict[str, Any]) -> None:
        """See that a state is of this very run, another number of ranks apart.

        Raises:
            ValueError: it was made with other data or settings, without ``--resume_anyway``.
        """
        was, now = state["identity"], self.identity()
        if (n_ranks := len(state["random"])) != self.runtime.world_size:
            # the data's order does not depend on it, so the run goes on along the same rows
            self.runtime.log(
                f"saved by {n_ranks} ranks, going on with {self.runtime.world_size}: "
                f"{self.schedule.update_rows} rows an update"
            )
            was["rows an update"] = now["rows an update"]
        changed = differences(was, now, "then", "now")
        if changed and not self.args.resume_anyway:
            raise ValueError(
                f"{self.states.folder} was made with other settings ({'; '.join(changed)}): use "
                "the same ones, accept the change with --resume_anyway, or name another --run_name"
            )
        for difference in changed:
            self.runtime.warn(f"resuming with a change: {difference}")

    def restore(self, state: dict[str, Any]) -> Progress:
        """Put everything back to where ``state`` was saved, and return where that is.

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
        progress = Progress(**state["progress"])
        self.schedule.go_on_from(progress)
        return progress


def differences(
    one: dict[str, Any], other: dict[str, Any], called: str, other_called: str
) -> list[str]:
    """Return where two identities differ, in words."""
    return [
        f"{key}: {one.get(key)!r} {called}, {other.get(key)!r} {other_called}"
        for key in {**one, **other}
        if one.get(key) != other.get(key)
    ]


def resume_command() -> str:
    """Return how to go on with this run; of a launcher's own flags a rank does not know."""
    if "RANK" in os.environ:
        return "the same command" + ("" if "--resume" in sys.argv else " and --resume")
    flags = [a for a in sys.argv if a != "--overwrite"]
    return shlex.join(["python", *flags, *([] if "--resume" in flags else ["--resume"])])
