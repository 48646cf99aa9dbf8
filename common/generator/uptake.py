"""How unevenly a lesion and its surroundings take up the tracer, from a few latent numbers.

Waves are products of cosines along the grid's axes, from coarse to fine. A lesion's waves lie in its own box, so they
follow it wherever it is, and the first of them is radial: it makes the middle colder than the rim, or warmer. The waves
of the surroundings lie in the grid. Warm spots are balls anywhere in the grid: organs, vessels, bladder.

`uptake_fields` makes fields of numbers; `wave_numbers` finds the waves of an image, by least squares. Nothing here is
trained, and a wave's number has no unit: what it is worth in an image, a painter learns.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

HEAT_SIZE = 2  # numbers of a code before the waves: the lesion's mean and its standard deviation

SPOT_SIZE = 5  # numbers of a warm spot
_FINEST = 3  # half periods along an axis
_WAVES = sorted(
    (k for k in itertools.product(range(_FINEST + 1), repeat=3) if any(k)), key=lambda k: (sum(n * n for n in k), k)
)
_HALF_BOX = 5**0.5  # of a lesion, in standard deviations along an axis: a ball's radius
_BEYOND = 1.3  # in half boxes: further out a wave keeps its value
_MOST_SPOTS = 2
_SPOT_RADIUS = (0.1, 0.4)  # in half sides of the grid
_SPOT_EDGE = 0.12  # in half sides: the width over which a spot fades
_SPOT_HEAT = -2.5  # logarithm of the median share; SUV 1.2 in a window of 15
_SPOT_LOUDNESS = 4.0  # what a painter sees of a share: a typical warm spot then is as loud as a wave
_RIDGE = 0.02  # about a fiftieth of a wave's mean square: few voxels cannot tell fine waves apart
_DARKEST = 0.01  # of the window: below it, how dark the surroundings are says nothing


@dataclass(frozen=True)
class UptakeCode:
    """How many numbers of an image's code are waves of the lesion, and around it, and how many warm spots follow."""

    lesion: int
    around: int
    spots: int

    @classmethod
    def of(cls, code_size: int) -> Self:
        """About a quarter and a half of a code, as far as there are waves. code_size: at least 3."""
        free = code_size - HEAT_SIZE
        return cls(
            lesion=min(1 + len(_WAVES), max(1, free // 4)),
            around=min(len(_WAVES), free // 2),
            spots=min(_MOST_SPOTS, free // (4 * SPOT_SIZE)),
        )

    @property
    def waves(self) -> int:
        """Numbers of all waves."""
        return self.lesion + self.around

    @property
    def count(self) -> int:
        """Numbers of waves and spots together."""
        return self.waves + SPOT_SIZE * self.spots

    @property
    def spots_at(self) -> slice:
        """Where in a code the numbers of warm spots lie."""
        return slice(HEAT_SIZE + self.waves, HEAT_SIZE + self.count)


def uptake_fields(numbers: Tensor, masks: Tensor, code: UptakeCode) -> Tensor:
    """(N, code.count), (N, 1, D, H, W) in [0, 1] -> (N, 3, D, H, W): waves inside the lesion, around it, warm spots."""
    inside, around, spots = torch.split(numbers, [code.lesion, code.around, SPOT_SIZE * code.spots], dim=1)
    places = _places_in_lesion(masks)
    fields = [
        (inside[:, :1, None, None] * _radial(places) + _sum_of_waves(inside[:, 1:], places)) * masks[:, 0],
        _sum_of_waves(around, _places_in_grid(masks)) * (1 - masks[:, 0]),
        _SPOT_LOUDNESS * warm_spots(spots, masks)[:, 0],
    ]
    return torch.stack(fields, dim=1)


def warm_spots(numbers: Tensor, masks: Tensor) -> Tensor:
    """(N, SPOT_SIZE * S) standard normal, (N, 1, D, H, W) -> (N, 1, D, H, W) in [0, 1]: balls outside the lesion.

    A spot's numbers are its place, uniform over the grid, its radius, and its uptake as a share of the intensity
    window, log-normal: a third are hardly warmer than what lies around. Where spots meet, the warmer one counts.
    """
    x, y, z = _places_in_grid(masks)
    warmest = torch.zeros_like(masks[:, 0])
    for first in range(0, numbers.shape[1], SPOT_SIZE):
        spot = numbers[:, first : first + SPOT_SIZE]
        a, b, c = torch.erf(spot[:, :3, None] / 2**0.5).unbind(dim=1)
        smallest, largest = _SPOT_RADIUS
        radius = smallest + (largest - smallest) * (1 + torch.erf(spot[:, 3] / 2**0.5)) / 2
        squares = (x - a).square()[:, :, None, None] + (y - b).square()[:, None, :, None]
        distance = (squares + (z - c).square()[:, None, None, :] + 1e-6).sqrt()
        cover = (0.5 + (radius[:, None, None, None] - distance) / _SPOT_EDGE).clamp(0.0, 1.0)
        heat = (_SPOT_HEAT + spot[:, 4]).exp().clamp(max=1.0)
        warmest = torch.maximum(warmest, cover * heat[:, None, None, None])
    return (warmest * (1 - masks[:, 0]))[:, None]


def wave_numbers(images: Tensor, masks: Tensor, code: UptakeCode) -> Tensor:
    """(N, code.waves): the waves that come nearest to an image, inside its lesion in shares of the mean, else in logs.

    images: (N, 1, D, H, W) in [0, 1]. masks: the same shape, in [0, 1].
    """
    found = []
    for image, mask in zip(images, masks, strict=True):
        places = _places_in_lesion(mask[None])
        inside, around = mask[0] >= 0.5, mask[0] == 0
        basis = torch.cat([_radial(places), _each_wave(code.lesion - 1, places)[0]])
        share = image[0] / image[0][inside].mean().clamp(min=_DARKEST)
        numbers = [_least_squares(basis[:, inside], share[inside])]
        basis = _each_wave(code.around, _places_in_grid(mask[None]))[0]
        numbers.append(_least_squares(basis[:, around], (image[0][around] + _DARKEST).log()))
        found.append(torch.cat(numbers))
    return torch.stack(found)


def _least_squares(basis: Tensor, values: Tensor) -> Tensor:
    """(W, V), (V,) -> (W,); mean of the values aside, small numbers rather than large ones."""
    if not basis.shape[1]:
        return basis.new_zeros(len(basis))
    basis = basis - basis.mean(dim=1, keepdim=True)
    gram = basis @ basis.T / len(values) + _RIDGE * torch.eye(len(basis), device=basis.device)
    numbers: Tensor = torch.linalg.solve(gram, basis @ (values - values.mean()) / len(values))
    return numbers


def _places_in_grid(masks: Tensor) -> list[Tensor]:
    """Three of (N, n): where a voxel lies along each axis, -1 to 1."""
    return [torch.linspace(-1, 1, n, device=masks.device).expand(len(masks), -1) for n in masks.shape[2:]]


def _places_in_lesion(masks: Tensor) -> list[Tensor]:
    """Three of (N, n): where a voxel lies in the lesion's box."""
    places = []
    for axis in (2, 3, 4):
        profile = masks.sum(dim=tuple({1, 2, 3, 4} - {axis}))  # (N, n)
        profile = profile / profile.sum(dim=1, keepdim=True).clamp(min=1e-3)
        at = torch.arange(profile.shape[1], device=masks.device, dtype=masks.dtype)
        middle = (profile * at).sum(dim=1, keepdim=True)
        spread = (profile * (at - middle).square()).sum(dim=1, keepdim=True).clamp(min=0.25).sqrt()
        places.append(((at - middle) / (_HALF_BOX * spread)).clamp(-_BEYOND, _BEYOND))
    return places


def _cosines(places: list[Tensor]) -> list[Tensor]:
    """Three of (N, n) -> three of (N, K, n)."""
    orders = torch.arange(_FINEST + 1, device=places[0].device)[:, None]
    return [torch.cos(torch.pi / 2 * orders * (place[:, None] + 1)) for place in places]


def _sum_of_waves(numbers: Tensor, places: list[Tensor]) -> Tensor:
    """(N, W) -> (N, D, H, W), without a volume for each wave."""
    cube = numbers.new_zeros((len(numbers), *(_FINEST + 1,) * 3))
    for number, (a, b, c) in enumerate(_WAVES[: numbers.shape[1]]):
        cube[:, a, b, c] = numbers[:, number]
    field: Tensor = torch.einsum("nabc,nax,nby,ncz->nxyz", cube, *_cosines(places))
    return field


def _each_wave(count: int, places: list[Tensor]) -> Tensor:
    """(N, count, D, H, W)."""
    x, y, z = _cosines(places)
    first, second, third = (list(orders) for orders in zip(*_WAVES[:count], strict=True)) if count else ([], [], [])
    return x[:, first, :, None, None] * y[:, second, None, :, None] * z[:, third, None, None, :]


def _radial(places: list[Tensor]) -> Tensor:
    """(N, D, H, W): 1 at the lesion's rim, -1 in its middle."""
    x, y, z = (place.square() for place in places)
    squares = x[:, :, None, None] + y[:, None, :, None] + z[:, None, None, :]
    return -torch.cos(torch.pi * squares.clamp(max=1.0))
