"""Files that a stranger could have made: nothing in them runs, and each gets one clear error.

The files are real ones. Each carries code that would leave a mark; the first tests show that it
does so where a file is read carelessly.
"""

import argparse
import ast
import builtins
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import ROOT, pretrain, pretrain_flags, run, write_corpus, write_csv
from transformers import AutoConfig, AutoTokenizer

from model.checkpoint import load_model
from model.export_gguf import read_gguf
from model.flags import run_main, weights_flags
from model.LMConfig import LMConfig
from model.lora import LoRAConfig, add_adapter, load_adapter, save_adapter
from model.model import MiniMindForCausalLM
from model.quiz import load_quiz
from model.tokenizer import Tokenizer
from model.tokens import StaleStore, TokenStore

DEEP = "[" * 100_000 + "]" * 100_000


class Code:
    """An object whose pickle says: call this."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


CALLS: dict[str, Callable[[Path], Code]] = {
    "shell": lambda mark: Code(os.system, f"touch '{mark}'"),
    "open": lambda mark: Code(open, str(mark), "w"),
    "exec": lambda mark: Code(exec, f"open({str(mark)!r}, 'w')"),
}


def zip_of(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def legacy_of(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def tar_of(value: Any) -> bytes:
    """Make torch's oldest format, an archive that is unpacked somewhere before it is read."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(value)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


FORMATS: dict[str, Callable[[Any], bytes]] = {
    "zip": zip_of,
    "legacy": legacy_of,
    "pickle": lambda value: pickle.dumps(value, protocol=2),  # as torch writes
    "tar": tar_of,
}
each_format = pytest.mark.parametrize("form", FORMATS)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """Yield the file that hostile code would leave; it must not be there in the end."""
    path = tmp_path / "mark" / "code-was-run"
    path.parent.mkdir()
    yield path
    assert not path.exists()


@pytest.fixture
def hostile(mark: Path) -> dict[str, Any]:
    """Weights with code among them."""
    return {"tok_embeddings.weight": torch.zeros(4, 4)} | {
        name: make(mark) for name, make in CALLS.items()
    }


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say yes to whatever transformers would ask on the terminal."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a corpus and, in ``out/``, weights and states of a short run on it."""
    folder = write_corpus(tmp_path_factory.mktemp("trained"))
    assert pretrain(folder, folder / "out", "--max_steps 4 --save_interval 2") == 0
    return folder


@pytest.fixture
def corpus(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "corpus"))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a script as its command does and gives back its one error."""

    def start(name: str, *flags: object) -> str:
        with pytest.raises(SystemExit) as end:
            run_main(lambda: run(name, *flags))
        told = capfd.readouterr().err
        assert end.value.code == 1, told
        assert "Traceback" not in told
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and told.splitlines()[-1] == errors[0], told
        return errors[0]

    return start


Refused = Callable[..., str]


def export_flags(corpus: Path, out: Path, kind: str = "minimind") -> str:
    return f"--format {kind} --output {out} --device cpu --tokenizer {corpus}/tokenizer"


def exported(corpus: Path, kind: str) -> Path:
    """Export the corpus's model and return the folder."""
    weights = f"--weights {corpus}/out/pretrain_32.pth"
    run("export_model.py", export_flags(corpus, corpus / kind, kind), weights)
    return corpus / kind


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")


# ----------------------------------------------------------------------------- they would run


@pytest.mark.parametrize("form", ("zip", "legacy", "pickle"))
@pytest.mark.parametrize("call", CALLS)
def test_the_pickles_are_hostile(tmp_path: Path, form: str, call: str) -> None:
    data = FORMATS[form]({"weight": CALLS[call](tmp_path / "mark")})
    load = pickle.load if form == "pickle" else lambda f: torch.load(f, weights_only=False)
    load(io.BytesIO(data))
    assert (tmp_path / "mark").exists()


def test_the_folder_is_hostile(corpus: Path, tmp_path: Path) -> None:
    folder = with_code(exported(corpus, "llama"), tmp_path / "mark", model_type="strange")
    with pytest.raises((ValueError, AttributeError)):  # it runs, and has no class of that name
        AutoConfig.from_pretrained(folder)
    assert (tmp_path / "mark").exists()


# ----------------------------------------------------------------------------- weights


@each_format
def test_weights_with_code(
    corpus: Path, tmp_path: Path, hostile: dict[str, Any], form: str, refused: Refused
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(FORMATS[form](hostile))
    told = refused("export_model.py", export_flags(corpus, tmp_path / "x"), f"--weights {path}")
    assert f"{path} is not a readable weights file" in told
    sft = f"--data_path {corpus}/sft_single.csv --out_dir {tmp_path}/out --device cpu"
    told = refused("3-full_sft.py", sft, f"--tokenizer {corpus}/tokenizer --init_from {path}")
    assert f"{path} is not a readable weights file" in told


def test_weights_named_safetensors(
    corpus: Path, tmp_path: Path, hostile: dict[str, Any], refused: Refused
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(zip_of(hostile))
    told = refused("export_model.py", export_flags(corpus, tmp_path / "x"), f"--weights {path}")
    assert f"{path} is not a readable weights file" in told


def test_a_header_that_claims_an_exabyte(corpus: Path, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    told = refused("export_model.py", export_flags(corpus, tmp_path / "x"), f"--weights {path}")
    assert f"{path} is not a readable weights file" in told


def test_a_small_file_that_claims_large_tensors(
    corpus: Path, tmp_path: Path, refused: Refused
) -> None:
    path, weights = tmp_path / "weights.pth", corpus / "out" / "pretrain_32.pth"
    state = torch.load(weights, weights_only=True)
    for claimed in (
        torch.zeros(1).expand(10**9, 10**9),
        torch.empty(10**9, 10**9, device="meta"),
        torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (10**9, 10**9)),
    ):
        torch.save({**state, "tok_embeddings.weight": claimed}, path)
        told = refused("export_model.py", export_flags(corpus, tmp_path / "x"), f"--weights {path}")
        assert f"{path}" in told and "tok_embeddings.weight" in told


def test_a_small_file_that_unpacks_to_a_large_one(
    corpus: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "weights.pth"
    plain = io.BytesIO(zip_of({"tok_embeddings.weight": torch.zeros(10**6)}))
    with (
        zipfile.ZipFile(plain) as stored,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in stored.namelist():
            small.writestr(name, stored.read(name))
    assert torch.load(path, weights_only=True)["tok_embeddings.weight"].shape == (10**6,)
    told = refused("export_model.py", export_flags(corpus, tmp_path / "x"), f"--weights {path}")
    assert f"{path} is not a readable weights file (it would unpack to 4,0" in told


def test_weights_without_names(corpus: Path, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(zip_of({1: torch.zeros(3), ("a", 2): torch.zeros(3)}))
    told = refused("export_model.py", export_flags(corpus, tmp_path / "x"), f"--weights {path}")
    assert f"{path} holds no state_dict" in told


@pytest.mark.parametrize(
    "claim", ({"n_layers": 10**9}, {"dim": 2**30}, {"hidden_dim": 2**40}, {"dim": 10**400})
)
def test_a_configuration_that_claims_a_large_model(
    corpus: Path, tmp_path: Path, claim: dict[str, int], refused: Refused
) -> None:
    path = corpus / "out" / "pretrain_32.json"
    config = json.loads(path.read_text("utf-8"))["config"]
    edit_json(path, config=config | claim)
    flags = export_flags(corpus, tmp_path / "x"), f"--weights {path.with_suffix('.pth')}"
    told = refused("export_model.py", *flags)
    assert str(path.with_suffix(".pth")) in told and "configuration" in told


@pytest.mark.parametrize("content", (pickle.dumps({"a": 1}), DEEP.encode(), b"[]", b"\xff"))
def test_the_json_beside_the_weights(
    corpus: Path, tmp_path: Path, content: bytes, refused: Refused
) -> None:
    path = corpus / "out" / "pretrain_32.json"
    path.write_bytes(content)
    flags = export_flags(corpus, tmp_path / "x"), f"--weights {path.with_suffix('.pth')}"
    assert str(path) in refused("export_model.py", *flags)


ODD_VALUES = (None, -1, 0, 2.5, 1e308, 10**400, "x", [], {}, True, float("nan"), [[]], {"a": []})


@pytest.mark.slow
def test_no_value_in_a_configuration_is_a_crash(trained: Path, tmp_path: Path) -> None:
    weights, path = trained / "out" / "pretrain_32.pth", tmp_path / "weights.pth"
    shutil.copy(weights, path)
    known = json.loads(weights.with_suffix(".json").read_text("utf-8"))
    parser = argparse.ArgumentParser()
    weights_flags(parser)
    args = parser.parse_args(f"--tokenizer {trained}/tokenizer --device cpu".split())
    n_refused = 0
    places = [("config", name) for name in (*known["config"], "n_shared_experts", "use_moe")]
    for section, name in [*places, (None, "tokenizer_sha256"), (None, "config")]:
        for value in ODD_VALUES:
            changed = json.loads(json.dumps(known))
            (changed if section is None else changed[section])[name] = value
            path.with_suffix(".json").write_text(json.dumps(changed), "utf-8")
            try:
                load_model(path, args)
            except ValueError as error:
                n_refused += 1
                names = (str(tmp_path), str(trained / "tokenizer"))
                assert any(name in str(error) for name in names), f"{name}={value!r}"
    assert n_refused > 100


# ----------------------------------------------------------------------------- folders


def with_code(folder: Path, mark: Path, **fields: Any) -> Path:
    """Name code in every place where transformers looks for it, and put that code there."""
    code = f"open({str(mark)!r}, 'w')\n"
    for name in ("model", "tokenizer", "modeling", "configuration", "setup", "generate"):
        (folder / f"{name}.py").write_text(code)
    auto = {name: "model.Strange" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel")}
    edit_json(folder / "config.json", auto_map=auto, **fields)
    names = ["tokenizer.Strange", "tokenizer.Strange"]
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": names})
    return folder


def test_code_beside_weights_is_not_run(corpus: Path, tmp_path: Path, mark: Path) -> None:
    folder = with_code(exported(corpus, "minimind"), mark)
    run("export_model.py", export_flags(corpus, tmp_path / "x"), f"--load_from {folder}")
    for path in (tmp_path / "x").iterdir():  # and is not handed on
        assert "Strange" not in path.read_text("utf-8", errors="replace"), path


def test_code_beside_a_llama_is_not_run(corpus: Path, tmp_path: Path, mark: Path) -> None:
    folder = with_code(exported(corpus, "llama"), mark)
    run("export_model.py", f"--from {folder} --output {tmp_path}/x.pth")
    assert (tmp_path / "x.pth").is_file()


def test_a_folder_of_another_kind_is_refused(
    corpus: Path, tmp_path: Path, mark: Path, refused: Refused
) -> None:
    folder = with_code(exported(corpus, "llama"), mark, model_type="strange")
    told = refused("export_model.py", f"--from {folder} --output {tmp_path}/x.pth")
    assert f"{folder}/config.json" in told and "'strange'" in told
    told = refused("export_model.py", export_flags(corpus, tmp_path / "x"), f"--load_from {folder}")
    assert str(folder) in told and "'strange'" in told


@each_format
@pytest.mark.parametrize("kind", ("minimind", "llama"))
def test_a_folder_with_a_pickle(
    corpus: Path, tmp_path: Path, hostile: dict, kind: str, form: str, refused: Refused
) -> None:
    folder = exported(corpus, kind)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(FORMATS[form](hostile))
    told = refused("export_model.py", f"--from {folder} --output {tmp_path}/x.pth")
    assert f"{folder}/pytorch_model.bin is not a readable weights file" in told


@pytest.mark.parametrize("suffix", ("safetensors", "bin"))
@pytest.mark.parametrize("place", ("../outside/w", "/{}/outside/w", "sub/../../outside/w", "..\\w"))
def test_an_index_cannot_leave_its_folder(
    corpus: Path, tmp_path: Path, place: str, suffix: str, refused: Refused
) -> None:
    folder = exported(corpus, "llama")
    name = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (corpus / "outside").mkdir()
    (folder / "sub").mkdir()
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if suffix == "safetensors":
        save_file(state, corpus / "outside" / "w.safetensors")
    else:
        torch.save(dict(state), corpus / "outside" / "w.bin")
    there = f"{place.format(corpus).replace('//', '/')}.{suffix}"
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, there)}))
    told = refused("export_model.py", f"--from {folder} --output {tmp_path}/x.pth")
    assert str(index) in told and repr(there) in told


def test_what_a_folder_names_elsewhere_is_not_fetched(corpus: Path, tmp_path: Path) -> None:
    """A kernel of a hub, the base of an adapter, settings of a quantizer: none is followed."""
    folder = exported(corpus, "llama")
    edit_json(
        folder / "config.json",
        attn_implementation="stranger/kernel",
        experts_implementation="stranger/kernel",
        quantization_config={"quant_method": "gptq", "bits": 4},
        _name_or_path="stranger/model",
    )
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "elsewhere"), "r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    run("export_model.py", f"--from {folder} --output {tmp_path}/x.pth")
    was, now = (
        torch.load(path, weights_only=True)
        for path in (corpus / "out" / "pretrain_32.pth", tmp_path / "x.pth")
    )
    assert all(torch.equal(was[name], now[name]) for name in was)


def test_a_gguf_file_with_any_bytes_changed(corpus: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(corpus / "tokenizer")
    folder = exported(corpus, "gguf")
    whole = next(folder.glob("*.gguf")).read_bytes()
    path = tmp_path / "x.gguf"
    source = np.random.default_rng(0)
    for _ in range(30):
        data = bytearray(whole)
        at = int(source.integers(0, 600))  # the counts and the metadata
        data[at : at + 8] = (2 ** int(source.integers(0, 64))).to_bytes(8, "little")
        path.write_bytes(data)
        try:
            read_gguf(path, tokenizer)
        except ValueError as error:
            assert str(error)


# ----------------------------------------------------------------------------- tokenizers


def test_code_beside_a_tokenizer_is_not_run(corpus: Path, tmp_path: Path, mark: Path) -> None:
    folder = corpus / "tokenizer"
    (folder / "config.json").write_text("{}")
    with_code(folder, mark)
    out = tmp_path / "out"
    assert pretrain(corpus, out, "--max_steps 1") == 0
    shutil.copytree(out, corpus / "out", dirs_exist_ok=True)
    settings = (exported(corpus, "llama") / "tokenizer_config.json").read_text("utf-8")
    assert "auto_map" not in settings, "it would be handed on to who trusts the export"


ESCAPE = "{{ ().__class__.__base__.__subclasses__() }}"
SHELL = "{{ cycler.__init__.__globals__.os.system('touch \"%s\"') }}"


@pytest.mark.parametrize("template", (ESCAPE, SHELL), ids=("classes", "shell"))
def test_a_chat_template_is_rendered_in_a_sandbox_or_not_at_all(
    corpus: Path, mark: Path, tmp_path: Path, template: str
) -> None:
    loud = tmp_path / "loud"
    jinja2.Template(template.replace("%s", str(loud))).render()
    assert loud.exists() or template == ESCAPE, "without a sandbox it does what it says"
    hostile = template.replace("%s", str(mark))
    edit_json(corpus / "tokenizer" / "tokenizer_config.json", chat_template=hostile)
    assert pretrain(corpus, tmp_path / "out", "--max_steps 1") == 0  # ours is not in that file
    theirs = AutoTokenizer.from_pretrained(exported(corpus, "minimind"), trust_remote_code=False)
    with pytest.raises(jinja2.exceptions.SecurityError):
        theirs.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)


@pytest.mark.parametrize("content", (DEEP, "[]", "{", "\x80"))
def test_settings_of_a_tokenizer_that_are_none(
    corpus: Path, tmp_path: Path, content: str, refused: Refused
) -> None:
    path = corpus / "tokenizer" / "tokenizer_config.json"
    path.write_text(content, "utf-8")
    weights = f"--weights {corpus}/out/pretrain_32.pth"
    told = refused("export_model.py", export_flags(corpus, tmp_path / "x"), weights)
    assert f"{path} is not a JSON object" in told


def spoilt(corpus: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = corpus / "tokenizer" / "tokenizer.json"
    spec = json.loads(path.read_text("utf-8"))
    change(spec)
    path.write_text(json.dumps(spec), "utf-8")
    return path


def test_a_tokenizer_that_pads_to_a_terabyte(trained: Path, corpus: Path) -> None:
    side = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    padding = {"strategy": {"Fixed": 10**12}, "pad_to_multiple_of": None, **side}
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    spoilt(corpus, lambda spec: spec.update(padding=padding, truncation=cut))
    text = "river mountain 长江"
    as_meant = Tokenizer(trained / "tokenizer").encode(text)
    mended = Tokenizer(corpus / "tokenizer")
    assert mended.encode(text) == as_meant and mended.encode_batch([text]) == [as_meant]


def test_a_tokenizer_with_ids_beyond_the_embedding(corpus: Path, refused: Refused) -> None:
    def move(spec: dict[str, Any]) -> None:
        last = max(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
        spec["model"]["vocab"][last] = 10**6

    path = spoilt(corpus, move)
    told = refused("1-pretrain.py", *pretrain_flags(corpus, corpus / "new"))
    assert f"{path}" in told and "train_tokenizer.py" in told


def test_a_tokenizer_of_another_kind(corpus: Path, refused: Refused) -> None:
    def make_words(spec: dict[str, Any]) -> None:
        vocab = spec["model"]["vocab"]
        spec["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}

    path = spoilt(corpus, make_words)
    told = refused("1-pretrain.py", *pretrain_flags(corpus, corpus / "new"))
    assert f"{path} is of the kind WordLevel, expected BPE" in told


@pytest.mark.parametrize("content", (DEEP, "", "[]", '{"version": "1.0"}', '{"model": 10}'))
def test_a_tokenizer_that_is_none(corpus: Path, content: str, refused: Refused) -> None:
    path = corpus / "tokenizer" / "tokenizer.json"
    path.write_text(content)
    told = refused("1-pretrain.py", *pretrain_flags(corpus, corpus / "new"))
    assert f"{path} is not a tokenizer file" in told


# ----------------------------------------------------------------------------- adapters


@pytest.fixture
def adapter(corpus: Path) -> Path:
    """Return the folder of an adapter for the corpus's model."""
    known = json.loads((corpus / "out" / "pretrain_32.json").read_text("utf-8"))
    model = MiniMindForCausalLM(LMConfig(**known["config"]))
    add_adapter(model, LoRAConfig(rank=2))
    save_adapter(model, corpus / "adapter", Path("base.pth"))
    return corpus / "adapter"


def adapter_flags(corpus: Path, adapter: Path) -> tuple[str, str]:
    weights = f"--weights {corpus}/out/pretrain_32.pth"
    return export_flags(corpus, corpus / "x"), f"{weights} --lora {adapter}"


@each_format
def test_an_adapter_with_code(
    corpus: Path, adapter: Path, hostile: dict[str, Any], form: str, refused: Refused
) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(FORMATS[form](hostile))
    told = refused("export_model.py", *adapter_flags(corpus, adapter))
    assert f"{path} is damaged" in told
    path.rename(adapter / "adapter_model.bin")
    told = refused("export_model.py", *adapter_flags(corpus, adapter))
    assert f"{path} does not exist; an adapter_model.bin is not read" in told


def test_an_adapter_does_not_choose_its_base(
    corpus: Path, adapter: Path, hostile: dict[str, Any]
) -> None:
    base = corpus / "hostile.pth"
    base.write_bytes(zip_of(hostile))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    run("export_model.py", *adapter_flags(corpus, adapter))


def test_an_adapter_that_names_a_hostile_base(
    corpus: Path, adapter: Path, hostile: dict[str, Any], refused: Refused
) -> None:
    """Without --weights its base is taken from where it says, and read like any weights."""
    base = corpus / "hostile.pth"
    base.write_bytes(zip_of(hostile))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    told = refused("export_model.py", export_flags(corpus, corpus / "x"), f"--lora {adapter}")
    assert f"{base} is not a readable weights file" in told


@pytest.mark.slow
def test_no_value_in_an_adapter_is_a_crash(corpus: Path, adapter: Path, build: Callable) -> None:
    path = adapter / "adapter_config.json"
    whole = path.read_text("utf-8")
    fields = (*json.loads(whole), "use_rslora", "alpha_pattern", "init_lora_weights")
    odd = [(name, value) for name in fields for value in ODD_VALUES]
    odd += [("alpha_pattern", {"(": 1.0}), ("alpha_pattern", {"w": "x"})]
    odd += [("alpha_pattern", {r"(\w+\.?)+!": 1.0})]  # would be compared until the sun goes out
    odd += [("alpha_pattern", {".*.*.*.*.*.*.*.*.*!": 1.0})]
    for name, value in odd:
        edit_json(path, **{name: value})
        try:
            load_adapter(build(dim=32, vocab_size=300), adapter)
        except ValueError as error:
            assert str(adapter) in str(error), f"{name}={value!r}: {error}"
        path.write_text(whole, "utf-8")
    path.write_text(DEEP)
    with pytest.raises(ValueError, match="is not JSON"):
        load_adapter(build(dim=32, vocab_size=300), adapter)


def test_an_adapter_of_rank_zero(build: Callable, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    empty = {n: t[:0] if "lora_A" in n else t[:, :0].contiguous() for n, t in tensors.items()}
    save_file(empty, path)
    with pytest.raises(ValueError, match="do not belong together"):
        load_adapter(build(dim=32, vocab_size=300), adapter)


# ----------------------------------------------------------------------------- states


def rewrite_state(folder: Path, data: bytes) -> None:
    """Replace a state's data, and say so in its manifest: a hash beside a file is no signature."""
    (folder / "state.pt").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit_json(folder / "manifest.json", bytes=len(data), sha256=digest)


@each_format
def test_a_state_with_code(
    corpus: Path, hostile: dict[str, Any], form: str, refused: Refused
) -> None:
    out = corpus / "out"
    step = out / "checkpoints" / "pretrain_32" / "step_4"
    rewrite_state(step, FORMATS[form]({"model": hostile}))
    flags = *pretrain_flags(corpus, out), "--max_steps", "4", "--resume"
    if form == "tar":  # not even opened: as good as damaged, so the one before is taken
        assert run("1-pretrain.py", *flags) == 0
        return
    told = refused("1-pretrain.py", *flags)
    assert f"{step}/state.pt holds more than weights and settings" in told
    assert f"remove {step}" in told
    shutil.rmtree(step)
    assert run("1-pretrain.py", *flags) == 0


@pytest.mark.parametrize("content", (DEEP, "null", '{"step": 4}', "\x80\x04"))
def test_a_state_with_another_manifest(corpus: Path, content: str) -> None:
    out = corpus / "out"
    (out / "checkpoints" / "pretrain_32" / "step_4" / "manifest.json").write_text(content)
    flags = *pretrain_flags(corpus, out), "--max_steps", "4", "--resume"
    assert run("1-pretrain.py", *flags) == 0  # from step 2


def test_a_state_that_is_no_table(corpus: Path) -> None:
    out = corpus / "out"
    rewrite_state(out / "checkpoints" / "pretrain_32" / "step_4", zip_of(torch.zeros(3)))
    flags = *pretrain_flags(corpus, out), "--max_steps", "4", "--resume"
    assert run("1-pretrain.py", *flags) == 0


# ----------------------------------------------------------------------------- data


def test_a_history_with_code(corpus: Path, tmp_path: Path, mark: Path, refused: Refused) -> None:
    calls = (
        f"__import__('os').system('touch \"{mark}\"')",
        f"[('a', open({str(mark)!r}, 'w').name)]",
        f"[x for x in [('a', 'b')] if open({str(mark)!r}, 'w')]",
        f"(lambda: open({str(mark)!r}, 'w'))()",
        f"[['a', f'{{open({str(mark)!r}, chr(119))}}']]",
        "[" * 100_000, "-" * 100_000 + "1", "1" + "+1" * 100_000, "a" + ".a" * 100_000,
        "9" * 10_000,
    )  # fmt: skip
    path = write_csv(tmp_path / "single.csv", ["history", "q", "a"], [[c, "q", "a"] for c in calls])
    flags = f"--data_path {path} --out_dir {tmp_path}/out --tokenizer {corpus}/tokenizer"
    init = f"--init_from {corpus}/out/pretrain_32.pth --device cpu"
    told = refused("3-full_sft.py", flags, init)
    assert re.search(rf"{path}: none of the first 10 records can be used", told)


@pytest.mark.slow
def test_a_reference_that_is_a_pickle(corpus: Path, tmp_path: Path, mark: Path) -> None:
    pairs = [
        {"prompt": f"river {i}", "chosen": "山 水", "rejected": "no " * (1 + i % 3)}
        for i in range(300)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), "utf-8")
    files = f"--data_path {tmp_path}/pairs.json --out_dir {tmp_path}/out --device cpu"
    init = f"--init_from {corpus}/out/pretrain_32.pth --tokenizer {corpus}/tokenizer"
    flags = f"{files} {init} --max_steps 1 --overwrite"
    assert run("5-dpo_train.py", flags) == 0
    found = list((tmp_path / "pairs.tokens").glob("reference-*.npy"))
    assert found
    right = {path: path.read_bytes() for path in found}
    objects, huge, packed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(objects, np.array([make(mark) for make in CALLS.values()], object), allow_pickle=True)
    np.lib.format.write_array_header_1_0(
        huge, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 2)}
    )
    np.savez(packed, a=np.zeros(3))
    raw = pickle.dumps(CALLS["open"](mark))
    for content in (objects.getvalue(), huge.getvalue(), packed.getvalue(), raw, b""):
        for path in found:
            path.write_bytes(content)
        assert run("5-dpo_train.py", flags) == 0
        assert {path: path.read_bytes() for path in found} == right, "measured anew"


@pytest.mark.slow
def test_a_store_of_pickles(corpus: Path, mark: Path) -> None:
    """The pieces are plain numbers of a known size; what is not is made anew."""
    for name in ("tokens-00000.bin", "offsets.bin", "manifest.json"):
        path = corpus / "pretrain.tokens" / name
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(CALLS["open"](mark)))
        assert pretrain(corpus, corpus / "new", "--max_steps 1 --overwrite") == 0
        assert path.stat().st_size == len(before)


@pytest.mark.parametrize("file", ("tokens-00000.bin", "offsets.bin"))
@pytest.mark.parametrize("value", (2**16 - 1, 300, 2**63, 2**64 - 1, 2**40))
def test_a_store_with_numbers_out_of_range(
    corpus: Path, file: str, value: int, refused: Refused
) -> None:
    """The sizes are right, so that only the numbers tell."""
    path = corpus / "pretrain.tokens" / file
    for plan in path.parent.glob("plan-*"):
        plan.unlink()
    if file == "offsets.bin" and value < 2**16:
        pytest.skip("an offset that there is")
    n_bytes = 2 if file.startswith("tokens") else 8
    data = bytearray(path.read_bytes())
    for at in range(n_bytes, len(data), n_bytes):
        data[at : at + n_bytes] = (value % 2 ** (8 * n_bytes)).to_bytes(n_bytes, "little")
    path.write_bytes(data)
    if file.startswith("tokens") and value % 2**16 < 300:
        pytest.skip("an id that there is")
    told = refused("1-pretrain.py", *pretrain_flags(corpus, corpus / "new"), "--max_steps", "2")
    assert f"{path.parent}" in told and "damaged" in told and "built again" in told


def test_no_value_in_a_manifest_is_a_crash(corpus: Path) -> None:
    folder = corpus / "pretrain.tokens"
    path = folder / "manifest.json"
    whole = path.read_text("utf-8")
    odd = [*ODD_VALUES, 10**9, 2**60, [10**30], ["../../x"], [-5, 5], {"documents": [10**9]}]
    for name in json.loads(whole):
        for value in odd:
            edit_json(path, **{name: value})
            try:
                store = TokenStore(folder)
                store.lengths(store.held_out)
            except StaleStore as error:
                assert str(folder) in str(error)
    path.write_text(DEEP)
    with pytest.raises(StaleStore, match="is not the manifest"):
        TokenStore(folder)


def test_a_quiz_of_depth(tmp_path: Path) -> None:
    (tmp_path / "quiz.jsonl").write_text(DEEP)
    with pytest.raises(ValueError, match=r"quiz.jsonl:1: not JSON"):
        load_quiz(tmp_path / "quiz.jsonl")


# ----------------------------------------------------------------------------- the law

SOURCES = sorted(
    path
    for path in [*ROOT.glob("*.py"), *(p for d in ("model", "dataset", "benchmarks", "docs")
                                       for p in (ROOT / d).rglob("*.py"))]
)  # fmt: skip
UNPICKLERS = {
    f"{module}.{name}"
    for module in ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal")
    for name in ("load", "loads", "Unpickler")
}
RUNNERS = {"eval", "exec", "compile", "__import__"}
OTHERS = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "shelve.open", "pandas.read_pickle"}
OTHERS |= {"torch.jit.load", "torch.hub.load", "jinja2.Environment", "jinja2.Template"}


def offences(source: str) -> list[str]:
    """Return the calls in a source that could run what a file says."""
    tree = ast.parse(source)
    known = {}  # local names of what is imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {a.asname or a.name.split(".")[0]: a.asname and a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        name = (known.get(first) or first) + dot + rest
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        is_wrong = (
            name in UNPICKLERS | RUNNERS | OTHERS
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False")
            or given.get("trust_remote_code", "False") != "False"
        )
        if is_wrong:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_runs_what_a_file_says(path: Path) -> None:
    assert not offences(path.read_text("utf-8"))


@pytest.mark.parametrize(
    "source",
    (
        "import torch; torch.load(f)",
        "import torch; torch.load(f, weights_only=False)",
        "from torch import load; load(f)",
        "import torch as t; t.load(f, weights_only=flag)",
        "import pickle; pickle.loads(b)",
        "from pickle import load as read; read(f)",
        "import pickle; pickle.Unpickler(f).load()",
        "eval(cell)",
        "exec(code)",
        "import yaml; yaml.load(f)",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)",
    ),
)
def test_the_law_sees_what_breaks_it(source: str) -> None:
    assert offences(source)
