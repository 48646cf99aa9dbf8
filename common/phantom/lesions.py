"""An FDG-PET-like crop of soft tissue around one tumour, label 1: the tumour.

Grey values are standardised uptake values: air takes up nothing, fat little, muscle a little more, warm organs and the
bladder some crops show much more. The tumour is one mass with up to two lobes, of any heat; large ones often have a
cold, necrotic middle. Lengths scale with the field of view, so that every study grid shows a whole tumour.

The ranges follow heats, sizes and places in the 25 openly published soft-tissue sarcomas of the IBSI set and are wider
than those; no scan is stored here. Whoever takes those scans for a hospital's private patients must know
that no epsilon covers this public design.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.phantom.canvas import Canvas, Floats
from common.phantom.fields import blur, smooth_fields
from common.phantom.scanner import Anatomy, Scanner
from common.volume.volume import Grid, Volume

_SHARE = (0.004, 0.15)  # of the field that belongs to the tumour
_TYPICAL_SHARE, _SHARE_SPREAD = 0.045, 0.95  # of its log-normal law
_TYPICAL_SUV, _SUV_SPREAD = 4.0, 0.55
_NECROTIC_SHARE = 0.02  # larger tumours may have outgrown their blood
_TEXTURE = 7.0  # knots of the fine texture across the field
_NOISE_AT_ONE = 3.5  # standard deviation at SUV 1 for each unit of a scanner's `noise`


def lesions(rng: np.random.Generator, grid: Grid) -> Anatomy:
    """One patient's uptake on the whole grid, in SUV before any scanner; label 1 is the tumour."""
    extent = np.array(grid.shape) * np.array(grid.spacing_mm)
    side = float(extent.min())
    canvas = Canvas(
        rng,
        shape=grid.shape,
        origin_mm=grid.affine[:3, 3],
        spacing_mm=grid.spacing_mm,
        warps=((side / 3, 0.03 * side), (side / 7, 0.008 * side)),
    )
    at = np.stack(
        [(axis / e).astype(np.float32) for axis, e in zip((canvas.x, canvas.y, canvas.z), extent, strict=True)]
    )
    fine, wide, spots = smooth_fields(rng, 3, grid.shape, grid.spacing_mm, side / _TEXTURE)
    middle = rng.normal(0.0, [0.05, 0.05, 0.06])
    _paint_body(rng, canvas, at, middle, wide=wide, fine=fine)
    tumour = _tumour_distance(rng, at, middle, extent)
    _paint_tumour(rng, canvas, tumour, spots, fine)
    label = (tumour < 0).astype(np.uint8)
    return Anatomy(signal=np.maximum(canvas.signal, 0), label=label, affine=grid.affine)


def acquire_pet(scanner: Scanner, anatomy: Anatomy, rng: np.random.Generator) -> tuple[Volume, Volume]:
    """One PET of `anatomy` and its label, on the anatomy's own voxels: float32 SUV, and uint8.

    A PET scanner differs from its neighbour in resolution and noise, and by some ten percent in calibration. Counts are
    few, so noise grows with the root of the uptake, and reconstruction makes it grainy over more than a voxel.
    """
    x, y, z = np.linalg.norm(anatomy.affine[:3, :3], axis=0)
    sigma_mm = 1.2 + 4.0 * scanner.blur_mm  # 6 to 10 mm full width at half maximum
    points = blur(anatomy.signal, (sigma_mm / x, sigma_mm / y, sigma_mm / z))
    scale = (scanner.gain / 500.0) ** 0.15 * rng.uniform(0.96, 1.04)
    grains = blur(rng.standard_normal(anatomy.label.shape, dtype=np.float32), (0.6, 0.6, 0.6))
    grains /= grains.std()
    noise = _NOISE_AT_ONE * scanner.noise * rng.uniform(0.8, 1.25)
    image = np.maximum(points + np.float32(noise) * np.sqrt(points) * grains, 0) * np.float32(scale)
    return (
        Volume(voxels=image.astype(np.float32), affine=anatomy.affine),
        Volume(voxels=anatomy.label, affine=anatomy.affine),
    )


def _paint_body(
    rng: np.random.Generator, canvas: Canvas, at: Floats, middle: NDArray[np.float64], *, wide: Floats, fine: Floats
) -> None:
    """A limb or a piece of the trunk, which runs along z; some show bone, warm organs, or a vessel."""
    side = float(min(n * s for n, s in zip(canvas.shape, canvas.spacing_mm, strict=True)))
    radii = rng.uniform(0.36, 0.62, 2) if rng.random() < 0.6 else rng.uniform(0.6, 1.1, 2)
    aside = rng.normal(0.0, 0.6, 2) * (radii - 0.3)
    lean = rng.normal(0.0, 0.12, 2)
    x, y = (at[i] - middle[i] - aside[i] - lean[i] * at[2] for i in range(2))
    skin = (np.hypot(x / radii[0], y / radii[1]) - 1) * np.float32(radii.min() * side)
    fat, muscle = rng.uniform(0.12, 0.3), rng.uniform(0.35, 0.9)
    canvas.paint(skin, np.float32(fat) * (1 + 0.15 * fine))
    depth = rng.uniform(0.02, 0.10) * side
    tissue = np.float32(muscle) * np.exp(np.float32(0.30) * wide + np.float32(0.10) * fine)
    canvas.paint(skin + np.float32(depth) * (1 + 0.4 * wide), tissue, softness=1.5)
    for _ in range(rng.integers(0, 4)):
        centre = middle + rng.uniform(-0.5, 0.5, 3)
        distance = _ball(at, centre, rng.uniform(0.05, 0.2, 3)) * np.float32(side)
        canvas.paint(np.maximum(distance + 0.03 * side * fine, skin), muscle * rng.uniform(0.4, 4.0), softness=2.0)
    if rng.random() < 0.12:  # bladder, or a ureter
        centre = middle + rng.choice([-1, 1], 3) * rng.uniform(0.3, 0.5, 3)
        distance = _ball(at, centre, rng.uniform(0.08, 0.2, 3)) * np.float32(side)
        canvas.paint(np.maximum(distance, skin), rng.uniform(6.0, 20.0))


def _tumour_distance(
    rng: np.random.Generator, at: Floats, middle: NDArray[np.float64], extent: NDArray[np.float64]
) -> Floats:
    """(I, J, K) mm, negative inside: an ellipsoid with up to two lobes, whole and inside the field."""
    side = float(extent.min())
    share = float(np.clip(_TYPICAL_SHARE * np.exp(_SHARE_SPREAD * rng.normal()), *_SHARE))
    radius = (3 * share / (4 * np.pi)) ** (1 / 3)
    stretch = np.exp(rng.normal(0.0, 0.16, 3))
    stretch[2] *= rng.uniform(1.0, 1.25)  # along the muscle
    radii = radius * stretch / np.prod(stretch) ** (1 / 3)
    lobes = int(rng.integers(0, 3))
    if lobes:
        radii *= 0.88
    radii = np.clip(radii, 1.6 / np.array(at.shape[1:]), 0.42)
    centre = np.clip(middle, -0.46 + radii, 0.46 - radii)
    distance = _ball(at, centre, radii)
    for _ in range(lobes):
        towards = rng.normal(size=3)
        towards /= np.linalg.norm(towards)
        own = radii * rng.uniform(0.4, 0.75)
        there = np.clip(centre + towards * radii * rng.uniform(0.7, 1.25), -0.46 + own, 0.46 - own)
        distance = np.minimum(distance, _ball(at, there, own))
    # Warps of the canvas carry voxels: the outermost layer stays free, or a mask might end at a border.
    distance *= np.float32(side)
    for axis in range(3):
        border = np.moveaxis(distance, axis, 0)[[0, -1]]
        np.moveaxis(distance, axis, 0)[[0, -1]] = np.maximum(border, np.float32(0.01 * side))
    return distance


def _paint_tumour(rng: np.random.Generator, canvas: Canvas, distance: Floats, spots: Floats, fine: Floats) -> None:
    """Uptake of the tumour: patchy, and in the middle of a large one often next to none."""
    suv = float(np.clip(_TYPICAL_SUV * np.exp(_SUV_SPREAD * rng.normal()), 1.2, 16.0))
    patchy = rng.uniform(0.1, 0.5)
    heat = np.float32(suv) * np.exp(np.float32(patchy) * spots + np.float32(0.08) * fine)
    if float((distance < 0).mean()) > _NECROTIC_SHARE and rng.random() < 0.45:
        rim = rng.uniform(0.25, 0.6) * -float(distance.min())
        core = distance + np.float32(rim) * (1 + np.float32(0.5) * spots)
        cover = np.clip(0.5 - core / (0.35 * rim), 0, 1).astype(np.float32)
        heat = heat * (1 - cover * np.float32(rng.uniform(0.6, 0.95)))
    canvas.paint(distance, heat)


def _ball(at: Floats, centre: NDArray[np.float64], radii: NDArray[np.float64]) -> Floats:
    """Distance to an ellipsoid, about, in shares of the field."""
    squares = [np.square((a - np.float32(c)) / np.float32(r)) for a, c, r in zip(at, centre, radii, strict=True)]
    distance: Floats = (np.sqrt(squares[0] + squares[1] + squares[2]) - 1) * np.float32(np.prod(radii) ** (1 / 3))
    return distance
