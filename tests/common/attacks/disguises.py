"""The ways in which a generator could show a patient without showing the very voxels, see audit note 6.2.

Each disguise: (pair (1+K, D, H, W) float32, rng, partner of the same shape) -> pair. Image in [-1, 1]. Only the
blend looks at the partner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

Pair = NDArray[np.float32]
Disguise = Callable[[Pair, np.random.Generator, Pair], Pair]

WARP_SMOOTHNESS_VOXELS = 5.0


def noise(deviation: float) -> Disguise:
    """Independent Gaussian noise, deviation in the image's unit."""
    return lambda pair, rng, _: _with_image(pair, pair[0] + deviation * rng.standard_normal(pair[0].shape))


def gain_and_offset(pair: Pair, rng: np.random.Generator, _: Pair) -> Pair:
    """Another contrast: gain 0.7 to 1.3, offset within 0.2."""
    return _with_image(pair, rng.uniform(0.7, 1.3) * pair[0] + rng.uniform(-0.2, 0.2))


def blur(pair: Pair, _rng: np.random.Generator, _: Pair) -> Pair:
    """Gaussian, one voxel."""
    return _with_image(pair, gaussian_filter(pair[0], 1.0, mode="nearest"))


def warp(deviation_voxels: float) -> Disguise:
    """A smooth deformation, root mean square displacement along each axis; labels move along."""

    def warped(pair: Pair, rng: np.random.Generator, _: Pair) -> Pair:
        shape = pair[0].shape
        fields = [gaussian_filter(rng.standard_normal(shape), WARP_SMOOTHNESS_VOXELS) for _ in shape]
        where = np.indices(shape) + np.stack([deviation_voxels * field / field.std() for field in fields])
        return np.stack([map_coordinates(c, where, order=1, mode="nearest") for c in pair]).astype(np.float32)

    return warped


def shift(pair: Pair, rng: np.random.Generator, _: Pair) -> Pair:
    """One or two voxels along each axis, either way; the rim's voxels are repeated."""
    for axis, step in enumerate(rng.choice([-2, -1, 1, 2], size=3), start=1):
        source = np.clip(np.arange(pair.shape[axis]) - step, 0, pair.shape[axis] - 1)
        pair = pair.take(source, axis=axis)
    return pair


def flip(pair: Pair, _rng: np.random.Generator, _: Pair) -> Pair:
    """Left and right exchanged."""
    return np.ascontiguousarray(pair[:, ::-1])


def blend(pair: Pair, _rng: np.random.Generator, partner: Pair) -> Pair:
    """Half of it and half of another patient."""
    return (0.5 * (pair + partner)).astype(np.float32)


DISGUISES: Mapping[str, Disguise] = {
    "noise 0.02": noise(0.02),
    "noise 0.10": noise(0.10),
    "gain and offset": gain_and_offset,
    "blur": blur,
    "warp 0.5": warp(0.5),
    "warp 1.0": warp(1.0),
    "shift": shift,
    "flip": flip,
    "blend": blend,
}


def disguised(people: Pair, name: str, seed: int) -> Pair:
    """(N, 1+K, D, H, W): everybody's disguised copy; the partner of a person is the next one."""
    rng = np.random.default_rng([seed, list(DISGUISES).index(name)])
    partners = np.roll(people, -1, axis=0)
    return np.stack([DISGUISES[name](p, rng, q) for p, q in zip(people, partners, strict=True)])


def _with_image(pair: Pair, image: NDArray[np.float64]) -> Pair:
    return np.concatenate([np.clip(image, -1, 1)[None], pair[1:]]).astype(np.float32)
