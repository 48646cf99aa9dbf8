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
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from common.measure.intervals import Bound, Interval, Side
from common.measure.monotone import rising, roc_points, true_positive_rate_at
from common.measure.noised_counts import CountNoise, Share

Counts = NDArray[np.float64]

_FAR = 3.0  # times the false-positive rate: where the tail begins in which copies are looked for
_MOST_EDGES = 16  # at which copies are looked for; every further one costs power at all others
_THRESHOLD_CONFIDENCE = 0.8  # that the edge of a TPR bound lies on its own side of the rate; coverage is tested


def quantile(confidence: float) -> float:
    """Standard normal quantile of a one-sided level."""
    return NormalDist().inv_cdf(confidence)


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
    """Shares above one edge, joined over sites: `members` = TPR, `nonmembers` = FPR."""

    members: Share
    nonmembers: Share


def exceedance(strata: Sequence[Stratum], edge: int) -> Exceedance:
    """Shares at or above edge number `edge` (0 is the lowest; bins edge + 1 and up).

    One edge for all sites, with the same site weights on both sides. Site-wise thresholds would each rest on the
    handful of non-members in one site's tail plus its noise; a common one rests on all of them and is just as fair.
    """
    weights = site_weights(strata)
    return Exceedance(
        members=_share([(w, s.members, s.member_noise) for w, s in zip(weights, strata, strict=True)], edge),
        nonmembers=_share([(w, s.nonmembers, s.nonmember_noise) for w, s in zip(weights, strata, strict=True)], edge),
    )


def _share(group: Sequence[tuple[float, Counts, CountNoise]], edge: int) -> Share:
    """Weighted share above the edge from (weight, counts, noise) of each site.

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
    return Share(
        value=float(share),
        draws=float(1 / inverse_draws),
        noise=CountNoise(variance=float(variance), fourth=float(fourth)),
    )


def fitted_roc(strata: Sequence[Stratum]) -> NDArray[np.float64]:
    """(B + 1, 2) false- and true-positive rate at every edge, highest edge first, from (0, 0) to (1, 1).

    Sites are joined before the fit: one site's few counts would be mostly noise, and a fit can only push that up.
    """
    weights = site_weights(strata)
    members = sum(w * s.members / s.member_total for w, s in zip(weights, strata, strict=True))
    nonmembers = sum(w * s.nonmembers / s.nonmember_total for w, s in zip(weights, strata, strict=True))
    return roc_points(rising(np.asarray(members)), rising(np.asarray(nonmembers)))


def every_edge(strata: Sequence[Stratum]) -> list[Exceedance]:
    """Shares above each edge, lowest edge first."""
    return [exceedance(strata, edge) for edge in range(len(strata[0].members) - 1)]


def _edge_before(every: Sequence[Exceedance], rate: float, confidence: float = 0.5) -> int:
    """Highest edge, coming from below, before the FPR first falls under the rate; with `confidence` it lies above it.

    Coming from above, noise summed over empty bins would cross the rate far out in the tail. At confidence 0.5 the
    noised FPR is taken as it is.
    """
    for edge, at in enumerate(every):
        if at.nonmembers.value - quantile(confidence) * math.sqrt(at.nonmembers.variance) < rate:
            return max(edge - 1, 0)
    return len(every) - 1


def _edge_beyond(every: Sequence[Exceedance], rate: float, confidence: float) -> Exceedance | None:
    """Lowest edge whose FPR lies below the rate with `confidence`; None when there is none."""
    for at in every:
        if at.nonmembers.value + quantile(confidence) * math.sqrt(at.nonmembers.variance) <= rate:
            return at
    return None


def rate_difference(at: Exceedance, confidence: float) -> Interval:
    """TPR - FPR with one-sided limits at `confidence` each, from the limits of the two rates  [Zou and Donner 2008].

    low = d - sqrt((TPR - its lower limit)^2 + (FPR's upper limit - FPR)^2), and likewise upwards. The rates' limits are
    Clopper and Pearson's under the known noise (`Share`), so that no exceedance at all does not mean no uncertainty and
    heavy-tailed noise counts as what it is. A limit of the FPR stops at zero although noise did not: there its
    deviation alone is the least distance.

    Measured against normal limits with the variance at the limit [Wilson 1927] and z corrected by the noise's kurtosis
    [Cornish and Fisher 1938], which this replaced, and against the two rates' limits at half the error each; coverage
    of lower / upper limit of the copied share at 95 %, its mean place:

    patients, noise, FPR, share        normal               half each            this
    3 x (520, 280), none, 1 %, 0       .90 / .98 -.006 .008 1.0 / 1.0 -.014 .012 .97 / .96 -.008 .007
    3 x (520, 280), eps 1, 1 %, 0      .94 / .96 -.013 .014 1.0 / 1.0 -.024 .020 .97 / .96 -.015 .014
    200 and 200, none, 1 %, 5 %        .94 / .97  .026 .087 1.0 / .99 -.006 .099 .97 / .97  .018 .087
    unequal, eps .5, .2 %, 1 %         .96 / .97 -.022 .044 1.0 / 1.0 -.042 .038 .96 / .96 -.022 .044

    At 99 % without noise, where a copy is looked for, the normal lower limit held in 96 %, this one in 99.9 %.
    """
    d = at.members.value - at.nonmembers.value
    low, high = d - _reach_down(at, confidence), d + _reach_up(at, confidence)
    return Interval(low=low, estimate=d, high=high, confidence=max(2 * confidence - 1, 1e-9))


def _reach_down(at: Exceedance, confidence: float) -> float:
    """From TPR - FPR to its lower limit."""
    tpr, fpr = at.members, at.nonmembers
    lowest, highest = tpr.lower(confidence), fpr.upper(confidence)
    return math.hypot(max(min(tpr.value, 1.0) - lowest, 0.0), highest - min(max(fpr.value, 0.0), highest))


def _reach_up(at: Exceedance, confidence: float) -> float:
    """From TPR - FPR to its upper limit."""
    tpr, fpr = at.members, at.nonmembers
    highest, lowest = tpr.upper(confidence), fpr.lower(confidence)
    noise = quantile(confidence) * math.sqrt(fpr.noise.variance)
    return math.hypot(highest - min(max(tpr.value, 0.0), highest), max(min(fpr.value, 1.0) - lowest, noise, 0.0))


def copied_at_least(at: Exceedance, confidence: float) -> float:
    """Lower limit of the share f = (TPR - FPR) / (1 - FPR) of members that stand out.

    If a share f of members always exceeds the edge and the rest scores like non-members, this is f.
    """
    return (at.members.value - at.nonmembers.value - _reach_down(at, confidence)) / _room(at)


def copied_at_most(at: Exceedance, confidence: float) -> float:
    """Upper limit of the same share."""
    return (at.members.value - at.nonmembers.value + _reach_up(at, confidence)) / _room(at)


def _room(at: Exceedance) -> float:
    # Thresholds that are read have few non-members above them; the floor keeps all others finite.
    return max(1 - at.nonmembers.value, 0.05)


@dataclass(frozen=True, kw_only=True)
class TruePositives:
    """TPR at a stated FPR: estimate with a two-sided interval, and one-sided bounds.

    beyond: shares above the first edge whose noised FPR is below the stated one, coming from below.
    """

    interval: Interval
    lower: Bound
    upper: Bound
    beyond: Exceedance


def true_positives(strata: Sequence[Stratum], false_positive_rate: float, confidence: float) -> TruePositives:
    """TPR at `false_positive_rate` from binned scores, cautious on both sides.

    A ROC is concave (an attacker can randomise between thresholds). A line from (1, 1) through the point of an edge
    with FPR >= a therefore lies above the ROC at a: TPR(a) <= a + f (1 - a) with f of `copied_at_most`. The same line
    through a point with FPR < a lies below it. The bounds take edges that lie on their side of the rate with
    confidence; the estimate is that of the curve that is shown. Without a leak f is zero at every edge, so that an
    uncertain threshold does not blur a clean result.
    """
    every, two_sided = every_edge(strata), (1 + confidence) / 2
    estimate = true_positive_rate_at(fitted_roc(strata), false_positive_rate)
    low, high = (bound(every, false_positive_rate, two_sided) for bound in (_lower, _upper))
    return TruePositives(
        interval=Interval(low=min(low, estimate), estimate=estimate, high=max(high, estimate), confidence=confidence),
        lower=Bound(value=_lower(every, false_positive_rate, confidence), side=Side.LOWER, confidence=confidence),
        upper=Bound(value=_upper(every, false_positive_rate, confidence), side=Side.UPPER, confidence=confidence),
        beyond=every[min(_edge_before(every, false_positive_rate) + 1, len(every) - 1)],
    )


def _upper(every: Sequence[Exceedance], rate: float, confidence: float) -> float:
    return max(_at_rate(_copies_upper(every, rate, confidence), rate), 0.0)


def _copies_upper(every: Sequence[Exceedance], rate: float, confidence: float) -> float:
    """Also from an edge whose FPR lies above the rate for sure: the noised one may only seem to."""
    edges = {_edge_before(every, rate), _edge_before(every, rate, _THRESHOLD_CONFIDENCE)}
    return max(copied_at_most(every[edge], confidence) for edge in edges)


def _lower(every: Sequence[Exceedance], rate: float, confidence: float) -> float:
    beyond = _edge_beyond(every, rate, _THRESHOLD_CONFIDENCE)
    return 0.0 if beyond is None else _at_rate(copied_at_least(beyond, confidence), rate)


def _at_rate(share: float, rate: float) -> float:
    return rate + share * (1 - rate)


def copies_lower_bound(strata: Sequence[Stratum], false_positive_rate: float, confidence: float) -> Bound:
    """Lower bound on the share of members that stand out as copies do: over all edges of the far tail.

    Far edges carry the noise of few bins, near ones leave room for copies that are less alike. The level is divided by
    the number of edges tried [Bonferroni], so that looking everywhere does not alarm more often.
    """
    tried = far_edges(strata, false_positive_rate)
    each = shared_level(confidence, len(tried))
    value = max(copied_at_least(at, each) for at in tried)
    return Bound(value=value, side=Side.LOWER, confidence=confidence)


def copies_upper_bound(strata: Sequence[Stratum], false_positive_rate: float, confidence: float) -> Bound:
    """Upper bound on the share of members that stand out, where the upper bound of the TPR is read; zero at least."""
    value = max(_copies_upper(every_edge(strata), false_positive_rate, confidence), 0.0)
    return Bound(value=value, side=Side.UPPER, confidence=confidence)


def far_edges(strata: Sequence[Stratum], false_positive_rate: float) -> list[Exceedance]:
    """Shares above every edge whose noised FPR is at most three times the rate; the last edge at least.

    Three times: an edge chosen by FPR <= rate would be one where the non-members' noise happens to be low, which makes
    members stand out. Not more: a broad shift of all members is the AUC's business and has its own threshold.

    A fine grid has a hundred such edges that say much the same, and a level divided by a hundred finds little. Of more
    than 16 only the first below each quarter of the FPR before it is taken, down to the first with no non-member above
    it: thresholds named by rank, for which Clopper and Pearson's limit of the FPR holds as for fixed ones
    [Wilks 1941]. Measured, 200 bins, exact, 200 and 200 patients, 5 % copies, level 99 %: 3 edges find them in 86 % of
    audits, halves instead of quarters in 78 %, the last alone, had one known, in 95 %.
    """
    every = every_edge(strata)
    far = [at for at in every[:-1] if at.nonmembers.value <= _FAR * false_positive_rate] + every[-1:]
    if len(far) <= _MOST_EDGES:
        return far
    levels = _levels(false_positive_rate, far[0].nonmembers.draws)
    first = {next((i for i, at in enumerate(far) if at.nonmembers.value <= level), len(far) - 1) for level in levels}
    return [far[i] for i in sorted(first)]


def edges_tried(edges: int, false_positive_rate: float, nonmembers: float) -> int:
    """The most that `far_edges` returns for so many edges in the far tail and so many non-members."""
    return edges if edges <= _MOST_EDGES else len(_levels(false_positive_rate, nonmembers))


def _levels(rate: float, nonmembers: float) -> list[float]:
    """Three times the rate, its quarters down to one non-member, and none."""
    quarters = math.ceil(math.log(max(_FAR * rate * nonmembers, 4.0), 4))
    return [*(_FAR * rate / 4**k for k in range(quarters)), 0.0]


def shared_level(confidence: float, tried: int) -> float:
    """Level of each of `tried` bounds so that all of them hold together with `confidence`.  [Bonferroni]"""
    return 1 - (1 - confidence) / max(tried, 1)


def smallest_detectable_copies(at: Exceedance, confidence: float, probability: float) -> float:
    """Smallest copied share whose lower bound (at `confidence`) is above zero with `probability`; 1 when none is.

    At that share the bound of the count that is reached with `probability` is just zero. Only the FPR, the draws and
    the noise of `at` are read.
    """
    fpr = replace(at.nonmembers, value=min(at.nonmembers.plausible, 0.5))

    def bound(copies: float) -> float:
        tpr = replace(at.members, value=fpr.value + copies * (1 - fpr.value))
        reached = tpr.value - quantile(probability) * math.sqrt(tpr.variance + fpr.variance)
        return copied_at_least(Exceedance(members=replace(tpr, value=reached), nonmembers=fpr), confidence)

    return float(brentq(bound, 0.0, 1.0, xtol=1e-6)) if bound(1.0) > 0 else 1.0


def set_membership_p_value(stratum: Stratum) -> float:
    """One-sided p-value of "members score no higher than non-members", for a site's whole set.

    Rank-sum statistic of the noised counts, U = sum_b m_b (n_a below - n_a above) / 2 with mean zero under equal
    distributions whatever the noise: it is linear in either side's noise  [Hilprecht et al. 2019, the set; Mann and
    Whitney 1947, the statistic]. Variance: M N (M + N + 1) / 12, ties only lower it, and the noise's, exactly
    v_m |S n|^2 + v_n |S m|^2 + v_m v_n |S|^2 over 4 with S the signs; observed counts overstate the first two by the
    third each.
    """
    m, n = stratum.members, stratum.nonmembers
    M, N = stratum.member_total, stratum.nonmember_total
    v_m, v_n = stratum.member_noise.variance, stratum.nonmember_noise.variance
    below, above = _lower_minus_higher(n), _lower_minus_higher(m)
    noise = (v_m * float(below @ below) + v_n * float(above @ above) - v_m * v_n * len(m) * (len(m) - 1)) / 4
    variance = M * N * (M + N + 1) / 12 + max(noise, 0.0)
    return NormalDist().cdf(-float(m @ below) / 2 / math.sqrt(variance))


def _lower_minus_higher(counts: Counts) -> Counts:
    """(B,) number of patients in lower bins less that in higher ones."""
    return np.asarray(2 * np.cumsum(counts) - counts - counts.sum(), dtype=np.float64)
