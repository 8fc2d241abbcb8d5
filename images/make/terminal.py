"""Draw what the scripts say on a terminal: python images/make/terminal.py [--run [NAME...]]

Without --run it draws again what images/make/terminal.json holds. With it the commands run first,
in a terminal of 100 columns, and their screens are kept there: all of them or those named. That
needs the demo's weights (make demo), a free port 8000 and curl.

    eval      2-eval.py --interactive, questions typed one after another
    server    my_openai_api.py and three requests by curl, one of them streamed
    pretrain  1-pretrain.py on the demo's corpus, to its end

Text is drawn as outlines in cells of one or two columns: DejaVu Sans Mono comes with matplotlib,
Chinese needs Noto Sans Mono CJK SC (Debian: apt-get install fonts-noto-cjk).
"""

import argparse
import json
from pathlib import Path

from screen import columns_of
from style import GREEN, IMAGES

HERE = Path(__file__).resolve().parent
CAPTURES = HERE / "terminal.json"
COLUMNS = 100
CELL, LINE, PAD, BAR = 8.0, 19.0, 16.0, 30.0  # pixels
BACK, EDGE, TEXT, DIM, PROMPT = "#1b2027", "#39414c", "#e2e5e9", "#9aa4b0", "#8fd19e"
CJK = "Noto Sans Mono CJK SC"


class Glyphs:
    """Outlines of characters, each kept once, as a drawing's definitions."""

    def __init__(self) -> None:
        from fontTools.ttLib import TTFont
        from matplotlib import get_data_path

        latin = TTFont(Path(get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf")
        self.fonts = [(latin, CELL / latin["hmtx"]["a"][0])]
        self.drawn: dict[str, str] = {}

    def name(self, character: str) -> str:
        """Return the id of a character's outline."""
        if character not in self.drawn:
            self.drawn[character] = self.outline(character)
        return f"c{ord(character):x}"

    def outline(self, character: str) -> str:
        """Return the path of a character on its first cell's left end, the base line at 0."""
        from fontTools.pens.svgPathPen import SVGPathPen
        from fontTools.pens.transformPen import TransformPen

        while True:
            for font, scale in self.fonts:
                glyph = font.getBestCmap().get(ord(character))
                if glyph is None:
                    continue
                shapes = font.getGlyphSet()
                room = CELL * columns_of(character)
                pen = SVGPathPen(shapes, ntos=lambda value: f"{value:.2f}".rstrip("0").rstrip("."))
                left = (room - shapes[glyph].width * scale) / 2
                shapes[glyph].draw(TransformPen(pen, (scale, 0, 0, -scale, left, 0)))
                return pen.getCommands()
            if len(self.fonts) == 2:
                raise SystemExit(f"no outline of {character!r} in {CJK} or DejaVu Sans Mono")
            self.fonts.append(load_cjk())

    def definitions(self) -> str:
        return "".join(f'<path id="c{ord(c):x}" d="{d}"/>' for c, d in sorted(self.drawn.items()))


def load_cjk() -> tuple[object, float]:
    """Return the installed Chinese font and the scale at which a character fills two cells."""
    from fontTools.ttLib import TTCollection
    from matplotlib import font_manager

    for path in sorted(font_manager.findSystemFonts()):
        if "NotoSans" in path and "CJK" in path and path.endswith("Regular.ttc"):
            for font in TTCollection(path).fonts:
                if font["name"].getDebugName(4).startswith(CJK):
                    return font, 2 * CELL * 0.94 / font["head"].unitsPerEm
    raise SystemExit(f"no font {CJK} here: apt-get install fonts-noto-cjk, or your system's name")


def window(glyphs: Glyphs, title: str, rows: list[str], top: float) -> tuple[str, float]:
    """Return a terminal window as SVG, its upper edge at ``top``, and its height."""
    width = COLUMNS * CELL + 2 * PAD
    height = BAR + len(rows) * LINE + 1.4 * PAD
    parts = [
        f'<rect x="0.5" y="{top + 0.5:g}" width="{width - 1:g}" height="{height - 1:g}" rx="9" '
        f'fill="{BACK}" stroke="{EDGE}"/>',
        f'<path d="M0.5 {top + BAR:g}H{width - 0.5:g}" stroke="{EDGE}"/>',
    ]
    for n, colour in enumerate(("#c0483e", "#d9822b", GREEN)):
        parts.append(f'<circle cx="{18 + 17 * n}" cy="{top + 15:g}" r="5" fill="{colour}"/>')
    left = (width - CELL * columns_of(title)) / 2
    parts.append(line(glyphs, title, left, top + 20, DIM))
    for n, row in enumerate(rows):
        y = top + BAR + 0.5 * PAD + (n + 1) * LINE - 4
        if row[:2] in ("$ ", "> "):  # what was typed into a shell
            parts.append(line(glyphs, row[0], PAD, y, PROMPT))
            parts.append(line(glyphs, row[2:], PAD + 2 * CELL, y, "#ffffff"))
        else:
            parts.append(line(glyphs, row, PAD, y, TEXT))
    return "\n".join(parts), height


def line(glyphs: Glyphs, text: str, x: float, y: float, colour: str) -> str:
    """Return a row of characters, each in its cells."""
    uses = []
    for character in text:
        if character != " ":
            uses.append(f'<use href="#{glyphs.name(character)}" x="{x:g}"/>')
        x += CELL * columns_of(character)
    return f'<g fill="{colour}" transform="translate(0 {y:g})">{"".join(uses)}</g>'


def draw(name: str, windows: list[dict]) -> None:
    """Write one picture: its windows below one another."""
    glyphs, parts, top = Glyphs(), [], 0.0
    for shown in windows:
        svg, height = window(glyphs, shown["title"], shown["rows"], top)
        parts.append(svg)
        top += height + 12
    width, height = COLUMNS * CELL + 2 * PAD, top - 12
    title = "; ".join(shown["title"] for shown in windows)
    path = IMAGES / f"terminal_{name}.svg"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img">\n<title>{title}</title>\n'
        f"<defs>{glyphs.definitions()}</defs>\n" + "\n".join(parts) + "\n</svg>\n",
        encoding="utf-8",
    )
    print(path.relative_to(IMAGES.parent))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs="*", metavar="NAME", help="eval, server, pretrain")
    args = parser.parse_args()
    captures = json.loads(CAPTURES.read_text(encoding="utf-8")) if CAPTURES.exists() else {}
    if args.run is not None:
        from terminal_runs import RUNS

        for name in args.run or RUNS:
            if name not in RUNS:
                parser.error(f"--run {name}: use {', '.join(RUNS)}")
            captures[name] = RUNS[name](COLUMNS)
        text = json.dumps(captures, ensure_ascii=False, indent=1)
        CAPTURES.write_text(text + "\n", encoding="utf-8")
    for name, windows in captures.items():
        draw(name, windows)


if __name__ == "__main__":
    main()
