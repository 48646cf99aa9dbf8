"""The grid holds a structure that lies at the edge of a scan, and stays where it is when nothing would be cut."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from client.placement import shift_to_hold
from common.settings.study import IntensitySettings
from common.volume.prepare import prepare
from common.volume.volume import Grid, Volume

GRID = Grid(shape=(8, 8, 8), spacing_mm=(2.0, 2.0, 2.0))  # 16 mm


def label(low: tuple[int, int, int], high: tuple[int, int, int], affine: np.ndarray | None = None) -> Volume:
    voxels = np.zeros((30, 30, 30), np.uint8)
    voxels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 1
    return Volume(voxels=voxels, affine=np.eye(4) if affine is None else affine)


def test_nothing_moves_while_the_structure_lies_on_the_grid() -> None:
    assert shift_to_hold(label((7, 7, 7), (23, 23, 23)), GRID).tolist() == [0, 0, 0]


def test_only_the_axis_that_would_be_cut_moves_and_leaves_a_voxel_around() -> None:
    # Along i the structure ends 11 mm from the centre, the grid at 8: with one voxel around it 5 mm are wanting.
    assert shift_to_hold(label((22, 13, 13), (26, 17, 17)), GRID).tolist() == [5, 0, 0]


def test_a_structure_longer_than_the_grid_has_the_grid_on_its_middle() -> None:
    assert shift_to_hold(label((13, 13, 10), (17, 17, 30)), GRID).tolist() == [0, 0, 5]


def test_directions_are_of_the_body_not_of_the_file() -> None:
    assert shift_to_hold(label((22, 13, 13), (26, 17, 17), np.diag([-1.0, -1.0, 1.0, 1.0])), GRID).tolist() == [
        -5,
        0,
        0,
    ]


@pytest.mark.parametrize("degrees", [0.0, 20.0])
def test_a_structure_at_the_edge_of_an_upright_or_a_turned_scan_comes_out_whole(degrees: float) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix()
    there = label((24, 12, 2), (29, 17, 7), affine)
    image = Volume(voxels=there.voxels.astype(np.float32), affine=affine)
    x, y, z = shift_to_hold(there, GRID)
    window = IntensitySettings(kind="window", low=0.0, high=1.0)
    pair = prepare(image, there, labels={1: "t"}, grid=GRID, intensity=window, shift_mm=(x, y, z))
    assert pair[1].sum() * 8 == pytest.approx(125, rel=0.03)  # mm3
    assert (pair[0] > 0).sum() > 5
