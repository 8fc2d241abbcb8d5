"""The model in transformers' own hands: Trainer, pipelines, device maps; and in accelerate's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from model.model import MiniMindForCausalLM

Build = Callable[..., MiniMindForCausalLM]
CLOSE = dict(rtol=0, atol=1e-5)  # the same sums in another order, fp32
N_ROWS, T = 16, 12

either_model = pytest.mark.parametrize("use_moe", (False, True), ids=("dense", "moe"))


def rows_of(n_ignored: Callable[[int], int]) -> list[dict[str, Tensor]]:
    """Return rows of ids of which the first ``n_ignored(row)`` are not learnt."""
    ids = torch.randint(3, 100, (N_ROWS, T), generator=torch.Generator().manual_seed(1))
    ignored = torch.arange(T) < torch.tensor([n_ignored(row) for row in range(N_ROWS)])[:, None]
    labels = ids.masked_fill(ignored, -100)
    return [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    usual = dict(
        report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, save_steps=1000
    )
    return TrainingArguments(str(folder), **(usual | settings))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Trainer


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", (False, True), ids=("", "checkpointing"))
@either_model
def test_trainer_takes_the_steps_of_plain_torch(
    build: Build, tmp_path: Path, use_moe: bool, checkpointing: bool
) -> None:
    """Four micro-batches of rows with more and fewer labels are one batch: the mean over all."""
    # the balance loss is a mean over sequences, which parts of a batch share by their labels
    rows = rows_of(lambda row: 3 if use_moe else row % 8)
    settings = dict(optim="sgd", learning_rate=0.2, lr_scheduler_type="constant", max_grad_norm=0.0)
    model = build(use_moe=use_moe)
    trainer = Trainer(
        model,
        arguments(
            tmp_path, max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=4,
            activation_checkpointing=checkpointing, **settings,
        ),
        train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    expected = build(use_moe=use_moe).train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.2)
    expected_losses = []
    for _ in range(3):
        out = expected(**stacked(rows))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected_losses.append(out.loss.item())
    assert expected_losses[-1] < expected_losses[0] - 0.1
    assert losses(trainer) == pytest.approx(expected_losses, abs=1e-4)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=1e-4)
