"""The quick way to the grid, one matrix per axis, against the general one: nobody may see which was taken."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from common.volume.prepare import to_ras
from common.volume.resampling import Aligned, Oblique, oblique, resampling
from common.volume.volume import Grid, Volume

SIGNED_AXES = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]
# In steps of 0.01 mm: a scan that is the grid up to 1e-4 is left as it is by one way and interpolated by the other.
MILLIMETRES = st.integers(25, 500).map(lambda hundredths: hundredths / 100)


def scan(shape: tuple[int, ...], spacing: tuple[float, ...], turn: np.ndarray, seed: int = 0) -> Volume:
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    values = np.random.default_rng(seed).uniform(-1.0, 1.0, shape).astype(np.float32)
    return Volume(voxels=values, affine=affine)


@settings(max_examples=100, deadline=None)
# 0.72 / 0.27: 3 standard deviations + 0.5, where the smoothing is cut, is a whole number up to rounding.
@example(
    shape=(2, 1, 1),
    spacing=(0.27, 0.25, 0.25),
    axes=((1, 0, 2), (1, 1, 1)),
    grid=Grid(shape=(8, 8, 8), spacing_mm=(0.25, 0.72, 0.25)),
    seed=0,
)
@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    spacing=st.tuples(*[MILLIMETRES] * 3),
    axes=st.sampled_from(SIGNED_AXES),
    grid=st.builds(Grid, shape=st.tuples(*[st.integers(8, 20)] * 3), spacing_mm=st.tuples(*[MILLIMETRES] * 3)),
    seed=st.integers(0, 9),
)
def test_both_ways_give_the_same_values_for_an_aligned_scan(
    shape: tuple, spacing: tuple, axes: tuple, grid: Grid, seed: int
) -> None:
    """Up to the edges, where the smoothing repeats the last voxel, and beyond them."""
    order, signs = axes
    ras = to_ras(scan(shape, spacing, np.eye(3)[:, order] * signs, seed))
    quick = resampling(ras, grid)
    assert isinstance(quick, Aligned)
    general = oblique(ras.shape, np.diag(np.divide(grid.spacing_mm, ras.spacing_mm)), grid.shape)
    np.testing.assert_array_equal(quick.inside, general.inside)
    quickly, generally = (way.apply(way.crop(ras.voxels)) for way in (quick, general))
    assert quickly.dtype == generally.dtype == np.float32
    np.testing.assert_allclose(quickly, generally, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("degrees", "way"), [(0.0, Aligned), (1e-4, Aligned), (0.1, Oblique), (30.0, Oblique)])
def test_a_turned_scan_takes_the_general_way(degrees: float, way: type) -> None:
    turn = Rotation.from_euler("xyz", [degrees, 0, degrees], degrees=True).as_matrix()
    grid = Grid(shape=(16, 16, 16), spacing_mm=(2.0, 2.0, 2.0))
    assert isinstance(resampling(scan((20, 20, 20), (1.0, 1.0, 1.0), turn), grid), way)


def test_a_slight_turn_changes_the_values_slightly_although_the_way_changes() -> None:
    grid = Grid(shape=(16, 16, 16), spacing_mm=(2.0, 2.0, 2.0))
    found = []
    for degrees in (0.0, 0.02):
        turn = Rotation.from_euler("xyz", [degrees, degrees, degrees], degrees=True).as_matrix()
        turned = scan((40, 40, 40), (1.0, 1.0, 1.0), turn)
        way = resampling(turned, grid)
        found.append(way.apply(way.crop(turned.voxels)))
    assert 0 < np.abs(found[1] - found[0]).max() < 0.05


@pytest.mark.parametrize("degrees", [0.0, 10.0])
def test_only_the_part_of_a_large_scan_that_the_grid_reaches_is_read(degrees: float) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix() * 0.5
    whole = Volume(voxels=np.broadcast_to(np.float32(0), (5000, 5000, 5000)), affine=affine)  # one value in memory
    way = resampling(whole, Grid(shape=(8, 8, 8), spacing_mm=(1.0, 1.0, 1.0)))
    assert max(way.crop(whole.voxels).shape) < 30
    assert way.inside.all()


def test_what_scans_of_one_extent_share_cannot_be_written_to() -> None:
    grid = Grid(shape=(16, 16, 16), spacing_mm=(2.0, 2.0, 2.0))
    ways = [resampling(scan((20, 21, 22), (1.0, 1.0, 1.0), np.eye(3), seed), grid) for seed in (0, 1)]
    first, second = (way.axes for way in ways if isinstance(way, Aligned))
    for one, other in zip(first, second, strict=True):
        assert one is other  # built once for a cohort, not once a scan
        assert one.weights is not None
        with pytest.raises(ValueError, match="read-only"):
            one.weights[:] = 0
