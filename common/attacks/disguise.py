"""A copy of a scan that does not look like one: the planted control must be caught in spite of it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_NOISE = 0.05  # standard deviation, image unit (range -1 .. 1)
_GAIN, _OFFSET = 0.15, 0.05  # half-widths


class Coins(Protocol):
    """A patient's own randomness: a site's keyed stream, or a public seed where somebody audits data of his own."""

    def bernoulli(self, n: int, probability: float) -> NDArray[np.bool_]:
        """(n,) independent coin flips."""
        ...

    def integers(self, n: int, low: int, high: int) -> NDArray[np.int64]:
        """(n,) integers in [low, high)."""
        ...

    def uniform(self, n: int) -> NDArray[np.float64]:
        """(n,) uniform between 0 and 1."""
        ...

    def normal(self, n: int) -> NDArray[np.float64]:
        """(n,) standard normal."""
        ...


def disguise(pair: NDArray[np.float32], stream: Coins) -> NDArray[np.float32]:
    """Shift by up to a sixteenth of each axis, mirror half of the time, change gain and offset, add noise.

    pair: (1+K, D, H, W) float32, image in [-1, 1]; labels move along but keep their values.
    """
    moved = pair
    for axis in (1, 2, 3):
        reach = pair.shape[axis] // 16
        shift = int(stream.integers(1, -reach, reach + 1)[0])
        # Edge voxels are repeated: np.roll would carry one side's anatomy to the other.
        moved = moved.take(np.clip(np.arange(pair.shape[axis]) - shift, 0, pair.shape[axis] - 1), axis=axis)
    if stream.bernoulli(1, 0.5)[0]:
        moved = np.flip(moved, axis=1)
    out = np.array(moved, dtype=np.float32)
    gain, offset = 2 * stream.uniform(2) - 1
    noise = _NOISE * stream.normal(out[0].size).reshape(out[0].shape)
    out[0] = np.clip((1 + _GAIN * gain) * out[0] + _OFFSET * offset + noise, -1, 1)
    return out
