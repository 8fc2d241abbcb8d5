"""What several test files share: a tiny model whose every part can be seen in its logits."""

import os
from collections.abc import Callable
from typing import Any

import pytest

# Before torch is imported, and for the scripts that tests start: on models of this size threads
# only wait for one another (50 times slower where other work keeps the cores busy).
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=100, max_seq_len=64)


@pytest.fixture
def build() -> Callable[..., Any]:
    """Return a function that makes a tiny model in eval mode; keywords are fields of LMConfig."""
    import torch

    from model.LMConfig import LMConfig
    from model.model import MiniMindForCausalLM

    def make(seed: int = 0, **fields: Any) -> MiniMindForCausalLM:
        model = MiniMindForCausalLM(LMConfig(**(TINY | fields)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                # unlike the initial weights, under which attention and routing are nearly even
                parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.125 * noise)
        return model.eval()

    return make
