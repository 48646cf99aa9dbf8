"""How unevenly a lesion and its surroundings take up the tracer: smooth waves, from a few latent numbers.

Products of cosines along the grid's axes, from coarse to fine. A lesion's waves lie in its own box, so they follow it
wherever it is, and the first of them is radial: it makes the middle colder than the rim, or warmer. The waves of the
surroundings lie in the grid.

`uptake_fields` makes fields of numbers; `uptake_numbers` finds the numbers of an image, by least squares. Nothing
here is trained, and a number has no unit: what its wave is worth in an image, a painter learns.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

HEAT_SIZE = 2  # numbers of a code before the waves: the lesion's mean and its standard deviation

_FINEST = 3  # half periods along an axis
_WAVES = sorted(
    (k for k in itertools.product(range(_FINEST + 1), repeat=3) if any(k)), key=lambda k: (sum(n * n for n in k), k)
)
_HALF_BOX = 5**0.5  # of a lesion, in standard deviations along an axis: a ball's radius
_BEYOND = 1.3  # in half boxes: further out a wave keeps its value
_RIDGE = 0.02  # about a fiftieth of a wave's mean square: few voxels cannot tell fine waves apart
_DARKEST = 0.01  # of the window: below it, how dark the surroundings are says nothing


@dataclass(frozen=True)
class UptakeWaves:
    """How many numbers of an image's code are waves: of the lesion, and of what is around it."""

    lesion: int
    around: int

    @classmethod
    def of(cls, code_size: int) -> Self:
        """About a quarter and a half of a code, as far as there are waves. code_size: at least 3."""
        free = code_size - HEAT_SIZE
        return cls(lesion=min(1 + len(_WAVES), max(1, free // 4)), around=min(len(_WAVES), free // 2))

    @property
    def count(self) -> int:
        """Of both together."""
        return self.lesion + self.around


def uptake_fields(numbers: Tensor, masks: Tensor, waves: UptakeWaves) -> Tensor:
    """(N, waves.count), (N, 1, D, H, W) in [0, 1] -> (N, 2, D, H, W): inside the lesion, and around it."""
    inside, around = torch.split(numbers, [waves.lesion, waves.around], dim=1)
    places, grid = _places_in_lesion(masks), _places_in_grid(masks)
    fields = [
        (inside[:, :1, None, None] * _radial(places) + _sum_of_waves(inside[:, 1:], places)) * masks[:, 0],
        _sum_of_waves(around, grid) * (1 - masks[:, 0]),
    ]
    return torch.stack(fields, dim=1)


def uptake_numbers(images: Tensor, masks: Tensor, waves: UptakeWaves) -> Tensor:
    """(N, waves.count): the waves that come nearest to an image, inside its lesion in shares of the mean, else in logs.

    images: (N, 1, D, H, W) in [0, 1]. masks: the same shape, in [0, 1].
    """
    found = []
    for image, mask in zip(images, masks, strict=True):
        places = _places_in_lesion(mask[None])
        inside, around = mask[0] >= 0.5, mask[0] == 0
        basis = torch.cat([_radial(places), _each_wave(waves.lesion - 1, places)[0]])
        share = image[0] / image[0][inside].mean().clamp(min=_DARKEST)
        numbers = [_least_squares(basis[:, inside], share[inside])]
        basis = _each_wave(waves.around, _places_in_grid(mask[None]))[0]
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
