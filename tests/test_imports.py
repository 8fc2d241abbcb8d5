"""Which module imports which: one way, never in a circle, nothing heavy before --help."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A row for every module of model/: what it may import of the project. A row may wait for its
# module; a module without a row fails.
ARROWS: dict[str, str] = {
    "LMConfig": "",
    "model": "LMConfig",  # exported with the weights, so nothing else
    # text and tokens
    "tokenizer": "",
    "tally": "",
    "records": "tally",
    "rows": "records tally",
    "tables": "records rows tally",
    "encoding": "",
    "tokens": "",
    "store_writer": "encoding tokens",
    "packing": "",
    "order": "",
    "dataset": "encoding losses order packing rows store_writer tally tokenizer tokens",
    "pairs": "dataset encoding losses packing rows states store_writer tally tokenizer tokens",
    # training
    "losses": "",
    "lora": "states",
    "optim": "",
    "runtime": "",
    "states": "",
    "metrics": "states",
    "prefetch": "",
    "console": "",
    "estimate": "LMConfig fused_pieces model",
    "course": "optim",
    "packed": "model",
    "fast_step": "model packed slot_cache",
    "checkpoint": "LMConfig lora model packed runtime states tokenizer",
    "fused_pieces": "",
    "fused_attention": "fused_pieces",
    "fused_feed_forward": "fused_pieces",
    "fused": "fused_attention fused_feed_forward fused_pieces model",
    "engine": "fused model optim runtime",
    "zero": "engine model runtime",
    "memory": "engine fused LMConfig console course estimate model runtime",
    "report": "console course engine estimate memory runtime states",
    "saves": "checkpoint course engine metrics model runtime states zero",
    "expert_load": "model",
    "trainer": "checkpoint console course engine estimate evaluation expert_load generation losses "
    "memory metrics model order prefetch report runtime sampling saves text_stream zero",
    "opening": "checkpoint memory runtime",
    # into the formats of others, and back
    "llama": "LMConfig",
    "export_folder": "LMConfig llama states tokenizer",
    "export_gguf": "LMConfig export_folder llama tokenizer",
    "hub": "LMConfig",
    "export": "checkpoint export_folder export_gguf hub llama states",
    "readback": "LMConfig checkpoint export_gguf llama model tokenizer",
    # talking to it
    "sampling": "",
    "text_stream": "sampling",
    "prompts": "",
    "slot_cache": "",
    "threads": "",
    "answers": "sampling text_stream",
    "generation": "answers fast_step sampling slot_cache text_stream threads",
    "engine_thread": "generation sampling",
    "evaluation": "losses",
    "repetition": "",
    "ceval": "evaluation records tally",
    "ceval_report": "ceval evaluation states",
    "stages": "ceval ceval_report checkpoint evaluation quiz repetition rows tally",
    "quiz": "checkpoint generation prompts runtime sampling",
    "script_parser": "",
    "flags": "runtime script_parser",
    "terminal": "checkpoint flags generation sampling",
    # serving it
    "model_list": "LMConfig checkpoint lora",
    "api_errors": "",
    "api_requests": "api_errors sampling",
    "api_responses": "generation sampling tokenizer",
    "api_service": "api_errors checkpoint engine_thread generation model_list sampling",
    "api_metrics": "api_service",
    "api_middleware": "api_errors api_metrics api_service",
    "api_streams": "api_errors api_responses api_service generation",
    "api_server": "api_errors api_metrics api_middleware api_requests api_responses api_service "
    "api_streams",
    "api_run": "api_server api_service generation model_list terminal",
    # the page and the terminal client
    "chats": "",
    "remote": "",
    "terminal_client": "chats remote terminal",
    "page_labels": "",
    "page_answers": "chats engine_thread generation model_list prompts remote sampling",
    "page_settings": "chats page_answers remote",
    "page": "chats page_answers page_labels page_settings",
}

SCRIPTS = sorted(
    [*ROOT.glob("*.py"), *(ROOT / "dataset").rglob("*.py")], key=lambda path: path.as_posix()
)
MODULES = sorted((ROOT / "model").glob("*.py"))
SCRIPT_NAMES = {path.stem for path in ROOT.glob("*.py")}
HEAVY = {
    "accelerate", "datasets", "deepspeed", "fastapi", "gguf", "matplotlib", "numpy", "openai",
    "pandas", "peft", "safetensors", "streamlit", "tokenizers", "torch", "transformers", "trl",
    "uvicorn", "wandb",
}  # fmt: skip


def imports(path: Path, *, module_level: bool = False) -> set[str]:
    """Return the dotted names that a file imports, relative ones as ``model.name``."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["model" if node.level else "", node.module]))
            found |= {f"{base}.{alias.name}" for alias in node.names}
        if module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if module_level and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue  # for type checkers alone
        pending.extend(ast.iter_child_nodes(node))
    return found


def of_the_project(path: Path, *, module_level: bool = False) -> set[str]:
    """Return the modules of ``model/`` that a file imports."""
    dotted = (name.split(".") for name in imports(path, module_level=module_level))
    return {parts[1] for parts in dotted if parts[0] == "model" and len(parts) > 1}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_along_its_arrows(path: Path) -> None:
    if path.stem == "__init__":
        assert path.read_text(encoding="utf-8") == "", "model/__init__.py stays empty"
        return
    assert path.stem in ARROWS, f"model/{path.name} has no row in ARROWS: what may it import?"
    too_many = of_the_project(path) - set(ARROWS[path.stem].split())
    assert not too_many, (
        f"model/{path.name} imports {sorted(too_many)}, which ARROWS does not allow"
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_names_its_neighbours_relatively(path: Path) -> None:
    # transformers copies relative imports along with an exported model
    absolute = [
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for name in node.names
    ]
    assert not [name for name in absolute if name.split(".")[0] == "model"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_no_script(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & (SCRIPT_NAMES - {"model"})


def test_the_table_has_no_circle() -> None:
    order: list[str] = []
    while len(order) < len(ARROWS):
        waiting = [name for name in ARROWS if name not in order]
        free = [name for name in waiting if set(ARROWS[name].split()) <= set(order)]
        assert free, f"a circle among {waiting}, or a name without a row"
        order += free


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_script_imports_no_script(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & (SCRIPT_NAMES - {path.stem})


def heavy_at_import(path: Path, seen: frozenset[Path] = frozenset()) -> set[str]:
    """Return the heavy packages that importing a file loads, through the modules it imports."""
    heavy = {name.split(".")[0] for name in imports(path, module_level=True)} & HEAVY
    for name in of_the_project(path, module_level=True):
        module = ROOT / "model" / f"{name}.py"
        if module.exists() and module not in seen:
            heavy |= heavy_at_import(module, seen | {module})
    return heavy


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_script_answers_help_before_anything_heavy_is_imported(path: Path) -> None:
    heavy = heavy_at_import(path)
    assert not heavy, f"{path.name} imports {sorted(heavy)} at its top: do it after parse_args"


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import model, sys; print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "")
