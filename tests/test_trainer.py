"""The loop: no split changes the mathematics, every row once an epoch, stop anywhere, lose nothing.

Real runs of ``1-pretrain.py`` and ``3-full_sft.py`` on tiny files, most of them in this process.
"""

import contextlib
import copy
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import (
    MODEL,
    PLACE,
    full_disk,
    pretrain,
    pretrain_flags,
    records,
    same_weights,
    script,
    states,
    write_corpus,
    write_documents,
)
from torch import Tensor, nn

from model.dataset import pretrain_data, sft_data
from model.evaluation import evaluate
from model.losses import Batch, LossSums, language_model_loss
from model.opening import open_stage
from model.optim import learning_rate_at
from model.runtime import Runtime
from model.trainer import MAX_SKIPPED_IN_A_ROW, Run, train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


class Recorder:
    """A stage's data that remembers which rows were asked for, batch by batch."""

    def __init__(self, data) -> None:
        self.data, self.batches = data, []

    def __getattr__(self, name: str):
        return getattr(self.data, name)

    def batch(self, rows: np.ndarray) -> Batch:
        self.batches.append(rows.tolist())
        return self.data.batch(rows)


def parts_of_run(corpus: Path, out: Path, flags: str = "", stage: str = "pretrain") -> tuple:
    """Return what :func:`model.trainer.train` takes, made as the scripts make it."""
    if stage == "pretrain":
        args = script("1-pretrain.py").parse_args([*pretrain_flags(corpus, out), *flags.split()])
        make = pretrain_data
    else:
        given = f"--data_path {corpus}/sft_multi.csv --tokenizer {corpus}/tokenizer --out_dir {out}"
        given += f" {MODEL} {PLACE} --init_from none {flags}"
        args = script("3-full_sft.py").parse_args(given.split())
        make = sft_data
    runtime, start, data = open_stage(args, after=None, make_data=make)
    return start, Recorder(data), args, runtime


def make_run(corpus: Path, out: Path, flags: str = "", stage: str = "pretrain", **kwargs) -> Run:
    start, data, args, runtime = parts_of_run(corpus, out, flags, stage)
    runtime = kwargs.get("runtime", runtime)
    loss_fn = kwargs.get("loss_fn", language_model_loss)
    return Run(start, data, args, runtime, stage, loss_fn, None)


def run_with(corpus: Path, out: Path, loss_fn: Callable, flags: str = "") -> int:
    """Run as ``1-pretrain.py`` does, but for the loss."""
    start, *parts = parts_of_run(corpus, out, flags)
    prompt = start.tokenizer.encode_document(script("1-pretrain.py").SAMPLE_TEXT)[:-1]
    return train(start, *parts, stage="pretrain", loss_fn=loss_fn, sample_prompt=prompt)


def gradients(run: Run) -> list[dict[str, Tensor]]:
    """Return a list that receives the gradients of each update, just before it is made."""
    seen: list[dict[str, Tensor]] = []
    names = {id(p): name for name, p in run.model.named_parameters()}

    def note(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append({names[id(p)]: p.grad.clone() for p in parameters})

    run.engine.optimizer.register_step_pre_hook(note)
    return seen


# ----------------------------------------------------------------------------- one update


def test_each_group_has_its_part_of_the_rate(corpus: Path, tmp_path: Path) -> None:
    run = make_run(corpus, tmp_path)
    run.update(next(run.updates()), 1e-3)
    rates = {group["lr"] for group in run.engine.optimizer.param_groups}
    assert rates == {1e-3, 8e-3}


@pytest.mark.parametrize("stage", ("pretrain", "full_sft_multi"))
@pytest.mark.parametrize("flags", ("", "--use_moe", "--use_moe --recipe v1"))
def test_no_split_of_an_update_changes_its_gradient(
    corpus: Path, tmp_path: Path, stage: str, flags: str
) -> None:
    """1 x 4 = 4 x 1 = 3 + 1 rows, with unequal numbers of trained tokens and padding."""
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4), (3, 2)):
        split = f"--batch_size {batch_size} --accumulation_steps {accumulation} --epochs 1"
        run = make_run(corpus, tmp_path, f"{flags} {split} --grad_clip 0 --dropout 0", stage)
        for name, parameter in run.model.named_parameters():
            if "gate" in name:  # at 0.02 the experts are so even that rounding chooses
                parameter.data.mul_(50)
        rows = run.sampler.rows(np.arange(4))
        parts = [rows[i : i + batch_size] for i in range(0, 4, batch_size)]
        batches = [run.data.batch(part) for part in parts]
        seen = gradients(run)
        before = [p.detach().clone() for p in run.model.parameters()]
        norm = run.update(batches, 0.0)
        assert all(map(torch.equal, before, run.model.parameters()))  # at a rate of 0
        results.append((seen[0], norm, run.progress.loss, run.progress.units, batches))
    counts = [batch.n_units for batch in results[1][4]]
    assert len(set(counts)) > 1 or stage == "pretrain"
    reference, norm, loss, units, _ = results[0]
    for other, other_norm, other_loss, other_units, _ in results[1:]:
        # two orders of the same fp32 sums
        assert (other_norm, other_loss) == pytest.approx((norm, loss), rel=1e-5)
        assert other_units == units
        for name, gradient in reference.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_an_update_is_the_mean_over_its_trained_tokens(corpus: Path, tmp_path: Path) -> None:
    run = make_run(corpus, tmp_path, "--batch_size 2 --accumulation_steps 2 --grad_clip 0")
    seen = gradients(run)
    batches = next(run.updates())
    total = sum(language_model_loss(run.model, batch).loss for batch in batches)
    n_trained = sum(int((batch.targets >= 0).sum()) for batch in batches)
    names = [name for name, _ in run.model.named_parameters()]
    by_hand = torch.autograd.grad(total / n_trained, list(run.model.parameters()))
    norm = run.update(batches, 1e-3)
    for name, gradient in zip(names, by_hand, strict=True):
        torch.testing.assert_close(seen[0][name], gradient, rtol=1e-4, atol=1e-7)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in by_hand]).norm().item(), rel=1e-5)
    assert run.progress.loss == pytest.approx(total.item(), rel=1e-6)
    assert (run.progress.units, run.progress.step, run.progress.samples) == (n_trained, 1, 4)
    assert all(p.grad is None for p in run.model.parameters())  # nothing leaks into the next


def test_gradients_are_clipped_to_the_norm_asked_for(corpus: Path, tmp_path: Path) -> None:
    run = make_run(corpus, tmp_path, "--grad_clip 0.01")
    seen = gradients(run)
    norm = run.update(next(run.updates()), 1e-3)
    clipped = torch.cat([g.flatten() for g in seen[0].values()]).norm()
    assert norm > 0.1 and clipped.item() == pytest.approx(0.01, rel=1e-3)


def test_an_update_without_anything_to_learn_changes_nothing_but_the_count(
    corpus: Path, tmp_path: Path
) -> None:
    run = make_run(corpus, tmp_path, "--weight_decay 0")
    batches = next(run.updates())
    for batch in batches:
        batch.targets.fill_(-100)
        batch.n_units = 0
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    assert run.update(batches, 1e-3) == 0
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())
    assert (run.progress.step, run.progress.skipped) == (1, 0)


# ----------------------------------------------------------------------------- order


def rows_seen(corpus: Path, out: Path, flags: str) -> tuple[list[list[int]], int]:
    """Run to the end; return the rows of each update, and how many rows an epoch has."""
    start, data, args, runtime = parts_of_run(corpus, out, f"{flags} --overwrite")
    train(start, data, args, runtime, stage="pretrain")
    size = args.accumulation_steps
    return [sum(data.batches[i : i + size], []) for i in range(0, len(data.batches), size)], (
        data.n_rows
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of few rows, for runs over several epochs."""
    folder = write_corpus(tmp_path_factory.mktemp("small"))
    write_documents(folder / "pretrain.csv", 25, longest=25)
    return folder


@pytest.mark.slow
def test_each_row_is_seen_once_an_epoch_in_another_order(small: Path, tmp_path: Path) -> None:
    updates, n_rows = rows_seen(small, tmp_path, "--epochs 3 --batch_size 4 --accumulation_steps 2")
    assert n_rows % 8  # so updates span the borders of epochs
    order = sum(updates, [])
    epochs = [order[i * n_rows : (i + 1) * n_rows] for i in range(3)]
    assert len(order) == 3 * n_rows  # the last, partial accumulation is trained too
    assert all(sorted(epoch) == list(range(n_rows)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # the same rows an update, however they are split; other rows under another seed
    others, _ = rows_seen(small, tmp_path, "--epochs 3 --batch_size 1 --accumulation_steps 8")
    assert others == updates
    others, _ = rows_seen(small, tmp_path, "--epochs 3 --batch_size 8 --seed 7")
    assert sum(others, []) != order and sorted(sum(others, [])) == sorted(order)


@pytest.mark.parametrize("n_ranks", (2, 3, 5))
def test_ranks_share_out_the_rows_of_each_update(small: Path, tmp_path: Path, n_ranks: int) -> None:
    """Together they see what one process sees: each row once an epoch."""
    alone, n_rows = rows_seen(small, tmp_path, f"--epochs 2 --batch_size {2 * n_ranks}")
    together: list[list[int]] = [[] for _ in alone]
    for rank in range(n_ranks):
        place = Runtime(torch.device("cpu"), torch.float32, rank, n_ranks)
        run = make_run(small, tmp_path, "--epochs 2 --batch_size 2", runtime=place)
        for number, parts in enumerate(run.updates()):
            if parts[0].n_tokens:  # a rank that is left without a row in the last update
                together[number] += run.data.batches[number]
    assert [sorted(rows) for rows in together] == [sorted(rows) for rows in alone]
    assert sorted(sum(together, [])) == sorted(2 * list(range(n_rows)))


def test_the_last_partial_accumulation_is_applied_alone(small: Path, tmp_path: Path) -> None:
    run = make_run(small, tmp_path, "--batch_size 4 --accumulation_steps 3 --grad_clip 0")
    n_rows, seen = run.data.n_rows, gradients(run)
    updates = list(run.updates())
    assert len(updates) == run.schedule.n_steps == -(-n_rows // 12) and n_rows % 12
    for batches in updates[:-1]:
        run.update(batches, 1e-3)
    total = sum(language_model_loss(run.model, batch).loss for batch in updates[-1])
    n_trained = sum(batch.n_units for batch in updates[-1])
    by_hand = torch.autograd.grad(total / n_trained, list(run.model.parameters()))
    run.update(updates[-1], 1e-3)
    assert run.progress.samples == n_rows and len(seen) == run.schedule.n_steps
    for (name, _), gradient in zip(run.model.named_parameters(), by_hand, strict=True):
        torch.testing.assert_close(seen[-1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("flags", "n_steps"),
    (
        ("--epochs 1 --batch_size 10", lambda n: -(-n // 10)),
        ("--epochs 0.5 --batch_size 1 --accumulation_steps 10", lambda n: -(-round(n / 2) // 10)),
        ("--epochs 2.5 --batch_size 7", lambda n: -(-round(2.5 * n) // 7)),
        ("--epochs 1 --max_steps 77", lambda n: 77),
    ),
)
def test_length_is_counted_in_updates(
    small: Path, tmp_path: Path, flags: str, n_steps: Callable[[int], int]
) -> None:
    run = make_run(small, tmp_path, flags)
    assert run.schedule.n_steps == n_steps(run.data.n_rows)


# ----------------------------------------------------------------------------- rates, precision


@pytest.mark.parametrize("accumulation", (1, 3))
def test_rates_count_updates(small: Path, tmp_path: Path, accumulation: int) -> None:
    flags = f"--recipe v1 --batch_size 2 --accumulation_steps {accumulation} --epochs 1"
    pretrain(small, tmp_path, f"{flags} --log_interval 1")
    found = [record for record in records(tmp_path) if "lr" in record]
    rates = [record["lr"] for record in found]
    n = -(-found[-1]["samples"] // (2 * accumulation))
    assert len(rates) == n and found[-1]["epoch"] == 1
    assert rates[0] == 1e-4 and rates == sorted(rates, reverse=True)
    expected = [learning_rate_at(step, n, 1e-4, "cosine", 0) for step in range(n)]
    assert rates == expected and rates[-1] < 1.2e-5 + 9e-5 / n


def test_warm_up_is_a_share_of_the_run_unless_given(corpus: Path, tmp_path: Path) -> None:
    for flags, warmup in (
        ("--max_steps 1000", 20),
        ("--max_steps 10", 1),
        ("--max_steps 1000000", 200),
        ("--max_steps 1000 --warmup_iters 0", 0),
        ("--max_steps 1000 --recipe v1", 0),
    ):
        assert make_run(corpus, tmp_path, flags).schedule.warmup == warmup


@contextlib.contextmanager
def products_of(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Collect the precision of every matrix product of linear layers."""
    seen: set[torch.dtype] = set()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, i, out: seen.add(out.dtype)) for m in linears]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("use_moe", ("false", "true"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_dtype_means_what_it_says(corpus: Path, tmp_path: Path, dtype: str, use_moe: str) -> None:
    run = make_run(corpus, tmp_path, f"--dtype {dtype} --use_moe {use_moe}")
    seen = gradients(run)
    with products_of(run.model) as products:
        run.update(next(run.updates()), 1e-3)
    assert products == {getattr(torch, dtype)}
    # what the optimizer keeps and changes is single precision always
    kept = [*run.model.parameters(), *seen[0].values()]
    kept += [v for state in run.engine.optimizer.state.values() for v in state.values()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert not run.engine.scaler.is_enabled()


def test_half_precision_scales_its_loss_and_skips_what_overflows(
    corpus: Path, tmp_path: Path
) -> None:
    half = Runtime(torch.device("cpu"), torch.float16)
    run, single = make_run(corpus, tmp_path, runtime=half), make_run(corpus, tmp_path)
    assert run.engine.scaler.is_enabled() and run.engine.scaler.get_scale() == 2**16
    batches = next(run.updates())
    run_seen, single_seen = gradients(run), gradients(single)
    with products_of(run.model) as products:
        run.update(batches, 1e-3)
    single.update(batches, 1e-3)
    assert products == {torch.float16}
    for name, gradient in single_seen[0].items():
        # fp16 keeps 11 bits; the largest entry sets the size of what is rounded off
        torch.testing.assert_close(
            run_seen[0][name], gradient, rtol=0, atol=0.02 * gradient.abs().max().item()
        )
    run.engine.scaler._scale.fill_(2.0**40)  # as if it had grown too far
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.update(batches, 1e-3)
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())
    assert run.progress.skipped == 1 and run.engine.scaler.get_scale() == 2.0**39


def test_half_precision_on_a_cpu_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--dtype float16 trains on a GPU only: use float32 or"):
        pretrain(corpus, tmp_path, "--dtype float16")


# ----------------------------------------------------------------------------- not finite


def spoiling(is_spoilt: Callable[[int], bool], how: str) -> Callable[[nn.Module, Batch], LossSums]:
    """Return the usual loss, not finite at those of its calls that ``is_spoilt`` names."""
    calls = iter(range(1, 10**6))

    def loss_fn(model: nn.Module, batch: Batch) -> LossSums:
        sums = language_model_loss(model, batch)
        if model.training and is_spoilt(next(calls)):
            if how == "loss":
                sums.loss = sums.loss * float("nan")
            else:
                sums.loss.register_hook(lambda gradient: gradient * float("inf"))
        return sums

    return loss_fn


@pytest.mark.parametrize("how", ("loss", "gradient"))
def test_an_update_that_is_not_finite_is_skipped_and_counted(
    corpus: Path, tmp_path: Path, how: str
) -> None:
    run = make_run(corpus, tmp_path, loss_fn=spoiling(lambda call: call == 2, how))
    updates = run.updates()
    run.update(next(updates), 1e-3)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    moments = copy.deepcopy(list(run.engine.optimizer.state.values()))
    loss, units = run.progress.loss, run.progress.units
    run.update(next(updates), 1e-3)
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())
    for was, now in zip(moments, run.engine.optimizer.state.values(), strict=True):
        assert all(torch.equal(value, now[key]) for key, value in was.items())
    assert (run.progress.loss, run.progress.units) == (loss, units)
    assert (run.progress.step, run.progress.skipped, run.progress.skipped_in_a_row) == (2, 1, 1)
    run.update(next(updates), 1e-3)
    assert not torch.equal(run.model.norm.weight, before["norm.weight"])
    assert (run.progress.skipped, run.progress.skipped_in_a_row) == (1, 0)


def test_skips_are_recorded_and_nine_in_a_row_are_borne(corpus: Path, tmp_path: Path) -> None:
    bad = range(3, 3 + MAX_SKIPPED_IN_A_ROW - 1)
    flags = "--max_steps 14 --log_interval 1"
    assert run_with(corpus, tmp_path, spoiling(lambda call: call in bad, "loss"), flags) == 0
    found = [record for record in records(tmp_path) if "lr" in record]
    assert [record["loss"] is None for record in found] == [step in bad for step in range(1, 15)]
    assert [record["skipped"] for record in found[-5:]] == [8, 9, 9, 9, 9]


@pytest.mark.slow
def test_ten_in_a_row_end_the_run_with_advice(corpus: Path, tmp_path: Path) -> None:
    flags = "--max_steps 20 --save_interval 2 --log_interval 1"
    with pytest.raises(ValueError, match="not finite in 10 updates in a row, up to update 13") as e:
        run_with(corpus, tmp_path, spoiling(lambda call: call > 3, "gradient"), flags)
    assert "lower --learning_rate" in str(e.value)
    assert states(tmp_path) == ["step_10", "step_12"]
    assert [record["skipped"] for record in records(tmp_path)[-2:]] == [8, 9]


# ----------------------------------------------------------------------------- what a run leaves


def test_a_run_shorter_than_its_intervals_leaves_everything(corpus: Path, tmp_path: Path) -> None:
    assert pretrain(corpus, tmp_path, "--max_steps 3") == 0
    assert states(tmp_path) == ["step_3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints", "logs", "pretrain_32.json", "pretrain_32.pth",
    ]  # fmt: skip
    training, validation = records(tmp_path)
    assert training["step"] == validation["step"] == 3 and training["loss"] > 0
    assert {"epoch", "tokens", "lr", "grad_norm", "skipped", "samples"} <= training.keys()
    assert {"val_loss", "val_bpb", "sample"} <= validation.keys()
    logs = tmp_path / "logs" / "pretrain_32"
    settings = json.loads((logs / "config.json").read_text("utf-8"))
    assert settings["max_steps"] == 3 and settings["config"]["dim"] == 32
    assert (logs / "curve.png").read_bytes()[:4] == b"\x89PNG"
    known = json.loads((tmp_path / "pretrain_32.json").read_text("utf-8"))
    assert (known["stage"], known["step"], known["tokens"]) == ("pretrain", 3, training["tokens"])


@pytest.mark.slow
def test_intervals_are_kept(corpus: Path, tmp_path: Path) -> None:
    flags = "--max_steps 10 --log_interval 3 --eval_interval 4 --save_interval 2 --keep_last 3"
    pretrain(corpus, tmp_path, flags)
    found = records(tmp_path)
    assert [record["step"] for record in found if "lr" in record] == [3, 6, 9, 10]
    assert [record["step"] for record in found if "val_loss" in record] == [4, 8, 10]
    assert states(tmp_path) == ["step_10", "step_6", "step_8"]


@pytest.mark.slow
def test_a_line_has_the_means_since_the_one_before(corpus: Path, tmp_path: Path) -> None:
    pretrain(corpus, tmp_path / "1", "--max_steps 6 --log_interval 1 --save_interval 4")
    pretrain(corpus, tmp_path / "3", "--max_steps 6 --log_interval 3")
    single, third = ([r for r in records(tmp_path / i) if "lr" in r] for i in "13")
    # rows are full but for a few tail positions, so the mean over tokens is nearly that of means
    means = [np.mean([r["loss"] for r in single[i : i + 3]]) for i in (0, 3)]
    assert [r["loss"] for r in third] == pytest.approx(means, rel=1e-3)
    assert third[-1]["tokens"] == single[-1]["tokens"] and third[-1]["samples"] == 24


@pytest.mark.slow
def test_training_learns_and_validation_measures_it(corpus: Path, tmp_path: Path) -> None:
    flags = "--max_steps 60 --eval_interval 30 --log_interval 10"
    pretrain(corpus, tmp_path, flags)
    found = records(tmp_path)
    losses = [record["loss"] for record in found if "lr" in record]
    val = [record["val_loss"] for record in found if "val_loss" in record]
    assert losses[-1] < losses[0] - 1 and val[-1] < val[0]
    run = make_run(corpus, tmp_path, "--overwrite")
    run.model.load_state_dict(torch.load(tmp_path / "pretrain_32.pth", weights_only=True))
    result = evaluate(run.model, run.held_out, language_model_loss, torch.device("cpu"))
    assert val[-1] == pytest.approx(result["val_loss"], rel=1e-6)


def test_a_corpus_too_small_to_hold_anything_out_says_so(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pretrain(small, tmp_path, "--max_steps 2 --eval_interval 1")
    assert "no document is held out" in capsys.readouterr().out
    assert not [record for record in records(tmp_path) if "val_loss" in record]


def test_a_context_shorter_than_the_sample_prompt_trains(corpus: Path, tmp_path: Path) -> None:
    assert pretrain(corpus, tmp_path, "--max_steps 2 --eval_interval 1 --max_seq_len 4") == 0
    assert all("sample" not in record for record in records(tmp_path))


# ----------------------------------------------------------------------------- before the start


def test_the_report_says_what_is_about_to_happen(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert pretrain(corpus, tmp_path, "--dry_run --epochs 2 --accumulation_steps 3") == 0
    assert list(tmp_path.iterdir()) == []  # nothing is made, nothing trained
    shown = capsys.readouterr().out
    run = make_run(corpus, tmp_path, "--epochs 2 --accumulation_steps 3")
    n_params = sum(p.numel() for p in run.model.parameters())
    for text in (
        "pretrain_32 (best recipe, seed 1337)",
        f"{n_params:,} parameters",
        f"{run.data.store.n_tokens:,} tokens",
        f"{run.data.n_rows:,} rows of 48 positions",
        f"2 epochs = {run.schedule.n_steps:,} updates of 12 rows (576 positions)",
        "cpu, float32",
        "free",
    ):
        assert text in shown


def test_show_samples_prints_rows_and_ends(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert pretrain(corpus, tmp_path, "--show_samples 2") == 0
    shown = capsys.readouterr().out
    assert shown.count("--- row ") == shown.count("⟧\n") == 2 and "<s>⟦" in shown
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_told_before_the_start(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="free, the run saves .*: make room, lower --keep_last"):
        pretrain(corpus, tmp_path, "--keep_last 1000000000")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_second_start_does_not_overwrite_a_run(corpus: Path, tmp_path: Path) -> None:
    assert run_with(corpus, tmp_path, signalling(2), "--max_steps 5") == 143
    with pytest.raises(ValueError, match="holds a run that came to update 2: go on with --resume"):
        pretrain(corpus, tmp_path, "--max_steps 5")
    assert states(tmp_path) == ["step_2"]
    assert pretrain(corpus, tmp_path, "--max_steps 4 --run_name other") == 0
    assert states(tmp_path) == ["step_2"] and states(tmp_path, "pretrain_32_other") == ["step_4"]
    assert (tmp_path / "pretrain_32_other.pth").is_file()
    assert pretrain(corpus, tmp_path, "--max_steps 5 --overwrite") == 0
    assert states(tmp_path) == ["step_5"]
    with pytest.raises(ValueError, match="came to update 5: .*--overwrite"):  # nor a finished one
        pretrain(corpus, tmp_path, "--max_steps 5")
    assert len(records(tmp_path)) == 2


# ----------------------------------------------------------------------------- stopping


def signalling(*moments: int, number: int = signal.SIGTERM, training: bool = True) -> Callable:
    """Return the usual loss, which sends this process a signal at those of its calls."""
    calls = iter(range(1, 10**6))

    def loss_fn(model: nn.Module, batch: Batch) -> LossSums:
        if model.training is training and next(calls) in moments:
            os.kill(os.getpid(), number)
        return language_model_loss(model, batch)

    return loss_fn


@pytest.mark.parametrize(("number", "code"), ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_a_signal_finishes_the_update_saves_and_says_how_to_go_on(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture, number: int, code: int
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    # at the first of two micro-batches of update 3
    flags = "--max_steps 9 --accumulation_steps 2 --eval_interval 3"
    assert run_with(corpus, tmp_path, signalling(5, number=number), flags) == code
    assert states(tmp_path) == ["step_3"]
    shown = capsys.readouterr().out
    assert "stopped at update 3 of 9; go on with: python" in shown and "--resume" in shown
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert records(tmp_path) == []  # the validation of update 3 is left to the resumed run


def test_a_second_signal_ends_at_once(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_with(corpus, tmp_path, signalling(3, 4), "--max_steps 9 --accumulation_steps 4")
    assert not list(tmp_path.glob("checkpoints/*/step_*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_signal_in_the_last_update_is_no_stop(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code = run_with(small, tmp_path, signalling(3), "--max_steps 3")
    assert (code, states(tmp_path)) == (143, ["step_3"])  # its validation is still due
    capsys.readouterr()
    assert pretrain(small, tmp_path, "--max_steps 3 --resume") == 0
    assert "all 3 updates are done already" in capsys.readouterr().out


# ----------------------------------------------------------------------------- a full disk


def filling(first: int, last: int, n_bytes: int) -> Callable:
    """Return the usual loss; from call ``first`` to ``last`` no file can exceed ``n_bytes``."""
    calls = iter(range(1, 10**6))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def loss_fn(model: nn.Module, batch: Batch) -> LossSums:
        if model.training:
            call = next(calls)
            soft = n_bytes if first <= call <= last else hard
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return language_model_loss(model, batch)

    return loss_fn


def test_a_full_disk_costs_a_save_not_the_run(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = "--max_steps 8 --save_interval 2 --log_interval 1"
    with full_disk(resource.RLIM_INFINITY):
        assert run_with(corpus, tmp_path, filling(3, 6, 100_000), flags) == 0
    warnings = capsys.readouterr().err
    assert warnings.count("is not saved") == 2 and "update 4 is not saved" in warnings
    assert "the run goes on and tries again" in warnings
    assert states(tmp_path) == ["step_2", "step_8"]  # 4 and 6 could not be saved
    assert [record["step"] for record in records(tmp_path) if "lr" in record] == list(range(1, 9))


def test_a_disk_without_a_byte_costs_lines_of_the_record_not_the_run(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = "--max_steps 8 --save_interval 4 --log_interval 1"
    with full_disk(resource.RLIM_INFINITY):
        assert run_with(corpus, tmp_path, filling(3, 5, 1), flags) == 0
    assert [record["step"] for record in records(tmp_path) if "lr" in record] == [1, 2, 6, 7, 8]
    assert capsys.readouterr().err.count("a line is missing in") == 3


@pytest.mark.slow
def test_a_last_save_that_fails_is_an_error_and_loses_no_earlier_one(
    corpus: Path, tmp_path: Path
) -> None:
    flags = "--max_steps 6 --save_interval 2"
    with full_disk(resource.RLIM_INFINITY):
        with pytest.raises(OSError, match="could not be written, the disk may be full"):
            run_with(corpus, tmp_path, filling(5, 99, 100_000), flags)
    assert states(tmp_path) == ["step_2", "step_4"]
    assert pretrain(corpus, tmp_path, flags, "--resume") == 0  # with room again
    pretrain(corpus, tmp_path / "straight", flags)
    assert same_weights(tmp_path / "pretrain_32.pth", tmp_path / "straight" / "pretrain_32.pth")


def test_a_full_device_is_advised_on(corpus: Path, tmp_path: Path) -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> LossSums:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryError, match="memory of cpu is full: lower --batch_size and raise"):
        run_with(corpus, tmp_path, loss_fn, "--max_steps 2")


def test_a_run_is_compared_with_another(corpus: Path, tmp_path: Path) -> None:
    """The same run again has the reference's loss at each validation; one of other rows has not."""
    flags = "--max_steps 6 --eval_interval 2"
    pretrain(corpus, tmp_path / "1", flags)
    reference = f"--compare_with {tmp_path}/1/logs/pretrain_32"
    pretrain(corpus, tmp_path / "2", flags, reference)
    pretrain(corpus, tmp_path / "3", flags, reference, "--seed 1")
    again, other = (
        [(r["val_loss"], r["reference_loss"]) for r in records(tmp_path / n) if "val_loss" in r]
        for n in "23"
    )
    assert len(again) == 3 and all(own == its for own, its in again)
    within = [(own, its) for own, its in other if its is not None]  # of as many tokens as the first
    assert within and all(own != its for own, its in within)


def test_an_unknown_reference_is_told_before_training(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no_such_run is no run to compare with"):
        pretrain(corpus, tmp_path, "--compare_with no_such_run")
    assert not (tmp_path / "logs").exists()
