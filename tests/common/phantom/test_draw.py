"""What every phantom promises: seeded, labelled, individual, shifted by the scanner, prepared like a scan."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from common.phantom.draw import acquisition_grid, draw, draw_pairs, draw_sessions, patient_rng
from common.phantom.scanner import site_scanner
from common.settings.study import IntensitySettings, PhantomKind
from common.volume.prepare import prepare
from common.volume.volume import Grid, Volume

GRID = Grid(shape=(32, 32, 32), spacing_mm=(1.5, 1.5, 1.5))
ROBUST = IntensitySettings(kind="robust", low=1.0, high=99.0)
LABELS = {
    PhantomKind.VESSELS: {1: "vessel"},
    PhantomKind.HIPPOCAMPUS: {1: "anterior", 2: "posterior"},
    PhantomKind.LESIONS: {1: "lesion"},
}
# What makes scanners differ: contrast, which percentiles keep, or the calibration of a physical unit.
LOOKS = {
    PhantomKind.VESSELS: (GRID, ROBUST),
    PhantomKind.HIPPOCAMPUS: (GRID, ROBUST),
    PhantomKind.LESIONS: (
        Grid(shape=(32, 32, 32), spacing_mm=(5.5, 5.5, 5.5)),
        IntensitySettings(kind="window", low=0.0, high=3.0),
    ),
}
EVERY = pytest.mark.parametrize("kind", list(PhantomKind))


def scan(kind: PhantomKind, patient: int, *, seed: int = 0, site: int = 0) -> tuple[Volume, Volume]:
    grid = acquisition_grid(kind, GRID)
    return draw(kind, patient_rng(kind, seed, site, patient), site_scanner(seed, site), grid)


def pairs(kind: PhantomKind, count: int, *, seed: int = 0, site: int = 0) -> NDArray[np.float32]:
    drawn = draw_pairs(kind, seed, count, site_scanner(seed, site), GRID, ROBUST, LABELS[kind])
    return drawn.astype(np.float32)


def overlap(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(2 * np.minimum(a, b).sum() / (a.sum() + b.sum()))


@EVERY
def test_the_same_seed_draws_the_same_patients_and_a_longer_draw_begins_with_a_shorter(kind):
    assert np.array_equal(pairs(kind, 4)[:2], pairs(kind, 2))
    assert not np.array_equal(pairs(kind, 2), pairs(kind, 2, seed=1))


@EVERY
def test_image_is_float32_label_is_uint8_and_both_share_one_geometry(kind):
    image, label = scan(kind, 0)
    assert image.voxels.dtype == np.float32
    assert label.voxels.dtype == np.uint8
    assert set(np.unique(label.voxels)) == {0, *LABELS[kind]}
    assert image.same_geometry(label)
    assert np.isfinite(image.voxels).all()
    assert image.voxels.min() >= 0  # a magnitude


@EVERY
def test_prepared_pairs_are_what_preparation_makes_of_the_drawn_scans(kind):
    image, label = scan(kind, 1)
    expected = prepare(image, label, labels=LABELS[kind], grid=GRID, intensity=ROBUST)
    assert np.array_equal(pairs(kind, 2)[1], expected.astype(np.float16).astype(np.float32))


@EVERY
def test_prepared_pairs_lie_in_their_ranges(kind):
    drawn = pairs(kind, 4)
    assert drawn.shape == (4, 1 + len(LABELS[kind]), 32, 32, 32)
    assert drawn[:, 0].min() == -1
    assert drawn[:, 0].max() == 1
    assert drawn[:, 1:].min() >= 0
    assert drawn[:, 1:].sum(axis=1).max() <= 1.001


@EVERY
def test_every_patient_differs_from_every_other_in_shape_and_in_grey_values(kind):
    drawn = pairs(kind, 12)
    labels = drawn[:, 1:].sum(axis=1)
    images = [np.ravel(pair[0]) for pair in drawn]
    assert max(overlap(a, b) for a, b in combinations(labels, 2)) < 0.85
    assert max(np.corrcoef(a, b)[0, 1] for a, b in combinations(images, 2)) < 0.95


@EVERY
def test_two_sites_share_a_seed_but_no_patient(kind):
    here, there = pairs(kind, 3, site=1)[:, 1:].sum(axis=1), pairs(kind, 3, site=2)[:, 1:].sum(axis=1)
    assert max(overlap(a, b) for a in here for b in there) < 0.85


@EVERY
def test_sessions_of_one_patient_share_anatomy_and_differ_in_noise(kind):
    rng = patient_rng(kind, 5, 0, 0)
    (first, first_label), (second, second_label) = draw_sessions(kind, rng, site_scanner(5, 0), GRID, sessions=2)
    assert np.array_equal(first_label.voxels, second_label.voxels)
    assert not np.array_equal(first.voxels, second.voxels)
    assert np.corrcoef(first.voxels.ravel(), second.voxels.ravel())[0, 1] > 0.9


@EVERY
def test_one_anatomy_looks_measurably_different_on_the_scanners_of_two_sites(kind):
    def looks(site: int) -> NDArray[np.floating]:  # (8, 4): contrast by three quartiles, sharpness and noise
        moved = replace(site_scanner(0, site), site=0)  # site 0: the same anatomies on every scanner
        images = draw_pairs(kind, 3, 8, moved, *LOOKS[kind], LABELS[kind])[:, 0].astype(np.float32)
        steps = [np.abs(np.diff(image, axis=0)).mean() for image in images]
        return np.column_stack([*(np.array([np.percentile(i[i > -1], [25, 50, 75]) for i in images]).T), steps])

    neutral = looks(0)
    for site in (1, 2, 3):
        shift = looks(site) - neutral
        certain = np.abs(shift.mean(axis=0)) / (shift.std(axis=0) / np.sqrt(len(shift)) + 1e-9)
        assert np.abs(shift.mean(axis=0)).max() > 0.02
        assert certain.max() > 4


@EVERY
@pytest.mark.parametrize(
    "grid",
    [
        Grid(shape=(48, 48, 48), spacing_mm=(1.0, 1.0, 1.0)),
        Grid(shape=(16, 24, 20), spacing_mm=(3.0, 2.0, 2.5)),
    ],
    ids=["fine", "anisotropic"],
)
def test_other_grids_give_other_shapes_and_about_the_same_share_of_label(kind, grid):
    drawn = draw_pairs(kind, 0, 3, site_scanner(0, 0), grid, ROBUST, LABELS[kind]).astype(np.float32)
    assert drawn.shape == (3, 1 + len(LABELS[kind]), *grid.shape)
    labelled_ml = drawn[:, 1:].sum(axis=(1, 2, 3, 4)) * np.prod(grid.spacing_mm) / 1000
    field_ml = np.prod(grid.shape) * np.prod(grid.spacing_mm) / 1000
    match kind:
        case PhantomKind.VESSELS:
            assert ((labelled_ml / field_ml > 0.02) & (labelled_ml / field_ml < 0.12)).all()
        case PhantomKind.HIPPOCAMPUS:
            assert ((labelled_ml > 1.5) & (labelled_ml < 7.0)).all()
        case PhantomKind.LESIONS:
            assert ((labelled_ml / field_ml > 0.002) & (labelled_ml / field_ml < 0.2)).all()
