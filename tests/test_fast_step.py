"""The short way to a token says what the model's own forward says."""

from collections.abc import Callable

import pytest
import torch
from talkers import GREEDY, PROMPT, ids_of, tiny_model
from torch import Tensor

from model import generation
from model.fast_step import fast_step
from model.generation import Engine
from model.model import MiniMindForCausalLM
from model.packed import can_pack, pack
from model.sampling import SamplingOptions
from model.slot_cache import PromptView, SlotCache

Build = Callable[..., MiniMindForCausalLM]
pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="torch without the kernels")
KINDS = [
    {},
    {"n_kv_heads": 4},
    {"n_kv_heads": 1},
    {"dim": 96, "n_heads": 2, "n_kv_heads": 1},  # odd widths
    {"rope_scaling": "linear:2"},
    {"rope_scaling": "yarn:4"},
]


def filled(model: MiniMindForCausalLM, lengths: list[int]) -> tuple[SlotCache, list[Tensor]]:
    """Return a cache whose slots hold prompts of these lengths, and the prompts."""
    cache = SlotCache(len(lengths) + 1, 40)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 100, (1, n), generator=generator) for n in lengths]
    for slot, prompt in enumerate(prompts):
        model(prompt, past_key_values=PromptView(cache, slot), use_cache=True)
        cache.ids[slot] += prompt[0].tolist()
    return cache, prompts


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("lengths", [[7], [7, 1, 12], [5] * 9])
@torch.inference_mode()
def test_rows_have_the_logits_of_the_whole_forward(
    build: Build, fields: dict, lengths: list[int]
) -> None:
    model = build(**fields)
    new = torch.randint(3, 100, (2, len(lengths)), generator=torch.Generator().manual_seed(1))
    plain = build(**fields)
    pack(model)
    cache, prompts = filled(model, lengths)
    step = fast_step(model)
    for n_done, ids in enumerate(new, 1):
        found = step(cache, ids.tolist())
        for slot, prompt in enumerate(prompts):
            cache.ids[slot].append(int(ids[slot]))
            whole = torch.cat((prompt[0], new[:n_done, slot]))[None]
            expected = plain(whole).logits[0, -1]
            scale = float(expected.abs().max())
            torch.testing.assert_close(found[slot], expected, atol=1e-5 * scale, rtol=0)


@torch.inference_mode()
def test_a_slot_in_the_middle_is_served_alone(build: Build) -> None:
    model = build()
    pack(model)
    cache, _ = filled(model, [4, 9, 6])
    step = fast_step(model)
    together = step(cache, [20, 21, 22])[1:2]
    others = [tensor[[0, 2]].clone() for tensor in cache._layers[1]]
    torch.testing.assert_close(step(cache, [21], 1), together, atol=1e-5, rtol=1e-5)
    assert all(map(torch.equal, others, (tensor[[0, 2]] for tensor in cache._layers[1])))


@torch.inference_mode()
def test_what_other_slots_hold_is_not_seen(build: Build) -> None:
    model = build()
    pack(model)
    cache, _ = filled(model, [3, 20])
    step = fast_step(model)
    before = step(cache, [20, 21])[0]
    for tensor in cache._layers[0] + cache._layers[1]:
        tensor[0, :, 4:] = 1000.0  # after its end
        tensor[1] += 1.0
    assert torch.equal(step(cache, [20, 21])[0], before)


@pytest.mark.parametrize("fields", [{}, {"rope_scaling": "yarn:4"}])
def test_greedy_equals_transformers_generate(fields: dict) -> None:
    model = tiny_model(1, **fields)
    theirs = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=24)
    assert pack(model) and fast_step(model) is not None
    assert ids_of(model, GREEDY) == theirs[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_deterministic_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip("no such kernels here")
    model = tiny_model(1)
    pack(model, dtype)

    def answers(n: int) -> list[list]:
        engine = Engine(model, None, max_batch=3, deterministic=True, prefill_chunk=5)
        options = [SamplingOptions(seed=i, max_new_tokens=12 + i, logprobs=0) for i in range(5)]
        asked = [engine.submit([1, 40 + i, 50, 60][: 2 + i], options[i]) for i in range(n)]
        while engine.has_work:
            engine.step()
        return [answer.tokens for answer in asked]

    assert answers(1) == answers(5)[:1]


def test_the_engine_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a step would be the model's forward, which is slower and says the same."""
    model = tiny_model(2)
    expected = ids_of(model, GREEDY)
    pack(model)
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    assert ids_of(model, GREEDY) == expected
    assert len(calls) == 1  # the prompt
    monkeypatch.setattr(generation, "fast_step", lambda model: None)
    assert ids_of(model, GREEDY) == expected
    assert len(calls) == 1 + len(expected) > 3


def test_a_prompt_computed_token_by_token() -> None:
    model = tiny_model(3)
    expected = ids_of(model, GREEDY)
    pack(model)
    engine = Engine(model, None, prefill_chunk=1)
    (answer,) = engine.answer_all([PROMPT], GREEDY)
    assert [token.id for token in answer.tokens] == expected


def test_models_that_have_no_short_way(build: Build) -> None:
    assert fast_step(build()) is None  # not packed
    mixture = build(use_moe=True)
    pack(mixture)
    assert fast_step(mixture) is None
