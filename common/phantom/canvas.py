"""A canvas in millimetres on which tissues are painted over one another with soft edges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.phantom.fields import Shape, smooth_fields

Floats = NDArray[np.float32]
Vector = tuple[float, float, float]
Block = tuple[slice, slice, slice]

_WARP_REACH_MM = 5.0  # further than any warp of `Canvas` carries a point, for all practical purposes
_EVERYWHERE: Block = (slice(None), slice(None), slice(None))


class Canvas:
    """Noise-free signal on a voxel grid whose anatomical coordinates are bent by a smooth random warp.

    axes: plain coordinates (mm) of the voxels along x, y, z. x, y, z: (I, J, K) warped coordinates.
    signal: (I, J, K) float32, what was painted so far. edge_mm: width of the soft edge of a tissue.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        *,
        shape: Shape,
        origin_mm: NDArray[np.float64],
        spacing_mm: Vector,
        warps: tuple[tuple[float, float], ...],
    ) -> None:
        """`warps`: (knot distance, standard deviation) in mm of each layer of the warp; they add up."""
        self.axes = [
            (o + s * np.arange(n)).astype(np.float32) for o, s, n in zip(origin_mm, spacing_mm, shape, strict=True)
        ]
        self.spacing_mm = spacing_mm
        self.shape = shape
        self.edge_mm = np.float32(max(0.8, min(spacing_mm)))
        bent = np.zeros((3, *shape), dtype=np.float32)
        for knot_mm, deviation in warps:
            bent += np.float32(deviation) * smooth_fields(rng, 3, shape, spacing_mm, knot_mm)
        plain = np.ix_(*self.axes)
        self.x, self.y, self.z = (axis + warp for axis, warp in zip(plain, bent, strict=True))
        self.signal: Floats = np.zeros(shape, dtype=np.float32)

    def paint(
        self, distance: Floats, value: float | Floats, *, softness: float = 1.0, block: Block = _EVERYWHERE
    ) -> None:
        """Cover what lies at negative `distance` (mm to a tissue's surface) with `value`."""
        cover = np.float32(0.5) - distance * (1 / (np.float32(softness) * self.edge_mm))
        np.clip(cover, 0, 1, out=cover)
        under = self.signal[block]
        under += cover * (np.asarray(value, dtype=np.float32) - under)

    def blob(self, centre: Vector, radii: Vector) -> tuple[Floats, Block]:
        """Distance (mm, about) to an ellipsoid, and the block of voxels that can lie in or near it."""
        block = (
            self._reach(0, centre[0], radii[0]),
            self._reach(1, centre[1], radii[1]),
            self._reach(2, centre[2], radii[2]),
        )
        squares = [
            np.square((axis[block] - np.float32(c)) * np.float32(1 / r))
            for axis, c, r in zip((self.x, self.y, self.z), centre, radii, strict=True)
        ]
        scale = np.float32(np.prod(radii) ** (1 / 3))
        distance: Floats = (np.sqrt(squares[0] + squares[1] + squares[2]) - 1) * scale
        return distance, block

    def _reach(self, axis: int, centre: float, radius: float) -> slice:
        reach = 1.3 * radius + _WARP_REACH_MM
        first, last = np.searchsorted(self.axes[axis], [centre - reach, centre + reach])
        return slice(int(first), int(last))
