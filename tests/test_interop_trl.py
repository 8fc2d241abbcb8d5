"""The model and its tokenizer in trl's trainers: instruction tuning and preferences."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import write_tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from model.model import MiniMindForCausalLM
from model.tokenizer import Message, Tokenizer

Build = Callable[..., MiniMindForCausalLM]

PAIRS = (
    ("北京", "city 山 水"),
    ("who walks quickly", "the river sings 。"),
    ("长江 and 黄河", "river mountain"),
    ("唱歌 !", "北京 walks"),
)

either_model = pytest.mark.parametrize("use_moe", (False, True), ids=("dense", "moe"))


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


CHATS = [[turn("user", q), turn("assistant", a)] for q, a in PAIRS]
LONG = [turn("system", "of the 山"), *CHATS[0], *CHATS[1], *CHATS[2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def settings(**changes: Any) -> dict[str, Any]:
    usual = dict(
        report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no",
        bf16=False, max_length=64, per_device_train_batch_size=5,
    )  # fmt: skip
    return usual | changes


def sft(
    model: MiniMindForCausalLM, folder: Path, output: Path, chats: Any, **changes: Any
) -> SFTTrainer:
    return SFTTrainer(
        model,
        SFTConfig(str(output), assistant_only_loss=True, **settings(**changes)),
        train_dataset=Dataset.from_list([{"messages": chat} for chat in chats]),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def logged(trainer: SFTTrainer | DPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@either_model
def test_sft_learns_the_tokens_that_we_learn(
    build: Build, folder: Path, tmp_path: Path, use_moe: bool
) -> None:
    chats = [*CHATS, LONG, LONG[1:], LONG[1:-1]]
    model = build(use_moe=use_moe, vocab_size=300)
    trainer = sft(model, folder, tmp_path, chats, max_length=256)
    ours = Tokenizer(folder)
    for row, chat in zip(trainer.train_dataset, chats, strict=True):
        ids, is_answer = ours.encode_chat_masked(chat)
        assert row["input_ids"] == ids
        assert [label != -100 for label in row["labels"]] == is_answer
        assert [label for label in row["labels"] if label != -100] == [
            i for i, learnt in zip(ids, is_answer, strict=True) if learnt
        ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "packing": True},
        {"per_device_train_batch_size": 4, "padding_free": True, "max_length": None},
    ),
    ids=("micro-batches", "packed", "in one row"),
)
@either_model
def test_sft_takes_the_steps_of_plain_torch(
    build: Build, folder: Path, tmp_path: Path, use_moe: bool, changes: dict[str, Any]
) -> None:
    """The loss is the mean over all trained tokens, of conversations of different lengths, and
    those in one row do not see one another.
    """
    # trl's balance loss is another formula, see below
    fields = dict(use_moe=use_moe, vocab_size=300, aux_loss_alpha=0.0)
    model, expected = build(**fields), build(**fields).train()
    trainer = sft(
        model, folder, tmp_path, CHATS, max_steps=4, optim="sgd", learning_rate=0.3,
        lr_scheduler_type="constant", max_grad_norm=0.0, **changes,
    )  # fmt: skip
    trainer.train()
    encoded = [Tokenizer(folder).encode_chat_masked(chat) for chat in CHATS]
    ids, is_answer = (pad_sequence([torch.tensor(row[i]) for row in encoded], True) for i in (0, 1))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.3)
    expected_losses = []
    for _ in range(4):
        loss = expected(ids, labels=ids.masked_fill(~is_answer, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected_losses.append(loss.item())
    assert expected_losses[-1] < expected_losses[0] - 0.5
    assert logged(trainer, "loss") == pytest.approx(expected_losses, abs=1e-4)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_sft_learns_by_heart_in_bf16(build: Build, folder: Path, tmp_path: Path) -> None:
    model = build(vocab_size=300)
    trainer = sft(
        model, folder, tmp_path, CHATS, max_steps=40, learning_rate=5e-3, bf16=True, packing=True
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.2 * losses[0]
    assert logged(trainer, "mean_token_accuracy")[-1] > 0.95
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_sft_keeps_the_load_of_experts_even(build: Build, folder: Path, tmp_path: Path) -> None:
    """trl's own balance loss, with our coefficient unless another is given: 2, the experts of a
    token, when all are equally loaded.
    """
    losses, balance = {}, {}
    for coefficient in (None, 1.0, 0.0):
        model = build(use_moe=True, vocab_size=300)
        trainer = sft(
            model, folder, tmp_path, CHATS, max_steps=8, learning_rate=0.03, optim="sgd",
            lr_scheduler_type="constant", router_aux_loss_coef=coefficient,
        )  # fmt: skip
        trainer.train()
        losses[coefficient], balance[coefficient] = (
            logged(trainer, name) for name in ("loss", "aux_loss")
        )
    assert balance[0.0] == []
    first = balance[None][0]
    assert first == balance[1.0][0] > 2
    assert losses[None][0] == pytest.approx(losses[0.0][0] + 0.01 * first, abs=1e-5)
    assert losses[1.0][0] == pytest.approx(losses[0.0][0] + first, abs=1e-5)
    assert balance[1.0][-1] < balance[None][-1] - 0.01


def preferences(
    model: MiniMindForCausalLM, folder: Path, output: Path, trainer: dict[str, Any], **changes: Any
) -> DPOTrainer:
    rows = [
        {"prompt": [question], "chosen": [answer], "rejected": [turn("assistant", "mountain 山")]}
        for question, answer in CHATS
    ]
    return DPOTrainer(
        model,
        args=DPOConfig(str(output), **settings(max_steps=15, **changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **trainer,
    )


@pytest.mark.slow
@pytest.mark.parametrize("reference", ("a copy", "computed before", "without the adapter"))
@either_model
def test_dpo_learns_what_is_preferred(
    build: Build, folder: Path, tmp_path: Path, use_moe: bool, reference: str
) -> None:
    fields = dict(use_moe=use_moe, vocab_size=300, aux_loss_alpha=0.0)
    model, untouched = build(**fields), build(**fields)
    peft_config = None
    if reference == "without the adapter":
        peft_config = LoraConfig(target_modules="all-linear")
    trainer = preferences(
        model,
        folder,
        tmp_path,
        dict(ref_model=build(**fields)) if peft_config is None else dict(peft_config=peft_config),
        learning_rate=2e-3 if peft_config is None else 0.01,
        precompute_ref_log_probs=reference == "computed before",
    )
    trainer.train()
    losses, margins = logged(trainer, "loss"), logged(trainer, "rewards/margins")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference
    assert losses[-1] < 0.2
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 1.5
    assert logged(trainer, "rewards/accuracies")[-1] == 1
    assert logged(trainer, "logps/rejected")[-1] < logged(trainer, "logps/rejected")[0] - 10
    if reference == "a copy":
        torch.testing.assert_close(
            trainer.ref_model.state_dict(), untouched.state_dict(), rtol=0, atol=0
        )
