"""Draw the logo: python images/make/logo.py

The mark is a speech bubble that holds an M of tokens; its middle is what the model reads next. The
word is drawn with strokes and arcs, so that no font is needed. The colours have a contrast of 3.8
to 4.9 with white and with the dark page of GitHub (#0d1117).
"""

from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1]
BLUE, ORANGE, LIGHT = "#3b80c2", "#b8721f", "#ffc46b"
CELL, PITCH = 15, 18
LETTER = ("#...#", "##.##", "#.o.#", "#...#", "#...#")
TOP, MIDDLE, BASE = 32, 58, 104  # of capitals, of small letters, and where both stand
STROKE = 12


def mark() -> str:
    """Return the bubble with its tail and the letter of five by five tokens."""
    bubble = (
        "M26 8H114A18 18 0 0 1 132 26V110A18 18 0 0 1 114 128H56L34 148V128H26"
        "A18 18 0 0 1 8 110V26A18 18 0 0 1 26 8Z"
    )
    parts = [f'<path d="{bubble}" fill="{BLUE}"/>']
    left = 70 - (4 * PITCH + CELL) / 2
    top = 68 - (4 * PITCH + CELL) / 2
    for row, line in enumerate(LETTER):
        for column, sign in enumerate(line):
            if sign != ".":
                colour = LIGHT if sign == "o" else "#ffffff"
                x, y = left + column * PITCH, top + row * PITCH
                parts.append(
                    f'<rect x="{x:g}" y="{y:g}" width="{CELL}" height="{CELL}" rx="3.5" '
                    f'fill="{colour}"/>'
                )
    return "\n".join(parts)


def capital_m(x: float) -> tuple[str, float]:
    """Return the path of an M whose left stem stands at ``x``, and its width."""
    return f"M{x} {BASE}V{TOP}L{x + 29} {TOP + 44}L{x + 58} {TOP}V{BASE}", 58


def small_i(x: float) -> tuple[str, float]:
    return f"M{x} {BASE}V{MIDDLE}M{x} {TOP + 2}V{TOP + 2.01}", 0


def small_n(x: float) -> tuple[str, float]:
    radius = 18
    top = MIDDLE + radius
    arch = f"M{x} {top}A{radius} {radius} 0 0 1 {x + 2 * radius} {top}V{BASE}"
    return f"M{x} {BASE}V{MIDDLE}{arch}", 2 * radius


def small_d(x: float) -> tuple[str, float]:
    radius = (BASE - MIDDLE) / 2
    right, centre = x + 2 * radius, MIDDLE + radius
    bowl = f"M{right} {centre}A{radius} {radius} 0 1 1 {x} {centre}"
    return f"{bowl}A{radius} {radius} 0 1 1 {right} {centre}M{right} {TOP - 4}V{BASE}", 2 * radius


def word(letters: str, x: float, colour: str) -> tuple[str, float]:
    """Return strokes that spell ``letters`` from ``x`` on, and where the next letter stands."""
    shapes = {"M": capital_m, "i": small_i, "n": small_n, "d": small_d}
    paths = []
    for letter in letters:
        path, width = shapes[letter](x)
        paths.append(path)
        x += width + 2 * STROKE
    drawn = (
        f'<path d="{"".join(paths)}" fill="none" stroke="{colour}" stroke-width="{STROKE}" '
        'stroke-linecap="round" stroke-linejoin="round"/>'
    )
    return drawn, x


def main() -> None:
    mini, x = word("Mini", 168, BLUE)
    mind, x = word("Mind", x + 4, ORANGE)
    width, height = round(x - 2 * STROKE + STROKE / 2 + 8), 156
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="MiniMind">\n'
        f"<title>MiniMind</title>\n{mark()}\n{mini}\n{mind}\n</svg>\n"
    )
    path = IMAGES / "logo.svg"
    path.write_text(svg)
    print(path.relative_to(IMAGES.parent))


if __name__ == "__main__":
    main()
