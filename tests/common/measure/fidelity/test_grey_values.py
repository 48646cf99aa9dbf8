import numpy as np
import pytest

from common.measure.fidelity.grey_values import (
    intensity_distances,
    radial_spectrum,
    spectrum_distance_db,
    tissue_histograms,
)


def pairs_of(background: float, inside: float, n: int = 3) -> np.ndarray:
    """(n, 2, 8, 8, 8): a quarter is labelled; grey values are constant in and outside of it."""
    pairs = np.full((n, 2, 8, 8, 8), background, dtype=np.float32)
    pairs[:, 1] = 0.0
    pairs[:, 0, :2], pairs[:, 1, :2] = inside, 1.0
    return pairs


def test_constant_grey_values_are_as_far_apart_as_they_are():
    outside, inside = intensity_distances(pairs_of(-0.5, 0.5), pairs_of(-0.25, 0.1))
    assert outside == pytest.approx(0.25, abs=0.008)
    assert inside == pytest.approx(0.4, abs=0.008)
    assert intensity_distances(pairs_of(-0.5, 0.5), pairs_of(-0.5, 0.5)) == (0.0, 0.0)


def test_it_is_the_wasserstein_distance_of_the_voxels():
    from scipy.stats import wasserstein_distance

    rng = np.random.default_rng(0)
    a, b = pairs_of(0, 0, 2), pairs_of(0, 0, 4)
    a[:, 0], b[:, 0] = rng.uniform(-1, 0.2, a[:, 0].shape), rng.normal(0, 0.3, b[:, 0].shape).clip(-1, 1)
    outside, _ = intensity_distances(a, b)
    expected = wasserstein_distance(a[:, 0, 2:].ravel(), b[:, 0, 2:].ravel())
    assert outside == pytest.approx(expected, abs=0.008)


def test_each_voxel_counts_by_its_share_and_a_label_that_nobody_has_is_none():
    pairs = pairs_of(-0.5, 0.5, 1)
    pairs[:, 1] *= 0.25
    assert tissue_histograms(pairs).sum(axis=1) == pytest.approx([512 - 32, 32])
    empty = pairs_of(-0.5, 0.5)
    empty[:, 1] = 0.0
    outside, inside = intensity_distances(pairs_of(-0.5, 0.5), empty)
    assert inside is None
    assert outside == pytest.approx(0.25, abs=0.01)  # a quarter of its voxels lies one away


def test_values_at_both_ends_are_counted():
    assert tissue_histograms(pairs_of(-1.0, 1.0, 1))[:, [0, -1]].tolist() == [[384, 0], [0, 128]]


def test_a_wave_has_all_its_power_in_the_shell_of_its_frequency():
    spacing = (2.0, 1.0, 1.0)
    at = np.arange(16) * 2.0
    image = np.cos(2 * np.pi * at / 8.0)[None, :, None, None] * np.ones((1, 16, 16, 16))  # 1/8 per mm; Nyquist is 1/4
    spectrum = radial_spectrum(image, spacing)[0]
    assert len(spectrum) == 8
    assert int(spectrum.argmax()) == 3  # half of Nyquist: the fourth of eight shells
    assert spectrum[3] / spectrum.sum() > 0.999


def test_white_noise_is_flat_and_twice_its_deviation_is_six_decibel():
    noise = np.random.default_rng(0).normal(0, 0.2, (40, 16, 16, 16))
    spectrum = radial_spectrum(noise, (1.0, 1.0, 1.0)).mean(axis=0)
    assert spectrum[1:] == pytest.approx(np.full(7, 0.04), rel=0.1)
    assert spectrum_distance_db(noise, 2 * noise, (1.0, 1.0, 1.0)) == pytest.approx(20 * np.log10(2), rel=1e-6)
    assert spectrum_distance_db(noise, noise[::-1], (1.0, 1.0, 1.0)) == pytest.approx(0.0, abs=1e-9)


def test_a_flat_scan_has_a_finite_spectrum():
    flat = np.full((2, 8, 8, 8), -1.0)
    assert np.isfinite(spectrum_distance_db(flat, np.random.default_rng(0).normal(0, 0.2, flat.shape), (1.0, 1.0, 1.0)))
