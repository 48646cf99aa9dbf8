"""The course of training as a figure: what was spent, how far the sites moved, who took part, how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from server.audit.drawing import LIMIT, MEMBER, NONMEMBER, Drawn, Panel, draw
from server.audit.facts import RoundCourse

SITE_COLOURS = ("#0b5394", "#b45309", "#2f6f4f", "#6b3fa0", "#7a4a1e", "#3d5a80")


def course_figure(rounds: Sequence[RoundCourse], *, target_epsilon: float | None) -> Drawn:
    """Epsilon spent, update norms of the sites where known, and seconds, by round."""
    norms = any(r.update_norms for r in rounds)
    panels: list[Panel] = [
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
    return draw("course", "Course of training", description, panels, height=2.5, across=len(panels))


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
