"""Charts of the report as inline SVG: the same numbers give the same bytes.

Drawn with matplotlib's object interface. Text stays text, in the page's own font, so that it can be
searched, read aloud and scaled; every figure has a title and a description for those who cannot see it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import median

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from server.audit.facts import RoundCourse
from server.audit.result import EndpointResult

INK = "#1f2933"
MUTED = "#52606d"
GRID = "#d9dee4"
MEMBER = "#0b5394"  # both colours keep 4.5:1 on white, and differ in lightness for print and colour blindness
NONMEMBER = "#b45309"
LIMIT = "#9b1c1c"
SITE_COLOURS = ("#0b5394", "#b45309", "#2f6f4f", "#6b3fa0", "#7a4a1e", "#3d5a80")

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


def course_figure(rounds: Sequence[RoundCourse], *, target_epsilon: float | None) -> str:
    """Epsilon spent, update norms of the sites where known, and seconds, by round."""
    norms = any(r.update_norms for r in rounds)
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _draw_epsilon(axes, rounds, target_epsilon),
        *([lambda axes: _draw_norms(axes, rounds)] if norms else []),
        lambda axes: _draw_sites(axes, rounds),
        lambda axes: _draw_seconds(axes, rounds),
    ]
    last = rounds[-1]
    spent = (
        "no privacy budget, because training had no noise" if last.epsilon is None else f"epsilon {last.epsilon:.2f}"
    )
    description = f"{len(rounds)} rounds. After the last one, training had spent {spent}."
    return _svg("course", "Course of training", description, panels, height=2.5)


def roc_figure(endpoints: Sequence[EndpointResult], *, false_positive_rate: float, max_tpr: float) -> str:
    """ROC of every endpoint on a logarithmic false-positive axis, with its band and the release limit."""
    panels = [(lambda axes, e=e: _draw_roc(axes, e, false_positive_rate, max_tpr)) for e in endpoints]
    found = "; ".join(
        f"{endpoint_title(e.name)}: {_percent(e.tpr.estimate)} of members found at {_percent(false_positive_rate)}"
        for e in endpoints
    )
    description = (
        f"Share of members found against share of non-members wrongly accused. {found}. The diagonal is guessing."
    )
    return _svg("roc", "How often members are recognised", description, panels, height=3.3)


def histogram_figure(endpoints: Sequence[EndpointResult]) -> str:
    """Share of members and of non-members in every bin of each score."""
    panels = [(lambda axes, e=e: _draw_histogram(axes, e)) for e in endpoints]
    description = (
        "Noised shares of patients in every bin of the audit plan. "
        "Overlapping shapes mean that scores do not tell members from non-members."
    )
    return _svg("scores", "Scores of members and non-members", description, panels, height=2.9)


def endpoint_title(name: str) -> str:
    """An endpoint's name for people."""
    return {"near_copy": "Near copy", "nearest": "Nearest synthetic scan"}.get(name, name.replace("_", " "))


def _svg(key: str, title: str, description: str, panels: Sequence[Callable[[Axes], None]], *, height: float) -> str:
    """Draw panels side by side; `key` keeps the ids of several figures on one page apart."""
    settings = {**_STYLE, "svg.hashsalt": f"consilium-{key}"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(9.6, height), layout=ConstrainedLayoutEngine(wspace=0.07))
        for index, draw in enumerate(panels):
            draw(figure.add_subplot(1, len(panels), index + 1))
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), key, title, description)


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


def _draw_epsilon(axes: Axes, rounds: Sequence[RoundCourse], target: float | None) -> None:
    axes.set_title("Epsilon spent by training")
    spent = [(r.round, r.epsilon) for r in rounds if r.epsilon is not None]
    if spent:
        axes.plot(*zip(*spent, strict=True), color=MEMBER, linewidth=1.8, marker="o", markersize=3)
    else:
        axes.text(0.5, 0.5, "no noise, no guarantee", transform=axes.transAxes, ha="center", color=LIMIT)
    if target is not None:
        axes.axhline(target, color=LIMIT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"target {target:g}", (0.02, target), xycoords=("axes fraction", "data"), va="bottom", color=LIMIT,
            xytext=(0, 2), textcoords="offset points",
        )  # fmt: skip
        axes.set_ylim(0, 1.15 * max([target, *(e for _, e in spent)]))
    _round_axis(axes, rounds)


def _draw_norms(axes: Axes, rounds: Sequence[RoundCourse]) -> None:
    axes.set_title("Length of updates (L2)")
    sites = sorted({site for r in rounds for site in r.update_norms})
    if len(sites) <= len(SITE_COLOURS):
        for site, colour, marker in zip(sites, SITE_COLOURS, "osD^v*", strict=False):
            known = [(r.round, r.update_norms[site]) for r in rounds if site in r.update_norms]
            axes.plot(*zip(*known, strict=True), color=colour, marker=marker, markersize=3, linewidth=1.2, label=site)
        axes.legend(loc="best")
    else:  # too many lines to follow: the middle and the range
        held = [(r.round, list(r.update_norms.values())) for r in rounds if r.update_norms]
        numbers = [number for number, _ in held]
        axes.fill_between(numbers, [min(n) for _, n in held], [max(n) for _, n in held], color=MEMBER, alpha=0.18)
        axes.plot(numbers, [median(n) for _, n in held], color=MEMBER, label=f"median of {len(sites)} sites, range")
        axes.legend(loc="best")
    axes.set_ylim(bottom=0)
    _round_axis(axes, rounds)


def _draw_sites(axes: Axes, rounds: Sequence[RoundCourse]) -> None:
    axes.set_title("Sites in the round")
    axes.bar([r.round for r in rounds], [len(r.used) for r in rounds], width=0.7, color=MEMBER, label="used")
    short = [r for r in rounds if r.excluded]
    if short:
        axes.bar(
            [r.round for r in short], [len(r.excluded) for r in short], bottom=[len(r.used) for r in short],
            width=0.7, color="white", edgecolor=NONMEMBER, hatch="////", label="left out",
        )  # fmt: skip
    axes.set_ylim(0, 1.35 * max(len(r.used) + len(r.excluded) for r in rounds))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.legend(loc="upper right", ncols=2)
    _round_axis(axes, rounds)


def _draw_seconds(axes: Axes, rounds: Sequence[RoundCourse]) -> None:
    axes.set_title("Seconds a round")
    axes.bar([r.round for r in rounds], [r.seconds for r in rounds], width=0.7, color="#7b8794")
    axes.set_ylim(bottom=0)
    _round_axis(axes, rounds)


def _round_axis(axes: Axes, rounds: Sequence[RoundCourse]) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlim(min(r.round for r in rounds) - 0.6, max(r.round for r in rounds) + 0.6)
    axes.grid(visible=False, axis="x")


def _draw_roc(axes: Axes, endpoint: EndpointResult, false_positive_rate: float, max_tpr: float) -> None:
    axes.set_title(endpoint_title(endpoint.name))
    floor = min(1e-3, false_positive_rate / 5)
    # A threshold between two bin edges is reached by tossing a coin, so the curve is straight between points.
    rates = np.geomspace(floor, 1.0, 121)
    known = [p.false_positive_rate for p in endpoint.roc]
    found, low, high = (
        np.interp(rates, known, [getattr(p, name) for p in endpoint.roc]).clip(0, 1)
        for name in ("true_positive_rate", "low", "high")
    )
    axes.set_xscale("log")
    axes.set_yscale("function", functions=(_root, np.square))  # linear would squeeze the end that matters
    axes.fill_between(rates, low, high, color=MEMBER, alpha=0.18, linewidth=0, label="confidence band")
    axes.plot(rates, found, color=MEMBER, linewidth=1.8, label="members found")
    axes.plot(rates, rates, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="guessing")
    below, estimate, above = (_rate(v) for v in (endpoint.tpr.low, endpoint.tpr.estimate, endpoint.tpr.high))
    axes.errorbar(
        [false_positive_rate], [estimate], yerr=[[estimate - below], [above - estimate]], color=INK, fmt="o",
        markersize=4, capsize=3, linewidth=1.2, label=f"at {_percent(false_positive_rate)} wrongly accused",
    )  # fmt: skip
    axes.plot([floor, false_positive_rate], [max_tpr, max_tpr], color=LIMIT, linewidth=1.6, label="release limit")
    axes.set_xlim(floor, 1)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("non-members wrongly accused (log scale)")
    axes.set_ylabel("members found (root scale)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value)))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda _value, _: ""))
    axes.legend(loc="upper left", frameon=True, framealpha=1, edgecolor="none")


def _root(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Square root; what lies below zero stays at zero."""
    root: NDArray[np.float64] = np.sqrt(np.maximum(rates, 0))
    return root


def _draw_histogram(axes: Axes, endpoint: EndpointResult) -> None:
    axes.set_title(endpoint_title(endpoint.name))
    counts = {histogram.group: histogram.counts for histogram in endpoint.histograms}
    members = [a + b for a, b in zip(counts["member_a"], counts["member_b"], strict=True)]
    bins = range(len(members))
    axes.bar(bins, _shares(members), width=0.9, color=MEMBER, alpha=0.35, label="members")
    walls = [i - 0.5 for i in range(len(members) + 1)]
    axes.stairs(_shares(counts["nonmember"]), walls, color=NONMEMBER, linewidth=1.8, label="non-members")
    step = max(1, math.ceil(len(endpoint.edges) / 9))
    shown = range(0, len(endpoint.edges), step)
    axes.set_xticks([i + 0.5 for i in shown], [f"{endpoint.edges[i]:g}" for i in shown])
    axes.set_xlim(-0.7, len(members) - 0.3)
    axes.set_ylim(bottom=0)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("score: more like a copy to the right; bin edges")
    axes.set_ylabel("share of patients")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value)))
    axes.legend(loc="upper right")


def _shares(counts: Sequence[int]) -> list[float]:
    """Counts as shares of their sum; noise below zero is drawn as zero."""
    total = sum(counts)
    return [max(0.0, c / total) if total > 0 else 0.0 for c in counts]


def _rate(value: float) -> float:
    """Only for drawing: noise may carry a rate outside [0, 1]."""
    return min(max(value, 0.0), 1.0)


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
