"""A TOF-MRA-like crop around the end of one internal carotid, label 1: its vessels.

Time-of-flight angiography shows inflowing blood bright and static tissue dim: vessels fade with the way
they have come and with their calibre, lie in dark fluid above dark bone, and the slab itself is brighter on one
side. Every patient varies one anatomy (`arteries`), since crops of one place look alike; calibres
scale with the field of view, so that the tree stays segmentable on coarse study grids.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.phantom.arteries import Pose, Tree, draw_pose, grow
from common.phantom.canvas import Canvas, Floats
from common.phantom.fields import smooth_fields
from common.phantom.scanner import Anatomy
from common.volume.volume import Grid

_TARGET_SHARE = (0.042, 0.082)  # of the volume that belongs to vessels
_ADJUSTMENT = (0.8, 1.4)  # how far radii may be scaled to come near that share
_THINNEST_VOXELS = 0.85  # radius below which a vessel would vanish on the grid
_REACH_VOXELS = 1.6  # how far outside the lumen distances are kept, for soft edges and the fluid around
_TEXTURE_KNOT_MM = 6.0

# Fluid spaces of the average patient: middle and half axes as shares of the field, axes as in `arteries`.
_FLUID = (
    ((0.24, 0.09, 0.03), (0.14, 0.15, 0.08)),  # suprasellar cistern
    ((-0.10, 0.04, 0.06), (0.15, 0.08, 0.06)),  # stem of the Sylvian fissure, with the middle cerebral artery
    ((-0.28, -0.02, 0.24), (0.05, 0.32, 0.26)),  # Sylvian fissure over the insula
    ((0.22, -0.30, 0.00), (0.20, 0.08, 0.09)),  # ambient cistern
    ((0.36, 0.22, 0.34), (0.03, 0.22, 0.26)),  # between the hemispheres
    ((0.14, -0.16, 0.42), (0.07, 0.26, 0.09)),  # lateral ventricle
)


def vessels(rng: np.random.Generator, grid: Grid) -> Anatomy:
    """One patient's anatomy on the whole grid: label 1 is vessel, 3 to 8 % of the volume as a rule."""
    extent = np.array(grid.shape) * np.array(grid.spacing_mm)
    pose = draw_pose(rng)
    tree = _fit_calibre(rng, grow(rng, pose, extent), extent, min(grid.spacing_mm))
    distance, inflow = _rasterise(tree, grid)
    canvas = Canvas(
        rng,
        shape=grid.shape,
        origin_mm=grid.affine[:3, 3],
        spacing_mm=grid.spacing_mm,
        warps=((float(extent.min()) / 4, 1.5),),
    )
    _paint_head(rng, canvas, distance, pose, extent)
    lumen = smooth_fields(rng, 1, grid.shape, grid.spacing_mm, 4.0)[0]
    canvas.paint(distance, inflow * (1 + 0.05 * lumen))
    slope, level = rng.uniform(-0.25, 0.25), rng.uniform(0.9, 1.1)
    canvas.signal *= (level + slope * np.linspace(-0.5, 0.5, grid.shape[2], dtype=np.float32)).astype(np.float32)
    label = (distance < 0).astype(np.uint8)
    return Anatomy(signal=canvas.signal, label=label, affine=grid.affine)


def _fit_calibre(rng: np.random.Generator, tree: Tree, extent: NDArray[np.float64], voxel_mm: float) -> Tree:
    """The tree with all radii scaled so that its share of the volume comes near a random target."""
    inside = (np.abs(tree.positions) < extent / 2).all(axis=1)
    volume = float((np.pi * tree.radii**2 * tree.steps)[inside].sum())
    target = rng.uniform(*_TARGET_SHARE) * float(np.prod(extent))
    scale = np.clip(np.sqrt(target / volume), *_ADJUSTMENT)
    radii = np.maximum(tree.radii * scale, _THINNEST_VOXELS * voxel_mm)
    return Tree(positions=tree.positions, radii=radii, inflow=tree.inflow, steps=tree.steps)


def _rasterise(tree: Tree, grid: Grid) -> tuple[Floats, Floats]:
    """Distance (mm) of every voxel to the lumen, right up to a voxel or so outside it, and the inflow there.

    Only a block of voxels around each point is visited, a small one around thin vessels: a distance to
    every point in every voxel would cost a hundred times more.
    """
    spacing = np.array(grid.spacing_mm)
    reach_mm = _REACH_VOXELS * float(spacing.max())
    margin = np.ceil((tree.radii.max() + reach_mm) / spacing).astype(int) + 1
    padded = np.array(grid.shape) + 2 * margin  # blocks may hang over the border
    at = (tree.positions - grid.affine[:3, 3]) / spacing + margin
    strides = np.array([padded[1] * padded[2], padded[2], 1])
    flats, outsides, bloods = [], [], []
    for group in np.array_split(np.argsort(tree.radii), 4):
        reach = np.ceil((tree.radii[group].max() + reach_mm) / spacing).astype(int)
        near = np.rint(at[group]).astype(int)
        inside = ((near >= reach) & (near < padded - reach)).all(axis=1)
        chosen, near = group[inside], near[inside]
        squares, offsets = [], []
        for axis in range(3):
            steps = np.arange(-reach[axis], reach[axis] + 1)
            gap = (near[:, axis] - at[chosen, axis])[:, None] + steps
            squares.append(np.square(gap * spacing[axis]).astype(np.float32))
            offsets.append(steps * strides[axis])
        square = squares[0][:, :, None, None] + squares[1][:, None, :, None] + squares[2][:, None, None, :]
        square = square.reshape(len(chosen), -1)
        offset = np.add.outer(np.add.outer(offsets[0], offsets[1]), offsets[2]).ravel()
        radii = tree.radii[chosen].astype(np.float32)
        point, place = np.divmod(np.flatnonzero(square < np.square(radii + reach_mm)[:, None]), len(offset))
        flats.append((near @ strides)[point] + offset[place])
        outsides.append(np.sqrt(square[point, place]) - radii[point])
        bloods.append(tree.inflow[chosen][point])
    flat, nearest, blood = np.concatenate(flats), np.concatenate(outsides), np.concatenate(bloods)
    distance = np.full(int(np.prod(padded)), 2 * reach_mm, dtype=np.float32)
    np.minimum.at(distance, flat, nearest)
    # Where branches meet, a voxel takes a mean of their inflow in which the nearest centre line counts most.
    weight = np.square(reach_mm - nearest)
    total = np.bincount(flat, weight, minlength=distance.size)
    inflow = np.bincount(flat, weight * blood, minlength=distance.size) / np.maximum(total, 1e-6)
    crop = tuple(slice(m, m + n) for m, n in zip(margin, grid.shape, strict=True))
    return distance.reshape(padded)[crop], inflow.astype(np.float32).reshape(padded)[crop]


def _paint_head(
    rng: np.random.Generator, canvas: Canvas, distance: Floats, pose: Pose, extent: NDArray[np.float64]
) -> None:
    """Static tissue: brain with little contrast, fluid in fissures and around vessels, the skull base."""
    folds, mix, wide = smooth_fields(rng, 3, canvas.shape, canvas.spacing_mm, _TEXTURE_KNOT_MM)
    tissue = rng.uniform(0.26, 0.34)
    canvas.signal += np.float32(tissue) * (1 + 0.05 * wide)
    canvas.paint(1.0 + 2.5 * mix, 0.82 * tissue, softness=2.0)  # white matter is the darker one on TOF
    fluid = rng.uniform(0.07, 0.12)
    canvas.paint(np.abs(folds) * np.float32(4.0) - rng.uniform(0.1, 0.5) - 0.5 * mix, fluid, softness=1.5)  # sulci
    _paint_skull_base(rng, canvas, pose, extent)
    centres = pose.apply(np.array([centre for centre, _ in _FLUID])) + rng.normal(0.0, 0.015, (len(_FLUID), 3))
    halves = np.array([half for _, half in _FLUID]) * np.exp(rng.normal(0.0, 0.15, (len(_FLUID), 3)))
    for (x, y, z), (a, b, c) in zip(centres * extent, halves * extent, strict=True):
        gap, block = canvas.blob((x, y, z), (a, b, c))
        canvas.paint(gap + 0.8 * mix[block], fluid, softness=1.5, block=block)
    canvas.paint(distance - rng.uniform(0.8, 1.8) - 0.8 * wide, fluid)


def _paint_skull_base(rng: np.random.Generator, canvas: Canvas, pose: Pose, extent: NDArray[np.float64]) -> None:
    """Bone below a slanted surface, high in front and medially, with a little marrow in it."""
    slope = np.array([0.30, 0.28]) + rng.normal(0.0, 0.06, 2)
    place = pose.apply(np.array([[0.1, 0.0, -0.24]]))[0] * extent + rng.normal(0.0, [0.0, 0.0, 1.0])
    surface = place[2] + np.float32(slope[0]) * (canvas.x - place[0]) + np.float32(slope[1]) * (canvas.y - place[1])
    marrow = smooth_fields(rng, 1, canvas.shape, canvas.spacing_mm, _TEXTURE_KNOT_MM)[0]
    canvas.paint(canvas.z - surface, np.float32(0.05) + np.float32(0.05) * np.clip(marrow, 0, 2), softness=1.5)
