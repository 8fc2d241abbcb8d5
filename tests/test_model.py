"""Laws of the model: time, caches, masks, generation, files, precision, initial weights."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM, build_mask

Build = Callable[..., MiniMindForCausalLM]
V = 100
CLOSE = dict(rtol=0, atol=1e-5)  # the same sums in another order, fp32

either_attention = pytest.mark.parametrize("flash_attn", (True, False), ids=("fused", "plain"))
either_model = pytest.mark.parametrize("use_moe", (False, True), ids=("dense", "moe"))


def tokens(B: int = 2, T: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return ids (B, T) with padding (id 0) on the left, and their mask."""
    ids = tokens(len(lengths), max(lengths))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


# Time


@either_attention
@either_model
def test_future_does_not_change_the_past(build: Build, flash_attn: bool, use_moe: bool) -> None:
    model, ids = build(flash_attn=flash_attn, use_moe=use_moe), tokens()
    edited = ids.clone()
    edited[:, 5] = (edited[:, 5] + 1) % V
    was, now = model(ids).logits, model(edited).logits
    torch.testing.assert_close(now[:, :5], was[:, :5], **CLOSE)
    assert ((now[:, 5:] - was[:, 5:]).abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("rope_scaling", (None, "linear:4", "yarn:4"))
def test_only_distances_count(build: Build, rope_scaling: str | None) -> None:
    model, ids = build(rope_scaling=rope_scaling), tokens()
    here = model(ids).logits
    there = model(ids, position_ids=torch.arange(12)[None] + 200).logits
    # sines of angles near 200 keep five digits fewer than those near 0
    torch.testing.assert_close(there, here, rtol=0, atol=1e-4)
    spread = model(ids, position_ids=torch.arange(12)[None] * 2).logits
    assert (spread[:, 1:] - here[:, 1:]).abs().amax(dim=-1).min() > 1e-3


# Caches


@pytest.mark.parametrize("steps", ((1,) * 12, (7, 1, 1, 3), (4, 8), (12,)), ids=str)
@pytest.mark.parametrize("kind", ("dynamic", "static", "minimal"))
@either_attention
def test_cached_decoding_is_the_full_forward(
    build: Build, steps: tuple[int, ...], kind: str, flash_attn: bool
) -> None:
    model, ids = build(flash_attn=flash_attn), tokens()
    expected = model(ids).logits
    cache = {
        "dynamic": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
        "minimal": MinimalCache,
    }[kind]()
    pieces = [model(part, past_key_values=cache).logits for part in ids.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **CLOSE)


class MinimalCache:
    """The least that a cache may be: what the engine of this project hands in."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, k: Tensor, v: Tensor, layer_id: int) -> tuple[Tensor, Tensor]:
        if layer_id in self.layers:
            past_k, past_v = self.layers[layer_id]
            k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        self.layers[layer_id] = (k, v)
        return k, v

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0


@pytest.mark.parametrize("fields", ({"use_moe": True}, {"rope_scaling": "yarn:4"}), ids=str)
def test_cached_decoding_of_moe_and_scaled_positions(build: Build, fields: dict[str, Any]) -> None:
    model, ids = build(**fields), tokens()
    cache = DynamicCache()
    pieces = [model(part, past_key_values=cache).logits for part in ids.split((5, 1, 6), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, **CLOSE)


@pytest.mark.parametrize("static", (False, True), ids=("dynamic", "static"))
@either_attention
def test_cached_decoding_of_a_left_padded_batch(
    build: Build, static: bool, flash_attn: bool
) -> None:
    model = build(flash_attn=flash_attn)
    ids, mask = left_padded((5, 12))
    expected = model(ids, attention_mask=mask).logits
    cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache()
    pieces, done = [], 0
    for part in ids.split((8, 1, 3), dim=1):
        done += part.shape[1]
        out = model(part, attention_mask=mask[:, :done], past_key_values=cache)
        pieces.append(out.logits)
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[seen], expected[seen], **CLOSE)


def test_the_cache_belongs_to_the_caller(build: Build) -> None:
    model, first, second = build(), tokens(seed=1), tokens(seed=2)
    alone = model(second).logits
    one, other = DynamicCache(), DynamicCache()
    for a, b in zip(first.split(4, dim=1), second.split(4, dim=1), strict=True):
        model(a, past_key_values=one)
        last = model(b, past_key_values=other).logits
    torch.testing.assert_close(last, alone[:, 8:], **CLOSE)
    torch.testing.assert_close(model(second).logits, alone, rtol=0, atol=0)


def test_a_cache_is_made_when_it_is_of_use(build: Build) -> None:
    model, ids = build(), tokens()
    assert model(ids).past_key_values.get_seq_length() == 12
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None


def test_a_mask_that_does_not_cover_the_cache_is_told(build: Build) -> None:
    model, ids = build(), tokens()
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 1 columns, expected 13"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


# generate


@either_attention
@either_model
def test_a_left_padded_batch_generates_what_its_rows_do(
    build: Build, flash_attn: bool, use_moe: bool
) -> None:
    model = build(flash_attn=flash_attn, use_moe=use_moe)
    lengths = (3, 9, 1, 6)
    ids, mask = left_padded(lengths)
    options = dict(max_new_tokens=10, do_sample=False)
    batch = model.generate(ids, attention_mask=mask, **options)[:, 9:]
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, 9 - length :], **options)[:, length:]
        assert batch[row, : alone.shape[1]].tolist() == alone[0].tolist()
    assert len({tuple(answer) for answer in batch.tolist()}) == len(lengths)


def test_beams_of_a_batch_are_those_of_its_rows(build: Build) -> None:
    model = build()
    ids, mask = left_padded((3, 8))
    options = dict(max_new_tokens=8, num_beams=3, do_sample=False)
    batch = model.generate(ids, attention_mask=mask, **options)[:, 8:]
    alone = model.generate(ids[:1, 5:], **options)[:, 3:]
    assert batch[0, : alone.shape[1]].tolist() == alone[0].tolist()
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 8:]

    def log_likelihood(answer: Tensor) -> Tensor:
        whole, seen = torch.cat((ids, answer), dim=1), F.pad(mask, (0, 8), value=1)
        steps = model(whole, attention_mask=seen).logits[:, 7:-1].log_softmax(dim=-1)
        return steps.gather(2, answer[..., None]).sum()

    assert log_likelihood(batch) > log_likelihood(greedy)  # the search finds what greed does not


@pytest.mark.parametrize("how", ("assistant", "prompt lookup", "static", "uncached"))
def test_ways_to_generate_agree(build: Build, how: str) -> None:
    model, prompt = build(), tokens(1, 4).repeat(1, 3)  # repeats, so that a lookup finds something
    options: dict[str, Any] = {
        "assistant": {"assistant_model": build(seed=1, n_layers=1)},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "static": {"cache_implementation": "static"},
        "uncached": {"use_cache": False},
    }[how]
    greedy = model.generate(prompt, max_new_tokens=12, do_sample=False)
    again = model.generate(prompt, max_new_tokens=12, do_sample=False, **options)
    assert again.tolist() == greedy.tolist()


def test_a_streamer_gets_what_generate_returns(build: Build) -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ids.append(-1)

    model, streamer = build(), Collector()
    out = model.generate(tokens(1), max_new_tokens=8, do_sample=False, streamer=streamer)
    assert streamer.ids == [*out[0].tolist(), -1]


def test_generate_stops_at_v1s_end_token(build: Build) -> None:
    model = build()
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    likely = model(tokens(1)).logits[0, -1].argmax().item()
    with torch.no_grad():  # exchange the end token and what would have come
        model.output.weight[[2, likely]] = model.output.weight[[likely, 2]]
    prompt = tokens(1)
    prompt[prompt == likely] = 2
    assert model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 12:].tolist() == [2]


# Masks


@either_attention
@either_model
def test_what_is_masked_changes_nothing(build: Build, flash_attn: bool, use_moe: bool) -> None:
    model, ids = build(flash_attn=flash_attn, use_moe=use_moe), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 6:8] = 0
    edited = torch.where(mask.bool(), ids, (ids + 7) % V)
    was, now = (model(x, attention_mask=mask).logits[mask.bool()] for x in (ids, edited))
    torch.testing.assert_close(now, was, **CLOSE)
    unmasked = model(edited).logits[mask.bool()]
    assert (unmasked - now).abs().max() > 1e-2


def test_left_padding_is_as_if_it_were_not_there(build: Build) -> None:
    model = build()
    ids, mask = left_padded((5, 12))
    padded = model(ids, attention_mask=mask).logits[0, 7:]
    torch.testing.assert_close(padded, model(ids[:1, 7:]).logits[0], **CLOSE)


@either_attention
@either_model
def test_a_row_of_padding_alone_spoils_nothing(
    build: Build, flash_attn: bool, use_moe: bool
) -> None:
    model, ids = build(flash_attn=flash_attn, use_moe=use_moe).train(), tokens()
    mask = torch.ones_like(ids)
    mask[1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    assert out.logits.isfinite().all()
    out.loss.backward()
    both = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids[:1], labels=ids[:1]).loss.backward()
    torch.testing.assert_close(both, {n: p.grad for n, p in model.named_parameters()}, **CLOSE)


def test_every_query_sees_a_key() -> None:
    # some kernels give NaN to a query without any, and a padded query's value spreads to the next
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 1]])
    seen = build_mask(mask, 0, 4, torch.empty(3, 4, 64))(6)  # six places of a static cache
    assert seen.any(dim=-1).all()


def packed_mask(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return a block-causal mask (1, 1, T, T) and positions (1, T) that restart."""
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (segments[:, None] == segments[None]).tril()
    return mask[None, None], torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("kind", (torch.bool, torch.long, torch.float), ids=str)
@either_attention
@either_model
def test_packed_conversations_are_as_if_alone(
    build: Build, kind: torch.dtype, flash_attn: bool, use_moe: bool
) -> None:
    model, ids = build(flash_attn=flash_attn, use_moe=use_moe), tokens(1)
    lengths = (5, 4, 3)
    mask, positions = packed_mask(lengths)
    mask = (
        torch.zeros(mask.shape).masked_fill(~mask, -1e9) if kind == torch.float else mask.to(kind)
    )
    packed = model(ids, attention_mask=mask, position_ids=positions).logits
    alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, **CLOSE)
    from_positions = model(ids, position_ids=positions).logits  # as transformers' models do
    torch.testing.assert_close(from_positions, alone, **CLOSE)


@either_attention
def test_a_padded_tail_of_a_packed_row_gives_finite_gradients(
    build: Build, flash_attn: bool
) -> None:
    model, ids = build(flash_attn=flash_attn), tokens(1)
    mask, positions = packed_mask((7, 5))
    mask[..., 7:, :] = False  # the tail sees nothing, not even itself
    labels = ids.clone()
    labels[:, 7:] = -100
    model(ids, attention_mask=mask, position_ids=positions, labels=labels).loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids[:, :7], labels=ids[:, :7]).loss.backward()
    torch.testing.assert_close(packed, {n: p.grad for n, p in model.named_parameters()}, **CLOSE)


# Arguments of forward


def test_inputs_embeds_in_place_of_ids(build: Build) -> None:
    model, ids = build(), tokens()
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(
        model(inputs_embeds=embeds).logits, model(ids).logits, rtol=0, atol=0
    )
    options = dict(max_new_tokens=6, do_sample=False)
    by_embeds = model.generate(inputs_embeds=embeds, **options)
    assert by_embeds.tolist() == model.generate(ids, **options)[:, 12:].tolist()
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of them"):
            model(**arguments)


def test_logits_to_keep(build: Build) -> None:
    model, ids = build(), tokens()
    logits = model(ids).logits
    for keep, expected in ((0, logits), (1, logits[:, -1:]), (5, logits[:, -5:])):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected, **CLOSE)
    places = torch.tensor([2, 3, 9])
    kept = model(ids, logits_to_keep=places).logits
    torch.testing.assert_close(kept, logits[:, places], **CLOSE)


def test_the_loss_is_the_mean_over_labels_that_are_not_ignored(build: Build) -> None:
    model, ids = build(), tokens()
    labels = ids.masked_fill(
        torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -100
    )
    log_probabilities = model(ids).logits.log_softmax(dim=-1)
    terms = [
        -log_probabilities[b, t - 1, labels[b, t]]
        for b in range(2)
        for t in range(1, 12)
        if labels[b, t] != -100
    ]
    assert 0 < len(terms) < 22
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(model(ids, labels=labels).loss, expected, **CLOSE)
    by_number = model(ids, labels=labels, num_items_in_batch=len(terms) * 4).loss  # Trainer's way
    torch.testing.assert_close(by_number, expected / 4, **CLOSE)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    assert model(ids, shift_labels=shifted).loss == model(ids, labels=labels).loss
    assert model(ids, shift_labels=None).loss is None


def test_id_0_is_a_label_like_any_other(build: Build) -> None:
    model, ids = build(), tokens()
    labels = torch.full_like(ids, -100)
    labels[:, 5] = 0  # v1 ignored it: padding, unknown token and ignored label shared the id
    expected = -model(ids).logits[:, 4].log_softmax(dim=-1)[:, 0].mean()
    torch.testing.assert_close(model(ids, labels=labels).loss, expected, **CLOSE)


def test_outputs_as_a_tuple(build: Build) -> None:
    model, ids = build(), tokens()
    out = model(ids, labels=ids)
    loss, logits, *_ = model(ids, labels=ids, return_dict=False)
    assert (loss, logits.shape) == (out.loss, (2, 12, V))
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


@pytest.mark.parametrize("how", ("argument", "config", "eager"))
def test_attention_weights_when_asked_for(build: Build, how: str) -> None:
    model, ids = build(attn_implementation="eager" if how == "eager" else None), tokens()
    if how == "config":
        model.config._attn_implementation = "eager"
        model.config.output_attentions = True
    weights = model(ids, output_attentions=None if how == "config" else True).attentions
    assert [w.shape for w in weights] == [(2, 4, 12, 12)] * 2
    for w in weights:
        torch.testing.assert_close(w.sum(dim=-1), torch.ones(2, 4, 12))
        assert not w.triu(1).any()
    assert model(ids, output_attentions=False).attentions is None


@pytest.mark.parametrize(
    ("fields", "fused"),
    (({}, True), ({"flash_attn": False}, False), ({"attn_implementation": "eager"}, False)),
    ids=str,
)
def test_the_configuration_chooses_the_kernel(
    build: Build, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], fused: bool
) -> None:
    kernel, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **kw: calls.append(1) or kernel(*a, **kw)
    )
    build(**fields)(tokens())
    assert len(calls) == (2 if fused else 0)  # one a layer


def test_the_body_and_the_head_are_the_model(build: Build) -> None:
    model, ids = build(), tokens()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    torch.testing.assert_close(head(hidden), model(ids).logits, rtol=0, atol=0)
    assert head.weight is model.get_input_embeddings().weight


# Training


@either_model
@pytest.mark.parametrize("use_reentrant", (False, True), ids=("kept graph", "reentrant"))
def test_gradient_checkpointing_changes_no_gradient(
    build: Build, use_moe: bool, use_reentrant: bool
) -> None:
    model = build(use_moe=use_moe, dropout=0.1).train()
    ids, mask = left_padded((8, 12))

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        torch.manual_seed(0)  # the same dropout
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        return loss, {name: p.grad.clone() for name, p in model.named_parameters()}

    loss, expected = gradients()
    passes = []
    model.layers[0].attention.wq.register_forward_hook(lambda *_: passes.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    again, got = gradients()
    assert len(passes) == 2  # forward, and once more for backward: it did checkpoint
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_dropout_is_active_in_training_alone(build: Build) -> None:
    model, ids = build(dropout=0.5), tokens()
    torch.testing.assert_close(model(ids).logits, build()(ids).logits, rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@either_attention
def test_dropout_falls_on_attention_too(build: Build, flash_attn: bool) -> None:
    model, ids = build(dropout=0.5, flash_attn=flash_attn).train(), tokens()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


@either_model
def test_initial_weights(use_moe: bool) -> None:
    torch.manual_seed(0)
    config = LMConfig(dim=128, n_layers=4, vocab_size=1000, use_moe=use_moe)
    model = MiniMindForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
            continue
        residual = name.endswith(("wo.weight", "w2.weight"))  # what is added to the stream
        expected = 0.02 / (2 * 4) ** 0.5 if residual else 0.02
        # the sample's own deviation: 512 weights of the gate are the fewest
        assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
        assert abs(parameter.mean().item()) < 0.2 * expected, name
    ids = torch.randint(0, 1000, (4, 64))
    uniform = math.log(1000)
    assert model(ids, labels=ids).loss.item() == pytest.approx(uniform, rel=0.02)


# Precision and devices


@either_attention
@either_model
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_is_near_full(
    build: Build, dtype: torch.dtype, use_moe: bool, flash_attn: bool
) -> None:
    exact, ids = build(use_moe=use_moe, flash_attn=flash_attn, norm_topk_prob=False), tokens()
    # every expert of every token, so that rounding cannot choose others
    exact.config.num_experts_per_tok = 4
    model = copy.deepcopy(exact).to(dtype).train()
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == dtype
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in model.parameters())
    expected = exact(ids).logits
    step = torch.finfo(dtype).eps * expected.abs().max()
    assert (out.logits - expected).abs().max() < 8 * step  # some roundings of the largest value


@either_model
def test_autocast_trains_fp32_weights(build: Build, use_moe: bool) -> None:
    model, ids = build(use_moe=use_moe, norm_topk_prob=False).train(), tokens()
    model.config.num_experts_per_tok = 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float for p in model.parameters())
    exact = model(ids, labels=ids)
    assert abs(out.loss - exact.loss) < 0.02


@pytest.mark.parametrize("rope_scaling", (None, "linear:4", "yarn:4"))
def test_positions_stay_exact_in_any_dtype(build: Build, rope_scaling: str | None) -> None:
    model, places = build(rope_scaling=rope_scaling), torch.tensor([[0, 1, 511, 100_000]])
    expected = model.rotary(places)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for turned, exact in zip(model.to(dtype).rotary(places), expected, strict=True):
            torch.testing.assert_close(turned, exact, rtol=0, atol=0)


def test_a_model_made_without_memory_gets_its_positions(build: Build) -> None:
    made = build(rope_scaling="yarn:4")
    with torch.device("meta"):
        model = MiniMindForCausalLM(made.config)
    model.to_empty(device="cpu").load_state_dict(made.state_dict())
    ids = tokens()
    torch.testing.assert_close(model.eval()(ids).logits, made(ids).logits, rtol=0, atol=0)


# Files


@either_model
@pytest.mark.parametrize("rope_scaling", (None, "yarn:4"))
def test_a_saved_model_is_the_same_again(
    build: Build, tmp_path: Path, use_moe: bool, rope_scaling: str | None
) -> None:
    model, ids = build(use_moe=use_moe, rope_scaling=rope_scaling, rope_theta=5e3), tokens()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert stored["architectures"] == ["MiniMindForCausalLM"]
    again, report = MiniMindForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert again.output.weight is again.tok_embeddings.weight
    assert not again.training
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    fields = {k: v for k, v in model.config.to_dict().items() if not k.startswith(("_", "dtype"))}
    assert {name: again.config.to_dict()[name] for name in fields} == fields
    assert list(again.state_dict()) == list(model.state_dict())


def test_a_saved_model_loads_in_bf16_with_exact_positions(build: Build, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    again = MiniMindForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.rotary.inv_freq, model.rotary.inv_freq)


def test_a_saved_model_loads_with_a_longer_context(build: Build, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    longer = dict(max_seq_len=256, rope_scaling="linear:4")
    model = MiniMindForCausalLM.from_pretrained(tmp_path, **longer)
    ids = tokens()
    torch.testing.assert_close(model(ids).logits, build(**longer)(ids).logits, rtol=0, atol=0)


def test_more_tokens_keep_the_head_tied(build: Build) -> None:
    model, ids = build(), tokens()
    before = model(ids).logits
    model.resize_token_embeddings(V + 10, mean_resizing=False)
    assert model.output.weight is model.tok_embeddings.weight
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits[..., :V], before, **CLOSE)
    assert out.loss.isfinite() and model.config.vocab_size == V + 10


# With what others build on such a model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("use_moe", "backend"),
    ((False, "inductor"), (True, "aot_eager")),  # what is traced; the C++ compiler once suffices
)
def test_a_compiled_model_is_the_model(build: Build, use_moe: bool, backend: str) -> None:
    model, ids = build(use_moe=use_moe, n_layers=1).train(), tokens()
    expected = model(ids, labels=ids)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    got = torch.compile(model, backend=backend)(ids, labels=ids)
    got.loss.backward()
    torch.testing.assert_close(got.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(got.loss, expected.loss, **CLOSE)
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, gradients, **CLOSE)
