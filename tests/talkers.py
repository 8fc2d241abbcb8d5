"""Tiny models that say something: what the tests of decoding and serving share."""

from collections.abc import Sequence

import torch

from model.generation import generate
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.sampling import SamplingOptions

PROMPT = [1, 40, 41, 42, 43]
GREEDY = SamplingOptions(temperature=0, max_new_tokens=24)
V = 300


def tiny_model(seed: int = 0, **fields: object) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": V}
    model = MiniMindForCausalLM(LMConfig(**{**shape, "max_seq_len": 64, **fields})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # at the usual 0.02 every answer repeats its first token
            parameter.data.mul_(6)
    return model


def ids_of(
    model: MiniMindForCausalLM, options: SamplingOptions, prompt: Sequence[int] = PROMPT
) -> list[int]:
    return [token.id for token in generate(model, prompt, options)]
