"""Inline SVG for the report: the same numbers give the same bytes.

Drawn with matplotlib's object interface. Text stays text, in the page's own font, so that it can be
searched, read aloud and scaled; every figure has a title and a description for those who cannot see it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK = "#1f2933"
MUTED = "#52606d"
GRID = "#d9dee4"
MEMBER = "#0b5394"  # both colours keep 4.5:1 on white, and differ in lightness for print and colour blindness
NONMEMBER = "#b45309"
PLANTED = "#2f6f4f"
LIMIT = "#9b1c1c"
WIDTH = 9.6  # inches; the page scales it

_STYLE: Mapping[str, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "consilium",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}

Panel = Callable[[Axes], None]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure, and the same in words. svg: draws it; Markdown and tests of words do without."""

    svg: Callable[[], str]
    description: str


def draw(key: str, title: str, description: str, panels: Sequence[Panel], *, height: float, across: int = 3) -> Drawn:
    """Panels in rows of at most `across`, each row `height` inches high.

    key: keeps the ids of several figures on one page apart.
    """
    return Drawn(
        svg=lambda: _inline(_panels(key, panels, height=height, across=across), key, title, description),
        description=description,
    )


def percent(value: float) -> str:
    """An axis label."""
    return f"{100 * value:.3g} %"


def _panels(key: str, panels: Sequence[Panel], *, height: float, across: int) -> str:
    """A stand-alone SVG document."""
    columns = min(len(panels), across)
    rows = -(-len(panels) // columns)
    settings = {**_STYLE, "svg.hashsalt": f"consilium-{key}"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(WIDTH, rows * height), layout=ConstrainedLayoutEngine(wspace=0.07, hspace=0.05))
        for index, panel in enumerate(panels):
            panel(figure.add_subplot(rows, columns, index + 1))
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return out.getvalue()


def _inline(document: str, key: str, title: str, description: str) -> str:
    """From a stand-alone SVG to one that can stand in a page beside others."""
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]+)"', body)
    if view_box is None:
        raise ValueError("the drawing has no viewBox")
    inner = body[body.index(">") + 1 :]
    inner = re.sub(r'\bid="', f'id="{key}-', inner)
    inner = re.sub(r"url\(#", f"url(#{key}-", inner)
    inner = re.sub(r'xlink:href="#', f'href="#{key}-', inner)
    inner = re.sub(r"font: ([\d.]+px|(?:\w+ )+[\d.]+px) [^;\"]*", _page_font, inner)
    return (
        f'<svg role="img" aria-labelledby="{key}-title {key}-description" viewBox="{view_box.group(1)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-description">{escape(description)}</desc>{inner}'
    )


def _page_font(match: re.Match[str]) -> str:
    """Size and weight of the drawing, family of the page."""
    *words, size = match.group(1).split()
    weight = "; font-weight: 700" if {"bold", "700"} & set(words) else ""
    return f"font-size: {size}{weight}"
