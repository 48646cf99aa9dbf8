"""A public law of lesion shapes: from a few latent numbers to one lesion's occupancy, through fixed maps only.

Nothing here is trained, so no mask of a patient can be in it: what the `trgan` family paints its images on, in training
as in a release, is drawn from this law. The main body is an ellipsoid with a lobulated surface; two smaller balls grow
out of it, or lie beside it. Sizes run over a factor of thirty. A lesion is about two voxels in radius at
least, on grids that a study may have, and the outermost voxels of the grid are always free.

Every step is differentiable but at isolated points, so that a search of the latent space can move a lesion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.volume.volume import Grid

_PARTS = (1, 3, 2, 4, 5, 8)  # size, place, stretch, turn, surface, two lobes of four numbers each
FORM_SIZE = sum(_PARTS)  # latent numbers of one lesion

_SMALLEST_SHARE, _LARGEST_SHARE = 0.004, 0.13  # of the grid's volume
_TILT_TO_LARGE = 0.35  # of the size's latent; the middle lesion then has about four percent of the grid
_STRETCH = 0.25  # largest logarithm of one of two free axes; the third takes what is left
_SURFACE = 0.2  # largest coefficient vector of the surface harmonics
_SURFACE_REACH = 1.31  # what the harmonics can make of a radius at most: 1 + _SURFACE * sup |Y|, sup |Y|^2 = 7/3
_LOBE_DISTANCE = 1.5  # in radii of the main body
_LOBE_RADIUS = (0.35, 0.65)
_MELT = 0.1  # temperature of the smooth union, in radii; it swells the union by at most log(3) of it
_SWELLING = 0.11
_LEAST_VOXELS = 2.0  # radius of the smallest lesion
_SMOOTHEST = 1e-6


def lesion_occupancy(form: Tensor, grid: Grid) -> Tensor:
    """(N, FORM_SIZE) standard normal -> (N, 1, D, H, W) in [0, 1]: the share of each voxel that is lesion."""
    size, place, stretch, turn, surface, lobes = torch.split(form.float(), list(_PARTS), dim=1)
    spacing = form.new_tensor(grid.spacing_mm, dtype=torch.float32)
    free = spacing * (form.new_tensor(grid.shape, dtype=torch.float32) - 1) / 2  # outermost centres, which stay free
    edge = spacing.log().mean().exp()  # an occupancy falls from one to zero over about a voxel

    radii = _radii(stretch)  # (N, 3), of a body of radius one
    axes = _rotation(turn)  # (N, 3, 3)
    towards, lobe_radii = _lobes(lobes)  # (N, 2, 3), (N, 2)
    low, high = _reach(radii, axes, towards, lobe_radii)  # (N, 3) each, of a body of radius one
    thickness = 0.5 * edge * _SURFACE_REACH * radii.amax(dim=1, keepdim=True)  # (N, 1) of the soft edge, and room
    fits = ((2 * (free - thickness)) / (high - low)).amin(dim=1, keepdim=True)
    radius = torch.minimum(_radius(size, grid).clamp(min=_LEAST_VOXELS * float(spacing.max())), fits)  # (N, 1) mm
    first, last = -free + thickness - radius * low, free - thickness - radius * high
    centre = (first + last) / 2 + (last - first) / 2 * torch.tanh(0.7 * place)  # (N, 3) mm

    away = _centres(grid, form.device)[None] - centre[:, None]  # (N, V, 3) mm
    distances = [_body_distance(away, radius, radii, axes, surface)]
    for number in range(towards.shape[1]):
        gap = away - (radius * towards[:, number])[:, None]
        distances.append(_length(gap) - radius * lobe_radii[:, number, None])
    melt = _MELT * radius
    distance = -melt * torch.logsumexp(torch.stack([-d / melt for d in distances]), dim=0)  # (N, V) mm
    occupancy: Tensor = (0.5 - distance / edge).clamp(0.0, 1.0)
    return occupancy.view(len(form), 1, *grid.shape)


def _radius(size: Tensor, grid: Grid) -> Tensor:
    """(N, 1) -> (N, 1) mm: of the ball with the lesion's share of the grid."""
    volume = 1.0
    for n, s in zip(grid.shape, grid.spacing_mm, strict=True):
        volume *= n * s
    low, high = torch.tensor([_SMALLEST_SHARE, _LARGEST_SHARE]).log().tolist()
    share: Tensor = ((low + high) / 2 + (high - low) / 2 * torch.tanh(0.8 * size + _TILT_TO_LARGE)).exp()
    radius: Tensor = (0.75 / torch.pi * share * volume) ** (1 / 3)
    return radius


def _radii(stretch: Tensor) -> Tensor:
    """(N, 2) -> (N, 3): half axes of an ellipsoid with the volume of the unit ball."""
    free = _STRETCH * torch.tanh(stretch)
    return torch.cat([free, -free.sum(dim=1, keepdim=True)], dim=1).exp()


def _rotation(turn: Tensor) -> Tensor:
    """(N, 4) -> (N, 3, 3): uniform rotations, from normal quaternions."""
    w, x, y, z = (turn / _length(turn)[:, None]).unbind(dim=1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def _lobes(lobes: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 8) -> middles (N, 2, 3) and radii (N, 2) of two balls beside a body of radius one."""
    lobes = lobes.view(len(lobes), 2, 4)
    towards = _LOBE_DISTANCE * lobes[:, :, :3] / (1 + lobes[:, :, :3].square().sum(dim=2, keepdim=True)).sqrt()
    smallest, largest = _LOBE_RADIUS
    return towards, smallest + (largest - smallest) * lobes[:, :, 3].sigmoid()


def _reach(radii: Tensor, axes: Tensor, towards: Tensor, lobe_radii: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds (N, 3), (N, 3) of the melted union along the grid's axes, for a body of radius one at the origin."""
    body = (axes * radii[:, None]).square().sum(dim=2).sqrt() * (_SURFACE_REACH * (1 + _SWELLING))
    swollen = (lobe_radii + _SWELLING)[:, :, None]
    low = torch.minimum(-body, (towards - swollen).amin(dim=1))
    high = torch.maximum(body, (towards + swollen).amax(dim=1))
    return low, high


def _body_distance(away: Tensor, radius: Tensor, radii: Tensor, axes: Tensor, surface: Tensor) -> Tensor:
    """(N, V) mm, about: to an ellipsoid whose radius follows five harmonics of the direction."""
    own = torch.einsum("nvi,nij->nvj", away, axes) / (radius * radii)[:, None]  # the ellipsoid is the unit ball
    length = _length(own)
    x, y, z = (own / length[..., None]).unbind(dim=2)
    harmonics = torch.stack([2 * x * y, 2 * y * z, 2 * z * x, x * x - y * y, 27**0.5 * x * y * z], dim=2)  # (N, V, 5)
    weights = _SURFACE * surface / (1 + surface.square().sum(dim=1, keepdim=True)).sqrt()
    return (length / (1 + torch.einsum("nvk,nk->nv", harmonics, weights)) - 1) * radius


def _centres(grid: Grid, device: torch.device) -> Tensor:
    """(V, 3) mm: voxel centres around the middle of the grid."""
    axes = [
        (torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2) * s
        for n, s in zip(grid.shape, grid.spacing_mm, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=3).flatten(0, 2)


def _length(vectors: Tensor) -> Tensor:
    """(..., C) -> (...,): with a slope everywhere."""
    return (vectors.square().sum(dim=-1) + _SMOOTHEST).sqrt()
