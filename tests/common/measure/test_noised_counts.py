import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom

from common.measure.noised_counts import (
    EXACT,
    CountNoise,
    Share,
    at_most,
    discrete_laplace_noise,
    noise_law,
    rate_lower,
    rate_upper,
)


def laplace(rng, size, epsilon):
    p = 1 - math.exp(-epsilon)
    return rng.geometric(p, size) - rng.geometric(p, size)


def test_laplace_noise_has_the_stated_cumulants():
    draws = laplace(np.random.default_rng(0), 400_000, 1.0).astype(float)
    stated = discrete_laplace_noise(1.0)
    assert draws.var() == pytest.approx(stated.variance, rel=0.02)
    assert (draws**4).mean() - 3 * draws.var() ** 2 == pytest.approx(stated.fourth, rel=0.1)
    assert discrete_laplace_noise(1.0, answers=2).variance == pytest.approx(2 * stated.variance)


@pytest.mark.parametrize("epsilon", [0.25, 1.0, 4.0])
def test_one_noised_count_gets_its_own_law_back_from_two_cumulants(epsilon):
    values, probabilities = noise_law(discrete_laplace_noise(epsilon))
    q = math.exp(-epsilon)
    assert probabilities == pytest.approx((1 - q) / (1 + q) * q ** np.abs(values), abs=1e-10)


def test_the_law_of_a_sum_is_the_convolution_of_its_terms():
    one, two, five = (dict(zip(*noise_law(discrete_laplace_noise(0.7, n)), strict=True)) for n in (2, 3, 5))
    for total in (-6.0, 0.0, 4.0):
        assert five[total] == pytest.approx(sum(p * two.get(total - k, 0.0) for k, p in one.items()), abs=1e-9)


def test_a_weighted_sum_keeps_its_variance_and_kurtosis():
    mixed = CountNoise(variance=7.3, fourth=21.0)
    values, probabilities = noise_law(mixed)
    variance = float(probabilities @ values**2)
    assert variance == pytest.approx(7.3, rel=1e-6)
    assert float(probabilities @ values**4) - 3 * variance**2 == pytest.approx(21.0, rel=1e-5)


@given(draws=st.integers(1, 400), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.95, 0.999]))
def test_without_noise_the_limits_are_those_of_the_beta_quantiles(draws, share, confidence):
    count = round(share * draws)
    upper = 1.0 if count == draws else beta.ppf(confidence, count + 1, draws - count)
    lower = 0.0 if count == 0 else beta.ppf(1 - confidence, count, draws - count + 1)
    assert rate_upper(count, draws, EXACT, confidence) == pytest.approx(upper, abs=1e-8)
    assert rate_lower(count, draws, EXACT, confidence) == pytest.approx(lower, abs=1e-8)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_tail_is_that_of_drawn_binomial_counts_with_drawn_noise(epsilon):
    rng = np.random.default_rng(1)
    seen = rng.binomial(60, 0.07, 200_000) + sum(laplace(rng, 200_000, epsilon) for _ in range(3))
    for count in (-4, 1, 4, 9):
        expected = float(np.mean(seen <= count))
        assert at_most(count, 60, 0.07, discrete_laplace_noise(epsilon, 3)) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(("draws", "rate"), [(150, 0.01), (150, 0.3), (800, 0.004), (20, 0.05)])
@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_limits_hold_in_all_but_five_percent_whatever_is_drawn(draws, rate, epsilon):
    """Not simulated: every count and every noise, weighted by its probability."""
    noise = discrete_laplace_noise(epsilon, 4)
    values, probabilities = noise_law(noise)
    counts = np.arange(draws + 1)
    seen = np.convolve(binom.pmf(counts, draws, rate), probabilities)
    at = np.arange(len(seen)) + values.min()
    likely = [(int(k), p) for k, p in zip(at, seen, strict=True) if p > 1e-6]
    missed_above = sum(p for k, p in likely if rate_upper(k, draws, noise, 0.95) < rate)
    missed_below = sum(p for k, p in likely if rate_lower(k, draws, noise, 0.95) > rate)
    assert missed_above <= 0.0501
    assert missed_below <= 0.0501
    deaf_above = sum(p for k, p in likely if rate_upper(k, draws, EXACT, 0.95) < rate)
    deaf_below = sum(p for k, p in likely if rate_lower(k, draws, EXACT, 0.95) > rate)
    assert max(deaf_above, deaf_below) > 0.06  # the same limits without the noise would not hold


def test_a_lucky_noise_cannot_prove_more_than_no_exceedance_at_all():
    noise = discrete_laplace_noise(1.0)
    assert rate_upper(-8, 100, noise, 0.95) == rate_upper(0, 100, noise, 0.95) > 0
    assert rate_lower(108, 100, noise, 0.95) == rate_lower(100, 100, noise, 0.95) < 1


@given(count=st.floats(-20, 130), draws=st.floats(0.7, 100), terms=st.integers(0, 30))
def test_limits_are_rates_around_the_share_for_every_count_that_noise_can_leave(count, draws, terms):
    noise = discrete_laplace_noise(0.5, terms) if terms else EXACT
    share = Share(value=count / draws, draws=draws, noise=noise.scaled(1 / draws))
    assert 0 <= share.lower(0.95) <= share.upper(0.95) <= 1
    assert share.variance > 0
