"""The pages say what is so: links lead somewhere, twins agree, code shown is the code that runs,
programs print what stands below them. That commands work is tested in test_docs_commands.py.
"""

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
from pages import ROOT, Code, Page, all_pages, read_page, twins

PAGES = all_pages()
TWINS = twins()
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
NAMED_CODE = re.compile(r"`([\w./-]+\.py): ([\w.]+)`")
NAMED_FILE = re.compile(
    r"`((?:model|tests|benchmarks|images|docs|dataset/demo)/[\w./-]*\w\.\w+|[\w-]+\.py)`"
)
TOLERANCE = 0.02  # of numbers that a program prints: processors round differently


def by_name(page: Page) -> str:
    return page.name


# ---- links and names ----


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_and_pictures_lead_somewhere(page: Page) -> None:
    for target in page.links + page.pictures:
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.path.parent / path).resolve() if path else page.path
        assert file.exists(), f"{page.name}: {target} leads nowhere"
        assert file.is_relative_to(ROOT), f"{page.name}: {target} leaves the project"
        if anchor:
            assert anchor in read_page(file).anchors, f"{page.name}: no heading makes {target}"


@cache
def objects_of(path: Path) -> dict[str, str]:
    """Return the source of what a module defines: functions, classes, methods, constants."""
    text = path.read_text("utf-8")
    found: dict[str, str] = {}

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            source = ast.get_source_segment(text, node) or ""
            names: list[str] = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                names = [node.name]
                decorators = [f"@{ast.unparse(d)}" for d in node.decorator_list]
                source = "\n".join([*decorators, source])
            elif isinstance(node, ast.Assign):
                names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            found.update({prefix + name: source for name in names})
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                add(node.body, f"{prefix}{node.name}.")

    add(ast.parse(text).body, "")
    return found


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_code_that_is_named_exists(page: Page) -> None:
    for name in NAMED_FILE.findall(page.prose):
        places = (ROOT, page.path.parent, ROOT / "model")
        assert any((place / name).exists() for place in places), f"{page.name}: no file {name}"
    for file, name in NAMED_CODE.findall(page.prose):
        assert (ROOT / file).is_file(), f"{page.name}: no file {file}"
        assert name in objects_of(ROOT / file), f"{page.name}: {file} defines no {name}"


def excerpts() -> list[tuple[Page, Code]]:
    return [(page, c) for page in PAGES for c in page.code if re.match(r"[\w./-]+\.py: ", c.marker)]


@pytest.mark.parametrize(
    ("page", "code"), excerpts(), ids=lambda x: x.name if isinstance(x, Page) else x.marker
)
def test_code_that_is_shown_stands_in_the_source(page: Page, code: Code) -> None:
    """In this order, line by line; ``...`` stands for lines that are left out."""
    file, name = code.marker.split(": ")
    objects = objects_of(ROOT / file)
    assert name in objects, f"{page.name}:{code.line}: {file} defines no {name}"
    source = [line.strip() for line in objects[name].split("\n")]
    place, may_skip = 0, True
    for line in (line.strip() for line in code.text.split("\n")):
        if line == "...":
            may_skip = True
        elif line:
            where = source.index(line, place) if line in source[place:] else None
            assert where is not None, f"{page.name}:{code.line}: {name} does not go {line!r}"
            left_out = [text for text in source[place:where] if text]
            assert may_skip or not left_out, f"{page.name}:{code.line}: left out {left_out}"
            place, may_skip = where + 1, False


@pytest.mark.parametrize("page", [p for p in PAGES if p.name.startswith("docs/")], ids=by_name)
def test_no_python_goes_untested(page: Page) -> None:
    for code in page.code:
        if code.language == "python":
            is_known = code.marker == "run" or re.fullmatch(r"[\w./-]+\.py: [\w.]+", code.marker)
            assert is_known, f"{page.name}:{code.line}: neither a program nor an excerpt"


def test_flags_in_the_text_are_some_scripts() -> None:
    """Those of launchers, pip and pytest apart."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("model/*.py"), *ROOT.glob("benchmarks/*.py")]
    sources += [*ROOT.glob("images/make/*.py")]
    known = {f for path in sources for f in re.findall(r"--[a-z]\w*", path.read_text("utf-8"))}
    known |= set("--nproc_per_node --nnodes --rdzv_endpoint --num_gpus --hostfile --no_ssh".split())
    known |= set("--node_rank --master_addr --master_port --dist".split())
    for page in PAGES:
        if page.name == "benchmarks/LOG.md":  # which keeps the flags of its day
            continue
        for inline in re.findall(r"`([^`]+)`", page.prose):
            unknown = set(re.findall(r"(?<![\w-])--[a-z]\w*", inline)) - known
            assert not unknown, f"{page.name}: no script has {' '.join(unknown)}"


# ---- two languages ----


@pytest.mark.parametrize(("english", "chinese"), TWINS, ids=by_name)
def test_twins_have_the_same_parts(english: Page, chinese: Page) -> None:
    assert [level for level, _ in english.headings] == [level for level, _ in chinese.headings]
    mine, theirs = ([(c.language, c.marker, c.text) for c in p.code] for p in (english, chinese))
    assert mine == theirs, "code blocks differ"
    assert english.pictures == chinese.pictures
    assert len(english.tables) == len(chinese.tables)
    for one, other in zip(english.tables, chinese.tables, strict=True):
        assert [len(row) for row in one] == [len(row) for row in other], f"table {one[0]}"
        for row, twin in zip(one, other, strict=True):
            assert numbers(row) == numbers(twin), f"figures differ: {row} and {twin}"


def numbers(cells: list[str]) -> list[str]:
    return sorted(NUMBER.findall(" ".join(cells)))


@pytest.mark.parametrize(("english", "chinese"), TWINS, ids=by_name)
def test_twins_link_alike_and_to_each_other(english: Page, chinese: Page) -> None:
    def of_english(page: Page) -> list[str]:
        """Links that every reader follows, anchors apart, as the English page has them."""
        places = {target.partition("#")[0] for target in page.links}
        own = {english.path.name, chinese.path.name}
        return sorted(place.replace("_zh.md", ".md") for place in places - own)

    assert of_english(english) == of_english(chinese)
    assert chinese.path.name in english.links and english.path.name in chinese.links
    for page, other in ((english, "_zh.md"), (chinese, ".md")):
        for target in page.links:
            path = target.partition("#")[0]
            if not path.endswith(".md") or "://" in path or path in (chinese.path.name, "LOG.md"):
                continue
            has_twin = page.path.parent / path.replace("_zh.md", ".md").replace(".md", "_zh.md")
            is_other = path.endswith("_zh.md") == (other == "_zh.md")
            if has_twin.exists() and path != english.path.name:
                assert not is_other, f"{page.name}: {target} is in the other language"


def test_every_page_for_readers_has_a_twin() -> None:
    alone = {"benchmarks/LOG.md", "dataset/demo/README.md"}
    named = {page.name for pair in TWINS for page in pair}
    assert {page.name for page in PAGES} - named == alone


@pytest.mark.parametrize("page", [chinese for _, chinese in TWINS], ids=by_name)
def test_chinese_pages_are_chinese(page: Page) -> None:
    for level, heading in page.headings:
        assert level == 1 or re.search(r"[\u4e00-\u9fff]", heading), f"{page.name}: {heading}"
    letters = re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>|[\s|#*-]", "", page.prose)
    chinese = len(re.findall(r"[\u3000-\u9fff\uff00-\uffef]", letters))
    assert chinese > 0.45 * len(letters), f"{page.name}: {chinese} of {len(letters)}"


# ---- programs ----


def programs() -> list[tuple[Page, Code, Code]]:
    """Programs with what they print; the Chinese pages have the same ones."""
    found = []
    for page in PAGES:
        if page.name.endswith("_zh.md"):
            continue
        for code, following in zip_longest(page.code, page.code[1:]):
            if code.marker == "run":
                found.append((page, code, following))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "code", "shown"),
    programs(),
    ids=lambda x: x.name if isinstance(x, Page) else str(getattr(x, "line", "")),
)
def test_programs_print_what_is_shown(page: Page, code: Code, shown: Code, tmp_path: Path) -> None:
    assert shown is not None and shown.language == "text", f"{page.name}:{code.line}: no output"
    file = tmp_path / "program.py"
    file.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code.text}\n", "utf-8")
    done = subprocess.run(
        [sys.executable, file], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert_alike(done.stdout.strip().split("\n"), shown.text.strip().split("\n"))


def assert_alike(printed: list[str], shown: list[str]) -> None:
    """Compare words exactly and numbers within ``TOLERANCE``."""
    assert len(printed) == len(shown), "\n".join(printed)
    for line, expected in zip(printed, shown, strict=True):
        assert NUMBER.sub("#", line).split() == NUMBER.sub("#", expected).split()
        values, wanted = (
            [float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (line, expected)
        )
        assert values == pytest.approx(wanted, rel=TOLERANCE), f"{line!r}, not {expected!r}"


# ---- pictures ----


@pytest.mark.soak
@pytest.mark.parametrize(
    "script",
    sorted(
        path.name
        for path in (ROOT / "images" / "make").glob("*.py")
        if "save(" in path.read_text("utf-8") and path.name not in ("style.py", "terminal.py")
    ),
)
def test_pictures_are_what_their_scripts_draw(script: str, tmp_path: Path) -> None:
    """Byte for byte, on a machine whose arithmetic is that of the one that drew them."""
    for folder in ("model", "images", "docs", "dataset/demo"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    drawn = subprocess.run(
        [sys.executable, f"images/make/{script}"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    names = re.findall(r"^images/\S+\.svg$", drawn.stdout, re.M)
    assert names, drawn.stdout
    for name in names:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), f"{name} is older"


def test_pictures_are_shown_somewhere() -> None:
    shown = {(p.path.parent / name).resolve() for p in PAGES for name in p.pictures}
    there = {path for kind in ("svg", "png") for path in (ROOT / "images").rglob(f"*.{kind}")}
    assert {path.name for path in there - shown} <= {"page_phone.png"}
