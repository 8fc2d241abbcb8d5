"""The Markdown pages of the project, taken apart: headings, tables, code, links, pictures."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHINESE = "_zh.md"
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
IMAGE_TAG = re.compile(r"""<img [^>]*src="([^"]+)\"""")


@dataclass(frozen=True)
class Code:
    """A fenced block.

    Attributes:
        language: what stands behind the fence.
        marker: the comment right above it, such as ``run`` or ``model/lora.py: merge``.
        line: its number in the page, from 1.
    """

    language: str
    marker: str
    text: str
    line: int


@dataclass
class Page:
    """A page; prose is what is left without its code blocks."""

    path: Path
    prose: str = ""
    headings: list[tuple[int, str]] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    code: list[Code] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def links(self) -> list[str]:
        """Where its links lead, pictures left out."""
        return [target for bang, target in LINK.findall(self.prose) if not bang]

    @property
    def pictures(self) -> list[str]:
        """Its pictures, in Markdown or as tags."""
        shown = [target for bang, target in LINK.findall(self.prose) if bang]
        return shown + IMAGE_TAG.findall(self.prose)

    @property
    def anchors(self) -> set[str]:
        """What can follow a ``#``, by the rule of code hosts."""
        return {slug(text) for _, text in self.headings}

    def commands(self) -> list[tuple[int, str]]:
        """Return the shell commands with their lines; continued lines are joined."""
        found = []
        for block in self.code:
            if block.language != "bash":
                continue
            text = block.text.replace("\\\n", " ")
            quotes = ""  # a quoted text may go over several lines, as curl's bodies do
            for line in text.splitlines():
                quotes += ("\n" if quotes else "") + re.sub(r"(^|\s)#\s.*$", "", line)
                if quotes.count("'") % 2 == 0:
                    if command := quotes.strip():
                        found.append((block.line, command))
                    quotes = ""
        return found


def slug(heading: str) -> str:
    """Return the anchor of a heading: lower case, punctuation dropped, hyphens for spaces."""
    plain = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@cache
def read_page(path: Path) -> Page:
    """Take a page apart."""
    page = Page(path)
    prose: list[str] = []
    lines = iter(enumerate(path.read_text("utf-8").split("\n"), start=1))
    table: list[list[str]] = []
    above = ""
    for number, line in lines:
        if fence := re.match(r"( *)```(\w*)", line):
            indent, language = fence.groups()
            text = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                text.append(inner.removeprefix(indent))
            comment = re.fullmatch(r"<!-- (.+) -->", above)
            marker = comment[1] if comment else ""
            page.code.append(Code(language, marker, "\n".join(text), number))
            above = ""
            continue
        prose.append(line)
        if heading := re.match(r"(#+) (.+)", line):
            page.headings.append((len(heading[1]), heading[2]))
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                table.append(cells)
        elif table:
            page.tables.append(table)
            table = []
        above = line.strip()
    if table:
        page.tables.append(table)
    page.prose = "\n".join(prose)
    return page


def all_pages() -> list[Page]:
    """Return every page of the project, the README first."""
    paths = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
    paths += [ROOT / "dataset" / "demo" / "README.md", ROOT / "benchmarks" / "LOG.md"]
    return [read_page(path) for path in paths]


def twins() -> list[tuple[Page, Page]]:
    """Return the pages that exist in both languages, English first."""
    pages = [page for page in all_pages() if page.name.endswith(CHINESE)]
    return [(read_page(Path(str(p.path).replace(CHINESE, ".md"))), p) for p in pages]
