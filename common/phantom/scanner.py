"""A hospital's scanner: how the same anatomy becomes different grey values at different sites."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.phantom.fields import blur, smooth_fields
from common.volume.volume import Volume

_BIAS_KNOT_MM = 40.0  # receive fields of head coils vary over several centimetres


@dataclass(frozen=True, kw_only=True, eq=False)
class Anatomy:
    """What there is to be scanned, before any scanner.

    signal: (I, J, K) float32, noise-free, about 0 (air) to 1 (brightest common tissue).
    label: (I, J, K) uint8, 0 = background.
    affine: (4, 4) voxel index -> millimetres in RAS+.
    """

    signal: NDArray[np.float32]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """Systematic properties of one site's scanner; each scan varies a little around them.

    site: number of the site, 0 = the neutral public scanner. Part of every patient's seed.
    gain: arbitrary units per unit of signal. contrast: exponent of the grey-scale curve, 1 = as drawn.
    bias: log-amplitude of the smooth receive field. noise: standard deviation of each of the
    two receiver channels, in units of signal. blur_mm: Gaussian sigma of the point spread.
    """

    site: int
    gain: float
    contrast: float
    bias: float
    noise: float
    blur_mm: float

    def __post_init__(self) -> None:
        if self.site < 0:
            raise ValueError(f"sites are numbered from 0 (neutral), got {self.site}")
        if self.gain <= 0 or self.contrast <= 0:
            raise ValueError(f"gain and contrast must be positive, got {self.gain} and {self.contrast}")
        if min(self.bias, self.noise, self.blur_mm) < 0:
            raise ValueError(f"bias, noise and blur cannot be negative: {self.bias}, {self.noise}, {self.blur_mm}")

    def acquire(self, anatomy: Anatomy, rng: np.random.Generator) -> tuple[Volume, Volume]:
        """One scan of `anatomy` and its label, on the anatomy's own voxels.

        The order is that of the physics: tissue contrast, point spread, receive field, gain and last
        the magnitude of a signal with Gaussian noise in two channels (Rician).  [Gudbjartsson & Patz 1995]
        The image is float32 in arbitrary units, the label uint8.
        """
        spacing = np.linalg.norm(anatomy.affine[:3, :3], axis=0)
        spacing_mm = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
        shape = anatomy.label.shape
        # One scan differs from the next on the same scanner: coil load, shim, movement.
        noise = self.noise * rng.uniform(0.8, 1.25)
        gain = self.gain * rng.uniform(0.85, 1.15)
        contrast = self.contrast * rng.uniform(0.96, 1.04)

        signal = np.maximum(anatomy.signal, 1e-4)
        if contrast != 1:  # a power; float32 exp and log are several times faster than **
            signal = np.exp(np.log(signal) * np.float32(contrast))
        if self.blur_mm > 0:
            x, y, z = (self.blur_mm / s for s in spacing_mm)
            signal = blur(signal, (x, y, z))
        if self.bias > 0:
            field = smooth_fields(rng, 1, shape, spacing_mm, _BIAS_KNOT_MM)[0]
            signal = signal * np.exp(np.float32(self.bias) * field)
        channels = rng.standard_normal((2, *shape), dtype=np.float32) * np.float32(noise)
        channels[0] += signal
        image = np.sqrt(np.square(channels).sum(axis=0)) * np.float32(gain)
        return Volume(voxels=image, affine=anatomy.affine), Volume(voxels=anatomy.label, affine=anatomy.affine)


def site_scanner(seed: int, site: int) -> Scanner:
    """The scanner of one site: 0 is the neutral public scanner, every other site is shifted from it.

    The shift depends on `seed` and `site` only. Raises ValueError for a negative site.
    """
    if site == 0:
        return Scanner(site=0, gain=500.0, contrast=1.0, bias=0.04, noise=0.03, blur_mm=0.45)
    rng = np.random.default_rng([abs(seed), max(site, 0), 0x5CA4])
    # Contrast is moved away from 1 on either side: a shift near zero would be no shift at all.
    away = rng.uniform(0.12, 0.26) * rng.choice([-1.0, 1.0])
    return Scanner(
        site=site,
        gain=float(500.0 * np.exp(rng.normal(0.0, 0.7))),
        contrast=float(np.exp(away)),
        bias=float(rng.uniform(0.04, 0.12)),
        noise=float(rng.uniform(0.02, 0.045)),
        blur_mm=float(rng.uniform(0.3, 0.75)),
    )
