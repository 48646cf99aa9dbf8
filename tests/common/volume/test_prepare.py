"""Preparation: the same anatomy arrives at the same grid voxel, however the scan was stored."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from common.errors import DataError
from common.settings.study import IntensitySettings
from common.volume.prepare import orientation, prepare, restore, to_ras
from common.volume.volume import Grid, Volume

LABELS = {1: "anterior", 3: "posterior"}
WINDOW = IntensitySettings(kind="window", low=0.0, high=100.0)
ROBUST = IntensitySettings(kind="robust", low=1.0, high=99.0)
GRID = Grid(shape=(8, 10, 12), spacing_mm=(1.0, 1.0, 1.0))
SIGNED_AXES = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def stored_as(ras: Volume, order: tuple[int, ...], signs: tuple[int, ...]) -> Volume:
    """The same scan as another scanner would store it: voxel axis a runs along `signs[a]` x world axis order[a]."""
    voxels = ras.voxels.transpose(order)
    affine = ras.affine[:, [*order, 3]].copy()
    for axis, sign in enumerate(signs):
        if sign < 0:
            voxels = np.flip(voxels, axis)
            affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
            affine[:3, axis] *= -1
    return Volume(voxels=voxels, affine=affine)


def at_centre(voxels: NDArray[np.generic], spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-mm * (n - 1) / 2 for mm, n in zip(spacing, voxels.shape, strict=True)]
    return Volume(voxels=voxels, affine=affine)


@settings(max_examples=25, deadline=None)
@given(axes=st.sampled_from(SIGNED_AXES), seed=st.integers(0, 99), shift=st.tuples(*[st.floats(-500, 500)] * 3))
def test_every_way_of_storing_a_scan_gives_the_same_pair(axes: tuple, seed: int, shift: tuple[float, ...]) -> None:
    rng = np.random.default_rng(seed)
    image = at_centre(rng.uniform(0, 100, GRID.shape).astype(np.float32))
    label = at_centre(rng.choice([0, 1, 3], GRID.shape).astype(np.uint8))
    told = prepare(image, label, labels=LABELS, grid=GRID, intensity=WINDOW)
    moved = image.affine.copy()
    moved[:3, 3] += shift
    other = stored_as(Volume(voxels=image.voxels, affine=moved), *axes)
    other_label = stored_as(Volume(voxels=label.voxels, affine=moved), *axes)
    np.testing.assert_array_equal(prepare(other, other_label, labels=LABELS, grid=GRID, intensity=WINDOW), told)
    assert orientation(to_ras(other)) == "RAS"
    np.testing.assert_array_equal(to_ras(other).voxels, image.voxels)
    np.testing.assert_allclose(to_ras(other).affine, moved, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    axes=st.sampled_from(SIGNED_AXES),
    spacing=st.tuples(*[st.sampled_from([0.5, 1.0, 1.7])] * 3),
    tilt=st.tuples(*[st.floats(-25, 25)] * 3),
    voxel=st.tuples(st.integers(7, 12), st.integers(7, 12), st.integers(7, 12)),
)
def test_a_marked_voxel_lands_where_its_world_coordinate_says(
    axes: tuple, spacing: tuple[float, float, float], tilt: tuple[float, ...], voxel: tuple[int, int, int]
) -> None:
    """Also for oblique scans: the blob's centre of mass on the grid is its place relative to the scan's centre."""
    shape = (20, 20, 20)
    near = np.linalg.norm(np.indices(shape).T - np.array(voxel), axis=-1).T
    blob = np.exp(-(near**2) / 4).astype(np.float32)
    upright = at_centre(blob, spacing)
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix()
    scan = stored_as(Volume(voxels=blob, affine=turn @ upright.affine), *axes)
    mark = stored_as(Volume(voxels=(blob > 0.5).astype(np.uint8), affine=turn @ upright.affine), *axes)
    grid = Grid(shape=(48, 48, 48), spacing_mm=(1.0, 1.0, 1.0))
    window = IntensitySettings(kind="window", low=0.0, high=1.0)
    pair = prepare(scan, mark, labels={1: "mark"}, grid=grid, intensity=window)
    expected = (turn @ upright.affine @ [*voxel, 1])[:3]
    for channel in (pair[0] + 1, pair[1]):
        weights = channel.astype(float)
        landed = [(weights.sum(axis=tuple({0, 1, 2} - {a})) * np.arange(48)).sum() / weights.sum() for a in range(3)]
        np.testing.assert_allclose(grid.affine[:3, :3] @ landed + grid.affine[:3, 3], expected, atol=0.3)


def test_geometry_equal_to_the_grid_leaves_every_voxel_untouched() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 100, GRID.shape).astype(np.float32)
    labels = rng.choice([0, 1, 3], GRID.shape).astype(np.uint8)
    pair = prepare(at_centre(values), at_centre(labels), labels=LABELS, grid=GRID, intensity=WINDOW)
    assert pair.dtype == np.float32
    np.testing.assert_allclose(pair[0], values / 50 - 1, atol=1e-6)
    np.testing.assert_array_equal(pair[1], labels == 1)
    np.testing.assert_array_equal(pair[2], labels == 3)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 24)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 4.0)] * 3),
    seed=st.integers(0, 99),
)
def test_prepared_values_keep_their_ranges_for_any_geometry(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    affine = np.diag([*spacing, 1.0])
    image = Volume(voxels=rng.normal(size=shape).astype(np.float32), affine=affine)
    label = Volume(voxels=rng.choice([0, 1, 3], shape).astype(np.uint8), affine=affine)
    try:
        pair = prepare(image, label, labels=LABELS, grid=GRID, intensity=ROBUST)
    except DataError:  # one or two voxels may have no contrast
        assert np.prod(shape) < 20 or min(np.array(shape) * spacing) < 6
        return
    assert pair.shape == (3, *GRID.shape)
    assert np.isfinite(pair).all()
    assert pair[0].min() >= -1
    assert pair[0].max() <= 1
    assert pair[1:].min() >= 0
    assert pair[1:].sum(axis=0).max() <= 1 + 1e-6


def test_a_larger_scan_is_cropped_and_a_smaller_one_padded_around_its_centre() -> None:
    big = np.zeros((14, 14, 14), np.float32)
    big[3:11, 3:11, 3:11] = 100  # exactly the central 8 voxels
    small = Grid(shape=(8, 8, 8), spacing_mm=(1.0, 1.0, 1.0))
    mask = (big > 0).astype(np.uint8)
    ramp = big * np.linspace(0.1, 1, 14, dtype=np.float32)
    pair = prepare(at_centre(ramp), at_centre(mask), labels={1: "a"}, grid=small, intensity=WINDOW)
    assert pair[1].min() == 1
    wide = Grid(shape=(20, 20, 20), spacing_mm=(1.0, 1.0, 1.0))
    pair = prepare(at_centre(ramp + 20), at_centre(mask), labels={1: "a"}, grid=wide, intensity=WINDOW)
    outside = np.ones((20, 20, 20), bool)
    outside[3:17, 3:17, 3:17] = False
    np.testing.assert_allclose(pair[0][outside], 20 / 50 - 1, atol=1e-6)  # the scan's own darkest value
    assert pair[1][outside].max() == 0
    np.testing.assert_array_equal(pair[1][6:14, 6:14, 6:14], 1)


def test_a_full_label_reaches_the_scans_edge_and_not_beyond() -> None:
    """Upsampling puts grid voxels between the last voxel's centre and its edge; they belong to the scan."""
    image = at_centre(np.random.default_rng(0).uniform(0, 100, (6, 6, 6)).astype(np.float32), (2.0, 2.0, 2.0))
    label = Volume(voxels=np.ones((6, 6, 6), np.uint8), affine=image.affine)
    grid = Grid(shape=(16, 16, 16), spacing_mm=(1.0, 1.0, 1.0))
    pair = prepare(image, label, labels={1: "a"}, grid=grid, intensity=WINDOW)
    assert pair[1].sum() == pytest.approx(12**3)
    assert pair[1][2:14, 2:14, 2:14].min() == 1


def test_downsampling_averages_instead_of_skipping() -> None:
    """A one-voxel checkerboard has no business on a grid three times coarser: it must come out grey."""
    board = (np.indices((48, 48, 48)).sum(axis=0) % 2 * 100).astype(np.float32)
    board[:24] += np.linspace(0, 40, 24, dtype=np.float32)[:, None, None]
    grid = Grid(shape=(16, 16, 16), spacing_mm=(3.0, 3.0, 3.0))
    wide = IntensitySettings(kind="window", low=-100.0, high=200.0)
    flat = at_centre((np.indices(board.shape)[1] % 3 == 0).astype(np.uint8))
    pair = prepare(at_centre(board), flat, labels={1: "a"}, grid=grid, intensity=wide)
    assert np.abs(pair[0, 9:15, 1:-1, 1:-1]).max() < 0.05
    assert pair[1].mean() == pytest.approx(1 / 3, abs=0.05)  # share of the volume, not of the sampled points


def test_robust_scaling_sees_one_scan_and_neither_its_unit_nor_its_padding() -> None:
    rng = np.random.default_rng(1)
    values = rng.gamma(2.0, 100.0, (10, 10, 10)).astype(np.float32)
    label = at_centre((values > 300).astype(np.uint8))
    grid = Grid(shape=(16, 16, 16), spacing_mm=(1.0, 1.0, 1.0))
    pair = prepare(at_centre(values), label, labels={1: "a"}, grid=grid, intensity=ROBUST)
    scaled = prepare(at_centre(7 * values + 1000), label, labels={1: "a"}, grid=grid, intensity=ROBUST)
    np.testing.assert_allclose(scaled, pair, atol=1e-4)
    low, high = np.percentile(values, [1, 99])
    inner = pair[0, 3:13, 3:13, 3:13]
    np.testing.assert_allclose(inner, ((values - low) / (high - low) * 2 - 1).clip(-1, 1), atol=1e-5)
    assert pair[0, 0].max() == -1


def test_an_image_without_contrast_is_refused() -> None:
    flat = at_centre(np.full(GRID.shape, 500, np.float32))
    label = at_centre(np.ones(GRID.shape, np.uint8))
    for intensity in (WINDOW, ROBUST):
        with pytest.raises(DataError, match="no contrast"):
            prepare(flat, label, labels=LABELS, grid=GRID, intensity=intensity)


def test_an_image_and_a_label_of_different_geometry_are_refused() -> None:
    image = at_centre(np.random.default_rng(0).uniform(size=GRID.shape).astype(np.float32))
    mirrored = Volume(voxels=np.ones(GRID.shape, np.uint8), affine=np.diag([-1.0, 1, 1, 1]) @ image.affine)
    with pytest.raises(DataError, match="different voxel grids"):
        prepare(image, mirrored, labels=LABELS, grid=GRID, intensity=WINDOW)


def test_preparing_does_not_write_into_the_scan() -> None:
    values = np.random.default_rng(0).uniform(0, 100, GRID.shape).astype(np.float32)
    before = values.copy()
    image, label = at_centre(values), at_centre(np.ones(GRID.shape, np.uint8))
    prepare(image, label, labels=LABELS, grid=GRID, intensity=WINDOW)[:] = 0
    np.testing.assert_array_equal(values, before)


def test_restoring_a_prepared_pair_gives_the_label_map_back_on_the_grid() -> None:
    rng = np.random.default_rng(3)
    values = rng.uniform(0, 100, GRID.shape).astype(np.float32)
    labels = rng.choice([0, 1, 3], GRID.shape).astype(np.uint8)
    pair = prepare(at_centre(values), at_centre(labels), labels=LABELS, grid=GRID, intensity=WINDOW)
    image, label = restore(pair.astype(np.float16), labels=LABELS, grid=GRID)
    assert (image.voxels.dtype, label.voxels.dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(label.voxels, labels)
    np.testing.assert_array_equal(image.affine, GRID.affine)
    assert image.same_geometry(label)


def test_restore_gives_a_voxel_to_what_occupies_most_of_it() -> None:
    pair = np.zeros((3, 8, 8, 8), np.float32)
    pair[1, 0, 0, 0], pair[2, 0, 0, 0] = 0.4, 0.35  # background 0.25
    pair[1, 1, 0, 0], pair[2, 1, 0, 0] = 0.3, 0.2  # background 0.5
    _, label = restore(pair, labels=LABELS, grid=Grid(shape=(8, 8, 8), spacing_mm=(1.0, 1.0, 1.0)))
    assert (label.voxels[0, 0, 0], label.voxels[1, 0, 0]) == (1, 0)


def test_restore_refuses_another_shape_and_labels_beyond_uint8() -> None:
    grid = Grid(shape=(8, 8, 8), spacing_mm=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="shape"):
        restore(np.zeros((2, 8, 8, 8), np.float32), labels=LABELS, grid=grid)
    for wrong in (0, 256):
        with pytest.raises(ValueError, match=r"1\.\.255"):
            restore(np.zeros((2, 8, 8, 8), np.float32), labels={wrong: "x"}, grid=grid)
