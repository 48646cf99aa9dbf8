import os
from pathlib import Path

import numpy as np
import pytest
from tiny_studies import tiny_study

from common.errors import DataError
from common.measure.fidelity.encoder import train_encoder
from common.measure.fidelity.fidelity import measure_fidelity
from common.phantom.draw import public_phantoms
from common.settings.study import IntensitySettings
from common.volume.nifti import read_nifti
from common.volume.prepare import prepare
from common.volume.volume import Grid, Volume

DATA = Path(os.environ.get("CONSILIUM_TEST_DATA", Path(__file__).parents[5] / "shared" / "data"))
PET = DATA / "pet" / "ibsi_sts"
SPACING = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def phantoms():
    return public_phantoms(tiny_study(), 5, 96).astype(np.float32)


@pytest.fixture(scope="module")
def encoder():
    return train_encoder(public_phantoms(tiny_study(), 1, 128).astype(np.float32), name="test", steps=80, seed=1)


def of(real, synthetic, encoder, spacing=SPACING):
    return measure_fidelity(real, synthetic, encoder=lambda: encoder, spacing_mm=spacing)


def noisy(pairs: np.ndarray, deviation: float) -> np.ndarray:
    worse = pairs.copy()
    worse[:, 0] += np.random.default_rng(0).normal(0, deviation, worse[:, 0].shape)
    return worse.clip(-1, 1)


def test_two_halves_of_one_set_differ_in_nothing(phantoms, encoder):
    found = of(phantoms[::2], phantoms[1::2], encoder)
    assert found.features.kid.contains(0.0)
    assert found.similarity_difference.contains(0.0)
    assert found.radiomics.differ() == ()
    assert min(found.features.f8, found.features.f_eighth) > 0.8
    assert (found.real, found.synthetic, found.features.net) == (48, 48, "test")


@pytest.mark.parametrize("harm", ["noise", "labels elsewhere", "repeats", "contrast"])
def test_every_harm_is_seen_by_its_measure(phantoms, encoder, harm):
    real, good = phantoms[::2], phantoms[1::2]
    clean = of(real, good, encoder)
    match harm:
        case "noise":
            found = of(real, noisy(good, 0.4), encoder)
            assert found.features.kid.low > 0
            assert found.spectrum_db > 3 * clean.spectrum_db
        case "labels elsewhere":
            moved = good.copy()
            moved[:, 1] = np.roll(moved[:, 1], 3, axis=2)
            found = of(real, moved, encoder)
            assert found.features.kid.low > 0
            assert "mean" in found.radiomics.differ()
            assert found.intensity[1] > 3 * clean.intensity[1]
        case "repeats":
            found = of(real, np.repeat(good[:4], 12, axis=0), encoder)
            assert found.similarity_difference.low > 0
            assert found.features.f8 < clean.features.f8 - 0.3
        case "contrast":
            flat = good.copy()
            flat[:, 0] *= 0.5
            found = of(real, flat, encoder)
            assert found.features.kid.low > 0
            assert found.intensity[0] > 3 * clean.intensity[0]
    assert found.features.frechet > 1.2 * clean.features.frechet


def test_no_value_depends_on_the_order_of_scans(phantoms, encoder):
    real, synthetic = phantoms[:20], noisy(phantoms[20:44], 0.1)
    rng = np.random.default_rng(0)
    first = of(real, synthetic, encoder)
    again = of(rng.permutation(real), rng.permutation(synthetic), encoder)
    assert first.features.frechet == pytest.approx(again.features.frechet, rel=1e-6)
    assert (first.features.kid.low, first.features.kid.high) == pytest.approx(
        (again.features.kid.low, again.features.kid.high), rel=1e-6
    )
    assert (first.features.f8, first.features.f_eighth) == pytest.approx((again.features.f8, again.features.f_eighth))
    assert first.similarity_difference.estimate == pytest.approx(again.similarity_difference.estimate)
    assert first.intensity == pytest.approx(again.intensity)
    assert first.spectrum_db == pytest.approx(again.spectrum_db)
    assert [t.p for t in first.radiomics.tests] == pytest.approx([t.p for t in again.radiomics.tests])


def test_empty_labels_are_counted_and_stop_nothing(phantoms, encoder):
    empty = phantoms[1::2].copy()
    empty[:, 1:] = 0.0
    found = of(phantoms[::2], empty, encoder)
    assert found.radiomics.left_out_synthetic == 48
    assert found.intensity[1] is None
    assert found.radiomics.correlation_difference is None


def test_pairs_of_another_grid_or_too_few_are_refused(phantoms, encoder):
    with pytest.raises(ValueError, match="different shapes"):
        of(phantoms, phantoms[:, :, :8], encoder)
    with pytest.raises(ValueError, match="at least"):
        of(phantoms[:20], phantoms[:2], encoder)


def test_sets_too_small_for_a_feature_net_are_compared_without_one(phantoms):
    def no_encoder():
        raise AssertionError("no feature net is trained for seven scans")

    found = measure_fidelity(phantoms[:20], noisy(phantoms[20:27], 0.4), encoder=no_encoder, spacing_mm=SPACING)
    clean = measure_fidelity(phantoms[:20], phantoms[20:27], encoder=no_encoder, spacing_mm=SPACING)
    assert found.features is None
    assert found.spectrum_db > 3 * clean.spectrum_db
    assert found.similarity_synthetic.estimate < clean.similarity_synthetic.estimate


@pytest.mark.skipif(not PET.is_dir(), reason=f"real PET absent: {PET} (set CONSILIUM_TEST_DATA)")
def test_real_pet_is_like_real_pet_and_unlike_what_spoils_it():
    """SUV window of 0 to 15 on a coarse grid; every other patient is held against the rest."""
    grid = Grid(shape=(24, 24, 32), spacing_mm=(8.0, 8.0, 7.0))
    intensity = IntensitySettings(kind="window", low=0.0, high=15.0)
    pairs = []
    for folder in sorted(PET.iterdir()):
        image, mask = (read_nifti(folder / f"PET_{part}.nii.gz") for part in ("image", "mask"))
        label = Volume(voxels=(mask.voxels > 0).astype(np.uint8), affine=image.affine)
        try:
            pairs.append(prepare(image, label, labels={1: "tumour"}, grid=grid, intensity=intensity))
        except DataError:
            continue
    real = np.stack(pairs)
    assert len(real) >= 20
    assert (real[:, 1].max(axis=(1, 2, 3)) > 0.5).all()  # every tumour survives
    phantoms = public_phantoms(tiny_study(grid={"shape": grid.shape, "spacing_mm": grid.spacing_mm}), 1, 64).astype(
        np.float32
    )
    encoder = train_encoder(phantoms, name="test", steps=40, seed=1)
    halves = of(real[::2], real[1::2], encoder, grid.spacing_mm)
    spoilt = of(real[::2], noisy(real[1::2], 0.2), encoder, grid.spacing_mm)
    invented = of(real[::2], phantoms[:12], encoder, grid.spacing_mm)
    assert halves.features.kid.contains(0.0)
    assert halves.radiomics.differ() == ()
    assert halves.radiomics.left_out_real == halves.radiomics.left_out_synthetic == 0
    assert halves.features.frechet < 0.5 * invented.features.frechet  # of twelve scans it sees no more than this
    assert halves.spectrum_db < spoilt.spectrum_db
    assert halves.intensity[1] < invented.intensity[1]
    assert len(invented.radiomics.differ()) >= 2
