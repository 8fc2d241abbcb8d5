"""What benchmarks/train.py compares, each in a process of its own: contenders.py NAME …

A worker builds its model and makes WARM_UP updates, then as many as each line of its input asks
for. It answers each of the first, and each line, with a line of JSON.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import memory_mb
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.flags import parse_training_args, training_parser  # noqa: E402 (the line above)
from model.LMConfig import MODELS, LMConfig  # noqa: E402
from model.losses import IGNORED, Batch  # noqa: E402

N_BATCHES = 8  # different ones, over and over
WARM_UP = 2  # updates, each a lot of its own: the first sets everything up
LEARNING_RATE = 1e-4  # small: what is learnt from random tokens is of no interest
CONFIGS: dict[str, dict[str, Any]] = {
    "small": MODELS["minimind-v1-small"],
    "v1": MODELS["minimind-v1"],
    "demo": {"dim": 192, "n_layers": 4, "n_heads": 6, "n_kv_heads": 3, "max_seq_len": 128},
}
ROWS = {"small": 8, "v1": 4, "demo": 4}  # of a batch, on a CPU
GPU_ROWS = 128
MOE = {"use_moe": True, "n_routed_experts": 4, "n_shared_experts": 2}
# name: kind, precision, whether compiled
CONTENDERS = {
    "ours fp32": ("ours", "float32", False),
    "ours bf16": ("ours", "bfloat16", False),
    "ours Muon fp32": ("muon", "float32", False),
    "ours Muon bf16": ("muon", "bfloat16", False),
    "ours fp32 --compile": ("ours", "float32", True),
    "ours bf16 --compile": ("ours", "bfloat16", True),
    "Llama fp32": ("llama", "float32", False),
    "Llama bf16": ("llama", "bfloat16", False),
    "Llama fp32 compiled": ("llama", "float32", True),
    "Llama bf16 compiled": ("llama", "bfloat16", True),
    "Trainer fp32": ("trainer", "float32", False),
    "Trainer bf16": ("trainer", "bfloat16", False),
    "litgpt fp32": ("litgpt", "float32", False),
    "litgpt bf16": ("litgpt", "bfloat16", False),
    "ours MoE fp32": ("moe", "float32", False),
    "ours MoE bf16": ("moe", "bfloat16", False),
}


def missing(name: str) -> str | None:
    """Say why a contender cannot run here, None if it can."""
    kind, _, compiled = CONTENDERS[name]
    if kind == "litgpt" and importlib.util.find_spec("litgpt") is None:
        return "litgpt is not installed"
    if kind == "trainer" and importlib.util.find_spec("accelerate") is None:
        return "accelerate is not installed, which transformers.Trainer needs"
    if compiled:
        from model.engine import can_compile  # here: what a worker has imported is measured

        if not can_compile("cuda" if torch.cuda.is_available() else "cpu"):
            return "there is neither g++ nor clang++"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--model", choices=CONFIGS, default="small")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row_tokens", type=int, default=512)
    parser.add_argument("--corpus", type=Path, help="default: random tokens")
    parser.add_argument("--padded", action="store_true", help="a document of the corpus a row")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    from transformers import LlamaForCausalLM  # noqa: F401 (what all take before their models)

    base_mb = memory_mb()
    kind, dtype, compiled = CONTENDERS[args.name]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # so that compiling takes what it takes
        config = LMConfig(**CONFIGS[args.model] | (MOE if kind == "moe" else {}))
        config.max_seq_len = max(config.max_seq_len, args.row_tokens)
        batches = make_batches(args, config)
        pacer = Pacer(args.device, batches, base_mb)
        torch.manual_seed(0)
        builders = {
            "ours": ours,
            "moe": ours,
            "muon": partial(ours, optimizer="muon"),
            "llama": llama,
            "trainer": trainer,
            "litgpt": litgpt,
        }
        builders[kind](config, batches, pacer, args.device, dtype, compiled)


# ---- batches ----


def make_batches(args: argparse.Namespace, config: LMConfig) -> list[Batch]:
    """Return the batches that everyone trains on."""
    if args.corpus is not None:
        return text_batches(args, config)
    generator = torch.Generator().manual_seed(1)
    shape = (N_BATCHES, args.rows, args.row_tokens + 1)
    tokens = torch.randint(3, config.vocab_size, shape, generator=generator)
    n = args.rows * args.row_tokens
    is_token = torch.ones(args.rows, args.row_tokens, dtype=torch.bool)
    return [
        Batch(
            rows[:, :-1].contiguous(),
            rows[:, 1:].contiguous(),
            token_mask=is_token,
            n_units=n,
            n_tokens=n,
        )
        for rows in tokens
    ]


def text_batches(args: argparse.Namespace, config: LMConfig) -> list[Batch]:
    """Return rows of a corpus, as a pretraining run packs or, as v1 did, pads them."""
    import numpy as np

    from model.dataset import pretrain_data
    from model.tokenizer import Tokenizer

    recipe = "v1" if args.padded else "best"
    data = pretrain_data(
        args.corpus, Tokenizer(), args.row_tokens, recipe=recipe, log=lambda _: None
    )
    rows = np.arange(N_BATCHES * args.rows).reshape(N_BATCHES, args.rows) % data.n_rows
    return [data.batch(some) for some in rows]


# ---- pace ----


class Pacer:
    """Lets a training loop make as many updates as the input asks for, and reports on each lot.

    The loop calls it before each update: ``while pacer.go_on(): …``
    """

    def __init__(self, device: str, batches: list[Batch], base_mb: float) -> None:
        self.device, self.batches, self.base_mb = device, batches, base_mb
        self.out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no report
        self.model_facts: dict[str, float] = {}
        self.n_done = self.n_asked = 0
        self.n_lots = 0
        self.position = 0  # of the next batch

    def go_on(self) -> bool:
        """Return whether to make one more update; waits for the next line where a lot is done."""
        if self.n_done == self.n_asked:
            if self.n_asked:
                self.report()
            self.n_lots += 1
            self.n_asked = 1 if self.n_lots <= WARM_UP else int(sys.stdin.readline() or 0)
            self.n_done = self.n_tokens = self.n_positions = 0
            self.started = time.perf_counter()
        if self.n_done == self.n_asked:  # the input has ended
            return False
        self.n_done += 1
        batch = self.batches[self.position % len(self.batches)]
        self.n_tokens += batch.n_tokens
        self.n_positions += batch.inputs.numel()
        return True

    def take(self) -> Batch:
        """Return the next batch."""
        self.position += 1
        return self.batches[(self.position - 1) % len(self.batches)]

    def report(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        report = {"updates": self.n_asked, "seconds": seconds, "base_mb": self.base_mb}
        report |= {"positions": self.n_positions, "tokens": self.n_tokens, "peak_mb": memory_mb()}
        if self.device == "cuda":
            report["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
            report["base_mb"] = 0.0
            torch.cuda.empty_cache()  # the others are on the same card
        print(json.dumps(report | self.model_facts), file=self.out, flush=True)


# ---- contenders ----


def ours(
    config: LMConfig,
    batches: list[Batch],
    pacer: Pacer,
    device: str,
    dtype: str,
    compiled: bool,
    optimizer: str = "adamw",  # the peers'; pretraining's own default is Muon
) -> None:
    """Train as the stages do, with their engine."""
    from model.engine import Engine
    from model.estimate import model_cost
    from model.losses import language_model_loss
    from model.model import MiniMindForCausalLM
    from model.runtime import setup

    flags = [
        "--device",
        device,
        "--dtype",
        dtype,
        "--optimizer",
        optimizer,
        *(["--compile"] if compiled else []),
    ]
    args = parse_training_args(training_parser("", data_path="", v1={}), flags)
    runtime = setup(args.device, args.dtype, args.seed, args.num_workers)
    engine = Engine(MiniMindForCausalLM(config), args, runtime)
    cost = model_cost(engine.model, batches[0].inputs.shape[1])
    pacer.model_facts = {"flops_per_position": cost.flops_per_token, "n_params": cost.n_params}
    engine.prepare()
    while pacer.go_on():
        batch = pacer.take().to(runtime.device)
        with engine.part(is_last=True):
            with runtime.autocast():
                sums = language_model_loss(engine.compute, batch)
            loss = sums.loss / batch.n_units
            if sums.balance is not None:
                loss = loss + sums.balance
            engine.backward(loss)
        engine.step(LEARNING_RATE, True)


def peer(config: LMConfig, device: str) -> nn.Module:
    """Return transformers' Llama of the same shape, trained in fp32."""
    from transformers import LlamaForCausalLM

    from model.llama import peer_config

    return LlamaForCausalLM(peer_config(config)).to(device).train()


def count(model: nn.Module, config: LMConfig, pacer: Pacer, batches: list[Batch]) -> None:
    """Note the arithmetic of one position, by the same count as ours."""
    n = sum(p.numel() for p in model.parameters())
    attention = 12 * config.n_layers * config.dim * batches[0].inputs.shape[1]
    pacer.model_facts = {"flops_per_position": 6 * n + attention, "n_params": n}


def plain_loop(
    model: nn.Module,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    pacer: Pacer,
    device: str,
    dtype: str,
) -> None:
    """Train with fused AdamW, as the peers' examples do."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    while pacer.go_on():
        batch = pacer.take().to(torch.device(device))
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = logits_of(batch.inputs).flatten(0, 1).float()
            loss = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def llama(
    config: LMConfig, batches: list[Batch], pacer: Pacer, device: str, dtype: str, compiled: bool
) -> None:
    """transformers' Llama in a plain loop."""
    model = peer(config, device)
    count(model, config, pacer, batches)
    called = torch.compile(model) if compiled else model
    plain_loop(
        model, lambda ids: called(input_ids=ids, use_cache=False).logits, pacer, device, dtype
    )


def trainer(
    config: LMConfig, batches: list[Batch], pacer: Pacer, device: str, dtype: str, compiled: bool
) -> None:
    """The same model under transformers.Trainer, which shifts the labels itself."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Pace(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = not pacer.go_on()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pacer.position += 1

    rows = [
        {"input_ids": ids, "labels": ids.where(kept != IGNORED, IGNORED)}
        for batch in batches
        for ids, kept in zip(batch.inputs, batch.targets, strict=True)
    ]
    model = peer(config, device)
    count(model, config, pacer, batches)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=len(batches[0].inputs),
            max_steps=10**6,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=dtype == "bfloat16",
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=device != "cpu",
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[Pace()]).train()


def litgpt(
    config: LMConfig, batches: list[Batch], pacer: Pacer, device: str, dtype: str, compiled: bool
) -> None:
    """litgpt's GPT of the same shape in the same plain loop; its head is not tied."""
    from litgpt import GPT, Config

    model = GPT(
        Config(
            block_size=config.max_seq_len,
            padded_vocab_size=config.vocab_size,
            vocab_size=config.vocab_size,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_query_groups=config.n_kv_heads,
            n_embd=config.dim,
            head_size=config.head_dim,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=config.hidden_dim,
        )
    )
    model.lm_head.weight = model.transformer.wte.weight
    model.to(device).train()
    count(model, config, pacer, batches)
    plain_loop(model, model, pacer, device, dtype)


if __name__ == "__main__":
    main()
