import numpy as np
import pytest

from common.measure.fidelity.precision_recall import ANGLES, curve, precision_recall


def normal(seed: int, n: int, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, (n, 6))


def test_identical_sets_have_all_precision_and_recall_and_disjoint_ones_none():
    a = normal(0, 100)
    same, apart = precision_recall(a, a), precision_recall(a, normal(1, 100, mean=50.0))
    assert same.f8 == pytest.approx(1.0, abs=0.01)
    assert same.f_eighth == pytest.approx(1.0, abs=0.01)
    assert apart.f8 == apart.f_eighth == 0.0


def test_two_samples_of_one_distribution_come_near_one():
    found = precision_recall(normal(0, 1000), normal(1, 1000))
    assert min(found.f8, found.f_eighth) > 0.95


def test_a_missing_mode_costs_recall_and_an_invented_one_precision():
    both = np.concatenate([normal(0, 200), normal(1, 200, mean=20.0)])
    one = normal(2, 400)
    missing, invented = precision_recall(both, one), precision_recall(one, both)
    assert max(missing.f8, invented.f_eighth) < 0.7
    assert min(missing.f_eighth, invented.f8) > 0.9


def test_the_curve_of_half_overlapping_histograms_is_their_closed_form():
    """P = (1/2, 1/2, 0), Q = (0, 1/2, 1/2): alpha = min(l, 1) / 2, beta = min(1, 1 / l) / 2."""
    precision, recall = curve(np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.5, 0.5]))
    slope = np.tan(np.arange(1, ANGLES + 1) * np.pi / 2 / (ANGLES + 1))
    assert precision == pytest.approx(np.minimum(slope, 1) / 2)
    assert recall == pytest.approx(np.minimum(1, 1 / slope) / 2)


def test_exchanging_the_sets_exchanges_precision_and_recall():
    a, b = normal(0, 120), normal(1, 120, mean=0.7)
    there, back = precision_recall(a, b), precision_recall(b, a)
    assert there.f8 == pytest.approx(back.f_eighth)
    assert there.precision == pytest.approx(back.recall[::-1])


def test_it_does_not_depend_on_the_order_of_scans_and_takes_as_many_of_each():
    a, b = normal(0, 60), normal(1, 90, mean=0.5)
    rng = np.random.default_rng(2)
    first, again = precision_recall(a, b), precision_recall(rng.permutation(a), rng.permutation(b))
    assert np.array_equal(first.precision, again.precision)
    assert precision_recall(a, np.concatenate([a, a])).f8 > 0.7


def test_many_equal_rows_leave_clusters_empty_without_a_warning():
    a = np.repeat(normal(0, 2), 50, axis=0)
    assert precision_recall(a, a).f8 == pytest.approx(1.0, abs=0.01)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="five rows"):
        precision_recall(normal(0, 4), normal(1, 100))
