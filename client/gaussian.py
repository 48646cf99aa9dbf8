"""Normals from uniform 64-bit words.  [Box and Muller 1958]

A pair of normals is a point at a random radius and a random angle, made of two words. The radius takes 74 bits as a
floating-point number, so the tail is followed, ever more finely, to 10.2 deviations (the smallest uniform is 2**-75).
32 bits would end at 6.7 and 24 at 5.9: a campaign with a million parameters and a thousand steps draws beyond 5.9
several times, and a value that noise alone can never give betrays that a patient's gradient lies beneath.

Twice the same equation: on a processor in numpy, in half of torch's time; on a GPU in torch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.int64]
Floats = NDArray[np.float64]

UNIT = 2.0**-63
SPARE_BITS = 11  # low bits of the angle's word, which a float64 angle has no room for: they extend the radius


class BoxMuller:
    """Work space for up to `pairs` pairs at a time; reused, because fresh memory costs more than the arithmetic."""

    def __init__(self, pairs: int) -> None:
        self._work = np.empty((3, pairs))
        self._normals = np.empty(2 * pairs)

    def normals(self, words: Words, deviation: float) -> Floats:
        """(2m,) normals of this standard deviation from (2m,) words, m radii and m angles; the words are overwritten.

        The next call overwrites the normals.
        """
        half = len(words) // 2
        normals = self._normals[: 2 * half]
        radius, signed, x = (row[:half] for row in self._work)
        np.copyto(signed, words[:half], casting="unsafe")
        np.copyto(x, words[half:], casting="unsafe")
        x *= math.pi / 4 * UNIT  # half the angle: it covers the right half of the circle
        spare = np.bitwise_and(words[half:], 2**SPARE_BITS - 1, out=words[half:])
        np.copyto(radius, spare, casting="unsafe")
        radius += 0.5
        radius *= 2.0**-SPARE_BITS
        radius += signed  # before the sign is taken off: both halves of the circle then have the same radii
        np.copyto(signed, radius)
        np.abs(radius, out=radius)
        radius *= UNIT
        np.log(radius, out=radius)
        radius *= -2.0 * deviation**2
        np.sqrt(radius, out=radius)
        np.copysign(radius, signed, out=radius)  # the left half of the circle: a bit that the radius did not need
        _to_half_circle(radius, x, signed, cosine=normals[:half], sine=normals[half:])
        return normals


def _to_half_circle(radius: Floats, x: Floats, work: Floats, *, cosine: Floats, sine: Floats) -> None:
    """Points (radius * cos 2x, radius * sin 2x) for |x| <= pi/4; the inputs are overwritten.

    With tan x = p / q the point is (q^2 - p^2, 2 p q) * radius / (q^2 + p^2), on its circle whatever p and q are.
    They are Lambert's continued fraction of the tangent cut after eight terms, which moves the angle by less than
    5e-16. numpy's own sine and cosine of a float64 take four times as long.
    """
    np.multiply(x, x, out=work)
    p = _polynomial(work, (-36.0, 6930.0, -270270.0, 2027025.0), out=cosine)
    q = _polynomial(work, (1.0, -630.0, 51975.0, -945945.0, 2027025.0), out=sine)
    p *= x
    np.multiply(p, q, out=work)
    p *= p
    q *= q
    np.add(p, q, out=x)
    radius /= x
    np.subtract(q, p, out=cosine)
    cosine *= radius
    radius *= 2.0
    np.multiply(work, radius, out=sine)


def _polynomial(x: Floats, coefficients: tuple[float, ...], *, out: Floats) -> Floats:
    """Horner's rule, highest power first, into `out`."""
    np.multiply(x, coefficients[0], out=out)
    for coefficient in coefficients[1:-1]:
        out += coefficient
        out *= x
    out += coefficients[-1]
    return out


def normals_on_device(words: Tensor, deviation: float) -> Tensor:
    """The same normals, up to the last digits, from (2m,) int64 words on any device."""
    half = len(words) // 2
    spare = words[half:].bitwise_and(2**SPARE_BITS - 1).double()
    signed = words[:half].double() + (spare + 0.5) * 2.0**-SPARE_BITS
    radius = torch.copysign(torch.sqrt(-2.0 * deviation**2 * torch.log(signed.abs() * UNIT)), signed)
    angle = words[half:].double() * (math.pi / 2 * UNIT)
    return torch.cat([torch.cos(angle) * radius, torch.sin(angle) * radius])
