"""What a warm-up release asks about a scan: at most 128 public features, the same at every site and at the coordinator.

The map is a pure function of the study: it is computed from phantoms of a fixed public seed wherever it is needed, so
no order brings one. A site's guarantee rests on the clip norm alone, whatever the features are; that it computes the
map itself also fixes what is asked before anybody has looked.

    components    scores on the phantoms' leading principal components, and their squares
    surroundings  mean grey value at each of a lattice of offsets from each label: what the structure borders on
    histogram     how often each grey value occurs in the background and in each label: soft bins
    volumes       how large each label is: soft bins on a logarithmic scale

Everything is taken at half resolution and is differentiable, so that a generator can be fitted to the answer. Features
are measured from the phantoms' mean in units of the phantoms' spread, and the whole vector in units of the phantoms'
median length: one clip norm then fits all studies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from common.phantom.draw import public_phantoms
from common.settings.load import parse_study, study_json
from common.settings.study import Study, WarmUpSettings

CLIP_NORM = 1.0  # of one patient's feature vector

_PHANTOMS = 128  # that fix the map
_SEED = 20_260_003  # of those phantoms; a campaign's own seeds are hashed to 48 bits
_LABEL_EMPHASIS = 2.0  # occupancies count twice in the components
_SMALLEST_VOLUME = 1e-4  # of the grid: lower end of the volume bins; the upper end is 1
_LEAST_SPREAD = 0.3  # of its block's median: a grey value that phantoms hardly have must not drown the others
_ROOM = 1.0  # clip norm in units of the phantoms' median length, see decision 0011
_BATCH = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureMap:
    """phi: pairs (N, 1+K, D, H, W) float32 -> (N, d), d <= 128.

    mean, components: (M,) and (M, c) of flattened half-resolution pairs. centre, scale: (d,), of the raw features.
    spread: (d, d) float64, covariance of the phantoms' features.
    """

    settings: WarmUpSettings
    mean: Tensor
    components: Tensor
    centre: Tensor
    scale: Tensor
    spread: Tensor

    @property
    def size(self) -> int:
        """D."""
        return len(self.centre)

    def __call__(self, pairs: Tensor) -> Tensor:
        """Features of each pair, not clipped."""
        return (_raw(pairs, self.settings, self.mean, self.components) - self.centre) / self.scale


def feature_map(study: Study) -> FeatureMap:
    """The study's map. Takes seconds the first time: it draws phantoms. Raises ValueError without a warm-up."""
    return _feature_map(study_json(study))


@lru_cache(maxsize=4)  # the sites of a simulation share a process
def _feature_map(text: str) -> FeatureMap:
    study = parse_study(text)
    settings = study.warm_up
    if settings is None:
        raise ValueError("the study has no warm-up, so it has no features")
    phantoms = torch.from_numpy(public_phantoms(study, _SEED, _PHANTOMS).astype(np.float32))
    rows = _rows(phantoms)
    mean = rows.mean(dim=0)
    components = torch.from_numpy(_leading_directions((rows - mean).double().numpy(), settings.components)).float()
    blocks = [_blocks(batch, settings, mean, components) for batch in torch.split(phantoms, _BATCH)]
    joined = [torch.cat(parts) for parts in zip(*blocks, strict=True)]
    spread = [block.std(dim=0) for block in joined]
    scale = torch.cat([s.clamp(min=max(_LEAST_SPREAD * float(s.median()), 1e-6)) for s in spread])
    raw = torch.cat(joined, dim=1)
    centre = raw.mean(dim=0)
    standard = (raw - centre) / scale
    unit = standard.norm(dim=1).median() * _ROOM / CLIP_NORM
    return FeatureMap(
        settings=settings,
        mean=mean,
        components=components,
        centre=centre,
        scale=scale * unit,
        spread=torch.cov((standard / unit).double().T).reshape(len(centre), -1),
    )


def _raw(pairs: Tensor, settings: WarmUpSettings, mean: Tensor, components: Tensor) -> Tensor:
    return torch.cat(_blocks(pairs, settings, mean, components), dim=1)


def _blocks(pairs: Tensor, settings: WarmUpSettings, mean: Tensor, components: Tensor) -> list[Tensor]:
    """The raw features of each kind, (N, .) each."""
    halved = F.avg_pool3d(pairs, 2)
    scores = (_rows(pairs) - mean) @ components
    found = [scores, scores.square()] if settings.components else []
    if settings.surroundings:
        found.append(surroundings(halved, settings.surroundings))
    if settings.histogram_bins:
        found.append(histogram(halved, settings.histogram_bins))
    if settings.volume_bins:
        found.append(volumes(halved, settings.volume_bins))
    return found


def surroundings(pairs: Tensor, reach: int) -> Tensor:
    """(N, K * offsets): mean grey value that each label meets when it is moved by each offset.

    Offsets: the 27 steps of 0 or +-1 voxel, and of +-2 .. +-reach voxels likewise. For label occupancy o and image I
    the feature is sum_x o(x) I(x + offset) / sum_x o(x); beyond the border the image goes on as it is there.
    """
    offsets = [(0, 0, 0), *(o for r in range(1, reach + 1) for o in product((-r, 0, r), repeat=3) if any(o))]
    depth, height, width = pairs.shape[2:]
    image = F.pad(pairs[:, :1], (reach,) * 6, mode="replicate")[:, 0]
    moved = torch.stack(
        [
            image[:, reach + a : reach + a + depth, reach + b : reach + b + height, reach + c : reach + c + width]
            for a, b, c in offsets
        ],
        dim=1,
    )
    sums = torch.einsum("nodhw,nkdhw->nko", moved, pairs[:, 1:])
    size = pairs[:, 1:].sum(dim=(2, 3, 4)).clamp(min=1.0)  # an absent label has no surroundings: zero, not NaN
    return (sums / size[:, :, None]).flatten(1)


def histogram(pairs: Tensor, bins: int) -> Tensor:
    """(N, (1+K) * bins): share of the voxels that are of each tissue, background first, and near each grey value.

    Triangular bins around `bins` equidistant values from -1 to 1; every voxel counts one in all.
    """
    values = torch.linspace(-1.0, 1.0, bins, dtype=pairs.dtype, device=pairs.device)
    near = _triangles(pairs[:, 0], values)  # (N, D, H, W, bins)
    tissue = torch.cat([1.0 - pairs[:, 1:].sum(dim=1, keepdim=True), pairs[:, 1:]], dim=1)
    return (torch.einsum("ndhwb,nkdhw->nkb", near, tissue) / pairs[0, 0].numel()).flatten(1)


def volumes(pairs: Tensor, bins: int) -> Tensor:
    """(N, K * bins): how near each label's share of the grid is to each of `bins` sizes, 1e-4 to 1, logarithmic."""
    share = pairs[:, 1:].mean(dim=(2, 3, 4)).clamp(min=_SMALLEST_VOLUME)
    sizes = torch.linspace(float(np.log(_SMALLEST_VOLUME)), 0.0, bins, dtype=pairs.dtype, device=pairs.device)
    return _triangles(share.log(), sizes).flatten(1)


def _triangles(values: Tensor, centres: Tensor) -> Tensor:
    """(...,) -> (..., bins): 1 at a centre, falling to 0 at the next; beyond the ends the last one stays at 1."""
    width = centres[1] - centres[0]
    held = values.clamp(float(centres[0]), float(centres[-1]))
    return (1.0 - (held[..., None] - centres).abs() / width).clamp(min=0.0)


def _rows(pairs: Tensor) -> Tensor:
    """(N, M): half-resolution pairs, flattened, labels emphasised."""
    halved = F.avg_pool3d(pairs, 2)
    return torch.cat([halved[:, :1], _LABEL_EMPHASIS * halved[:, 1:]], dim=1).flatten(1)


def _leading_directions(rows: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """(M, count) orthonormal principal directions of centred rows (n, M).  [Turk and Pentland 1991]

    From the (n, n) Gram matrix in double precision; the entry of largest size is positive, so that two machines
    agree. Directions beyond the rank are zero.
    """
    values, vectors = np.linalg.eigh(rows @ rows.T)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    usable = values > values[0] * 1e-9 if len(values) else values > 0
    directions = rows.T @ (vectors[:, usable] / np.sqrt(values[usable]))
    directions *= np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])])
    out = np.zeros((rows.shape[1], count))
    out[:, : directions.shape[1]] = directions
    return out
