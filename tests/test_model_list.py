"""Which models are found below out/, under which names, and that they open."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import find_weights, load_model, save_weights, weights_path
from model.export import export
from model.flags import weights_flags
from model.lora import LoRAConfig, adapters, add_adapter, merge_adapter, save_adapter
from model.model_list import ModelChoice, chosen_model, find_models, open_model, parse_model
from model.tokenizer import Tokenizer


def flags(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    weights_flags(parser)
    return parser.parse_args([*map(str, words), "--device", "cpu", "--dtype", "float32"])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture
def save(
    build: Callable[..., Any], tokenizer: Tokenizer, tmp_path: Path
) -> Callable[[str, str], Path]:
    """Return a function that leaves weights as a stage does, in a folder below tmp_path."""

    def make(folder: str, stage: str, seed: int = 0, run_name: str | None = None) -> Path:
        model = build(seed, vocab_size=tokenizer.vocab_size)
        path = weights_path(tmp_path / folder, stage, model.config, run_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(model, path, tokenizer)
        return path

    return make


def test_chat_stages_come_first_and_the_first_is_what_the_scripts_take(save, tmp_path) -> None:
    pretrain = save("out", "pretrain")
    demo = save("out/demo", "dpo")
    single, multi = save("out", "full_sft_single"), save("out", "full_sft_multi")
    found = find_models(tmp_path / "out")
    assert [c.path for c in found] == [multi, single, demo, pretrain]
    assert found[0].path == find_weights(flags("--out_dir", tmp_path / "out", "--dim", 64), "chat")


def test_names_are_the_files_and_tell_namesakes_apart(save, tmp_path) -> None:
    for folder, stage in (("out", "dpo"), ("out/demo", "dpo"), ("out", "full_sft_single")):
        save(folder, stage)
    save("out", "full_sft_multi")
    save("out", "dpo", run_name="test")
    assert [c.name for c in find_models(tmp_path / "out")] == [
        "rl_64",
        "rl_64_test",
        "full_sft_64",
        "single_chat/full_sft_64",
        "demo/rl_64",
    ]


def test_no_folder_is_no_models(tmp_path: Path) -> None:
    assert find_models(tmp_path / "nowhere") == []


def test_an_adapter_is_found_on_its_base_and_opens_merged(
    save, build, tokenizer, tmp_path: Path
) -> None:
    base = save("out", "dpo")
    model = build(0, vocab_size=tokenizer.vocab_size)
    add_adapter(model, LoRAConfig(rank=2))
    generator = torch.Generator().manual_seed(1)
    for _, layer in adapters(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    save_adapter(model, tmp_path / "out" / "lora_64", base)
    choice = find_models(tmp_path / "out")[1]
    assert choice == ModelChoice("rl_64+lora_64", base, tmp_path / "out" / "lora_64")
    tokens = torch.tensor([[1, 40, 41, 42]])
    merge_adapter(model)
    found = open_model(choice, flags()).model(tokens).logits
    # packed: another order of sums
    torch.testing.assert_close(found, model(tokens).logits, rtol=0, atol=2e-5)
    base.unlink()  # an adapter whose base is gone cannot be used
    assert find_models(tmp_path / "out") == []


def test_an_exported_folder_is_found_and_opens(save, tokenizer, tmp_path: Path) -> None:
    path = save("elsewhere", "dpo")
    loaded = load_model(path, flags())
    (tmp_path / "out").mkdir()
    for kind in ("minimind", "llama"):  # the second is not for our code
        export(loaded, tmp_path / "out" / "exports" / kind, kind)
    (choice,) = find_models(tmp_path / "out")
    assert (choice.name, choice.path) == ("minimind", tmp_path / "out" / "exports" / "minimind")
    tokens = torch.tensor([[1, 40, 41, 42]])
    found = open_model(choice, flags()).model(tokens).logits
    expected = loaded.model.eval()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # packed: another order of sums


def test_damaged_files_do_not_hide_the_others(save, tmp_path: Path) -> None:
    path = save("out", "dpo")
    for name, file in (("a", "adapter_config.json"), ("b", "config.json")):
        (tmp_path / "out" / name).mkdir()
        (tmp_path / "out" / name / file).write_text("{", "utf-8")
        (tmp_path / "out" / name / "model.safetensors").write_bytes(b"")
    assert [c.path for c in find_models(tmp_path / "out")] == [path]


def test_parse_model(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pth", "odd=name+b.pth"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "ad").mkdir()
    (tmp_path / "ad+er").mkdir()
    a, odd, ad, ader = Path("a.pth"), Path("odd=name+b.pth"), Path("ad"), Path("ad+er")
    assert parse_model("a.pth") == ModelChoice("a", a)
    assert parse_model("small=a.pth") == ModelChoice("small", a)
    assert parse_model("a.pth+ad") == ModelChoice("a+ad", a, ad)
    assert parse_model("x=a.pth+ad") == ModelChoice("x", a, ad)
    assert parse_model("x=a.pth+ad+er") == ModelChoice("x", a, ader)
    assert parse_model("odd=name+b.pth") == ModelChoice("odd=name+b", odd)
    assert parse_model("y=odd=name+b.pth") == ModelChoice("y", odd)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no file"),
        ("x=", "names no file"),
        ("=a.pth", "has no name before"),
        ("x=b.pth", "b.pth does not exist"),
        ("x=a.pth+", "names no file"),
        ("x=a.pth+none", "none does not exist"),
        ("+a.pth", "names no file"),
    ],
)
def test_parse_model_refuses(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        parse_model(text)


def test_the_flags_choose(save, tmp_path: Path) -> None:
    path = save("out", "dpo")
    assert chosen_model(flags("--weights", path)) == ModelChoice("rl_64", path)
    with pytest.raises(FileNotFoundError, match="no weights"):
        chosen_model(flags("--out_dir", tmp_path / "none"))
