"""The model in transformers' own hands: Trainer, pipelines, device maps; and in accelerate's."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate_loop
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tiny_runs import ROOT, write_tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, EvalPrediction, Trainer, TrainingArguments, pipeline

from model.generation import Engine
from model.model import MiniMindForCausalLM
from model.sampling import SamplingOptions
from model.tokenizer import Message, Tokenizer

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
    passes = []
    model.layers[0].attention.wq.register_forward_hook(lambda *_: passes.append(1))
    trainer.train()
    assert len(passes) == 3 * 4 * (2 if checkpointing else 1)  # again on the way back
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


@pytest.mark.slow
@either_model
def test_a_checkpoint_of_trainer_resumes_to_the_same_weights(
    build: Build, tmp_path: Path, use_moe: bool
) -> None:
    def trainer(folder: str, model: MiniMindForCausalLM) -> Trainer:
        settings = arguments(
            tmp_path / folder, max_steps=6, save_steps=3, per_device_train_batch_size=4,
            learning_rate=1e-3,
        )  # fmt: skip
        return Trainer(model, settings, train_dataset=rows_of(lambda row: 2))

    # dropout: the place in the random numbers must come back too; 6 steps end in a second epoch
    whole = trainer("whole", build(use_moe=use_moe, dropout=0.1))
    whole.train()
    resumed = trainer("resumed", build(seed=1, use_moe=use_moe, dropout=0.1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    folder = tmp_path / "whole/checkpoint-6"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "tok_embeddings.weight" in file.keys() and "output.weight" not in file.keys()
    again = MiniMindForCausalLM.from_pretrained(folder)
    assert again.output.weight is again.tok_embeddings.weight
    ids = rows_of(lambda row: 0)[0]["input_ids"][None]
    torch.testing.assert_close(again(ids).logits, whole.model.eval()(ids).logits, rtol=0, atol=0)


@either_model
def test_trainer_evaluates_without_the_balance_loss(
    build: Build, tmp_path: Path, use_moe: bool
) -> None:
    model, rows = build(use_moe=use_moe, dropout=0.3), rows_of(lambda row: row % 8)
    seen = []

    def measure(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": 0.5}

    trainer = Trainer(
        model.train(),
        arguments(tmp_path, per_device_eval_batch_size=1),  # batches have equal weights there
        eval_dataset=rows,
        compute_metrics=measure,
    )
    result = trainer.evaluate()
    model.eval()
    batch = stacked(rows)
    logits = model(batch["input_ids"]).logits
    per_row = [
        F.cross_entropy(row[:-1], labels[1:])
        for row, labels in zip(logits, batch["labels"], strict=True)
    ]
    assert result["eval_loss"] == pytest.approx(torch.stack(per_row).mean().item(), abs=1e-5)
    assert result["eval_accuracy"] == 0.5
    (prediction,) = seen
    torch.testing.assert_close(torch.tensor(prediction.predictions), logits, **CLOSE)
    assert prediction.label_ids.tolist() == batch["labels"].tolist()


# Pipelines

CHATS = (
    ("北京", "city 山 水"),
    ("who walks quickly", "the river sings 。"),
    ("长江 and 黄河 , the mountain", "river mountain"),
    ("唱歌 !", "北京 walks"),
)


def learn(model: MiniMindForCausalLM, tokenizer: Tokenizer, chats: list[list[Message]]) -> None:
    """Let the model learn what the assistant says by heart."""
    encoded = [tokenizer.encode_chat_masked(chat) for chat in chats]
    ids, is_answer = (pad_sequence([torch.tensor(row[i]) for row in encoded], True) for i in (0, 1))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(60):
        model(ids, labels=ids.masked_fill(~is_answer, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("learnt", (True, False), ids=("learnt", "endless"))
@either_model
def test_a_pipeline_says_what_we_say(
    build: Build, tmp_path: Path, use_moe: bool, learnt: bool
) -> None:
    """Message lists go in, one by one and as a left-padded batch; the end token ends an answer."""
    folder = write_tokenizer(tmp_path)
    ours, model = Tokenizer(folder), build(use_moe=use_moe, vocab_size=300)
    questions = [[{"role": "user", "content": question}] for question, _ in CHATS]
    expected = [
        [*prompt, {"role": "assistant", "content": answer}]
        for prompt, (_, answer) in zip(questions, CHATS, strict=True)
    ]
    if learnt:
        learn(model, ours, expected)
    greedy = SamplingOptions(max_new_tokens=24, temperature=0)
    said = []
    for prompt in questions:
        prompt_ids = ours.encode_chat(prompt, add_generation_prompt=True)
        engine = Engine(model, ours, max_batch=1)
        answer = engine.submit(prompt_ids, greedy)
        said.append([*prompt, {"role": "assistant", "content": "".join(engine.stream(answer))}])
        assert answer.finish_reason == ("stop" if learnt else "length")
    assert (said == expected) == learnt
    chat = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    settings = dict(max_new_tokens=24, do_sample=False)
    assert [chat(prompt, **settings)[0]["generated_text"] for prompt in questions] == said
    assert len({len(ours.encode_chat(prompt)) for prompt in questions}) == len(CHATS)  # padding
    batch = chat(questions, batch_size=len(CHATS), **settings)
    assert [answers[0]["generated_text"] for answers in batch] == said


# Devices


@either_model
@pytest.mark.parametrize("where", ("cpu", "half on disk"))
def test_a_device_map_changes_no_logit(
    build: Build, tmp_path: Path, use_moe: bool, where: str
) -> None:
    model = build(use_moe=use_moe, n_layers=4, rope_scaling="yarn:4")
    model.save_pretrained(tmp_path)
    settings: dict[str, Any] = {"device_map": "cpu"}
    if where == "half on disk":
        n_bytes = sum(4 * p.numel() for p in model.parameters())
        room = {"cpu": int(0.8 * n_bytes)}  # what is left must be able to come in, one at a time
        settings = dict(device_map="auto", max_memory=room, offload_folder=tmp_path / "rest")
    spread = MiniMindForCausalLM.from_pretrained(tmp_path, **settings)
    if where == "half on disk":  # and no block in two
        places = {k: v for k, v in spread.hf_device_map.items() if k.startswith("layers")}
        assert places == {
            "layers.0": "cpu", "layers.1": "cpu", "layers.2": "disk", "layers.3": "disk"
        }  # fmt: skip
    ids = stacked(rows_of(lambda row: 0))["input_ids"][:2]
    torch.testing.assert_close(spread(ids).logits, model(ids).logits, rtol=0, atol=0)
    greedy = dict(max_new_tokens=8, do_sample=False)
    assert spread.generate(ids, **greedy).tolist() == model.generate(ids, **greedy).tolist()


# accelerate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_processes", "use_moe"), ((1, False), (2, True)), ids=("alone", "two of a mixture")
)
def test_accelerate_launch_takes_the_steps_of_plain_torch(
    build: Build, tmp_path: Path, n_processes: int, use_moe: bool
) -> None:
    rows = rows_of(lambda row: 2)
    build(use_moe=use_moe).save_pretrained(tmp_path)
    torch.save(rows, tmp_path / "rows.pt")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    # with --cpu it starts several processes by mpirun only; the loop itself asks for cpu=True
    command += ["--cpu"] if n_processes == 1 else ["--multi_gpu"]
    command += ["--num_processes", str(n_processes), "--num_cpu_threads_per_process", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    loop = ROOT / "tests/accelerate_loop.py"
    done = subprocess.run(
        [*command, str(loop), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(n_processes)]

    expected = build(use_moe=use_moe).train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=accelerate_loop.LEARNING_RATE)
    losses = []
    for _ in range(accelerate_loop.EPOCHS):
        for part in (rows[:8], rows[8:]):
            loss = expected(**stacked(part)).loss
            (loss / 2).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    for result in results:
        assert result["losses"] == pytest.approx(losses, abs=1e-4)
        torch.testing.assert_close(result["state"], expected.state_dict(), rtol=0, atol=1e-4)
        torch.testing.assert_close(result["state"], results[0]["state"], rtol=0, atol=0)
