"""The attacks as figures: ROC curves on logarithmic axes, score histograms, bounds beside their limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from server.audit.drawing import INK, LIMIT, MEMBER, MUTED, NONMEMBER, PLANTED, Drawn, draw, percent
from server.audit.result import AuditResult, EndpointResult
from server.audit.threats import attack_title

ProvenLimit = Callable[[float], float]  # from a false-positive rate to the most that any attack can find there

_FLOOR = 1e-3  # where both axes of a ROC begin; fewer than a thousand patients resolve nothing below


def roc_figure(audit: AuditResult, proven: ProvenLimit | None) -> Drawn:
    """ROC of every endpoint on two logarithmic axes, with band, guessing, release limit and proven limit."""
    rate = audit.false_positive_rate
    panels = [(lambda axes, e=e: _draw_roc(axes, e, audit, proven)) for e in audit.endpoints]
    found = "; ".join(
        f"{attack_title(e.name)}: {percent(e.tpr.estimate)} of members found at {percent(rate)}"
        for e in audit.endpoints
    )
    limit = f" The proven limit there is {percent(proven(rate))}." if proven else ""
    description = (
        f"Share of members found against share of non-members wrongly accused. {found}. The diagonal is guessing."
        f"{limit}"
    )
    return draw("roc", "How often members are recognised", description, panels, height=3.5)


def histogram_figure(audit: AuditResult) -> Drawn:
    """Share of members, held-out patients and planted copies in every bin; noised counts come fitted."""
    panels = [(lambda axes, e=e: _draw_histogram(axes, e)) for e in audit.endpoints]
    description = (
        "Shares of patients in every bin of the audit plan; noised counts are fitted so that none is below zero. "
        "Overlapping shapes mean that scores do not tell members from non-members."
    )
    return draw("scores", "Scores of members, held-out patients and planted copies", description, panels, height=3.1)


def bounds_figure(audit: AuditResult) -> Drawn:
    """Intervals and upper bounds of AUC and true-positive rate beside their limits; others are in tables."""
    limits = audit.thresholds
    aucs = [row for e in audit.endpoints for row in _auc_rows(e, limits.max_auc, limits.max_auc_site)]
    rates = [
        (attack_title(e.name), (e.tpr.low, e.tpr.estimate, e.tpr.high), e.tpr_upper.value, limits.max_tpr)
        for e in audit.endpoints
    ]
    rate = percent(audit.false_positive_rate)
    panels = [
        lambda axes: _draw_bounds(axes, "AUC", aucs, chance=0.5),
        lambda axes: _draw_rates(axes, f"Members found, {rate} accused", rates, audit.false_positive_rate),
    ]
    over = [f"{name} ({upper:.3g}, limit {limit:g})" for name, _, upper, limit in (*aucs, *rates) if upper > limit]
    within = "Every AUC and rate bound drawn here lies within its limit."
    description = within if not over else f"Above its limit: {'; '.join(over)}."
    return draw("bounds", "Bounds beside their limits", description, panels, height=0.7 + 0.32 * len(aucs), across=2)


Row = tuple[str, tuple[float, float, float], float, float]  # name, (low, estimate, high), upper bound, limit


def _auc_rows(e: EndpointResult, limit: float, site_limit: float) -> list[Row]:
    title = attack_title(e.name)
    rows: list[Row] = [(title, (e.auc.low, e.auc.estimate, e.auc.high), e.auc_upper.value, limit)]
    worst = max(e.sites, key=lambda s: s.upper.value, default=None)
    if worst is not None:
        interval = (worst.auc.low, worst.auc.estimate, worst.auc.high)
        rows.append((f"{title}, {worst.site}", interval, worst.upper.value, site_limit))
    return rows


def _draw_bounds(axes: Axes, title: str, rows: Sequence[Row], *, chance: float) -> None:
    axes.set_title(title)
    places = range(len(rows))
    for y, (_, (low, estimate, high), upper, limit) in zip(places, rows, strict=True):
        axes.plot([low, high], [y, y], color=MEMBER, linewidth=1.6, label="interval" if y == 0 else None)
        axes.plot([estimate], [y], color=MEMBER, marker="o", markersize=4)
        axes.plot(
            [upper], [y], color=INK, marker="|", markersize=11, markeredgewidth=1.8, linestyle="none",
            label="upper bound" if y == 0 else None,
        )  # fmt: skip
        axes.plot(
            [limit], [y], color=LIMIT, marker="D", markersize=5, linestyle="none", label="limit" if y == 0 else None
        )
    axes.axvline(chance, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="guessing")
    axes.set_yticks(places, [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _draw_rates(axes: Axes, title: str, rows: Sequence[Row], rate: float) -> None:
    _draw_bounds(axes, title, rows, chance=rate)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)  # one for both panels


def _draw_roc(axes: Axes, endpoint: EndpointResult, audit: AuditResult, proven: ProvenLimit | None) -> None:
    axes.set_title(attack_title(endpoint.name))
    rate = audit.false_positive_rate
    # A threshold between two bin edges is reached by tossing a coin, so the curve is straight between points.
    rates = np.geomspace(_FLOOR, 1.0, 181)
    known = [p.false_positive_rate for p in endpoint.roc]
    found, low, high = (
        _shown(np.interp(rates, known, [getattr(p, name) for p in endpoint.roc]))
        for name in ("true_positive_rate", "low", "high")
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.fill_between(rates, low, high, color=MEMBER, alpha=0.18, linewidth=0, label="confidence band")
    axes.plot(rates, found, color=MEMBER, linewidth=1.8, label="members found")
    axes.plot(rates, rates, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="guessing")
    if proven is not None:
        ceiling = _shown(np.array([proven(a) for a in rates]))
        axes.plot(rates, ceiling, color=NONMEMBER, linewidth=1.4, linestyle=(0, (1, 1.5)), label="proven limit")
    below, estimate, above = _shown(np.array([endpoint.tpr.low, endpoint.tpr.estimate, endpoint.tpr.high]))
    axes.errorbar(
        [rate], [estimate], yerr=[[estimate - below], [above - estimate]], color=INK, fmt="o",
        markersize=4, capsize=3, linewidth=1.2, label=f"at {percent(rate)}",
    )  # fmt: skip
    axes.plot([_FLOOR, rate], [audit.thresholds.max_tpr] * 2, color=LIMIT, linewidth=1.6, label="release limit")
    axes.set_xlim(_FLOOR, 1)
    axes.set_ylim(_FLOOR, 1.06)
    axes.set_xlabel("wrongly accused (log scale)")
    axes.set_ylabel("members found (log scale)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
        axis.set_minor_formatter(FuncFormatter(lambda _value, _: ""))
    axes.legend(loc="lower right", frameon=True, framealpha=0.92, edgecolor="none", fontsize=7.5, labelspacing=0.25)


def _shown(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """On a logarithmic axis nothing lies at or below zero: what noise carried there is drawn at the edge."""
    cut: NDArray[np.float64] = np.clip(rates, _FLOOR, 1.0)
    return cut


def _draw_histogram(axes: Axes, endpoint: EndpointResult) -> None:
    axes.set_title(attack_title(endpoint.name))
    counts = {histogram.group: histogram.counts for histogram in endpoint.histograms}
    members = [a + b for a, b in zip(counts["member_a"], counts["member_b"], strict=True)]
    bins = range(len(members))
    axes.bar(bins, _shares(members), width=0.9, color=MEMBER, alpha=0.35, label="members")
    walls = [i - 0.5 for i in range(len(members) + 1)]
    axes.stairs(_shares(counts["nonmember"]), walls, color=NONMEMBER, linewidth=1.8, label="held out")
    if "planted" in counts:
        axes.stairs(
            _shares(counts["planted"]), walls, color=PLANTED, linewidth=1.4, linestyle=(0, (3, 2)),
            label="held out, some copied on purpose",
        )  # fmt: skip
    axes.axhline(0, color=MUTED, linewidth=0.8)
    step = max(1, math.ceil(len(endpoint.edges) / 9))
    shown = range(0, len(endpoint.edges), step)
    axes.set_xticks([i + 0.5 for i in shown], [f"{endpoint.edges[i]:g}" for i in shown])
    axes.set_xlim(-0.7, len(members) - 0.3)
    top = max(axes.get_ylim()[1], 0.01)
    axes.set_ylim(top=1.35 * top)  # room for the legend
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("score (bin edges)")
    axes.set_ylabel("share of patients")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axes.legend(loc="upper right", fontsize=7.5)


def _shares(counts: Sequence[int]) -> list[float]:
    """Counts as shares of their sum; a group that noise left without a sum is not drawn."""
    total = sum(counts)
    return [c / total for c in counts] if total > 0 else [math.nan] * len(counts)
