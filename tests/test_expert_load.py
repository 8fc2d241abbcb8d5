"""How evenly routers use their experts, as a run records it."""

from collections.abc import Callable

import pytest
import torch
from tiny_runs import pretrain, records, write_corpus

from model.expert_load import ExpertLoad, spread
from model.model import MiniMindForCausalLM

Build = Callable[..., MiniMindForCausalLM]


def test_tokens_are_counted_where_the_router_sends_them(build: Build) -> None:
    """By the router's own scores; padding does not count, evaluation neither."""
    model = build(use_moe=True, n_routed_experts=4, num_experts_per_tok=2).train()
    load = ExpertLoad(model, torch.device("cpu"))
    tokens = torch.randint(100, (2, 16))
    token_mask = torch.ones(2, 16, dtype=torch.bool)
    token_mask[1, 10:] = False
    out = model(input_ids=tokens, token_mask=token_mask, output_router_logits=True)
    expected = [
        [
            int((logits.view(2, 16, 4).topk(2).indices == expert)[token_mask].sum())
            for expert in range(4)
        ]
        for logits in out.router_logits
    ]
    model.eval()(input_ids=tokens)
    counts = load.take()
    assert counts == [float(n) for layer in expected for n in layer]
    assert sum(counts) == 2 * 2 * 26, "two layers, two experts a token"
    assert load.take() == [0.0] * 8, "taken once"


def test_one_is_an_even_share() -> None:
    assert spread([5.0] * 8, n_layers=2) == {"expert_load_min": 1.0, "expert_load_max": 1.0}
    assert spread([4, 4, 4, 4, 0, 0, 0, 16], n_layers=2) == {
        "expert_load_min": 0.0,
        "expert_load_max": 4.0,
    }
    assert spread([], n_layers=2) == {}, "a dense model has none"


@pytest.mark.slow
def test_a_run_records_the_load_and_a_dense_one_does_not(tmp_path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    flags = "--max_steps 8 --log_interval 4"
    assert pretrain(corpus, tmp_path / "out", flags, "--use_moe") == 0
    found = [r for r in records(tmp_path / "out", "pretrain_32_moe") if "lr" in r]
    assert len(found) == 2
    for record in found:
        assert 0 <= record["expert_load_min"] <= 1 <= record["expert_load_max"] <= 2
    assert pretrain(corpus, tmp_path / "out", flags) == 0
    assert "expert_load_min" not in records(tmp_path / "out")[0]
