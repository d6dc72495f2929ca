"""Pictures: drawn with matplotlib, for a page or for a file."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intrafuse.support.extras import import_extra
from intrafuse.support.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "Picture", "colour", "faint", "ink", "marker", "new_figure", "shortened"]

FORMATS = ("png", "svg", "pdf")
PAPER = ("#222222", "#cccccc")  # colors of text and of grid lines
PAGE = {
    "#010203": "var(--ink)",
    "#040506": "var(--faint)",
}  # colors of light or dark mode
METHODS = {
    "select": ("#4477aa", "o"),
    "intra-fusion": ("#dd5566", "s"),
    "moment": ("#228833", "^"),
    "folding": ("#aa8800", "D"),
    "auto": ("#3399bb", "v"),
}
OTHERS = (("#aa3377", "P"), ("#777777", "X"), ("#885533", "*"), ("#5566cc", "h"))
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may hold dollars
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


@dataclass(frozen=True)
class Picture:
    """A picture that is drawn on demand.

    Attributes:
        name: file name without suffix.
        title: title of the picture.
        alternative: text alternative with the main numbers.
        draw: makes the figure.
    """

    name: str
    title: str
    alternative: str
    draw: Callable[[], Figure]

    def svg(self, prefix: str) -> str:
        """Return the picture as SVG for a page; `prefix` makes its ids unique on the page."""
        drawn = io.StringIO()
        with _style(self.name, *PAGE), warnings.catch_warnings():
            # the page uses the reader's fonts
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            self.draw().savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
        text = drawn.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
        for placeholder, variable in PAGE.items():
            text = text.replace(placeholder, variable)
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)

    def write(self, path: Path) -> Path:
        """Write the picture to a file; the suffix sets the format."""
        with _style(self.name, *PAPER), replacing(path) as temporary:
            form = path.suffix.removeprefix(".").lower() or "png"
            metadata = {"Date": None} if form == "svg" else None
            self.draw().savefig(temporary, format=form, dpi=200, metadata=metadata)
        return path


def new_figure(height: float = 3.1, width: float = 4.8) -> tuple[Figure, Axes]:
    """Make a figure of the given size in inches, with one pair of axes.

    Raises:
        IntrafuseError: matplotlib is not installed.
    """
    module = import_extra("matplotlib.figure", "plots")
    figure = module.Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


def colour(name: str, order: int = 0) -> str:
    """Return the color of a method; `order` chooses the color of unknown names."""
    return METHODS.get(name, OTHERS[order % len(OTHERS)])[0]


def marker(name: str, order: int = 0) -> str:
    """Return the marker of a method, so that methods differ not only by color."""
    return METHODS.get(name, OTHERS[order % len(OTHERS)])[1]


def shortened(name: str, most: int = 28) -> str:
    """Shorten a long name at the front, because its end identifies the layer or file.

    >>> shortened("features.denseblock4.conv2", 12)
    '…lock4.conv2'
    """
    return name if len(name) <= most else f"…{name[1 - most :]}"


def ink() -> str:
    """Return the color of text, for use while a picture is drawn."""
    return import_extra("matplotlib", "plots").rcParams["text.color"]


def faint() -> str:
    """Return the color of grids, for use while a picture is drawn."""
    return import_extra("matplotlib", "plots").rcParams["grid.color"]


def _style(salt: str, text: str, lines: str) -> AbstractContextManager:
    """Return matplotlib settings that make pictures reproducible, with fixed ids."""
    colours = {**dict.fromkeys(INKED, text), "legend.labelcolor": text, "grid.color": lines}
    style = {**STYLE, **colours, "svg.hashsalt": salt}
    return import_extra("matplotlib", "plots").rc_context(style)
