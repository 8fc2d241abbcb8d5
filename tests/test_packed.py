"""Packed layers give the numbers of the usual ones."""

import argparse
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from model import packed
from model.checkpoint import load_for_inference, save_weights
from model.flags import weights_flags
from model.model import MiniMindForCausalLM
from model.packed import PackedLinear, can_pack, pack
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


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no bf16 kernels here")
def test_bf16_is_packed_too(build: Build) -> None:
    model = build().bfloat16()
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        before = model(tokens).logits.float()
        assert pack(model)
        after = model(tokens).logits.float()
    # bf16 has 8 bits: a sum in another order may end in the next number
    torch.testing.assert_close(after, before, atol=0.03 * float(before.abs().max()), rtol=0)


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
