"""A scan as a value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """One 3-D scan or label map in scanner space.

    voxels: (I, J, K) real or integer array; never written to after construction.
    affine: (4, 4) float64, voxel index -> millimetres in RAS+ (the NIfTI convention).

    Raises ValueError when voxels are not 3-D or the affine is not an invertible (4, 4).
    """

    voxels: NDArray[np.generic]
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or 0 in self.voxels.shape:
            raise ValueError(f"a volume has three non-empty axes, got shape {self.voxels.shape}")
        affine = np.asarray(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError(f"affine must be a finite (4, 4) matrix, got shape {affine.shape}")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise ValueError("affine is singular: voxel axes do not span space")
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each axis."""
        i, j, k = self.voxels.shape
        return (i, j, k)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel in millimetres."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return (float(x), float(y), float(z))

    def same_geometry(self, other: Volume, tolerance_mm: float = 1e-2) -> bool:
        """Whether both volumes lie on the same voxel grid, up to `tolerance_mm` at any corner."""
        if self.shape != other.shape:
            return False
        corners = np.array(
            [[i, j, k, 1] for i in (0, self.shape[0]) for j in (0, self.shape[1]) for k in (0, self.shape[2])]
        )
        return bool(np.abs((self.affine - other.affine) @ corners.T).max() <= tolerance_mm)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The study's voxel grid: every scan is brought to it. RAS+ axes, centred on the scan.

    shape: voxels per axis; spacing_mm: edge lengths in millimetres.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    def __post_init__(self) -> None:
        if min(self.shape) < 8:
            raise ValueError(f"a grid has at least 8 voxels per axis, got {self.shape}")
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing must be positive, got {self.spacing_mm} mm")

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4) RAS+ affine with the origin at the centre of the grid."""
        affine = np.diag([*self.spacing_mm, 1.0])
        affine[:3, 3] = [-s * (n - 1) / 2 for s, n in zip(self.spacing_mm, self.shape, strict=True)]
        return affine
