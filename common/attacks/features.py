"""What the density ratio and the substitute classifier read of a pair: 64 numbers that vary among synthetic volumes.

Fine structure and a histogram of gradient directions, rotated onto the leading principal components of SYNTHETIC
volumes and scaled by their spread there. Nothing is fitted on a patient or on the reference set. Reads the image only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.attacks.near_copy import moving_matrices, templates
from common.attacks.templates import SIDE, centre_windows
from common.errors import DataError

DIMENSIONS = 64  # 32 miss half of blended copies on phantoms

_FITTED = 2048  # volumes that fix the components; their Gram matrix is square in them
_CHUNK = 64  # volumes whose gradients are held at once: more leave the cache
_LEAST_VARIANCE = 1e-5  # of a component, features having length one: volumes all alike must not be blown up
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """Whitened principal components. centre (F,), axes (F, d): each axis divided by the deviation along it."""

    centre: Tensor
    axes: Tensor

    @staticmethod
    def fit(synthetic: Tensor, dimensions: int = DIMENSIONS) -> Embedding:
        """From pooled synthetic pairs (M, 1+K, 16, 16, 16), of which the first 2,048 are read.

        Raises DataError for no more volumes than dimensions.
        """
        if len(synthetic) <= dimensions or not synthetic.isfinite().all():
            raise DataError(
                f"the synthetic set has {len(synthetic)} volumes, more than {dimensions} finite ones are needed; "
                "nothing was scored. Draw more, or take the generator's weights from the run again."
            )
        features = torch.cat([_features(chunk) for chunk in _chunks(synthetic[:_FITTED])])  # (M, F)
        centre = features.mean(dim=0)
        features = features - centre
        # The Gram matrix has M rows, the covariance thousands: same non-zero spectrum.
        gram = (features @ features.T).double() / len(features)
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values[-dimensions:].clamp(min=_LEAST_VARIANCE), vectors[:, -dimensions:]
        axes = features.T @ (vectors / (values * len(features) ** 0.5)).float()
        return Embedding(centre=centre, axes=axes)

    def __call__(self, pooled: Tensor) -> Tensor:
        """(N, 1+K, 16, 16, 16) -> (N, d): mean zero and variance one over the fitted volumes."""
        return torch.cat([(_features(chunk) - self.centre) @ self.axes for chunk in _chunks(pooled)])


def views(scan: Tensor) -> Tensor:
    """One pair (1+K, D, H, W) -> its pooled image (250, 1, 16, 16, 16) after every shift of `moving_matrices`.

    Each as is and mirrored along the first axis, which is left-right in RAS+.
    """
    i, j, k = (moving_matrices(n) for n in scan.shape[1:])
    both = torch.stack([scan[0], scan[0].flip(0)])
    moved: Tensor = torch.einsum("vijk,sai,tbj,uck->vstuabc", both, i, j, k)
    return moved.reshape(-1, 1, SIDE, SIDE, SIDE)


def _chunks(pooled: Tensor) -> list[Tensor]:
    """In order; only one chunk's full feature vectors are held at once."""
    return [pooled[first : first + _CHUNK] for first in range(0, len(pooled), _CHUNK)]


def _features(pooled: Tensor) -> Tensor:
    """(N, 1+K, 16, 16, 16) -> (N, 4802): band-passed image and gradient histogram, each of length one."""
    gradients = _gradient_histogram(pooled[:, :1])
    return torch.cat([templates(pooled), gradients], dim=1)


def _gradient_histogram(image: Tensor) -> Tensor:
    """(N, 1, 16, 16, 16) -> (N, 2058): how steeply grey values rise and fall along each axis, in 7 x 7 x 7 cells.

    Gain and offset of the grey values cancel.
    """
    parts = []
    for axis in (2, 3, 4):
        slope = (image.roll(-1, axis) - image.roll(1, axis)) / 2  # its rim is wrong and lies outside the window
        parts += [slope.clamp(min=0), (-slope).clamp(min=0)]
    cells: Tensor = F.avg_pool3d(centre_windows(torch.cat(parts, dim=1)), 2).flatten(1)
    length = cells.square().sum(dim=1, keepdim=True).sqrt().clamp(min=_EPSILON)
    return cells / length
