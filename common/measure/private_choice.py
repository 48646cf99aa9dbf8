"""Choosing a checkpoint by private utilities, at a stated epsilon: permute and flip.

Taking the best by exact Dice on patients is a query to them. Permute and flip [McKenna and Sheldon 2020, Alg. 1] has
the distribution of report-noisy-max with exponential noise [Ding et al. 2021; Dwork and Roth 2014, Claim 3.9] and
is never worse than the exponential mechanism. It needs no noise on floating-point scores, whose low bits
would leak [Mironov 2012]: scores are integers, and what is random are an order and coins.

Only the index leaves. Utilities that stand beside it in a report are answers of their own and paid for apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.measure.course import CheckpointRule, Choice, CoursePoint, joint_confidence, refusal


class Coins(Protocol):
    """The randomness of whoever holds the scores; a site's is keyed by its operating system."""

    def bernoulli(self, n: int, probability: float) -> NDArray[np.bool_]:
        """(n,) independent coin flips."""
        ...

    def permutation(self, n: int) -> NDArray[np.int64]:
        """A random order of range(n)."""
        ...


@dataclass(frozen=True, kw_only=True)
class NoisyMax:
    """A choice that is epsilon-DP.

    sensitivity: the most that one patient, added or removed, moves any one score, in the scores' integer units.
    monotone: a patient who is added lowers no score. Half the noise is then enough [Dwork and Roth 2014, Claim 3.9;
    McKenna and Sheldon 2020]: sums of Dice are monotone, sums of Dice minus one half are not.

    Raises ValueError for an epsilon that is not finite and above zero, or a sensitivity below one.
    """

    epsilon: float
    sensitivity: int
    monotone: bool

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon must be finite and above zero, got {self.epsilon}")
        if self.sensitivity < 1:
            raise ValueError(f"sensitivity must be at least one unit, got {self.sensitivity}")

    @property
    def rate(self) -> float:
        """How fast acceptance falls with each unit that a score is below the best."""
        return self.epsilon / (self.sensitivity * (1 if self.monotone else 2))

    def exponents(self, scores: Sequence[int]) -> list[float]:
        """gamma_i >= 0 for each score: a candidate that is met is accepted with probability exp(-gamma_i)."""
        best = max(scores)
        return [self.rate * (best - score) for score in scores]


def permute_and_flip(scores: Sequence[int], mechanism: NoisyMax, coins: Coins) -> int:
    """Index of a good score.  [McKenna and Sheldon 2020, Alg. 1]

    Candidates are met in random order; each is accepted with its probability. The best one always is, so one is.
    How long it takes tells about the scores: whoever can time a site must not see it.
    Raises ValueError without any score.
    """
    if not scores:
        raise ValueError("there is nothing to choose from")
    exponents = mechanism.exponents(scores)
    order = [int(i) for i in coins.permutation(len(scores))]
    return next(i for i in order if flip(exponents[i], coins))


def flip(gamma: float, coins: Coins) -> bool:
    """True with probability exp(-gamma), gamma >= 0.  [Canonne et al. 2020, Alg. 1]

    One coin for each whole unit and one for the rest: a single uniform of 52 bits is never below exp(-40), and an
    outcome that one cohort can give and its neighbour never does has no epsilon.
    """
    whole = math.floor(gamma)
    return all(bool(coins.bernoulli(1, math.exp(-1.0))[0]) for _ in range(whole)) and bool(
        coins.bernoulli(1, math.exp(whole - gamma))[0]
    )


def choose_privately(
    points: Sequence[CoursePoint], scores: Sequence[int], rule: CheckpointRule, mechanism: NoisyMax, coins: Coins
) -> Choice:
    """The rule's choice with private scores, (P,) integers, one a point, in the place of the points' utilities.

    Epsilon of the choice is the mechanism's. Which points are allowed must be public: their AUC limits are paid for
    and their epsilon is the accountant's. The reason names no utility.
    Raises ValueError when a point is exact, or scores and points differ in number.
    """
    if len(scores) != len(points):
        raise ValueError(f"{len(points)} checkpoints have {len(scores)} scores")
    if any(p.exact for p in points):
        raise ValueError(
            "exact AUC limits decide which checkpoints are allowed, and that would leak; nothing was chosen"
        )
    allowed = [i for i, p in enumerate(points) if rule.allows(p)]
    if not allowed:
        return Choice(index=None, reason=refusal(points, rule), confidence=None)
    index = allowed[permute_and_flip([scores[i] for i in allowed], mechanism, coins)]
    return Choice(
        index=index,
        reason=(
            f"round {points[index].round}: chosen by permute and flip at epsilon {mechanism.epsilon:g} among "
            f"{len(allowed)} allowed of {len(points)} checkpoints"
        ),
        confidence=joint_confidence(points),
    )
