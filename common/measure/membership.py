"""Membership statistics from noised histograms, sites kept apart.

Notation: in one stratum (site), m_b and n_b are the noised counts of members and non-members in bin b,
M and N their sums. Every count carries independent noise of known variance and mean zero. Strata are
joined with weights w_s that are the same for members and non-members: a site whose patients score higher
for any other reason than membership then shifts both sides alike and cannot pass for a leak.

Nothing is clipped. A negative count is kept as it is: replacing it by zero would push every sum of
sparse bins upwards and, in the far tail, hide or invent exactly the few copies that are looked for.
Counts enter all estimates linearly (up to the totals), so zero-mean noise leaves them unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from common.measure.intervals import Bound, Interval, Side

Counts = NDArray[np.float64]

_FAR = 3.0  # times the false-positive rate: where the tail begins in which copies are looked for
_THRESHOLD_CONFIDENCE = 0.8  # that the edge of a TPR bound lies on its own side of the rate; coverage is tested


def quantile(confidence: float) -> float:
    """Standard normal quantile of a one-sided level."""
    return NormalDist().inv_cdf(confidence)


@dataclass(frozen=True, kw_only=True)
class CountNoise:
    """Second and fourth cumulant of the noise on one count; odd ones are zero."""

    variance: float
    fourth: float


def discrete_laplace_noise(epsilon: float, answers: int = 1) -> CountNoise:
    """Noise of a count that is a sum of `answers` counts with P(k) proportional to exp(-epsilon |k|) each.

    A difference of two geometric variables with ratio q = exp(-epsilon)  [Ghosh et al. 2012]: cumulants
    2q / (1 - q)^2 and 2q (1 + 4q + q^2) / (1 - q)^4.
    """
    q = math.exp(-epsilon)
    return CountNoise(
        variance=answers * 2 * q / (1 - q) ** 2, fourth=answers * 2 * q * (1 + 4 * q + q**2) / (1 - q) ** 4
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Stratum:
    """One site's two groups on one grid.

    members, nonmembers: (B,) noised counts. member_noise, nonmember_noise: noise of each count.
    Raises ValueError for different grids, a value that is not finite, or a total below one.
    """

    members: Counts
    nonmembers: Counts
    member_noise: CountNoise
    nonmember_noise: CountNoise

    def __post_init__(self) -> None:
        if self.members.shape != self.nonmembers.shape or self.members.ndim != 1:
            raise ValueError(f"groups lie on different grids: {self.members.shape}, {self.nonmembers.shape}")
        if not (np.isfinite(self.members).all() and np.isfinite(self.nonmembers).all()):
            raise ValueError("a count is not finite")
        if min(self.members.sum(), self.nonmembers.sum()) < 1:
            raise ValueError("a group is empty")

    @property
    def member_total(self) -> float:
        """Noised number of members."""
        return float(self.members.sum())

    @property
    def nonmember_total(self) -> float:
        """Noised number of non-members."""
        return float(self.nonmembers.sum())


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A normal estimate: sampling and privacy noise are both in the variance."""

    value: float
    variance: float

    def interval(self, confidence: float) -> Interval:
        """Two-sided interval."""
        half = quantile((1 + confidence) / 2) * math.sqrt(self.variance)
        return Interval(low=self.value - half, estimate=self.value, high=self.value + half, confidence=confidence)

    def bound(self, side: Side, confidence: float) -> Bound:
        """One-sided bound."""
        half = quantile(confidence) * math.sqrt(self.variance)
        value = self.value + (half if side is Side.UPPER else -half)
        return Bound(value=value, side=side, confidence=confidence)


def site_weights(strata: Sequence[Stratum]) -> NDArray[np.float64]:
    """(S,) weights proportional to a site's noised number of patients.

    The pooled number then speaks about a patient drawn from the whole federation. Equal weights would let
    the noisiest small site dominate the variance; small sites are protected by their own per-site threshold.
    """
    sizes = np.array([s.member_total + s.nonmember_total for s in strata])
    return np.asarray(sizes / sizes.sum(), dtype=np.float64)


def stratified_auc(strata: Sequence[Stratum]) -> Estimate:
    """P(member scores higher than non-member of the same site), ties counting half."""
    weights = site_weights(strata)
    each = [_auc(s) for s in strata]
    return Estimate(
        value=float(sum(w * e.value for w, e in zip(weights, each, strict=True))),
        variance=float(sum(w**2 * e.variance for w, e in zip(weights, each, strict=True))),
    )


def _auc(stratum: Stratum) -> Estimate:
    """AUC = sum_b m_b F_b / M with F_b the non-members' CDF at mid-bin.

    Sampling variance by placements [DeLong et al. 1988]; noise by first-order propagation through counts and
    totals: v sum_b (F_b - A)^2 / M^2 for members and likewise for non-members.
    """
    m, n = stratum.members, stratum.nonmembers
    M, N = stratum.member_total, stratum.nonmember_total
    below = (np.cumsum(n) - n / 2) / N  # (B,) share of non-members below the middle of the bin
    above = 1 - (np.cumsum(m) - m / 2) / M  # (B,) share of members above the middle of the bin
    value = float(m @ below / M)
    # Noise enters the placements' spread too; with separated groups it would even go to zero or below. The
    # floor is half of what two identical distributions give, [Mann and Whitney 1947].
    placements = max(float(m @ (below - value) ** 2) / M**2, 0.0) + max(float(n @ (above - value) ** 2) / N**2, 0.0)
    sampling = max(placements, (M + N + 1) / (24 * M * N))
    noise = (
        stratum.member_noise.variance * float(np.sum((below - value) ** 2)) / M**2
        + stratum.nonmember_noise.variance * float(np.sum((above - value) ** 2)) / N**2
    )
    return Estimate(value=value, variance=sampling + noise)


@dataclass(frozen=True, kw_only=True)
class Exceedance:
    """Shares above one edge, joined over sites: `members` = TPR, `nonmembers` = FPR.

    *_draws: effective number of patients for the binomial variance; *_noise: privacy noise of the share.
    """

    members: float
    nonmembers: float
    member_draws: float
    nonmember_draws: float
    member_noise: CountNoise
    nonmember_noise: CountNoise


def exceedance(strata: Sequence[Stratum], edge: int) -> Exceedance:
    """Shares at or above edge number `edge` (0 is the lowest; bins edge + 1 and up).

    One edge for all sites, with the same site weights on both sides. Site-wise thresholds would each rest on the
    handful of non-members in one site's tail plus its noise; a common one rests on all of them and is just as fair.
    """
    weights = site_weights(strata)
    groups = (
        [(w, s.members, s.member_noise) for w, s in zip(weights, strata, strict=True)],
        [(w, s.nonmembers, s.nonmember_noise) for w, s in zip(weights, strata, strict=True)],
    )
    (tpr, member_draws, member_noise), (fpr, nonmember_draws, nonmember_noise) = (_share(g, edge) for g in groups)
    return Exceedance(
        members=tpr,
        nonmembers=fpr,
        member_draws=member_draws,
        nonmember_draws=nonmember_draws,
        member_noise=member_noise,
        nonmember_noise=nonmember_noise,
    )


def _share(group: Sequence[tuple[float, Counts, CountNoise]], edge: int) -> tuple[float, float, CountNoise]:
    """Weighted share above the edge, effective number of draws, noise of the share; (weight, counts, noise) a site.

    d(tail / total): a bin of the tail moves the share t of a site by (1 - t) / total, any other by -t / total.
    """
    share = inverse_draws = variance = fourth = 0.0
    for weight, counts, noise in group:
        total, bins, tail = float(counts.sum()), len(counts), len(counts) - edge - 1
        t = float(counts[edge + 1 :].sum()) / total
        share += weight * t
        inverse_draws += weight**2 / total
        variance += noise.variance * (weight / total) ** 2 * (tail * (1 - t) ** 2 + (bins - tail) * t**2)
        fourth += noise.fourth * (weight / total) ** 4 * (tail * (1 - t) ** 4 + (bins - tail) * t**4)
    return share, 1 / inverse_draws, CountNoise(variance=variance, fourth=fourth)


def threshold_edge(strata: Sequence[Stratum], false_positive_rate: float, confidence: float = 0.5) -> int:
    """Highest edge, coming from below, before the FPR first falls under the rate; with `confidence` it lies above it.

    Coming from above, noise summed over empty bins would cross the rate far out in the tail. At confidence 0.5 the
    noised FPR is taken as it is.
    """
    edges = len(strata[0].members) - 1
    for edge in range(edges):
        at = exceedance(strata, edge)
        if at.nonmembers - quantile(confidence) * _nonmember_deviation(at) < false_positive_rate:
            return max(edge - 1, 0)
    return edges - 1


def _edge_beyond(strata: Sequence[Stratum], false_positive_rate: float, confidence: float) -> Exceedance | None:
    """Lowest edge whose FPR lies below the rate with `confidence`; None when there is none."""
    for edge in range(len(strata[0].members) - 1):
        at = exceedance(strata, edge)
        if at.nonmembers + quantile(confidence) * _nonmember_deviation(at) <= false_positive_rate:
            return at
    return None


def _nonmember_deviation(at: Exceedance) -> float:
    rate = min(max(at.nonmembers, 0.5 / at.nonmember_draws), 0.5)
    return math.sqrt(rate * (1 - rate) / at.nonmember_draws + at.nonmember_noise.variance)


def copied_share(at: Exceedance, confidence: float) -> Interval:
    """Share f of members that stand out: 1 - (1 - TPR) / (1 - FPR), with one-sided limits at `confidence` each.

    If a share f of members always exceeds the edge and the rest scores like non-members, this is f. The limits
    solve (estimate - f)^2 = z^2 Var(f), with the binomial variance taken at the limit itself [Wilson 1927], so
    that no exceedance at all does not mean no uncertainty. Few bins of Laplace noise have heavier tails than a
    normal: z is corrected by their excess kurtosis [Cornish and Fisher 1938].
    """
    # Thresholds that are read have few non-members above them; the floor keeps all others finite.
    estimate = 1 - (1 - at.members) / max(1 - at.nonmembers, 0.05)
    base = min(max(at.nonmembers, 0.5 / at.nonmember_draws), 0.5)  # a plausible rate for the variance only
    noise = at.nonmember_noise.variance + at.member_noise.variance
    fixed = (base * (1 - base) / at.nonmember_draws + noise) / (1 - base) ** 2
    # Var(f) = fixed + p (1 - p) / draws / (1 - base)^2 at p = base + f (1 - base), a quadratic in f.
    c0 = base * (1 - base) / (at.member_draws * (1 - base) ** 2) + fixed
    c1 = (1 - 2 * base) / (at.member_draws * (1 - base))
    c2 = -1 / at.member_draws
    excess = (at.nonmember_noise.fourth + at.member_noise.fourth) / (c0 * (1 - base) ** 2) ** 2
    z = quantile(confidence)
    z += (z**3 - 3 * z) * excess / 24
    a, b, c = 1 - z**2 * c2, -2 * estimate - z**2 * c1, estimate**2 - z**2 * c0
    root = math.sqrt(max(b**2 - 4 * a * c, 0.0))
    low, high = (-b - root) / (2 * a), (-b + root) / (2 * a)
    return Interval(
        low=min(low, estimate), estimate=estimate, high=max(high, estimate), confidence=max(2 * confidence - 1, 1e-9)
    )


def rate_interval(at: Exceedance, confidence: float) -> Interval:
    """TPR at the measured FPR, two-sided: sampling and noise of both groups, for one point of a ROC."""
    variance = at.member_noise.variance + at.nonmember_noise.variance
    for rate, draws in ((at.members, at.member_draws), (at.nonmembers, at.nonmember_draws)):
        plausible = min(max(rate, 0.5 / draws), 1 - 0.5 / draws)
        variance += plausible * (1 - plausible) / draws
    return Estimate(value=at.members, variance=variance).interval(confidence)


@dataclass(frozen=True, kw_only=True)
class TruePositives:
    """TPR at a stated FPR: estimate with a two-sided interval, and one-sided bounds.

    at: shares above the edge that the estimate was read at, noised FPR at or above the stated one.
    beyond: shares above the next edge.
    """

    interval: Interval
    lower: Bound
    upper: Bound
    at: Exceedance
    beyond: Exceedance


def true_positives(strata: Sequence[Stratum], false_positive_rate: float, confidence: float) -> TruePositives:
    """TPR at `false_positive_rate` from binned scores, cautious on both sides.

    A ROC is concave (an attacker can randomise between thresholds). A line from (1, 1) through the point of an edge
    with FPR >= a therefore lies above the ROC at a: TPR(a) <= a + f (1 - a) with f of `copied_share`. The same line
    through a point with FPR < a lies below it. The estimate takes the threshold as noised, the bounds take edges that
    lie on their side of the rate with confidence. Without a leak f is zero at every edge, so that an uncertain
    threshold does not blur a clean result.
    """
    edge = threshold_edge(strata, false_positive_rate)
    at = exceedance(strata, edge)
    two_sided = (1 + confidence) / 2
    estimate = _at_rate(copied_share(at, confidence).estimate, false_positive_rate)
    low, high = (bound(strata, false_positive_rate, two_sided) for bound in (_lower, _upper))
    return TruePositives(
        interval=Interval(low=min(low, estimate), estimate=estimate, high=max(high, estimate), confidence=confidence),
        lower=Bound(value=_lower(strata, false_positive_rate, confidence), side=Side.LOWER, confidence=confidence),
        upper=Bound(value=_upper(strata, false_positive_rate, confidence), side=Side.UPPER, confidence=confidence),
        at=at,
        beyond=exceedance(strata, min(edge + 1, len(strata[0].members) - 2)),
    )


def _upper(strata: Sequence[Stratum], rate: float, confidence: float) -> float:
    edges = {threshold_edge(strata, rate), threshold_edge(strata, rate, _THRESHOLD_CONFIDENCE)}
    return max(_at_rate(copied_share(exceedance(strata, e), confidence).high, rate) for e in edges)


def _lower(strata: Sequence[Stratum], rate: float, confidence: float) -> float:
    beyond = _edge_beyond(strata, rate, _THRESHOLD_CONFIDENCE)
    return 0.0 if beyond is None else _at_rate(copied_share(beyond, confidence).low, rate)


def _at_rate(share: float, rate: float) -> float:
    return rate + share * (1 - rate)


def copies_lower_bound(strata: Sequence[Stratum], false_positive_rate: float, confidence: float) -> Bound:
    """Lower bound on the share of members that stand out as copies do: over all edges of the far tail.

    Far edges carry the noise of few bins, near ones leave room for copies that are less alike. The level is divided by
    the number of edges tried [Bonferroni], so that looking everywhere does not alarm more often.
    """
    tried = far_edges(strata, false_positive_rate)
    each = shared_level(confidence, len(tried))
    value = max(copied_share(at, each).low for at in tried)
    return Bound(value=value, side=Side.LOWER, confidence=confidence)


def copies_upper_bound(tpr: TruePositives, confidence: float) -> Bound:
    """Upper bound on the share of members that stand out, at the edge where the TPR is read: it lies at or below it."""
    return Bound(value=copied_share(tpr.at, confidence).high, side=Side.UPPER, confidence=confidence)


def far_edges(strata: Sequence[Stratum], false_positive_rate: float) -> list[Exceedance]:
    """Shares above every edge whose noised FPR is at most three times the rate; the last edge at least.

    Three times: an edge chosen by FPR <= rate would be one where the non-members' noise happens to be low, which makes
    members stand out. Not more: a broad shift of all members is the AUC's business and has its own threshold.
    """
    every = [exceedance(strata, edge) for edge in range(len(strata[0].members) - 1)]
    return [at for at in every[:-1] if at.nonmembers <= _FAR * false_positive_rate] + every[-1:]


def shared_level(confidence: float, tried: int) -> float:
    """Level of each of `tried` bounds so that all of them hold together with `confidence`.  [Bonferroni]"""
    return 1 - (1 - confidence) / max(tried, 1)


def smallest_detectable_copies(at: Exceedance, confidence: float, probability: float) -> float:
    """Smallest copied share whose lower bound (at `confidence`) is above zero with `probability`.

    Solves f = z sd(0) + z' sd(f) by fixed point; 1 when even that is not found.
    """
    base = min(max(at.nonmembers, 0.5 / at.nonmember_draws), 0.5)
    fixed = base * (1 - base) / at.nonmember_draws + at.nonmember_noise.variance + at.member_noise.variance

    def deviation(f: float) -> float:
        rate = base + f * (1 - base)
        return math.sqrt(fixed + rate * (1 - rate) / at.member_draws) / (1 - base)

    f = 0.0
    for _ in range(60):
        f = min(quantile(confidence) * deviation(0.0) + quantile(probability) * deviation(f), 1.0)
    return f
