"""What guesses about canaries in one run prove about epsilon.

Each of m canaries is in or out of training by a fair coin of its own. Somebody who sees what the mechanism released
guesses the coins of the canaries that look most in and most out, shares fixed beforehand, and passes on the others.
Under a true claim few guesses can be right; how few gives three numbers, each with the ceiling that perfect guesses
would have reached:

- `claim_free`: holds for every (epsilon, delta)-private mechanism.  [Steinke et al. 2023, Thm 5.2]
- `gaussian_curve`: holds for every mechanism whose whole trade-off curve is that of some Gaussian release, which is
  the hypothesis about the claim.  [Mahloujifar et al. 2024]
- `independent`: an estimate. It takes the guesses for independent, which no theorem gives for one run.

Guesses are made by several rules at once; each is tested at its part of the error (Bonferroni) and the best counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import beta, binom

from common.measure.epsilon_bounds import EpsilonBound
from common.measure.intervals import Bound, Side
from common.privacy.accounting import epsilon
from common.privacy.mechanism import GaussianRelease

LARGEST_EPSILON = 100.0  # where the search for a bound ends; no number of canaries that fits a critic gets near it
LARGEST_MU = 60.0
PRECISION = 1e-6


@dataclass(frozen=True, kw_only=True)
class GuessRule:
    """Call this share of all canaries, the highest scores, `in`, and this share, the lowest, `out`."""

    into: float
    out: float

    def __post_init__(self) -> None:
        if not (0 <= self.into <= 0.5 and 0 <= self.out <= 0.5 and self.into + self.out > 0):
            raise ValueError(
                f"each share of guesses lies in [0, 0.5], one of them above 0, got {self.into}, {self.out}"
            )

    def halves(self, canaries: int) -> tuple[int, int]:
        """How many of so many canaries are called `in`, and how many `out`; rounded down."""
        return int(self.into * canaries + 1e-9), int(self.out * canaries + 1e-9)

    def guesses(self, canaries: int) -> int:
        """How many guesses are made."""
        return sum(self.halves(canaries))


# Fixed before any run. A strong leak shows best in a few sure guesses, a weak one in many. Sure ones are about those
# that took part: who was never drawn has left no trace, so nothing is sure about the others. Of 0.4 on either
# side all can be right although the coins never split evenly.
GUESS_RULES = (
    GuessRule(into=0.02, out=0.0),
    GuessRule(into=0.05, out=0.0),
    GuessRule(into=0.1, out=0.1),
    GuessRule(into=0.2, out=0.2),
    GuessRule(into=0.4, out=0.4),
)


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """By one rule: how many canaries were guessed, and how many of those guesses were right."""

    rule: GuessRule
    guesses: int
    correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.guesses:
            raise ValueError(f"{self.correct} right of {self.guesses} guesses")


@dataclass(frozen=True, kw_only=True)
class OneRunBounds:
    """The three numbers of the module's page."""

    claim_free: EpsilonBound
    gaussian_curve: EpsilonBound
    independent: EpsilonBound

    @property
    def proven(self) -> tuple[EpsilonBound, EpsilonBound]:
        """Those that a verdict may rest on."""
        return self.claim_free, self.gaussian_curve

    @property
    def all(self) -> tuple[EpsilonBound, ...]:
        """Proven ones first."""
        return *self.proven, self.independent


def guess(scores: Sequence[float], inside: Sequence[bool], rule: GuessRule) -> Guesses:
    """Guess by the rule and count what is right. scores, inside: one a canary, the score higher for those inside."""
    into, out = rule.halves(len(scores))
    order = np.argsort(np.asarray(scores, dtype=np.float64), kind="stable")
    truth = np.asarray(inside, dtype=bool)
    right = int((~truth[order[:out]]).sum() + truth[order[len(order) - into :]].sum())
    return Guesses(rule=rule, guesses=into + out, correct=right)


def add_up(totals: Iterable[Sequence[Guesses]]) -> tuple[Guesses, ...]:
    """The guesses of several sites, rule by rule. Canaries of different sites have coins and noise of their own.

    Raises ValueError when the sites guessed by different rules.
    """
    by_site = list(totals)
    if len({tuple(g.rule for g in counts) for counts in by_site}) != 1:
        raise ValueError("guesses by different rules cannot be added")
    return tuple(
        Guesses(rule=at[0].rule, guesses=sum(g.guesses for g in at), correct=sum(g.correct for g in at))
        for at in zip(*by_site, strict=True)
    )


def one_run_bounds(canaries: int, counts: Sequence[Guesses], *, delta: float, confidence: float) -> OneRunBounds:
    """All three numbers at `delta`, each with this confidence over all rules together.

    canaries: m, guessed or not. A rule that makes no guess of so few canaries proves nothing and still has its part of
    the error. Raises ValueError without any rule, or for more guesses than canaries.
    """
    if not counts or any(g.guesses > canaries for g in counts):
        raise ValueError(f"bounds need rules with at most {canaries} guesses, got {counts}")
    error = (1 - confidence) / len(counts)

    def bound(method: str, assumption: str, lower: Callable[[Guesses, int], float]) -> EpsilonBound:
        value = max(lower(g, g.correct) for g in counts)
        return EpsilonBound(
            method=method,
            assumption=assumption,
            value=Bound(value=value, side=Side.LOWER, confidence=confidence),
            ceiling=max(lower(g, g.guesses) for g in counts),
            delta=delta,
        )

    return OneRunBounds(
        claim_free=bound(
            "one run, Steinke et al. 2023",
            "",
            lambda g, right: claim_free_epsilon(canaries, g.guesses, right, delta=delta, error=error),
        ),
        gaussian_curve=bound(
            "one run, Mahloujifar et al. 2024",
            "the trade-off curve claimed is that of a Gaussian release",
            lambda g, right: gaussian_epsilon(curve_mu(canaries, g.guesses, right, error=error), delta),
        ),
        independent=bound(
            "one run, Clopper-Pearson",
            "an estimate: takes canaries for independent and the curve for that of a Gaussian release",
            lambda g, right: gaussian_epsilon(independent_mu(g.rule, g.guesses, right, error=error), delta),
        ),
    )


# --- without assumption -----------------------------------------------------------------------------------------------


def claim_free_p_value(canaries: int, guesses: int, correct: int, *, epsilon: float, delta: float) -> float:
    """Probability bound of so many right guesses or more, whatever (epsilon, delta)-private mechanism was run.

    [Steinke et al. 2023, Thm 5.2]: P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i, with
    W ~ Binomial(r, 1 / (1 + e^-epsilon)) and i = 1..m.
    """
    accuracy = 1 / (1 + math.exp(-epsilon))
    reached = float(binom.sf(correct - 1, guesses, accuracy))
    if correct == 0 or delta == 0:
        return min(reached, 1.0)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))  # P[v > W >= v - i], i = 1..v
    slack = float((below / np.arange(1, correct + 1)).max())
    return min(reached + 2 * canaries * delta * slack, 1.0)


@lru_cache(maxsize=4096)
def claim_free_epsilon(canaries: int, guesses: int, correct: int, *, delta: float, error: float) -> float:
    """The largest epsilon that so many right guesses refute at this error probability; 0 when they refute none."""

    def refuted(epsilon: float) -> bool:
        return claim_free_p_value(canaries, guesses, correct, epsilon=epsilon, delta=delta) <= error

    return _largest(refuted, LARGEST_EPSILON)


# --- given the curve --------------------------------------------------------------------------------------------------


def curve_refuted(canaries: int, guesses: int, correct: int, *, mu: float, error: float) -> bool:
    """Whether so many right guesses have a probability below `error` under the curve of a Gaussian release `mu`.

    [Mahloujifar et al. 2024, Alg. 1] for two alternatives. Let p_j be the probability of j right guesses,
    r_i = sum_{j>=i} p_j j / m and h_i = sum_{j>=i} p_j (r - j) / m, the wrong ones. The curve bounds what is right by
    what is wrong: r_{i+1} <= 1 - f(h_i), so h_i >= Phi(Phi^-1(r_{i+1}) - mu). Start with probability `error` at
    `correct`; where the least total that follows exceeds one, so much could not have been there.
    """
    right, wrong = error * correct / canaries, error * (guesses - correct) / canaries
    whole = guesses / canaries
    for i in range(correct - 1, -1, -1):
        least = max(wrong, float(ndtr(ndtri(min(right, 1.0)) - mu)))
        right += i / (guesses - i) * (least - wrong)
        wrong = least
        if right + wrong > whole:
            return True
    return False


@lru_cache(maxsize=4096)
def curve_mu(canaries: int, guesses: int, correct: int, *, error: float) -> float:
    """The largest signal / noise of a Gaussian release that so many right guesses refute; 0 when they refute none."""

    def refuted(mu: float) -> bool:
        return curve_refuted(canaries, guesses, correct, mu=mu, error=error)

    return _largest(refuted, LARGEST_MU)


# --- independent canaries ---------------------------------------------------------------------------------------------


def gaussian_accuracy(mu: float, rule: GuessRule) -> float:
    """Expected share of right guesses by a rule, of fair coins seen through N(0, 1) or N(mu, 1)."""
    return (_right(mu, rule.into) + _right(mu, rule.out)) / (rule.into + rule.out)


def _right(mu: float, share: float) -> float:
    """Of all canaries, those called rightly when a share at one end is called; both ends are mirror images.

    With the middle at zero the share is beyond t where (Phi(mu/2 - t) + Phi(-mu/2 - t)) / 2 = share, and the first
    half of that sum is right.
    """
    if share == 0:
        return 0.0

    def surplus(t: float) -> float:
        return float(ndtr(mu / 2 - t) + ndtr(-mu / 2 - t)) / 2 - share

    return float(ndtr(mu / 2 - brentq(surplus, -mu / 2 - 40.0, mu / 2 + 40.0))) / 2


@lru_cache(maxsize=4096)
def independent_mu(rule: GuessRule, guesses: int, correct: int, *, error: float) -> float:
    """Signal / noise whose accuracy is the Clopper-Pearson lower bound of the accuracy seen; 0 at chance or below."""
    if correct == 0:
        return 0.0
    least = float(beta.ppf(error, correct, guesses - correct + 1))

    def too_weak(mu: float) -> bool:
        return gaussian_accuracy(mu, rule) < least

    return _largest(too_weak, LARGEST_MU)


@lru_cache(maxsize=4096)
def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at `delta` of a Gaussian release with signal / noise `mu`."""
    return epsilon([GaussianRelease(noise_multiplier=1 / mu)], delta).value if mu > 0 else 0.0


def _largest(holds: Callable[[float], bool], end: float) -> float:
    """The largest value in [0, end], to PRECISION from below, up to which `holds` holds; 0 when it never does."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, end
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
