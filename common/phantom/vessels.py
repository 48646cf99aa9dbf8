"""A TOF-MRA-like crop with a branching vessel tree, label 1.

Time-of-flight angiography shows inflowing blood bright and static tissue dim: vessels fade with the way
they have come and with their calibre, lie in dark fluid, and the slab itself is brighter on one side.
The tree is grown generation by generation from two or three inlets on the border; calibres follow Murray's
law and scale with the field of view, so that the tree stays segmentable on coarse study grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.phantom.canvas import Canvas, Floats
from common.phantom.fields import smooth_curve, smooth_fields
from common.phantom.scanner import Anatomy
from common.volume.volume import Grid

_POINTS = 14  # samples along a branch, about half a radius apart
_GENERATIONS = 4
_TARGET_SHARE = (0.04, 0.08)  # of the volume that belongs to vessels
_ADJUSTMENT = (0.7, 1.6)  # how far radii may be scaled to come near that share
_THINNEST_VOXELS = 0.85  # radius below which a vessel would vanish on the grid
_REACH_VOXELS = 1.6  # how far outside the lumen distances are kept, for soft edges and the fluid around


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """Points along all centre lines: positions (N, 3) and radii (N,) in mm, inflow (N,) in (0, 1], step (N,) in mm."""

    positions: NDArray[np.float64]
    radii: NDArray[np.float64]
    inflow: NDArray[np.float64]
    steps: NDArray[np.float64]


def vessels(rng: np.random.Generator, grid: Grid) -> Anatomy:
    """One patient's anatomy on the whole grid: label 1 is vessel, 3 to 8 % of the volume as a rule."""
    extent = np.array(grid.shape) * np.array(grid.spacing_mm)
    origin = grid.affine[:3, 3]
    tree = _fit_calibre(rng, _grow(rng, extent), extent, min(grid.spacing_mm))
    distance, inflow = _rasterise(tree, grid)
    canvas = Canvas(
        rng, shape=grid.shape, origin_mm=origin, spacing_mm=grid.spacing_mm, warps=((float(extent.min()) / 4, 1.5),)
    )
    _paint_head(rng, canvas, distance, extent)
    lumen = smooth_fields(rng, 1, grid.shape, grid.spacing_mm, 4.0)[0]
    canvas.paint(distance, inflow * (1 + 0.06 * lumen))
    slope, level = rng.uniform(-0.25, 0.25), rng.uniform(0.9, 1.1)
    canvas.signal *= (level + slope * np.linspace(-0.5, 0.5, grid.shape[2], dtype=np.float32)).astype(np.float32)
    label = (distance < 0).astype(np.uint8)
    return Anatomy(signal=canvas.signal, label=label, affine=grid.affine)


def _grow(rng: np.random.Generator, extent: NDArray[np.float64]) -> _Tree:
    """The tree of two or three inlets, before its calibre is fitted to the volume."""
    size = float(extent.min())
    starts, headings = _inlets(rng, extent)
    radii = size * rng.uniform(0.048, 0.066, len(starts))
    travelled = np.zeros(len(starts))
    grown: list[_Tree] = []
    for generation in range(_GENERATIONS):
        lengths = size * rng.uniform(0.30, 0.52, len(starts)) * 0.86**generation
        lines = _branches(rng, starts, headings, lengths)
        along = np.linspace(0.0, 1.0, _POINTS)
        taper = 1 - rng.uniform(0.08, 0.25, (len(starts), 1)) * along
        bulge = 1 + 0.06 * np.stack([smooth_curve(rng, _POINTS, 5) for _ in starts])
        ways = travelled[:, None] + lengths[:, None] * along
        calibre = radii[:, None] * taper * bulge
        # Slow and distant blood is saturated; thin vessels lose signal to partial volume besides.
        inflow = np.exp(-ways / (size * 2.6)) * (0.72 + 0.28 * np.minimum(1, calibre / (0.045 * size)))
        steps = np.repeat(lengths / (_POINTS - 1), _POINTS)
        grown.append(_Tree(positions=lines.reshape(-1, 3), radii=calibre.ravel(), inflow=inflow.ravel(), steps=steps))
        starts, headings, radii, travelled = _bifurcate(rng, lines, radii * taper[:, -1], travelled + lengths, extent)
    return _Tree(
        positions=np.concatenate([t.positions for t in grown]),
        radii=np.concatenate([t.radii for t in grown]),
        inflow=np.concatenate([t.inflow for t in grown]),
        steps=np.concatenate([t.steps for t in grown]),
    )


def _inlets(rng: np.random.Generator, extent: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n, 3) places on the border where arteries enter, mostly from below, and their (n, 3) headings."""
    count = int(rng.integers(2, 4))
    starts = rng.uniform(-0.4, 0.4, (count, 3)) * extent
    sides = rng.choice([(2, -1), (2, -1), (2, -1), (1, -1), (0, -1), (0, 1)], size=count)
    for start, (axis, sign) in zip(starts, sides, strict=True):
        start[axis] = sign * extent[axis] * 0.5
    aims = rng.uniform(-0.3, 0.3, (count, 3)) * extent
    return starts, _unit(aims - starts)


def _branches(
    rng: np.random.Generator,
    starts: NDArray[np.float64],
    headings: NDArray[np.float64],
    lengths: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(n, points, 3) tortuous lines: an arc that turns away from its heading, with two or three windings."""
    n = len(starts)
    along = np.linspace(0.0, 1.0, _POINTS)[None, :, None]
    turned = _unit(headings + rng.normal(0.0, 0.5, (n, 3)))
    arc = headings[:, None] * (along - along**2 / 2) + turned[:, None] * along**2 / 2
    aside = _unit(np.cross(headings, rng.normal(size=(n, 3))))
    across = np.cross(headings, aside)
    winding = (
        along
        * (1 - along)
        * np.sin(2 * np.pi * (along * rng.uniform(0.6, 1.6, (n, 1, 1)) + rng.uniform(0, 1, (n, 1, 1))))
    )
    second = (
        along
        * (1 - along)
        * np.cos(2 * np.pi * (along * rng.uniform(0.6, 1.6, (n, 1, 1)) + rng.uniform(0, 1, (n, 1, 1))))
    )
    sway = rng.uniform(0.2, 0.7, (n, 1, 1)) * (winding * aside[:, None] + second * across[:, None])
    lines: NDArray[np.float64] = starts[:, None] + lengths[:, None, None] * (arc + sway)
    return lines


def _bifurcate(
    rng: np.random.Generator,
    lines: NDArray[np.float64],
    radii: NDArray[np.float64],
    travelled: NDArray[np.float64],
    extent: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Two daughters at the end of every branch: starts, headings, radii, way so far.

    r^3 = r1^3 + r2^3 with a random share of the flow.  [Murray 1926]
    """
    ends = lines[:, -1]
    headings = _unit(lines[:, -1] - lines[:, -3])
    # A branch that runs out of the volume is led back: its daughters would be drawn for nothing.
    home = -ends / extent * np.clip(np.abs(ends) / (0.5 * extent) - 0.5, 0, 1).max(axis=1, keepdims=True) * 6
    share = rng.uniform(0.3, 0.7, len(ends))
    angle = np.deg2rad(rng.uniform(25, 60, len(ends)))
    plane = _unit(np.cross(headings, rng.normal(size=headings.shape)))
    aside = np.sin(angle)[:, None] * plane
    first = _unit(headings * np.cos(angle)[:, None] + aside * (1.6 - share[:, None]) + home)
    second = _unit(headings * np.cos(angle)[:, None] - aside * (0.6 + share[:, None]) + home)
    return (
        np.concatenate([ends, ends]),
        np.concatenate([first, second]),
        np.concatenate([radii * share ** (1 / 3), radii * (1 - share) ** (1 / 3)]),
        np.concatenate([travelled, travelled]),
    )


def _fit_calibre(rng: np.random.Generator, tree: _Tree, extent: NDArray[np.float64], voxel_mm: float) -> _Tree:
    """The tree with all radii scaled so that its share of the volume comes near a random target."""
    inside = (np.abs(tree.positions) < extent / 2).all(axis=1)
    volume = float((np.pi * tree.radii**2 * tree.steps)[inside].sum())
    target = rng.uniform(*_TARGET_SHARE) * float(np.prod(extent))
    scale = np.clip(np.sqrt(target / volume), *_ADJUSTMENT)
    radii = np.maximum(tree.radii * scale, _THINNEST_VOXELS * voxel_mm)
    return _Tree(positions=tree.positions, radii=radii, inflow=tree.inflow, steps=tree.steps)


def _rasterise(tree: _Tree, grid: Grid) -> tuple[Floats, Floats]:
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


def _paint_head(rng: np.random.Generator, canvas: Canvas, distance: Floats, extent: NDArray[np.float64]) -> None:
    """Static tissue: brain with little contrast, dark fluid in sulci and around vessels, sometimes bone and scalp."""
    folds, mix, cistern, broad = smooth_fields(rng, 4, canvas.shape, canvas.spacing_mm, 6.0)
    tissue = rng.uniform(0.24, 0.34)
    canvas.signal += np.float32(tissue) + 0.02 * broad
    canvas.paint(1.0 + 2.5 * mix, 0.88 * tissue, softness=2.0)  # white matter is the darker one on TOF
    fluid = rng.uniform(0.07, 0.13)
    canvas.paint(np.abs(folds) * np.float32(4.0) - rng.uniform(0.3, 0.9) - 0.6 * mix, fluid)
    canvas.paint(distance - rng.uniform(0.5, 1.8) - 1.2 * cistern, fluid)
    for _ in range(int(rng.integers(0, 3))):  # ventricles
        x, y, z = rng.uniform(-0.35, 0.35, 3) * extent
        a, b, c = rng.uniform(0.06, 0.16, 3) * extent
        gap, block = canvas.blob((x, y, z), (a, b, c))
        canvas.paint(gap, fluid, block=block)
    if rng.random() < 0.55:
        _paint_skull(rng, canvas, extent)


def _paint_skull(rng: np.random.Generator, canvas: Canvas, extent: NDArray[np.float64]) -> None:
    """Bone, scalp fat and air beyond a curved surface that cuts off one corner of the volume."""
    outward = _unit(rng.normal(size=(1, 3)) * [1.0, 1.0, 0.4])[0]
    place = float(extent.min()) * rng.uniform(0.28, 0.42)
    curve = float(extent.min()) * 1.6
    beyond = np.float32(outward[0]) * canvas.x + np.float32(outward[1]) * canvas.y + np.float32(outward[2]) * canvas.z
    square = np.square(canvas.x) + np.square(canvas.y) + np.square(canvas.z)
    height = beyond + (square - np.square(beyond)) / np.float32(2 * curve) - np.float32(place)
    canvas.paint(-height, 0.05)
    thick = rng.uniform(4.0, 7.0)
    canvas.paint(thick - height, rng.uniform(0.30, 0.45))
    canvas.paint(thick + rng.uniform(3.0, 6.0) - height, 0.01)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 3) vectors brought to length 1."""
    units: NDArray[np.float64] = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
    return units
