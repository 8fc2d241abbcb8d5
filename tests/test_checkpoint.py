"""Weights files: strict, atomic, of every origin; errors that say what to do."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import full_disk, script, write_tokenizer

from model.checkpoint import (
    find_weights,
    load_for_inference,
    load_model,
    read_state_dict,
    save_weights,
    start_model,
    weights_path,
)
from model.flags import weights_flags
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import Tokenizer

Build = Callable[..., MiniMindForCausalLM]
SHAPE = "--n_heads 4"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def flags(tokenizer: Tokenizer) -> Callable[[str], argparse.Namespace]:
    """Return a function that parses the flags of scripts which use weights."""

    def parse(text: str = "") -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        weights_flags(parser)
        given = f"--tokenizer {tokenizer.folder} --device cpu {text}"
        return parser.parse_args(given.split())

    return parse


@pytest.fixture
def make(build: Build, tokenizer: Tokenizer) -> Build:
    return lambda **fields: build(**{"vocab_size": tokenizer.vocab_size, **fields})


def same(one: MiniMindForCausalLM, other: MiniMindForCausalLM) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def forget_config(path: Path) -> Path:
    path.with_suffix(".json").unlink()
    return path


Flags = Callable[..., argparse.Namespace]
KINDS = {
    "dense": {},
    "heads": dict(n_heads=8, n_kv_heads=8, hidden_dim=100, norm_eps=1e-6, rope_theta=5e4),
    "moe": dict(use_moe=True, n_routed_experts=3, num_experts_per_tok=1, n_shared_experts=1),
}


# ----------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_with_their_configuration(
    tmp_path: Path, make: Build, tokenizer: Tokenizer, flags: Flags, kind: str
) -> None:
    model = make(**KINDS[kind])
    path = tmp_path / "sub" / "a.pth"
    save_weights(model, path, tokenizer, stage="pretrain", step=7)
    loaded = load_model(path, flags())
    assert same(loaded.model, model) and loaded.path == path
    assert loaded.model.config.to_diff_dict() == model.config.to_diff_dict()
    assert loaded.tokenizer.sha256 == tokenizer.sha256
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded.model.eval()(ids).logits, model(ids).logits)
    known = json.loads(path.with_suffix(".json").read_text())
    assert (known["stage"], known["step"]) == ("pretrain", 7)
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.json", "a.pth"]


@pytest.mark.parametrize("kind", KINDS)
def test_loading_draws_no_random_numbers(
    tmp_path: Path, make: Build, tokenizer: Tokenizer, flags: Flags, kind: str
) -> None:
    """They would be overwritten, and drawing those of 26 M parameters takes half of the loading."""
    path = tmp_path / "a.pth"
    save_weights(make(**KINDS[kind]), path, tokenizer)
    before = torch.get_rng_state()
    model = load_model(path, flags()).model
    assert torch.equal(torch.get_rng_state(), before)
    make(**KINDS[kind])
    assert not torch.equal(torch.get_rng_state(), before)  # a new model draws them
    assert model.output.weight is model.tok_embeddings.weight


def test_the_file_is_a_state_dict_that_torch_reads_without_code(
    tmp_path: Path, make: Build, tokenizer: Tokenizer
) -> None:
    model = make()
    save_weights(model, tmp_path / "a.pth", tokenizer)
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert state.keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_a_configuration_is_read_by_its_shapes(
    tmp_path: Path, make: Build, tokenizer: Tokenizer, flags: Flags, kind: str
) -> None:
    model = make(**KINDS[kind])
    path = tmp_path / "a.pth"
    save_weights(model, path, tokenizer)
    forget_config(path)
    loaded = load_model(path, flags(f"--n_heads {model.config.n_heads}"))
    assert same(loaded.model, model)
    for name in ("dim", "n_layers", "n_kv_heads", "hidden_dim", "use_moe", "n_shared_experts"):
        if name != "n_shared_experts" or model.config.use_moe:
            assert getattr(loaded.model.config, name) == getattr(model.config, name)


@pytest.mark.parametrize("prefix", ("", "_orig_mod.", "module.", "module._orig_mod."))
def test_v1s_files_load_strictly(tmp_path: Path, make: Build, flags: Flags, prefix: str) -> None:
    """Stored rotary tables and the prefixes of torch.compile and DDP aside."""
    model = make()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    state[prefix + "pos_cis"] = torch.zeros(64, 8, dtype=torch.complex64)
    state[prefix + "layers.0.attention.mask"] = torch.zeros(1, 1, 64, 64)
    torch.save(state, tmp_path / "a.pth")
    assert same(load_model(tmp_path / "a.pth", flags(SHAPE)).model, model)
    del state[prefix + "output.weight"]  # tied, so some files store it once
    torch.save(state, tmp_path / "a.pth")
    assert same(load_model(tmp_path / "a.pth", flags(SHAPE)).model, model)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, make: Build, tokenizer: Tokenizer, flags: Flags
) -> None:
    model, other = make(), make(seed=1)
    path = tmp_path / "a.pth"
    save_weights(model, path, tokenizer)
    with full_disk(50_000), pytest.raises(OSError, match="could not be written, the disk may be"):
        save_weights(other, path, tokenizer)
    assert same(load_model(path, flags()).model, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.pth"]


# ----------------------------------------------------------------------------- folders


def v1_config(model: MiniMindForCausalLM, **changes: object) -> dict[str, object]:
    """A config.json as v1's released folders have it."""
    names = "dim n_layers n_heads n_kv_heads vocab_size multiple_of norm_eps max_seq_len dropout"
    names += " use_moe n_routed_experts num_experts_per_tok aux_loss_alpha seq_aux norm_topk_prob"
    config = {name: getattr(model.config, name) for name in names.split()}
    config |= {"hidden_dim": None, "flash_attn": True, "scoring_func": "softmax"}
    config |= {"architectures": ["Transformer"], "torch_dtype": "float32", "model_type": "minimind"}
    config["auto_map"] = {"AutoConfig": "LMConfig.LMConfig", "AutoModelForCausalLM": "model.Trans"}
    return config | changes


@pytest.mark.parametrize("use_moe", (False, True))
def test_the_originals_folder_loads_and_its_code_does_not_run(
    tmp_path: Path, make: Build, tokenizer: Tokenizer, flags: Flags, use_moe: bool
) -> None:
    model = make(use_moe=use_moe, n_shared_experts=1)
    folder = tmp_path / "minimind-v1"
    shutil.copytree(tokenizer.folder, folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config = v1_config(model, n_shared_experts=True)  # as in the released files: one
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.py", "LMConfig.py"):
        (folder / name).write_text("raise SystemExit('the code was run')")
    args = flags(f"--load_from {folder} --dtype float32")
    args.tokenizer = None  # the folder has its own
    loaded = load_for_inference(args, packed=False)
    assert same(loaded.model, model) and not loaded.model.training
    assert loaded.tokenizer.folder == folder
    assert loaded.path == folder / "pytorch_model.bin"


def test_a_folder_of_transformers_loads(
    tmp_path: Path, make: Build, tokenizer: Tokenizer, flags: Flags
) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert same(load_model(tmp_path, flags()).model, model)


def test_a_folder_without_weights_is_told(tmp_path: Path, flags: Flags) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor.*found: notes.txt"):
        load_model(tmp_path, flags())


# ----------------------------------------------------------------------------- what is refused


@pytest.fixture
def saved(tmp_path: Path, make: Build, tokenizer: Tokenizer) -> Path:
    save_weights(make(), tmp_path / "a.pth", tokenizer)
    return tmp_path / "a.pth"


@pytest.mark.parametrize(
    ("wrong", "message"),
    (
        ("--dim 512", "dim=64, not 512"),
        ("--n_layers 3", "n_layers=2, not 3 as --model or --n_layers says"),
        ("--use_moe", "use_moe=False, not True"),
        ("--model minimind-v1", "dim=64, not 768; n_layers=2, not 16"),
        ("--n_heads 8 --n_kv_heads 8", "n_heads=4, not 8; n_kv_heads=2, not 8"),
    ),
)
@pytest.mark.parametrize("has_config", (True, False))
def test_flags_that_contradict_the_weights_are_refused(
    saved: Path, flags: Flags, wrong: str, message: str, has_config: bool
) -> None:
    if not has_config:
        forget_config(saved)
        if "n_heads" in wrong:
            return  # only the flags know it then
        wrong += f" {SHAPE}"
    with pytest.raises(ValueError) as caught:
        load_model(saved, flags(wrong))
    assert message in str(caught.value) and str(saved) in str(caught.value)
    assert "drop the flag, or name other weights" in str(caught.value)


def test_flags_that_agree_or_instruct_are_taken(saved: Path, flags: Flags) -> None:
    given = flags("--dim 64 --use_moe false --max_seq_len 32 --dropout 0.25")
    config = load_model(saved, given).model.config
    assert (config.max_seq_len, config.dropout) == (32, 0.25)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda s: s.pop("norm.weight"), 'missing "norm.weight"; check the model flags'),
        (
            lambda s: s.update({"layers.0.feed_forward.experts.0.w1.weight": torch.zeros(1)}),
            'unexpected "layers.0.feed_forward.experts.0.w1.weight"; try --use_moe',
        ),
        (
            lambda s: s.update({"norm.weight": torch.zeros(9)}),
            r'"norm.weight" is \(9,\), expected \(64,\)',
        ),
        (
            lambda s: [s.pop(f"layers.1.attention.{n}.weight") for n in ("wq", "wk", "wv", "wo")],
            'missing "layers.1.attention.wq.weight"; .* and 1 more',
        ),
    ),
)
def test_a_strict_load_says_what_does_not_fit(
    saved: Path, flags: Flags, change: Callable, message: str
) -> None:
    edit(saved, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(saved, flags())
    assert "does not fit dim=64, n_layers=2, n_heads=4" in str(caught.value)


def test_weights_of_another_kind_are_told(tmp_path: Path, flags: Flags) -> None:
    path = tmp_path / "a.pth"
    for state in (
        {"model.embed_tokens.weight": torch.zeros(3, 4)},
        {"tok_embeddings.weight": torch.zeros(3, 4)},
        {
            "tok_embeddings.weight": torch.zeros(3, 4),
            "layers.0.attention.wk.weight": torch.zeros(4, 4),
        },
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match="has no parameter .* it is not a MiniMind v1 model"):
            load_model(path, flags())
    for value in ([torch.zeros(1)], {"a": 1}, torch.zeros(2)):
        torch.save(value, path)
        with pytest.raises(ValueError, match="holds no state_dict"):
            load_model(path, flags())


def test_a_truncated_file_is_told(saved: Path, flags: Flags) -> None:
    content = saved.read_bytes()
    for damaged in (content[: len(content) // 2], content[:100], b"", b"<html>not found</html>"):
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable weights file.*(truncated|damaged)"):
            load_model(saved, flags())


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, flags: Flags) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return ((tmp_path / "evil").touch, ())

    torch.save({"tok_embeddings.weight": Evil()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth is not a readable weights file.*never loaded"):
        load_model(tmp_path / "a.pth", flags())
    assert not (tmp_path / "evil").exists()
    torch.save(MiniMindForCausalLM(LMConfig(dim=32, n_layers=1)), tmp_path / "b.pth")
    with pytest.raises(ValueError, match="b.pth is not a readable weights file"):
        load_model(tmp_path / "b.pth", flags())  # a whole model: its class would be imported


def test_another_tokenizer_is_refused(
    tmp_path: Path, saved: Path, make: Build, flags: Flags
) -> None:
    args = flags()
    args.tokenizer = write_tokenizer(tmp_path / "other", vocab_size=290)
    with pytest.raises(ValueError, match="was trained with another tokenizer.*name the right one"):
        load_model(saved, args)
    forget_config(saved)  # nobody knows any more which it was, but the number of ids tells
    args.n_heads = 4
    with pytest.raises(ValueError, match="has 290 ids, the model's embedding 300"):
        load_model(saved, args)
    args.tokenizer = None  # the shipped one
    with pytest.raises(ValueError, match="has 6400 ids, the model's embedding 300"):
        load_model(saved, args)


def test_a_damaged_configuration_is_told(saved: Path, flags: Flags) -> None:
    for content, message in (
        ('{"config": ', "a.json is not JSON .*copy or make it anew"),
        ("[]", "a.json holds a list, expected an object"),
        ('{"dim": 64}', 'a.json has no "config": remove it to go by flags'),
        ('{"config": {"dim": 63}}', "the configuration of .*a.pth is wrong: dim=63 does not"),
    ):
        saved.with_suffix(".json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_model(saved, flags())


def test_missing_files_are_told(tmp_path: Path, saved: Path, flags: Flags) -> None:
    with pytest.raises(FileNotFoundError, match="b.pth does not exist"):
        read_state_dict(tmp_path / "b.pth")
    args = flags()
    args.tokenizer = tmp_path / "no"
    with pytest.raises(FileNotFoundError, match="no/tokenizer.json does not exist.*--tokenizer"):
        load_model(saved, args)


# ----------------------------------------------------------------------------- context


def test_rope_scaling_extends_a_trained_context_once(
    tmp_path: Path, saved: Path, make: Build, tokenizer: Tokenizer, flags: Flags
) -> None:
    loaded = load_model(saved, flags("--rope_scaling linear:4"))
    config = loaded.model.config
    assert config.max_seq_len == 256
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("linear", 4)
    # interpolation: at every fourth position the angles are those of the trained positions
    ids = torch.arange(3, 13)[None]
    stretched = loaded.model.eval()(ids, position_ids=4 * torch.arange(10)[None]).logits
    # (4 * n) * (f / 4) against n * f in fp32
    torch.testing.assert_close(stretched, make()(ids).logits, rtol=0, atol=1e-4)
    save_weights(loaded.model, tmp_path / "b.pth", tokenizer)
    again = load_model(tmp_path / "b.pth", flags("--rope_scaling linear:4")).model.config
    assert again.max_seq_len == 256
    with pytest.raises(ValueError, match="scaled by linear:4 already; drop the flag"):
        load_model(tmp_path / "b.pth", flags("--rope_scaling yarn:2"))
    yarn = load_model(saved, flags("--rope_scaling yarn:2")).model.config
    assert yarn.max_seq_len == 128
    assert yarn.rope_parameters["original_max_position_embeddings"] == 64
    with pytest.raises(ValueError, match="rope_scaling='cubic:2' is unknown"):
        load_model(saved, flags("--rope_scaling cubic:2"))


# ----------------------------------------------------------------------------- finding


STAGES = ("dpo", "full_sft_multi", "full_sft_single")
TINY = LMConfig(dim=64, n_heads=4, n_kv_heads=2)
MOE = LMConfig(dim=64, n_heads=4, n_kv_heads=2, use_moe=True)


def test_names_are_v1s() -> None:
    stages = ("pretrain", *STAGES, "lora", "lora_dpo")
    assert {stage: weights_path("out", stage, LMConfig()).as_posix() for stage in stages} == {
        "pretrain": "out/pretrain_512.pth",
        "full_sft_single": "out/single_chat/full_sft_512.pth",
        "full_sft_multi": "out/multi_chat/full_sft_512.pth",
        "dpo": "out/rl_512.pth",
        "lora": "out/lora_512",  # folders in PEFT's format
        "lora_dpo": "out/lora_rl_512",
    }
    assert weights_path("out", "dpo", MOE).name == "rl_64_moe.pth"
    assert weights_path("out", "dpo", MOE, "mine").name == "rl_64_moe_mine.pth"


def test_chat_takes_the_last_stage_then_the_demo_never_by_time(
    tmp_path: Path, flags: Flags
) -> None:
    out, demo = tmp_path / "out", tmp_path / "out" / "demo"
    args = flags(f"--out_dir {out} --dim 64 {SHAPE}")
    with pytest.raises(FileNotFoundError, match="run 1-pretrain.py and 3-full_sft.py or"):
        find_weights(args, "chat")
    places = [weights_path(root, s, TINY) for root in (demo, out) for s in reversed(STAGES)]
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert find_weights(args, "chat") == path  # each beats all before it
    places[0].write_text("newer")
    assert find_weights(args, "chat") == places[-1]
    weights_path(out, "dpo", MOE).touch()
    assert find_weights(args, "chat") == places[-1]
    args.use_moe = True
    assert find_weights(args, "chat") == weights_path(out, "dpo", MOE)


def test_the_demo_is_found_whatever_its_width(tmp_path: Path, flags: Flags) -> None:
    args = flags(f"--out_dir {tmp_path}")
    for stage, purpose in (("pretrain", "pretrain"), ("full_sft_multi", "chat")):
        with pytest.raises(FileNotFoundError, match="no weights: looked for"):
            find_weights(args, purpose)
        path = weights_path(tmp_path / "demo", stage, TINY)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert find_weights(args, purpose) == path
    args.dim = 512  # asked for another
    with pytest.raises(FileNotFoundError):
        find_weights(args, "chat")


def test_a_named_file_wins_and_must_exist(tmp_path: Path, saved: Path, flags: Flags) -> None:
    assert find_weights(flags(f"--weights {saved}"), "chat") == saved
    assert find_weights(flags(f"--load_from {tmp_path}"), "chat") == tmp_path
    with pytest.raises(FileNotFoundError, match="no.pth does not exist"):
        find_weights(flags("--weights no.pth"), "chat")
    with pytest.raises(ValueError, match="--weights and --load_from exclude one another"):
        find_weights(flags(f"--weights {saved} --load_from {tmp_path}"), "chat")


# ----------------------------------------------------------------------------- the next stage


@pytest.fixture
def stage_flags(tmp_path: Path, tokenizer: Tokenizer) -> Flags:
    def parse(text: str = "") -> argparse.Namespace:
        given = f"--out_dir {tmp_path} --tokenizer {tokenizer.folder} --dim 64 {text}"
        return script("1-pretrain.py").parse_args(given.split())

    return parse


def test_a_stage_starts_from_the_one_before(
    tmp_path: Path, make: Build, tokenizer: Tokenizer, stage_flags: Flags
) -> None:
    with pytest.raises(FileNotFoundError, match="pretrain_64.pth does not exist: run 1-pre"):
        start_model(stage_flags(), after="pretrain")
    with pytest.raises(FileNotFoundError, match="run 3-full_sft.py --chat single first"):
        start_model(stage_flags(), after="full_sft_single")
    models = {"": make(), "_mine": make(seed=1), "_other": make(seed=2)}
    for name, model in models.items():
        save_weights(model, tmp_path / f"pretrain_64{name}.pth", tokenizer)
    for given, name in (
        ("", ""),
        ("--run_name mine", "_mine"),  # a run's own goes on under its name
        ("--run_name new", ""),
        (f"--init_from {tmp_path}/pretrain_64_other.pth", "_other"),
    ):
        assert same(start_model(stage_flags(given), after="pretrain").model, models[name])
    with pytest.raises(FileNotFoundError, match="--init_from no.pth does not exist"):
        start_model(stage_flags("--init_from no.pth"), after="pretrain")


def test_the_first_stage_starts_from_random_weights(
    tmp_path: Path, make: Build, tokenizer: Tokenizer, stage_flags: Flags
) -> None:
    save_weights(make(), tmp_path / "pretrain_64.pth", tokenizer)
    given = "--n_layers 3 --n_heads 4 --n_kv_heads 1 --max_seq_len 99"
    for after, start in ((None, ""), ("pretrain", "--init_from none")):
        started = start_model(stage_flags(f"{given} {start}"), after=after)
        config = started.model.config
        assert started.path is None and config.vocab_size == tokenizer.vocab_size
        found = (config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.max_seq_len)
        assert found == (64, 3, 4, 1, 99)


@pytest.mark.parametrize(
    ("given", "expected"),
    (
        ("--model minimind-v1", dict(dim=768, n_layers=16, use_moe=False)),
        ("--model minimind-v1-moe --n_layers 2", dict(dim=512, n_layers=2, use_moe=True)),
        ("--use_moe --n_layers 1", dict(dim=512, n_layers=1, use_moe=True, n_shared_experts=2)),
        ("--use_moe --n_layers 1 --n_shared_experts 1", dict(use_moe=True, n_shared_experts=1)),
    ),
)
def test_a_named_model_under_the_flags_given(given: str, expected: dict) -> None:
    from model.checkpoint import new_config

    args = script("1-pretrain.py").parse_args(given.split())
    config = new_config(args, Tokenizer())
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_folder_of_another_kind_of_model_is_told_how_to_come_in(
    tmp_path: Path, make: Build, flags: Flags
) -> None:
    config = v1_config(make(), model_type="llama")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(make().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="of type 'llama': make a weights file of it first, py"):
        load_model(tmp_path, flags(""))
