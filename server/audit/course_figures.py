"""Utility, attacks and epsilon by round, and which rounds no other beats."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from common.measure.course import CoursePoint, pareto_front
from common.measure.intervals import Interval
from server.audit.drawing import LIMIT, MEMBER, MUTED, NONMEMBER, PLANTED, Drawn, Panel, draw
from server.course import Chosen, Course

EXACT_LABEL = "EXACT – RESEARCH ONLY"


def points_figure(course: Course, chosen: Chosen) -> Drawn:
    """Four panels over the measured points; the chosen one is ringed in each."""
    points = course.points
    number = None if chosen.row is None else chosen.row.round
    panels: list[Panel] = [
        lambda axes: _draw_utility(axes, points, number),
        lambda axes: _draw_attacks(axes, points, chosen),
        lambda axes: _draw_epsilon(axes, points, chosen),
        lambda axes: _draw_front(axes, points, number),
    ]
    return draw(
        "points", "Points in the course of training", in_words(course, chosen), panels, height=2.7, across=len(panels)
    )


def in_words(course: Course, chosen: Chosen) -> str:
    """What the figure shows; the table beside it has every number."""
    front = ", ".join(str(course.points[i].round) for i in pareto_front(course.points))
    label = f"{EXACT_LABEL}. " if course.exact else ""
    picked = "No round is chosen" if chosen.row is None else f"Round {chosen.row.round} is chosen"
    return (
        f"{label}{len(course.points)} points with utility, attacks and epsilon by round. {picked}. "
        f"No other round beats {front or 'any'} in all three."
    )


def _draw_utility(axes: Axes, points: Sequence[CoursePoint], chosen: int | None) -> None:
    axes.set_title("Utility (Dice on held-out)")
    rounds = [p.round for p in points]
    axes.fill_between(
        rounds, [p.utility.low for p in points], [p.utility.high for p in points], color=MEMBER, alpha=0.18
    )
    axes.plot(rounds, [p.utility.estimate for p in points], color=MEMBER, marker="o", markersize=3)
    _ring(axes, [(p.round, p.utility.estimate) for p in points if p.round == chosen])
    _round_axis(axes, rounds)


def _draw_attacks(axes: Axes, points: Sequence[CoursePoint], chosen: Chosen) -> None:
    axes.set_title("Attacks, AUC")
    rounds = [p.round for p in points]
    _band(axes, rounds, [p.generator_attack for p in points], colour=MEMBER, marker="o", label="generator")
    critic = [(p.round, p.critic_attack) for p in points if p.critic_attack is not None]
    if critic:
        _band(axes, *map(list, zip(*critic, strict=True)), colour=NONMEMBER, marker="s", label="critic")
    if chosen.rule.max_auc < 1:
        axes.axhline(chosen.rule.max_auc, color=LIMIT, linewidth=1.2, linestyle=(0, (4, 3)), label="limit")
    axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.03)
    axes.legend(loc="best")
    _round_axis(axes, rounds)


def _band(axes: Axes, rounds: list[int], found: list[Interval], *, colour: str, marker: str, label: str) -> None:
    """Estimates in their intervals, cut to what an AUC can be."""
    low, high = [max(i.low, 0.0) for i in found], [_shown(i.high) for i in found]
    axes.fill_between(rounds, low, high, color=colour, alpha=0.14)
    axes.plot(rounds, [_shown(i.estimate) for i in found], color=colour, marker=marker, markersize=3, label=label)


def _shown(auc: float) -> float:
    return min(auc, 1.0)


def _draw_epsilon(axes: Axes, points: Sequence[CoursePoint], chosen: Chosen) -> None:
    axes.set_title("Epsilon spent by training")
    spent = [(p.round, p.epsilon_spent) for p in points if p.epsilon_spent is not None]
    if spent:
        axes.plot(*zip(*spent, strict=True), color=MEMBER, marker="o", markersize=3)
        axes.set_ylim(bottom=0)
    else:
        axes.text(0.5, 0.5, "no noise, no guarantee", transform=axes.transAxes, ha="center", color=LIMIT)
    if chosen.rule.max_epsilon is not None:
        axes.axhline(chosen.rule.max_epsilon, color=LIMIT, linewidth=1.2, linestyle=(0, (4, 3)))
    _round_axis(axes, [p.round for p in points])


def _draw_front(axes: Axes, points: Sequence[CoursePoint], chosen: int | None) -> None:
    axes.set_title("Pareto front")
    front = set(pareto_front(points))
    for on_front, colour, marker, label in ((True, PLANTED, "D", "front"), (False, "#7b8794", "o", "beaten")):
        some = [p for i, p in enumerate(points) if (i in front) == on_front]
        if some:
            axes.scatter(
                [_shown(p.generator_attack.high) for p in some], [p.utility.estimate for p in some],
                color=colour, marker=marker, s=22, label=label,
            )  # fmt: skip
    for p in points:
        axes.annotate(
            str(p.round), (_shown(p.generator_attack.high), p.utility.estimate),
            xytext=(4, 3), textcoords="offset points", fontsize=7.5,
        )  # fmt: skip
    _ring(axes, [(_shown(p.generator_attack.high), p.utility.estimate) for p in points if p.round == chosen])
    axes.set_xlabel("AUC, upper limit")
    axes.set_ylabel("Dice")
    axes.legend(loc="best")


def _ring(axes: Axes, at: Sequence[tuple[float, float]]) -> None:
    if at:
        axes.scatter([x for x, _ in at], [y for _, y in at], s=110, facecolors="none", edgecolors=LIMIT, linewidths=1.4)


def _round_axis(axes: Axes, rounds: Sequence[int]) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)
