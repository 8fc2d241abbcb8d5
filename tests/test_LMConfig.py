"""The configuration: v1's defaults, its checks, transformers' names, files old and new."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from model.LMConfig import MODELS, LMConfig
from model.model import MiniMindForCausalLM


def test_the_defaults_are_v1s() -> None:
    v1 = dict(
        dim=512, n_layers=8, n_heads=16, n_kv_heads=8, vocab_size=6400, multiple_of=64,
        norm_eps=1e-5, max_seq_len=512, rope_theta=1e4, dropout=0.0, flash_attn=True, use_moe=False,
        num_experts_per_tok=2, n_routed_experts=4, n_shared_experts=2, scoring_func="softmax",
        aux_loss_alpha=0.01, seq_aux=True, norm_topk_prob=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    config = LMConfig()
    assert {name: getattr(config, name) for name in v1} == v1


@pytest.mark.parametrize(
    ("name", "fields", "millions"),
    (
        ("minimind-v1-small", {}, 26.878464),
        ("minimind-v1", {}, 108.7),
        ("minimind-v1-moe", {}, 113.4),
        ("minimind-v1-moe", {"n_shared_experts": 1}, 96.1),
    ),
)
def test_the_named_models_have_v1s_sizes(
    name: str, fields: dict[str, Any], millions: float
) -> None:
    with torch.device("meta"):
        model = MiniMindForCausalLM(LMConfig(**(MODELS[name] | fields)))
    n_params = sum(parameter.numel() for parameter in model.parameters())
    digits = len(str(millions).split(".")[1])
    assert round(n_params / 1e6, digits) == millions


@pytest.mark.parametrize(("dim", "width"), ((512, 1408), (768, 2048), (64, 192), (96, 256)))
def test_hidden_dim_none_is_two_thirds_of_four_dims_rounded_up(dim: int, width: int) -> None:
    assert LMConfig(dim=dim, n_heads=8).hidden_dim == width
    assert LMConfig(dim=dim, n_heads=8, hidden_dim=100).hidden_dim == 100


@pytest.mark.parametrize(
    ("fields", "needed"),
    (
        ({"n_heads": 6, "n_kv_heads": 4}, r"n_heads=6 is not a multiple of n_kv_heads=4"),
        ({"dim": 100}, r"dim=100 .* n_heads=16 .* try dim=96"),
        ({"dim": 48, "n_heads": 16}, r"even width .* try dim=(32|64)"),
        ({"dim": 1}, r"try dim=32"),
        ({"dim": 0}, r"dim=0 is not a positive whole number"),
        ({"n_layers": -1}, r"n_layers=-1 is not a positive"),
        ({"n_heads": 0}, r"n_heads=0 is not a positive"),
        ({"n_kv_heads": 0}, r"n_kv_heads=0 is not a positive"),
        ({"vocab_size": 6400.0}, r"vocab_size=6400\.0 is not a positive whole"),
        ({"max_seq_len": "512"}, r"max_seq_len='512' is not a positive whole"),
        ({"multiple_of": 0}, r"multiple_of=0 is not a positive"),
        ({"hidden_dim": 0}, r"hidden_dim=0 is not a positive"),
        ({"norm_eps": 0}, r"norm_eps=0 is not a positive number"),
        ({"rope_theta": "1e4"}, r"rope_theta='1e4' is not a positive number"),
        ({"dropout": 1.0}, r"dropout=1\.0 is not in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0\.1 is not in"),
        ({"use_moe": True, "num_experts_per_tok": 5}, r"num_experts_per_tok=5 is more than n_rou"),
        ({"use_moe": True, "n_routed_experts": 0}, r"n_routed_experts=0 is not a positive"),
        ({"use_moe": True, "n_shared_experts": -1}, r"n_shared_experts=-1 is negative"),
        ({"scoring_func": "sigmoid"}, r"scoring_func='sigmoid' is unknown: use \"softmax\""),
        ({"hidden_size": 100}, r"dim=100 .* try dim=96"),
    ),
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_bad_field_is_told(fields: dict[str, Any], needed: str) -> None:
    with pytest.raises(ValueError, match=needed):
        LMConfig(**fields)


def test_fields_of_experts_are_not_checked_in_a_dense_model() -> None:
    assert LMConfig(n_routed_experts=1, num_experts_per_tok=2).use_moe is False


@pytest.mark.parametrize(("given", "kept"), ((True, 1), (False, 0), (None, 0), (2, 2), (0, 0)))
def test_shared_experts_are_a_number(given: Any, kept: int) -> None:
    assert LMConfig(n_shared_experts=given).n_shared_experts == kept


def test_no_kv_heads_means_one_for_each_head() -> None:
    assert LMConfig(n_heads=8, n_kv_heads=None).n_kv_heads == 8
    assert LMConfig(num_attention_heads=4, num_key_value_heads=None).n_kv_heads == 4


TRANSFORMERS_NAMES = {
    "hidden_size": ("dim", 64),
    "num_hidden_layers": ("n_layers", 3),
    "num_attention_heads": ("n_heads", 4),
    "num_key_value_heads": ("n_kv_heads", 2),
    "max_position_embeddings": ("max_seq_len", 128),
    "intermediate_size": ("hidden_dim", 96),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "num_experts": ("n_routed_experts", 6),
}


def test_only_a_mixture_has_a_router_to_be_asked_for() -> None:
    """By these two names trl decides whether to add a balance loss."""
    names = ("output_router_logits", "router_aux_loss_coef")
    assert not any(hasattr(LMConfig(), name) for name in names)
    config = LMConfig(use_moe=True, aux_loss_alpha=0.5)
    assert [getattr(config, name) for name in names] == [False, 0.5]
    config.router_aux_loss_coef = 0.25
    assert LMConfig.from_dict(config.to_dict()).aux_loss_alpha == 0.25


@pytest.mark.parametrize(("theirs", "ours"), TRANSFORMERS_NAMES.items())
def test_transformers_names_read_and_write_our_fields(theirs: str, ours: tuple[str, Any]) -> None:
    name, value = ours
    config = LMConfig()
    assert getattr(config, theirs) == getattr(config, name)
    setattr(config, theirs, value)
    assert getattr(config, name) == value
    setattr(config, name, 1)
    assert getattr(config, theirs) == 1


def test_a_configuration_in_transformers_names_is_the_same() -> None:
    ours = LMConfig(**{name: value for name, value in TRANSFORMERS_NAMES.values()})
    theirs = LMConfig(**{name: value for name, (_, value) in TRANSFORMERS_NAMES.items()})
    assert theirs.to_dict() == ours.to_dict()
    assert LMConfig(hidden_size=64).hidden_dim == 192  # from that width
    yarn = LMConfig(max_position_embeddings=2048, rope_scaling="yarn:4").rope_parameters
    assert yarn["original_max_position_embeddings"] == 512


@pytest.mark.parametrize(
    ("given", "stored"),
    (
        (None, {"rope_type": "default"}),
        ({"rope_type": "default"}, {"rope_type": "default"}),
        ("linear:4", {"rope_type": "linear", "factor": 4.0}),
        ({"type": "linear", "factor": 2}, {"rope_type": "linear", "factor": 2.0}),
        (
            "yarn:8",
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 300},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 300},
        ),
    ),
)
def test_rope_scaling_is_stored_as_rope_parameters(given: Any, stored: Any) -> None:
    before = copy.deepcopy(given)
    config = LMConfig(max_seq_len=2048, rope_theta=5e3, rope_scaling=given)
    assert config.rope_parameters == {"rope_theta": 5e3} | stored
    again = LMConfig(max_seq_len=2048, rope_parameters=config.rope_parameters)
    assert again.to_dict() == config.to_dict()
    assert given == before


@pytest.mark.parametrize(
    "scaling",
    (
        "", "linear", "linear:", "linear:x", "linear:0.5", "linear:inf", "linear:nan", "dynamic:2",
        "4", 4, {"type": "llama3", "factor": 4.0}, {"type": "linear"},
        {"type": "yarn", "factor": None},
    ),
)  # fmt: skip
def test_another_rope_scaling_is_told(scaling: Any) -> None:
    with pytest.raises(ValueError, match=r'rope_scaling=.* is unknown: use "linear:F" or "yarn:F"'):
        LMConfig(rope_scaling=scaling)


def test_a_theta_in_the_dictionary_is_the_theta() -> None:
    assert LMConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e6}).rope_theta == 1e6


@pytest.mark.parametrize("scaling", (None, "linear:4", "yarn:4"))
def test_a_saved_configuration_is_the_same_again(tmp_path: Path, scaling: str | None) -> None:
    config = LMConfig(
        dim=64, n_heads=4, n_kv_heads=2, use_moe=True, dropout=0.1, max_seq_len=2048,
        rope_theta=1e6, rope_scaling=scaling, flash_attn=False, n_shared_experts=0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = LMConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert stored["rope_parameters"] == config.rope_parameters
    assert "rope_scaling" not in stored


def test_an_override_on_loading_scales_the_context(tmp_path: Path) -> None:
    LMConfig().save_pretrained(tmp_path)
    config = LMConfig.from_pretrained(tmp_path, max_seq_len=2048, rope_scaling="yarn:4")
    assert config.rope_parameters == LMConfig(max_seq_len=2048, rope_scaling="yarn:4").rope_scaling


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))))
def test_copies_are_equal_and_apart(copied: Any) -> None:
    config = LMConfig(rope_scaling="yarn:4")
    again = copied(config)
    assert again.to_dict() == config.to_dict()
    again.rope_parameters["factor"] = 2.0
    again.dim = 1
    assert (config.rope_parameters["factor"], config.dim) == (4.0, 512)


def test_the_originals_config_json_loads(tmp_path: Path) -> None:
    original = {
        "architectures": ["Transformer"], "auto_map": {"AutoConfig": "LMConfig.LMConfig"},
        "aux_loss_alpha": 0.01, "dim": 512, "dropout": 0.0, "flash_attn": True, "hidden_dim": None,
        "max_seq_len": 512, "model_type": "minimind", "multiple_of": 64, "n_heads": 16,
        "n_kv_heads": 8, "n_layers": 8, "n_routed_experts": 4, "n_shared_experts": True,
        "norm_eps": 1e-05, "norm_topk_prob": True, "num_experts_per_tok": 2, "rope_theta": 10000.0,
        "scoring_func": "softmax", "seq_aux": True, "torch_dtype": "float32",
        "transformers_version": "4.44.0", "use_moe": True, "vocab_size": 6400, "unknown": [1],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(original), encoding="utf-8")
    config = LMConfig.from_pretrained(tmp_path)
    assert (config.hidden_dim, config.n_shared_experts, config.use_moe) == (1408, 1, True)
    assert config.dtype == torch.float32
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.unknown == [1]  # kept, in no one's way
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 96.1
