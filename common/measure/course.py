"""The course of training: fidelity, utility and privacy at each checkpoint, and which checkpoint to take.

What is looked at here is either a simulation's exact value, and then says so, or an answer that was paid for; choosing
among paid-for answers costs nothing more. To choose by exact private values is a query of its own: see
`private_choice.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.measure.fidelity.fidelity import Fidelity
from common.measure.intervals import Interval


@dataclass(frozen=True, kw_only=True)
class CoursePoint:
    """One checkpoint.

    epsilon_spent: by training, for each patient; None where training is not private. fidelity: None where it was not
    measured. utility: Dice on real scans of a segmenter trained on synthetic ones. generator_attack, critic_attack:
    AUC, members against non-members; the critic's is None where none was asked, since it never leaves its site.
    exact: computed without noise from patients' scans, in a research simulation only.

    Raises ValueError for a negative round or epsilon.
    """

    round: int
    epsilon_spent: float | None
    fidelity: Fidelity | None
    utility: Interval
    generator_attack: Interval
    critic_attack: Interval | None
    exact: bool

    def __post_init__(self) -> None:
        if self.round < 0:
            raise ValueError(f"a round is not negative, got {self.round}")
        if self.epsilon_spent is not None and not 0 <= self.epsilon_spent < math.inf:
            raise ValueError(f"epsilon is finite and not negative, got {self.epsilon_spent}")

    @property
    def epsilon(self) -> float:
        """Infinite where training is not private."""
        return math.inf if self.epsilon_spent is None else self.epsilon_spent


@dataclass(frozen=True, kw_only=True)
class CheckpointRule:
    """Maximise utility subject to the AUC's upper limit and epsilon.

    max_auc: for the upper end of the generator attack's interval. max_epsilon: None puts no cap, and then training
    without privacy is allowed too. Raises ValueError for an AUC outside (0, 1] or an epsilon not above zero.
    """

    max_auc: float
    max_epsilon: float | None

    def __post_init__(self) -> None:
        if not 0 < self.max_auc <= 1:
            raise ValueError(f"max_auc must lie in (0, 1], got {self.max_auc}")
        if self.max_epsilon is not None and not 0 < self.max_epsilon < math.inf:
            raise ValueError(f"max_epsilon must be finite and above zero, got {self.max_epsilon}")

    def within_auc(self, point: CoursePoint) -> bool:
        """Whether the attack is bounded well enough."""
        return point.generator_attack.high <= self.max_auc

    def within_epsilon(self, point: CoursePoint) -> bool:
        """Whether the checkpoint spent little enough."""
        return self.max_epsilon is None or point.epsilon <= self.max_epsilon

    def allows(self, point: CoursePoint) -> bool:
        """Whether both hold."""
        return self.within_auc(point) and self.within_epsilon(point)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen checkpoint and why, or None and why not.

    confidence: that the chosen AUC's upper limit holds although the best of several was picked: each point may err by
    half of its own interval's error, and they are added up  [Bonferroni]. None without a choice.
    """

    index: int | None
    reason: str
    confidence: float | None


def pareto_front(points: Sequence[CoursePoint]) -> tuple[int, ...]:
    """Points that no other beats: as good in utility, AUC's upper limit and epsilon, and better in one.  [Pareto 1906]

    In the order of `points`; equal points are all on the front.
    """
    aims = [(-p.utility.estimate, p.generator_attack.high, p.epsilon) for p in points]
    return tuple(i for i, mine in enumerate(aims) if not any(_beats(other, mine) for other in aims))


def choose(points: Sequence[CoursePoint], rule: CheckpointRule) -> Choice:
    """The allowed point of greatest utility; among equals that of least AUC limit, then epsilon, then round."""
    allowed = [i for i, p in enumerate(points) if rule.allows(p)]
    if not allowed:
        return Choice(index=None, reason=refusal(points, rule), confidence=None)

    def rank(i: int) -> tuple[float, float, float, int]:
        p = points[i]
        return (-p.utility.estimate, p.generator_attack.high, p.epsilon, p.round)

    best = min(allowed, key=rank)
    p = points[best]
    spent = "no epsilon, it is not private" if p.epsilon_spent is None else f"epsilon {p.epsilon_spent:.3g}"
    return Choice(
        index=best,
        reason=(
            f"round {p.round}: utility {p.utility.estimate:.3f}, the greatest of {len(allowed)} allowed of "
            f"{len(points)} checkpoints; AUC at most {p.generator_attack.high:.3f}, {spent}"
        ),
        confidence=joint_confidence(points),
    )


def refusal(points: Sequence[CoursePoint], rule: CheckpointRule) -> str:
    """Why no point is allowed, with the nearest miss of each condition."""
    if not points:
        return "no checkpoint was measured, so none was chosen"
    reasons = []
    leaky = [p.generator_attack.high for p in points if not rule.within_auc(p)]
    if leaky:
        reasons.append(f"{len(leaky)} have an AUC limit above {rule.max_auc:g} (the lowest {min(leaky):.3f})")
    costly = [p.epsilon for p in points if not rule.within_epsilon(p)]
    if costly:
        least = min(costly)
        lowest = "none is private" if math.isinf(least) else f"the lowest {least:.3g}"
        reasons.append(f"{len(costly)} spent more than epsilon {rule.max_epsilon:g} ({lowest})")
    return f"none of {len(points)} checkpoints is allowed: {'; '.join(reasons)}. None was chosen"


def joint_confidence(points: Sequence[CoursePoint]) -> float:
    """That all points' upper AUC limits hold at once, whatever their dependence; not below zero."""
    return max(1.0 - sum((1.0 - p.generator_attack.confidence) / 2.0 for p in points), 0.0)


def _beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b
