import numpy as np
import pytest

from common.measure.fidelity.content_order import content_order
from common.measure.fidelity.distances import (
    FEWEST,
    frechet_distance,
    gaussian_frechet,
    kernel_distance,
    shrunk_covariance,
    squared_mmd,
)


def normal(seed: int, n: int, d: int = 8, mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, scale, (n, d))


def test_frechet_of_two_normals_is_its_closed_form():
    mean_a, mean_b = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])  # these commute: |mean|^2 + sum (s_a - s_b)^2
    assert gaussian_frechet(mean_a, a, mean_b, b) == pytest.approx(5.0 + 1.0 + 0.0 + 4.0)
    turn, _ = np.linalg.qr(normal(0, 3, 3))
    assert gaussian_frechet(turn @ mean_a, turn @ a @ turn.T, turn @ mean_b, turn @ b @ turn.T) == pytest.approx(10.0)


def test_frechet_of_normals_that_do_not_commute():
    a, b = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[3.0, 0.0], [0.0, 1.0]])
    # tr (AB)^1/2 of a 2 x 2 product is sqrt(tr AB + 2 sqrt(det AB))
    expected = 4.0 + 4.0 - 2.0 * np.sqrt(np.trace(a @ b) + 2.0 * np.sqrt(np.linalg.det(a @ b)))
    assert gaussian_frechet(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected)


def test_frechet_of_large_samples_comes_near_the_truth():
    found = frechet_distance(normal(1, 20_000), normal(2, 20_000, mean=0.5, scale=2.0))
    assert found == pytest.approx(8 * 0.25 + 8 * 1.0, rel=0.03)


def test_the_stated_floor_of_small_samples_is_what_they_give():
    for n, floor in ((64, 2.2), (256, 0.5), (1024, 0.15)):
        found = np.mean([frechet_distance(normal(s, n, 64), normal(s + 50, n, 64)) for s in range(4)])
        assert found == pytest.approx(floor, rel=0.25), n


def test_shrinkage_lies_nearer_the_truth_than_the_sample_does():
    truth = np.diag(np.linspace(0.5, 1.5, 30))
    rows = normal(3, 20, 30) @ np.sqrt(truth)
    assert np.linalg.norm(shrunk_covariance(rows) - truth) < 0.5 * np.linalg.norm(np.cov(rows.T) - truth)
    assert shrunk_covariance(np.ones((9, 3))) == pytest.approx(np.zeros((3, 3)))
    many = normal(3, 50_000, 3) * [1.0, 2.0, 3.0]
    assert shrunk_covariance(many) == pytest.approx(np.cov(many.T, ddof=0), abs=0.02)


def test_squared_mmd_is_that_of_pairs_counted_one_by_one():
    a, b = normal(1, 4, 3), normal(2, 5, 3)

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    aa = np.mean([kernel(a[i], a[j]) for i in range(4) for j in range(4) if i != j])
    bb = np.mean([kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    ab = np.mean([kernel(x, y) for x in a for y in b])
    assert squared_mmd(a, b) == pytest.approx(aa + bb - 2 * ab)


def test_the_jackknife_is_that_of_leaving_out_one_row_at_a_time():
    a, b = normal(1, 9, 3), normal(2, 8, 3, mean=1.0)
    variance = 0.0
    for without in (
        [squared_mmd(np.delete(a, i, axis=0), b) for i in range(9)],
        [squared_mmd(a, np.delete(b, i, axis=0)) for i in range(8)],
    ):
        variance += (len(without) - 1) * np.var(without)
    found = kernel_distance(a, b, confidence=0.95)
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * np.sqrt(variance))


@pytest.mark.parametrize(("rows", "features"), [(12, 64), (24, 8), (64, 64)])
def test_kid_of_equal_distributions_is_zero_in_the_mean_and_its_interval_holds_zero(rows, features):
    found = [kernel_distance(normal(s, rows, features), normal(s + 1000, rows, features)) for s in range(200)]
    estimates = np.array([k.estimate for k in found])
    assert abs(estimates.mean()) < 3 * estimates.std() / np.sqrt(200)
    assert np.mean([k.contains(0.0) for k in found]) >= 0.9


def test_kid_covers_its_true_value_and_sees_a_shift():
    """Mean of (x x' + 1)^3 for two x of mean m and variance 1: 1 + 3 m^2 + 3 E^2[x^2] + E^2[x^3]."""

    def expected(m):
        second, third = m**2 + 1, m**3 + 3 * m
        return 1 + 3 * m**2 + 3 * second**2 + third**2

    m = 0.7
    cross = 1 + 3 * (m**2 + 1)  # of one x with mean zero: its first and third moments vanish
    truth = expected(0.0) + expected(m) - 2 * cross
    found = [kernel_distance(normal(s, 300, 1), normal(s + 1000, 300, 1, mean=m)) for s in range(200)]
    assert np.mean([k.contains(truth) for k in found]) >= 0.88  # third powers are skewed
    assert np.mean([k.low > 0 for k in found]) > 0.9


def test_distances_do_not_depend_on_the_order_of_scans():
    a, b = normal(1, 40), normal(2, 30, mean=0.3)
    mixed = np.random.default_rng(0).permutation(a)
    assert frechet_distance(mixed, b) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    before, after = kernel_distance(a, b), kernel_distance(mixed, b)
    assert (before.low, before.high) == pytest.approx((after.low, after.high), rel=1e-9)


def test_too_few_scans_and_other_features_are_refused():
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="at least"):
            distance(normal(1, FEWEST - 1), normal(2, 40))
        with pytest.raises(ValueError, match="one length"):
            distance(normal(1, 40, 8), normal(2, 40, 9))


def test_content_order_is_a_permutation_of_content_alone():
    rows = normal(5, 20)
    order = content_order(rows)
    assert sorted(order) == list(range(20))
    assert np.array_equal(rows[order], rows[::-1][content_order(rows[::-1])])
    assert not np.array_equal(order, content_order(rows, draw=1))
