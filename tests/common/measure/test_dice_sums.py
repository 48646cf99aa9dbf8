import numpy as np
import pytest

from client.randomness import SecureStream
from common.measure.dice_sums import (
    UNITS,
    mean_and_variance,
    noise_epsilon,
    noise_variance,
    sensitivity_units,
    to_answer,
    total_units,
)


def test_without_noise_the_answer_is_the_sum_and_the_count():
    dice_sum, patients = to_answer(total_units(np.array([[0.75, 0.5], [0.25, 1.0]])))
    assert (dice_sum, patients) == ((1.0, 1.5), 2.0)


@pytest.mark.parametrize("one", [[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [7.0, -3.0], [np.nan, np.inf]])
def test_no_patient_moves_the_totals_by_more_than_the_sensitivity(one):
    others = np.array([[0.8, 0.7], [0.4, 0.9]])
    moved = total_units(np.vstack([others, one])) - total_units(others)
    assert np.abs(moved).sum() <= sensitivity_units(2)


def test_the_largest_patient_reaches_the_sensitivity():
    """A sensitivity stated too large would pass the test above and waste the budget."""
    assert np.abs(total_units(np.ones((1, 3)))).sum() == sensitivity_units(3)


def test_the_stated_variance_is_that_of_the_noise():
    noise = SecureStream.from_seed(1).discrete_laplace(200_000, noise_epsilon(2, 1.0)) / UNITS
    stated = noise_variance(2, 1.0)
    assert stated == pytest.approx(2 * 2.0**2, rel=1e-3)  # Laplace of scale sensitivity / epsilon = 2
    assert noise.var() == pytest.approx(stated, rel=0.03)


def test_the_stated_error_covers_noised_means_and_is_not_wildly_wide():
    rng, stream = np.random.default_rng(0), SecureStream.from_seed(2)
    errors, stated = [], []
    for _ in range(400):
        dice = rng.beta(8, 2, (300, 2))
        units = total_units(dice) + stream.discrete_laplace(3, noise_epsilon(2, 1.0))
        dice_sum, patients = to_answer(units)
        mean, variance = mean_and_variance(dice_sum, patients, variance_of_noise=noise_variance(2, 1.0))
        errors.append(mean - 0.8)
        stated.append(variance)
    ratio = np.var(errors, axis=0) / np.mean(stated, axis=0)
    assert (ratio < 1).all()
    assert (ratio > 0.1).all()


def test_a_count_that_noise_carried_below_zero_gives_no_mean():
    with pytest.raises(ValueError, match="no mean"):
        mean_and_variance([1.0], -2.0, variance_of_noise=1.0)
