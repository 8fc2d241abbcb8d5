"""Adapters that peft makes and trains on the model; their files are in test_lora.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from model.lora import TARGETS, load_adapter
from model.model import MiniMindForCausalLM

Build = Callable[..., MiniMindForCausalLM]
IDS = torch.randint(3, 100, (8, 16), generator=torch.Generator().manual_seed(1))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(model: torch.nn.Module, folder: Path, **settings: Any) -> list[float]:
    """Let Trainer learn eight rows by heart; return the loss of each step."""
    arguments = TrainingArguments(
        str(folder), max_steps=20, learning_rate=0.01, per_device_train_batch_size=8,
        report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, **settings,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("use_moe", (False, True), ids=("dense", "moe"))
def test_peft_takes_all_linear_layers_for_those_we_take(build: Build, use_moe: bool) -> None:
    """Experts too, and not the head, whose weights are the embedding's."""
    adapted = get_peft_model(build(use_moe=use_moe), LoraConfig(target_modules="all-linear"))
    names = {n.split(".lora_A")[0].rsplit(".", 1)[1] for n in adapted.state_dict() if "lora_A" in n}
    assert names == set(TARGETS)
    n_layers = sum(".lora_A." in name for name, _ in adapted.named_parameters())
    assert n_layers == 2 * (4 + 3 * (5 if use_moe else 1))  # four experts and the shared one


@pytest.mark.slow
@pytest.mark.parametrize(
    "use_moe, targets, checkpointing",
    (
        (False, ["wq", "wv"], True),
        (False, "all-linear", False),
        (True, "all-linear", True),
        (True, ["wo", "w2"], False),
    ),
    ids=("dense some", "dense all", "moe all", "moe some"),
)
def test_an_adapter_of_pefts_learns_and_goes_everywhere(
    build: Build, tmp_path: Path, use_moe: bool, targets: Any, checkpointing: bool
) -> None:
    base = {name: tensor.clone() for name, tensor in build(use_moe=use_moe).state_dict().items()}
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(build(use_moe=use_moe), config)
    losses = train(adapted, tmp_path, activation_checkpointing=checkpointing)
    assert losses[-1] < 0.8 * losses[0]
    expected = logits(adapted)
    assert (expected - logits(build(use_moe=use_moe))).abs().max() > 0.1
    with adapted.disable_adapter():  # only the adapter has changed
        assert torch.equal(logits(adapted), logits(build(use_moe=use_moe)))

    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build(use_moe=use_moe), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    ours = build(use_moe=use_moe)
    load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5)

    merged = adapted.merge_and_unload()
    assert type(merged) is MiniMindForCausalLM
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    changed = {n for n, tensor in merged.state_dict().items() if not torch.equal(tensor, base[n])}
    kinds = TARGETS if targets == "all-linear" else targets
    assert {name.split(".")[-2] for name in changed} == set(kinds)
    assert merged.state_dict().keys() == base.keys()
