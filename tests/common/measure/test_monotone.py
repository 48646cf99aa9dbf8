import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from common.measure.monotone import rising, roc_points, true_positive_rate_at

# Tail-refined edges of a uniform score: audit notes, section 7.3.
EDGES = -norm.ppf([0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002])
RATE = 0.01


@given(st.lists(st.integers(-30, 60), min_size=2, max_size=20).filter(lambda c: sum(c) > 0))
def test_a_fitted_histogram_has_no_negative_bin_and_the_same_total(counts):
    fitted = rising(np.array(counts, dtype=float))
    assert fitted.min() >= 0
    assert fitted.sum() == pytest.approx(sum(counts))


@given(st.lists(st.integers(0, 60), min_size=2, max_size=20).filter(lambda c: sum(c) > 0))
def test_counts_that_are_possible_are_left_alone(counts):
    assert rising(np.array(counts, dtype=float)) == pytest.approx(np.array(counts, dtype=float), abs=1e-9)


def test_the_fit_is_the_closest_rising_curve_not_just_some_rising_curve():
    counts = np.array([5.0, -3.0, 4.0, 2.0])  # running totals 5, 2, 6: 5 and 2 meet in the middle
    assert np.cumsum(rising(counts)) == pytest.approx([3.5, 3.5, 6.0, 8.0])


def test_nobody_cannot_be_fitted():
    with pytest.raises(ValueError, match="nobody"):
        rising(np.array([3.0, -4.0]))


def test_a_roc_runs_from_corner_to_corner_and_is_read_between_its_points():
    points = roc_points(np.array([2.0, 2.0, 6.0]), np.array([8.0, 2.0, 0.0]))
    assert points == pytest.approx(np.array([[0, 0], [0, 0.6], [0.2, 0.8], [1, 1]]))
    assert true_positive_rate_at(points, 0.1) == pytest.approx(0.7)
    assert true_positive_rate_at(points, 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_negative_counts_do_not_bias_the_true_positive_rate_as_clipping_does(epsilon):
    """Three sites of 800: the bins that clipping lifts lie beyond the threshold of 1 %."""
    rng, repeats, sites, n, mu = np.random.default_rng(0), 1500, 3, 800, 1.0
    truth = norm.cdf(mu + norm.ppf(RATE))
    nonmember, member = (np.diff([0, *norm.cdf(EDGES - shift), 1]) for shift in (0.0, mu))

    def noise(answers: int) -> np.ndarray:
        p = 1 - math.exp(-epsilon)
        shape = (repeats, sites * answers, len(member))
        return (rng.geometric(p, shape) - rng.geometric(p, shape)).sum(axis=1)

    m = rng.multinomial(sites * n, member, repeats) + noise(2)
    k = rng.multinomial(sites * n, nonmember, repeats) + noise(1)

    def mean_at_rate(fit) -> float:
        pairs = zip(m, k, strict=True)
        return float(np.mean([true_positive_rate_at(roc_points(fit(a), fit(b)), RATE) for a, b in pairs]))

    fitted = mean_at_rate(lambda c: rising(c.astype(float)))
    clipped = mean_at_rate(lambda c: np.maximum(c, 0.0))
    assert fitted == pytest.approx(truth, abs=0.0025)  # four standard errors at epsilon .5
    if epsilon == 0.5:
        assert clipped < truth - 0.001
        assert clipped < fitted - 0.001
