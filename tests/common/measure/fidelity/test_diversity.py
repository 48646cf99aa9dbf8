import numpy as np
import pytest

from common.measure.fidelity.diversity import difference, mean_similarity, ms_ssim
from common.measure.intervals import Interval


def scans(seed: int, n: int, shape: tuple[int, int, int] = (24, 16, 12)) -> np.ndarray:
    """Blobs at random places with some noise."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, k) for k in shape), indexing="ij")
    out = np.empty((n, *shape), dtype=np.float32)
    for scan in out:
        centre = rng.uniform(-0.5, 0.5, 3)
        blob = 1.6 * np.exp(-sum((x - c) ** 2 for x, c in zip(axes, centre, strict=True)) / 0.3)
        scan[:] = blob - 0.8 + rng.normal(0, 0.05, shape)
    return out.clip(-1, 1)


def test_a_scan_is_wholly_similar_to_itself_and_less_to_what_was_done_to_it():
    a = scans(0, 3)
    noise = np.random.default_rng(1).normal(0, 1, a.shape)
    assert ms_ssim(a, a) == pytest.approx(np.ones(3))
    little, much = ms_ssim(a, a + 0.1 * noise), ms_ssim(a, a + 0.4 * noise)
    assert (ms_ssim(a, scans(7, 3)) < 0.9).all()
    assert (much < little).all()
    assert (little < 1).all()


def test_similarity_is_symmetric_and_never_below_zero():
    a, b = scans(0, 4), scans(1, 4)
    assert ms_ssim(a, b) == pytest.approx(ms_ssim(b, a))
    assert (ms_ssim(a, -a) >= 0).all()


def test_flat_images_are_compared_by_luminance_alone():
    a, b = np.full((1, 8, 8, 8), 0.5), np.full((1, 8, 8, 8), -0.1)  # one scale: cs is 1, the exponent 1
    c1 = (0.01 * 2) ** 2
    assert ms_ssim(np.abs(a), np.abs(b))[0] == pytest.approx((2 * 0.5 * 0.1 + c1) / (0.25 + 0.01 + c1))


def test_it_does_not_depend_on_batches_or_order():
    a, b = scans(0, 40), scans(1, 40)
    alone = np.concatenate([ms_ssim(a[i : i + 1], b[i : i + 1]) for i in range(40)])
    assert ms_ssim(a, b) == pytest.approx(alone, abs=1e-12)
    first, again = mean_similarity(a), mean_similarity(np.random.default_rng(3).permutation(a))
    assert (first.low, first.estimate, first.high) == pytest.approx((again.low, again.estimate, again.high))


def test_a_set_that_repeats_itself_is_more_alike_and_one_scan_repeated_wholly():
    varied = mean_similarity(scans(0, 30))
    repeated = mean_similarity(np.repeat(scans(0, 3), 10, axis=0))
    assert difference(repeated, varied).low > 0
    assert mean_similarity(np.repeat(scans(0, 1), 5, axis=0)).estimate == pytest.approx(1.0)


def test_the_interval_holds_the_mean_over_all_pairs_of_scans():
    pool = scans(5, 60)
    truth = mean_similarity(pool).estimate
    rng = np.random.default_rng(0)
    found = [mean_similarity(pool[rng.choice(60, 14, replace=False)]) for _ in range(25)]
    assert np.mean([i.contains(truth) for i in found]) >= 0.84


def test_differences_of_intervals_are_those_of_independent_estimates():
    a = Interval(low=0.4, estimate=0.7, high=1.0, confidence=0.95)
    b = Interval(low=0.1, estimate=0.5, high=0.9, confidence=0.95)
    found = difference(a, b)
    assert (found.low, found.estimate, found.high) == pytest.approx((0.2 - 0.5, 0.2, 0.2 + 0.5))
    with pytest.raises(ValueError, match="confidences"):
        difference(a, Interval(low=0.1, estimate=0.5, high=0.9, confidence=0.9))


def test_small_grids_other_shapes_and_pairs_of_scans_are_refused():
    with pytest.raises(ValueError, match="5 voxels"):
        ms_ssim(np.zeros((1, 4, 9, 9)), np.zeros((1, 4, 9, 9)))
    with pytest.raises(ValueError, match="both alike"):
        ms_ssim(np.zeros((1, 9, 9, 9)), np.zeros((2, 9, 9, 9)))
    with pytest.raises(ValueError, match="3 scans"):
        mean_similarity(scans(0, 2))
