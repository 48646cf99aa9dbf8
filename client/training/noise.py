"""The one place where noise meets a sum over patients.

Adding a floating-point normal to a floating-point sum leaks [Mironov 2012]: floats are not evenly spaced, so which
values `sum + noise` can take depends on the sum, and one look at the last bits may give a patient away for good,
whatever the deviation. Here the addition is done in float64 and only the nearest multiple of a public step is
returned. The step is a power of two about a thousandth of the noise: 2**40 times coarser than the spacing
of the floats added, so each multiple gathers a very large number of noise values, and its probability
is that of true Gaussian noise but for a relative error below 2**-32. Rounding itself costs nothing (it looks at the
result only) and adds less than a millionth to the noise's variance. What the errors cost is stated in
`common/privacy/noise_grid.py`.

Not covered: how long a step takes; a GPU's logarithm and sine, which are used as they come; somebody who
reads this process's memory; an operating system that gives bad entropy.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.randomness import SecureStream
from common.privacy.noise_grid import SENSITIVITY_SLACK, grid_of


def noisy(total: Tensor, *, scale: float, stream: SecureStream) -> Tensor:
    """Return total + N(0, scale^2 I), each coordinate rounded to the nearest multiple of `grid_of(scale)`.

    total: any shape, finite; float32 holds the multiples exactly up to 2**14 scales. scale: noise multiplier *
    clip norm, in the unit of total; the noise drawn is larger by SENSITIVITY_SLACK, which no accountant claims.
    With scale 0, research only, `total` comes back as it is. Raises ValueError for a scale that is no number >= 0.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be finite and >= 0, got {scale}")
    if scale == 0:
        return total
    grid = grid_of(scale)
    deviation = scale * (1 + SENSITIVITY_SLACK) / grid
    flat = total.detach().reshape(-1)
    if flat.device.type != "cpu":
        noise = stream.normal_on(flat.device, flat.numel(), deviation=deviation)
        rounded = noise.add_(flat.double() / grid).round_().mul_(grid)
    else:
        exact = flat if flat.dtype is torch.float64 else flat.float()
        rounded = torch.from_numpy(_noisy(exact.numpy(), grid, deviation, stream))
    return rounded.to(total.dtype).view_as(total)


def _noisy(total: NDArray[np.floating], grid: float, deviation: float, stream: SecureStream) -> NDArray[np.floating]:
    """The same on a processor, block by block. deviation: in steps of the grid."""
    result = np.empty_like(total)
    start = 0
    for noise in stream.normal_blocks(total.size, deviation=deviation):
        piece = slice(start, start + noise.size)
        steps = np.add(noise, total[piece] * total.dtype.type(1 / grid), out=noise)  # a power of two: exact
        np.multiply(np.rint(steps, out=steps), grid, out=result[piece], casting="same_kind")
        start += noise.size
    return result
