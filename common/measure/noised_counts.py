"""Limits of a share of patients whose count was seen through known noise: Clopper-Pearson, convolved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv, gammaln, xlog1py, xlogy

_SMALLEST_RATIO = 1e-3  # of the geometric law; noise of less kurtosis than that is taken to have as much
_NEGLIGIBLE = 1e-11  # probability of one value of the noise


@dataclass(frozen=True, kw_only=True)
class CountNoise:
    """Second and fourth cumulant of the noise on one count; odd ones are zero. Both are 0 for an exact count."""

    variance: float
    fourth: float

    def scaled(self, factor: float) -> CountNoise:
        """Noise of `factor` times the count."""
        return CountNoise(variance=self.variance * factor**2, fourth=self.fourth * factor**4)


EXACT = CountNoise(variance=0.0, fourth=0.0)


def discrete_laplace_noise(epsilon: float, answers: int = 1) -> CountNoise:
    """Noise of a count that is a sum of `answers` counts with P(k) proportional to exp(-epsilon |k|) each.

    A difference of two geometric variables with ratio q = exp(-epsilon)  [Ghosh et al. 2012]: cumulants
    2q / (1 - q)^2 and 2q (1 + 4q + q^2) / (1 - q)^4.
    """
    q = math.exp(-epsilon)
    return CountNoise(
        variance=answers * 2 * q / (1 - q) ** 2, fourth=answers * 2 * q * (1 + 4 * q + q**2) / (1 - q) ** 4
    )


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of patients as it was seen: value = noised count / noised total, never clipped.

    draws: number of patients it rests on; for a weighted mean over sites the number whose plain mean would vary as
    much  [Kish 1965]. noise: of the share, the total's included.

    Limits are exact for one epsilon and equal weights, given `draws`. Patients of different sites have different
    rates; their count varies less than a binomial one of the mean rate  [Hoeffding 1956]. A noised total moves the
    share t by t times its relative error: `noise` carries that, and at the shares that matter (near 0) it vanishes.
    """

    value: float
    draws: float
    noise: CountNoise

    @property
    def plausible(self) -> float:
        """The share moved to where one of `draws` patients could have left it; for variances only."""
        least = min(0.5 / self.draws, 0.5)
        return min(max(self.value, least), 1 - least)

    @property
    def variance(self) -> float:
        """Of sampling and noise."""
        return self.plausible * (1 - self.plausible) / self.draws + self.noise.variance

    def upper(self, confidence: float) -> float:
        """One-sided upper limit, in [0, 1]."""
        return rate_upper(self.value * self.draws, self.draws, self.noise.scaled(self.draws), confidence)

    def lower(self, confidence: float) -> float:
        """One-sided lower limit, in [0, 1]."""
        return rate_lower(self.value * self.draws, self.draws, self.noise.scaled(self.draws), confidence)


def rate_upper(count: float, draws: float, noise: CountNoise, confidence: float) -> float:
    """Upper limit of a rate: where so low a noised count is just still plausible.  [Clopper and Pearson 1934]

    Solves P(Binomial(draws, rate) + noise <= count) = 1 - confidence. A count below zero is taken as zero: else a
    lucky noise could rule out every rate there is.
    """
    count = max(count, 0.0)
    if count >= draws:
        return 1.0
    if noise.variance == 0:
        return float(betaincinv(count + 1, draws - count, confidence))

    def surplus(rate: float) -> float:
        return at_most(count, draws, rate, noise) - (1 - confidence)

    return 1.0 if surplus(1.0) >= 0 else float(brentq(surplus, 0.0, 1.0, xtol=1e-10))


def rate_lower(count: float, draws: float, noise: CountNoise, confidence: float) -> float:
    """Lower limit of a rate: the complement's upper one, seen from the other side."""
    return 1 - rate_upper(draws - count, draws, noise, confidence)


def at_most(count: float, draws: float, rate: float, noise: CountNoise) -> float:
    """P(Binomial(draws, rate) + noise <= count)."""
    values, probabilities = noise_law(noise)
    room = (count - values)[::-1]  # ascending, as many whole steps apart as there are values
    weights = probabilities[::-1]
    inside = (room >= 0) & (room < draws)
    return float(weights[inside] @ _cumulative(room[inside], draws, rate) + weights[room >= draws].sum())


def _cumulative(x: NDArray[np.float64], draws: float, rate: float) -> NDArray[np.float64]:
    """P(Binomial(draws, rate) <= x), x ascending in steps of one; carried to fractions by the incomplete beta function.

    Only the first is integrated, the others add the probability of one more.
    """
    if len(x) == 0:
        return x
    ways = gammaln(draws + 1) - gammaln(x + 1) - gammaln(draws - x + 1)
    one_more = np.exp(ways + xlogy(x, rate) + xlog1py(draws - x, -rate))
    one_more[0] = betainc(draws - x[0], x[0] + 1, 1 - rate)
    return np.asarray(np.minimum(np.cumsum(one_more), 1.0), dtype=np.float64)


def noise_law(noise: CountNoise) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(K,) ascending whole numbers, their probabilities under a sum of discrete Laplace variables of these cumulants.

    The two cumulants give back the ratio q and the number of terms r, so that counts of one epsilon get their exact
    law; a weighted sum (r is then no whole number) the law of this family with its own variance and kurtosis.
    """
    if noise.variance == 0:
        return np.zeros(1), np.ones(1)
    ratio, terms = _ratio_and_terms(noise)
    return _laplace_sum(ratio, terms)


def _ratio_and_terms(noise: CountNoise) -> tuple[float, float]:
    """The ratio q from fourth / variance = k = (1 + 4q + q^2) / (1 - q)^2, and r from the variance."""
    k = noise.fourth / noise.variance
    q = (k + 2 - math.sqrt(6 * k + 3)) / (k - 1) if k > 1 + 1e-9 else 0.0
    q = max(q, _SMALLEST_RATIO)
    return q, noise.variance * (1 - q) ** 2 / (2 * q)


@lru_cache(maxsize=256)
def _laplace_sum(q: float, terms: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """From the characteristic function ((1 - q)^2 / (1 - 2q cos t + q^2))^r by a Fourier sum over whole numbers."""
    deviation = math.sqrt(2 * q * terms) / (1 - q)
    size = 2 ** math.ceil(math.log2(20 * deviation + 80 / -math.log(q)))
    t = 2 * math.pi * np.arange(size // 2 + 1) / size
    probabilities = np.fft.fftshift(np.fft.irfft((1 + 2 * q * (1 - np.cos(t)) / (1 - q) ** 2) ** -terms, size))
    values = np.arange(size) - size // 2
    kept = probabilities > _NEGLIGIBLE
    return values[kept].astype(np.float64), probabilities[kept] / probabilities[kept].sum()
