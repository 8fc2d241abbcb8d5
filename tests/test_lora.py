"""Adapters: against W + s B A by hand, and against peft in both directions."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_losses import random_batch
from tiny_runs import full_disk

from model.lora import (
    CONFIG_FILE,
    TARGETS,
    WEIGHTS_FILE,
    LoRAConfig,
    adapters,
    add_adapter,
    describe,
    freeze_in,
    has_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from model.losses import language_model_loss
from model.model import MiniMindForCausalLM

Build = Callable[..., MiniMindForCausalLM]
TOKENS = torch.arange(24).view(2, 12) % 100


SMALL = LoRAConfig(rank=4, alpha=8.0)


def adapted(build: Build, config: LoRAConfig = SMALL, **fields) -> MiniMindForCausalLM:
    """Return a model whose adapter has something to say, as after training."""
    model = build(**fields)
    add_adapter(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("use_moe", (False, True))
def test_a_new_adapter_changes_nothing(build: Build, use_moe: bool) -> None:
    model = build(use_moe=use_moe)
    before = logits(model)
    add_adapter(model, LoRAConfig())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("use_moe", (False, True))
def test_an_adapter_is_w_plus_s_b_a(build: Build, use_moe: bool) -> None:
    model = adapted(build, LoRAConfig(rank=4, alpha=6.0), use_moe=use_moe)
    state = model.state_dict()
    plain = build(use_moe=use_moe)
    by_hand = plain.state_dict()
    before = logits(plain)
    for name, _ in adapters(model):
        a, b = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        assert a.shape[0] == b.shape[1] == 4
        by_hand[f"{name}.weight"] += 6.0 / 4 * (b @ a)
    plain.load_state_dict(by_hand)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)
    assert (logits(plain) - before).abs().max() > 0.1


@pytest.mark.parametrize("use_moe", (False, True))
def test_merging_keeps_the_logits_and_leaves_a_plain_model(build: Build, use_moe: bool) -> None:
    model = adapted(build, use_moe=use_moe)
    before = logits(model)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert not has_adapter(model)
    assert model.state_dict().keys() == build(use_moe=use_moe).state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("use_moe", (False, True))
def test_only_the_adapter_learns_and_all_of_it(build: Build, use_moe: bool) -> None:
    """Every trained parameter gets a gradient, or ranks would wait for one another for ever."""
    model = adapted(build, use_moe=use_moe).train()
    language_model_loss(model, random_batch(0)).loss.backward()
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_" in name
        assert parameter.requires_grad == is_adapter
        assert (parameter.grad is not None) == is_adapter
    n_targets = sum(isinstance(m, torch.nn.Linear) for m in model.modules()) - 1
    assert len(list(adapters(model))) == n_targets  # all but the head


def test_the_head_and_the_embedding_are_never_adapted(build: Build) -> None:
    model = adapted(build)
    assert model.output.weight is model.tok_embeddings.weight
    with pytest.raises(ValueError, match="'output'.*use some of wq wk wv wo w1"):
        add_adapter(build(), LoRAConfig(targets=("wq", "output")))
    with pytest.raises(ValueError, match="'q_proj'"):
        add_adapter(build(), LoRAConfig(targets=("q_proj",)))


def test_only_the_named_layers_are_adapted(build: Build) -> None:
    model = build()
    add_adapter(model, LoRAConfig(targets=("wq", "w2")))
    names = {name.rsplit(".", 1)[1] for name, _ in adapters(model)}
    assert names == {"wq", "w2"}


def test_the_trained_share_is_told(build: Build) -> None:
    model = build()
    n_base = sum(p.numel() for p in model.parameters())
    add_adapter(model, LoRAConfig(rank=2, targets=("wq", "wk")))
    n_new = 2 * 2 * (64 + 64) + 2 * 2 * (64 + 32)  # two layers, rank 2; kv heads are half as many
    share = f"{n_new:,} of {n_base + n_new:,} parameters are trained "
    assert describe(model).startswith(share + f"({100 * n_new / (n_base + n_new):.2f} %)")


def test_the_base_is_kept_in_the_precision_asked_and_the_adapter_in_fp32(build: Build) -> None:
    model = adapted(build)
    expected = logits(model)
    freeze_in(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = language_model_loss(model.train(), random_batch(0)).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    # logits of size 3, 8 bits of mantissa through two layers
    torch.testing.assert_close(logits(model.eval()).float(), expected, rtol=0, atol=0.3)


def test_dropout_is_on_the_low_rank_path_alone_and_in_training_alone(build: Build) -> None:
    model = adapted(build, LoRAConfig(4, 8.0, dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    plain = logits(model)
    model.train()
    assert not torch.equal(logits(model), plain)
    for _, layer in adapters(model):
        torch.nn.init.zeros_(layer.lora_B)
    assert torch.equal(logits(model), logits(build()))


@pytest.mark.parametrize(
    "wrong, message",
    (
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"targets": ()}, "targets is empty"),
    ),
)
def test_a_configuration_that_cannot_be_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**wrong)


# ----------------------------------------------------------------------------- peft's files


@pytest.mark.parametrize("use_moe", (False, True))
def test_ours_loads_in_peft(build: Build, tmp_path: Path, use_moe: bool) -> None:
    model = adapted(build, LoRAConfig(3, 5.0, targets=TARGETS[:5]), use_moe=use_moe)
    save_adapter(model, tmp_path, Path("out/full_sft_64.pth"))
    theirs = PeftModel.from_pretrained(build(use_moe=use_moe), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)
    assert theirs.peft_config["default"].base_model_name_or_path == "out/full_sft_64.pth"


@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"use_rslora": True},
        {"target_modules": r".*layers\.1\..*\.w[qk]"},
        {"rank_pattern": {"wq": 2}, "alpha_pattern": {"layers.1.attention.wq": 7, "w1": 3}},
    ),
    ids=("plain", "rslora", "regex", "patterns"),
)
def test_one_that_peft_made_loads_here_and_survives_our_saving(
    build: Build, tmp_path: Path, settings: dict
) -> None:
    usual = {"r": 4, "lora_alpha": 8, "target_modules": ["wq", "wv", "w1"]}
    # weights that are not zero, as after training
    config = LoraConfig(**{**usual, **settings}, init_lora_weights=False)
    theirs = get_peft_model(build(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    described = json.loads((tmp_path / "theirs" / CONFIG_FILE).read_text())
    model = build()
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)
    assert described["r"] == 4 and (logits(model) - logits(build())).abs().max() > 0.1
    save_adapter(model, tmp_path / "ours", None)
    again = PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"peft_type": "IA3"}, "type 'IA3', expected LORA"),
        ({"use_dora": True}, "use_dora=True.*only plain LoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["norm"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"lora_alpha": None}, "lora_alpha=None is not a number"),
    ),
)
def test_an_adapter_of_another_kind_is_refused(
    build: Build, tmp_path: Path, changes: dict, message: str
) -> None:
    save_adapter(adapted(build), tmp_path, None)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_adapter(build(), tmp_path)


def test_an_adapter_of_another_shape_is_refused_by_name(build: Build, tmp_path: Path) -> None:
    save_adapter(adapted(build), tmp_path, Path("out/base.pth"))
    with pytest.raises(ValueError, match=r"layers\.0.*takes 64.*expected \(32, .*out/base.pth"):
        load_adapter(build(dim=32), tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1.* no such layer"):
        load_adapter(build(n_layers=1), tmp_path)


def test_what_is_no_adapter_is_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no adapter_config.json.*4-lora_sft.py or peft"):
        load_adapter(build(), tmp_path / "none")
    save_adapter(adapted(build), tmp_path, None)
    path = tmp_path / WEIGHTS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(build(), tmp_path)
    path.rename(tmp_path / "adapter_model.bin")  # a pickle can hold code
    with pytest.raises(FileNotFoundError, match="adapter_model.bin is not read"):
        load_adapter(build(), tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_adapter(build(), tmp_path)


def test_a_full_disk_leaves_the_adapter_that_was_there(build: Build, tmp_path: Path) -> None:
    model = adapted(build)
    save_adapter(model, tmp_path / "a", None)
    shutil.copytree(tmp_path / "a", tmp_path / "before")
    with torch.no_grad():
        next(adapters(model))[1].lora_B.add_(1)
    with full_disk(4096), pytest.raises(OSError, match="could not be written"):
        save_adapter(model, tmp_path / "a", None)
    for path in (tmp_path / "before").iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == 2
