"""The scanner of a site: neutral, shifted, and true to the physics of a magnitude image."""

from __future__ import annotations

import numpy as np
import pytest

from common.phantom.scanner import Anatomy, Scanner, site_scanner


def flat_anatomy(signal: float) -> Anatomy:
    return Anatomy(
        signal=np.full((24, 24, 24), signal, dtype=np.float32),
        label=np.zeros((24, 24, 24), dtype=np.uint8),
        affine=np.eye(4),
    )


def scanner(**changes: float) -> Scanner:
    plain = {"gain": 1.0, "contrast": 1.0, "bias": 0.0, "noise": 0.05, "blur_mm": 0.0}
    return Scanner(site=0, **{**plain, **changes})


def test_site_zero_is_the_same_neutral_scanner_for_every_seed():
    assert site_scanner(0, 0) == site_scanner(99, 0)
    assert site_scanner(0, 0).contrast == 1.0


def test_other_sites_are_reproducible_and_differ_from_each_other():
    sites = [site_scanner(7, site) for site in range(5)]
    assert sites == [site_scanner(7, site) for site in range(5)]
    assert len({s.gain for s in sites}) == 5
    assert all(abs(np.log(s.contrast)) > 0.05 for s in sites[1:])


def test_noise_of_an_empty_scan_is_rayleigh_and_of_a_bright_one_gaussian():
    air, _ = scanner().acquire(flat_anatomy(0.0), np.random.default_rng(0))
    tissue, _ = scanner().acquire(flat_anatomy(1.0), np.random.default_rng(0))
    sigma = tissue.voxels.std()
    assert air.voxels.min() >= 0
    # Mean over standard deviation of the Rayleigh law.
    assert air.voxels.mean() / air.voxels.std() == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.03)
    assert air.voxels.mean() == pytest.approx(sigma * np.sqrt(np.pi / 2), rel=0.05)


def test_bias_field_is_smooth_and_as_strong_as_stated():
    fields = [
        scanner(bias=0.2, noise=0.0).acquire(flat_anatomy(1.0), np.random.default_rng(i))[0].voxels for i in range(30)
    ]
    relative = [np.log(field / field.mean()) for field in fields]
    assert np.mean([r.std() for r in relative]) > 0.02
    assert max(np.abs(np.diff(r, axis=0)).max() for r in relative) < 0.05


def test_the_anatomy_is_not_changed_by_a_scan():
    anatomy = flat_anatomy(0.5)
    site_scanner(0, 1).acquire(anatomy, np.random.default_rng(0))
    assert (anatomy.signal == 0.5).all()


@pytest.mark.parametrize(
    "wrong", [{"gain": 0.0}, {"contrast": -1.0}, {"noise": -0.1}, {"bias": -0.1}, {"blur_mm": -1.0}]
)
def test_impossible_scanners_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|cannot be"):
        scanner(**wrong)


def test_a_negative_site_is_refused():
    with pytest.raises(ValueError, match="numbered from 0"):
        site_scanner(0, -1)
