"""What benchmarks/decode.py compares, each in a process of its own: decoders.py KIND WEIGHTS …

Answers each line of its input, {"batch": …, "context": …, "n_new": …, "n_threads": …}, with a line:
the seconds that ``n_new`` more tokens took, after prompts of ``context`` tokens and the token that
comes out of the prompt itself. Greedy; no answer ends before. All rows of a batch have the same
prompt. llama.cpp's is run by another Python, so nothing is imported that it need not have.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Job = dict[str, int]
Decoder = Callable[[Job, list[int]], float]


def ours(weights: str, dtype: str, longest: int) -> Decoder:
    """The engine, which finds out itself how many threads are best, up to those of the job."""
    import torch

    from model.checkpoint import load_for_inference
    from model.flags import weights_flags
    from model.generation import Engine
    from model.sampling import SamplingOptions

    parser = argparse.ArgumentParser()
    weights_flags(parser)
    flags = ["--weights", weights, "--device", "cpu", "--dtype", dtype]
    model = load_for_inference(parser.parse_args(flags)).model
    model.config.eos_token_id = -1  # none: no answer ends by itself

    def decode(job: Job, prompt: list[int]) -> float:
        torch.set_num_threads(job["n_threads"])
        engine = Engine(model, None, max_batch=job["batch"], prefill_chunk=256)
        options = SamplingOptions(temperature=0, max_new_tokens=job["n_new"] + 1)
        answers = [engine.submit(prompt, options) for _ in range(job["batch"])]
        while any(not answer.tokens for answer in answers):
            engine.step()
        n_before = sum(len(answer.tokens) - 1 for answer in answers)
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        elapsed_s = time.perf_counter() - start
        n_new = job["batch"] * job["n_new"]
        return elapsed_s * n_new / (n_new - n_before)

    return decode


def transformers_generate(folder: str, dtype: str, longest: int) -> Decoder:
    """``generate`` of ``LlamaForCausalLM``, whose prompt's time is told apart."""
    import torch
    from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None

    class Clock(StoppingCriteria):
        """Is asked after each token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

    def decode(job: Job, prompt: list[int]) -> float:
        torch.set_num_threads(job["n_threads"])
        clock = Clock()
        model.generate(
            torch.tensor([prompt] * job["batch"]),
            attention_mask=torch.ones(job["batch"], len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=job["n_new"] + 1,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return clock.times[-1] - clock.times[0]

    return decode


def llama_cpp(path: str, dtype: str, longest: int) -> Decoder:
    """llama.cpp by its own functions, one token after another; a batch of 1."""
    import llama_cpp as lib
    import numpy as np

    llama = lib.Llama(path, n_ctx=longest, n_batch=512, logits_all=False, verbose=False)
    ctx, n_vocab = llama.ctx, llama.n_vocab()

    def decode(job: Job, prompt: list[int]) -> float:
        lib.llama_set_n_threads(ctx, job["n_threads"], job["n_threads"])
        llama.reset()
        lib.llama_memory_clear(lib.llama_get_memory(ctx), True)
        llama.eval(prompt)
        start = time.perf_counter()
        for _ in range(job["n_new"]):
            logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, -1), (n_vocab,))
            token = (lib.llama_token * 1)(int(logits.argmax()))
            if lib.llama_decode(ctx, lib.llama_batch_get_one(token, 1)):
                raise RuntimeError("llama_decode failed")
        return time.perf_counter() - start

    return decode


KINDS = {"ours": ours, "transformers": transformers_generate, "llama.cpp": llama_cpp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("weights")
    parser.add_argument("dtype")
    parser.add_argument("longest", type=int, help="tokens of prompt and answer")
    args = parser.parse_args()
    decode = KINDS[args.kind](args.weights, args.dtype, args.longest)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        # any ids will do: which ones is nothing to a product
        prompt = [1, *(3 + 7 * i % 6000 for i in range(job["context"] - 1))]
        print(json.dumps({"seconds": decode(job, prompt)}), flush=True)


if __name__ == "__main__":
    main()
