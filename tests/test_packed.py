"""Packed layers give the numbers of the usual ones."""

import argparse
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from model import checkpoint, packed
from model.checkpoint import load_for_inference, save_weights
from model.flags import training_parser, weights_flags
from model.model import MiniMindForCausalLM
from model.packed import PackedLinear, can_pack, pack
from model.runtime import inference_dtype
from model.tokenizer import Tokenizer

Build = Callable[..., MiniMindForCausalLM]
needs_kernels = pytest.mark.skipif(not can_pack(torch.float32), reason="torch without oneDNN")


@needs_kernels
@pytest.mark.parametrize("fields", [{}, {"use_moe": True}])
@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (3, 17), (1, 60)])
def test_a_packed_model_gives_the_logits_it_gave(build: Build, fields: dict, shape: tuple) -> None:
    model = build(**fields)
    tokens = torch.randint(100, shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(tokens).logits
        assert pack(model)
        after = model(tokens).logits
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"use_moe": True}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_weights_of_fewer_bits_say_nearly_the_same(
    build: Build, fields: dict, dtype: torch.dtype
) -> None:
    if not can_pack(dtype):
        pytest.skip("no such kernels here")
    model = build(**fields)
    tokens = torch.randint(100, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(tokens).logits
        assert pack(model, dtype)
        after = model(tokens).logits
    assert after.dtype == torch.float32
    error = (after - before).norm(dim=-1) / before.norm(dim=-1)
    # the steps of either, summed over random weights of two layers; a router may decide otherwise
    # for a few of the tokens
    assert 1e-4 < float(error.median()) < {torch.bfloat16: 0.02, torch.int8: 0.06}[dtype]


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no bf16 kernels here")
def test_a_model_in_bf16_is_packed_in_bf16(build: Build) -> None:
    model, other = build().bfloat16(), build().bfloat16().float()
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert pack(model) and pack(other, torch.bfloat16)
        assert torch.equal(model(tokens).logits, other(tokens).logits)


@pytest.mark.skipif(not can_pack(torch.int8), reason="no int8 kernels here")
def test_int8_rounds_weights_by_row_and_inputs_by_token() -> None:
    """By hand, in numbers that both roundings keep: rows and tokens of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (32, 64), generator=generator).float()
    weight[:, 0] = 127  # so that a row's step is 1
    weight *= torch.logspace(-3, 3, 32)[:, None]
    linear = nn.Linear(64, 32, bias=False)
    linear.weight.data = weight
    x = torch.randint(-1, 2, (5, 64), generator=generator).float()
    x *= torch.logspace(-3, 3, 5)[:, None]
    layer = PackedLinear(linear, dtype=torch.int8)
    for rows in (x, x[:1], x[4:], x[None]):
        found, expected = layer(rows), rows.double() @ weight.double().T
        # the range of a token has 255 steps: half of one for its value, half for where zero is
        error = (found - expected).abs() / (rows.abs().amax(-1, True) * weight.abs().sum(dim=1))
        assert float(error.max()) < 1 / 127


@needs_kernels
def test_layers_with_one_input_are_one_product(build: Build) -> None:
    """Asked in any order, for other inputs between, by several threads."""
    attention = build().layers[0].attention
    x, y = torch.randn(2, 3, 64).unbind()
    expected = {n: [getattr(attention, n)(t) for t in (x, y)] for n in ("wq", "wk", "wv")}
    packed.join(attention, ("wq", "wk", "wv"), torch.float32)
    assert attention.wq.joined is attention.wv.joined

    def ask(order: str) -> None:
        for _ in range(20):
            for i, n in enumerate(order):
                for t, given in ((0, x), (1, y)) if i % 2 else ((1, y), (0, x)):
                    found = getattr(attention, f"w{n}")(given)
                    torch.testing.assert_close(found, expected[f"w{n}"][t], atol=1e-5, rtol=1e-5)

    with torch.inference_mode(), ThreadPoolExecutor(3) as pool:
        list(pool.map(ask, ("qkv", "vkq", "kqv")))
    assert attention.wq.held[0][0] is None or attention.wq.held[0][0] in (x, y)


@needs_kernels
def test_a_norms_weight_goes_into_the_layers_behind_it(build: Build) -> None:
    norm, small = build(norm_eps=0.1).layers[0].ffn_norm, torch.randn(4, 64) * 0.1
    expected = norm(small)
    torch.testing.assert_close(packed.UnitNorm(norm)(small) * packed.gain_of(norm), expected)


@needs_kernels
def test_no_tokens_are_no_result(build: Build) -> None:
    """An expert without tokens."""
    layer = PackedLinear(build().layers[0].attention.wk)
    assert layer(torch.zeros(0, 64)).shape == (0, 32)


def test_the_kernels_are_where_torch_says_so() -> None:
    assert can_pack(torch.float32) or not torch.backends.mkldnn.is_available()


@needs_kernels
def test_the_usual_weights_are_let_go(build: Build) -> None:
    model = build()
    wq = weakref.ref(model.layers[0].attention.wq.weight)
    pack(model)
    gc.collect()
    assert wq() is None and model.tok_embeddings.weight.numel() == 100 * 64


@needs_kernels
def test_packed_weights_are_not_saved_by_halves(build: Build, tmp_path: Path) -> None:
    model = build(vocab_size=6400)
    pack(model)
    with pytest.raises(ValueError, match="load it with packed=False"):
        save_weights(model, tmp_path / "own.pth", Tokenizer())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_stay_as_they_are(build: Build, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    assert not pack(model)
    assert isinstance(model.output, nn.Linear)


def test_without_kernels_the_usual_layers_stay(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "can_pack", lambda dtype: False)
    model = build()
    assert not pack(model) and isinstance(model.output, nn.Linear)


@needs_kernels
def test_what_is_loaded_to_answer_is_packed(build: Build, tmp_path: Path) -> None:
    model, tokenizer = build(vocab_size=6400), Tokenizer()
    save_weights(model, tmp_path / "own.pth", tokenizer)
    parser = argparse.ArgumentParser()
    weights_flags(parser)
    args = parser.parse_args(["--weights", str(tmp_path / "own.pth"), "--device", "cpu"])
    answering, readable = load_for_inference(args), load_for_inference(args, packed=False)
    assert isinstance(answering.model.output, PackedLinear)
    assert isinstance(readable.model.output, nn.Linear)
    assert answering.n_params == readable.n_params == model.num_parameters()


def test_int8_is_for_answering_on_a_cpu(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights(build(vocab_size=6400), tmp_path / "own.pth", Tokenizer())
    parser = argparse.ArgumentParser()
    weights_flags(parser)
    place = ["--weights", str(tmp_path / "own.pth"), "--device", "cpu", "--dtype", "int8"]
    args = parser.parse_args(place)
    if can_pack(torch.int8):
        assert isinstance(load_for_inference(args).model.output, PackedLinear)
    with pytest.raises(ValueError, match="--dtype int8: it only answers; use bfloat16 or float32"):
        load_for_inference(args, packed=False)
    monkeypatch.setattr(checkpoint, "can_pack", lambda dtype: False)
    with pytest.raises(ValueError, match="int8: this processor's torch has no such kernels"):
        load_for_inference(args)
    with pytest.raises(ValueError, match="--dtype int8 is for CPUs, this is cuda: use bfloat16"):
        inference_dtype("int8", torch.device("cuda"))
    with pytest.raises(SystemExit):
        training_parser("", data_path="", v1={}).parse_args(["--dtype", "int8"])
