"""How the project's pictures look: one palette, drawn by matplotlib, on a card of their own so that
they are legible on light and dark pages alike.

SVGs are written without date and with text as outlines: the same figures give the same file on any
machine, whatever fonts it has. Labels are names from the code or English; the pages caption them.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

IMAGES = Path(__file__).resolve().parents[1]
PAPER, INK, FAINT = "#fbfaf7", "#22272e", "#8a929c"
BLUE, ORANGE, GREEN, RED, PURPLE = "#2f6fab", "#d9822b", "#3f8f5f", "#c0483e", "#7c5fa8"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE)

matplotlib.rcParams.update(
    {
        "svg.hashsalt": "minimind",
        "font.size": 10,
        "figure.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "axes.facecolor": PAPER,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e3e1da",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
)


def chart(width: float = 7.0, height: float = 3.6, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many inches and its axes, side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def drawing(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure to draw boxes in; a unit is a tenth of an inch, from the lower left."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 10 * width)
    axes.set_ylim(0, 10 * height)
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    colour: str = BLUE,
    *,
    size: float = 10,
    filled: bool = True,
) -> None:
    """Draw a rounded box from its lower left corner; a frame alone where it is not ``filled``."""
    patch = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.8",
        facecolor=colour + ("26" if filled else "00"),
        edgecolor=colour,
        linewidth=1.3,
        linestyle="-" if filled else (0, (4, 3)),
    )
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], *, bend: float = 0.0
) -> None:
    """Draw an arrow, curved by ``bend``."""
    axes.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={
            "arrowstyle": "-|>",
            "color": INK,
            "linewidth": 1.1,
            "shrinkA": 0,
            "shrinkB": 0,
            "connectionstyle": f"arc3,rad={bend}",
        },
    )


def save(figure: Figure, name: str) -> Path:
    """Write ``images/<name>.svg`` and say so."""
    path = IMAGES / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    print(path.relative_to(IMAGES.parent))
    return path
