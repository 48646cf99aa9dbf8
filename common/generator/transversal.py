"""The generator of the `trgan` family: slices of an image, painted on a procedural lesion.  [Bergen et al. 2023]

A one-dimensional network writes a code for each slice, a two-dimensional one paints every slice from its own code and
from what the lesion looks like there: its mask, and how unevenly it and its surroundings take up the tracer, see
`common.generator.uptake`. The slices are axial: they lie along the last axis of the study's grid, which runs from
inferior to superior.

No mask can be given to this generator from outside: the last FORM_SIZE numbers of its latent are the lesion, through
the public law of `common.generator.lesions`. So a site's training step can only feed it latents, it stays a function
of noise and of the noised critic, and the mask that comes out is the very one that the image was painted on.

Convolutions that paint are 3-D with a kernel one voxel thick along the slices, which is the same as a 2-D one for each
of them; the platform's last one looks at the neighbours too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import gcd
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.generator.lesions import FORM_SIZE, lesion_occupancy
from common.generator.uptake import HEAT_SIZE, UptakeCode, uptake_fields
from common.volume.volume import Grid


class Painter(Protocol):
    """Image from its code and its mask: (N, C), (N, 1, D, H, W) in [0, 1] -> (N, 1, D, H, W) in [-1, 1]."""

    def __call__(self, code: Tensor, masks: Tensor, /) -> Tensor:
        """Images of a batch."""
        ...


class TransversalGenerator(nn.Module):
    """Latents to pairs, by a mask law that is not trained and a painter that is.

    latent (N, L) -> pairs (N, 2, D, H, W): image in [-1, 1] and occupancy of the lesion. The first L - FORM_SIZE
    numbers are the image's code.
    """

    labels = 1

    def __init__(self, *, grid: Grid, latent_size: int, painter: Painter) -> None:
        super().__init__()
        self.grid = grid
        self.latent_size = latent_size
        self.painter = painter

    def forward(self, latent: Tensor) -> Tensor:
        """(N, L) float32 -> (N, 2, D, H, W) float32."""
        code, form = torch.split(latent, [code_size(self.latent_size), FORM_SIZE], dim=1)
        masks = lesion_occupancy(form, self.grid)
        return torch.cat([self.painter(code, masks), masks], dim=1)


def code_size(latent_size: int) -> int:
    """How many of a latent's numbers say how the image looks; the others are the lesion."""
    return latent_size - FORM_SIZE


class SlicePainter(nn.Module):
    """The platform's painter: small, group normalisation, and the lesion seen at every resolution.

    Group normalisation has no running state and looks at one volume, so the mean of two sites' weights is a painter,
    and a volume depends on its own latent only. A code begins with the lesion's heat, whose meaning is
    learnt, and the numbers of its uptake. In-plane sizes are multiples of 8.
    """

    def __init__(self, *, shape: Sequence[int], code_size: int, width: int) -> None:
        super().__init__()
        *plane, slices = shape
        self.start = (plane[0] // 8, plane[1] // 8)
        self.width = width
        self.slice_codes = SliceCodes(slices=slices, code_size=code_size, widths=(width,) * 6)
        self.stem = nn.Linear(code_size + width, width * self.start[0] * self.start[1])
        self.uptake = UptakeCode.of(code_size)
        lesion = 4  # channels: mask, uptake in it and around it, warm spots
        seen = (max(lesion, width // 16), width // 8, width // 8)  # at 1/2, 1/4 and 1/8 in-plane
        self.looks = nn.ModuleList(
            nn.Conv3d(a, b, (4, 4, 3), stride=(2, 2, 1), padding=1) for a, b in itertools.pairwise((lesion, *seen))
        )
        painted = (width, width // 4, width // 8, width // 8)
        self.stages = nn.ModuleList(
            _SmoothStage(a + look, b) for (a, b), look in zip(itertools.pairwise(painted), reversed(seen), strict=True)
        )
        self.finish = nn.Conv3d(painted[-1] + lesion, 1, 3, padding=1, padding_mode="replicate")
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(self, code: Tensor, masks: Tensor) -> Tensor:
        """(N, C), (N, 1, D, H, W) -> (N, 1, D, H, W)."""
        codes = F.avg_pool1d(self.slice_codes(code), 3, stride=1, padding=1, count_include_pad=False)  # (N, width, W)
        each = torch.cat([code[:, :, None].expand(-1, -1, codes.shape[2]), codes], dim=1).transpose(1, 2)
        x = self.stem(each).unflatten(2, (self.width, *self.start)).permute(0, 2, 3, 4, 1)  # (N, width, D/8, H/8, W)
        numbers = code[:, HEAT_SIZE : HEAT_SIZE + self.uptake.count]
        lesion = torch.cat([masks, uptake_fields(numbers, masks, self.uptake)], dim=1)
        looked = [lesion]
        for look in self.looks:
            looked.append(F.leaky_relu(look(looked[-1]), 0.2))
        for stage, seen in zip(self.stages, reversed(looked[1:]), strict=True):
            x = stage(torch.cat([x, seen], dim=1).contiguous(memory_format=torch.channels_last_3d))
        image: Tensor = self.finish(torch.cat([x, lesion], dim=1)).tanh()
        return image


class SliceCodes(nn.Module):
    """One code for each slice, by transposed convolutions along the slices.  [Saito et al. 2017, temporal generator]

    widths: channels from the first layer on, the last those of a slice's code; a study with fewer doublings leaves out
    the widest. slices: a multiple of 8, at most 128.

    code (N, C) -> (N, widths[-1], slices).
    """

    def __init__(self, *, slices: int, code_size: int, widths: Sequence[int]) -> None:
        super().__init__()
        doublings = 0
        while doublings < len(widths) - 1 and slices % 2 ** (doublings + 1) == 0:
            doublings += 1
        channels = widths[-(doublings + 1) :]
        self.first = nn.ConvTranspose1d(code_size, channels[0], slices // 2**doublings)
        self.first_norm = _group_norm(channels[0])
        self.doublings = nn.ModuleList(
            nn.ConvTranspose1d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(channels)
        )
        self.norms = nn.ModuleList(_group_norm(b) for b in channels[1:-1])

    def forward(self, code: Tensor) -> Tensor:
        """(N, C) -> (N, F, slices), in [-1, 1]."""
        x = F.relu(self.first_norm(self.first(code[:, :, None])))
        for number, double in enumerate(self.doublings):
            x = double(x)
            if number < len(self.norms):
                x = F.relu(self.norms[number](x))
        return x.tanh()


class _SmoothStage(nn.Module):
    """Twice the in-plane resolution of every slice, first interpolated and then convolved.  [Odena et al. 2016]

    Transposed convolutions left a chequered pattern, and zeros beyond the border a frame.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(channels_in, channels_out, (3, 3, 1), padding=(1, 1, 0), padding_mode="replicate")
        self.norm = _group_norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, Cin, d, h, W) -> (N, Cout, 2d, 2h, W)."""
        wide = F.interpolate(x, scale_factor=(2.0, 2.0, 1.0), mode="trilinear")
        return F.leaky_relu(self.norm(self.convolution(wide)), 0.2)


class _SliceStage(nn.Module):
    """Twice the in-plane resolution of every slice, by the published transposed convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.convolution = nn.ConvTranspose3d(channels_in, channels_out, (4, 4, 1), stride=(2, 2, 1), padding=(1, 1, 0))
        self.norm = _group_norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, Cin, d, h, W) -> (N, Cout, 2d, 2h, W)."""
        return F.leaky_relu(self.norm(self.convolution(x)), 0.2)


class PublishedPainter(nn.Module):
    """The published layer plan, at its published size for width 64; for comparison in research, see decision 0018.

    The mask is squeezed to one small code for the whole volume, a hundredth as loud as the slice codes and the same for
    every slice. Group normalisation stands in for batch normalisation, whose running state the weights of a generator
    do not hold and without which a volume would depend on its batch. Codes are uniform in (-1, 1).
    """

    QUIET = 0.01  # how loud the mask's code is
    START = 0.01  # weights start uniform within it

    def __init__(self, *, shape: Sequence[int], code_size: int, width: int) -> None:
        super().__init__()
        *plane, slices = shape
        doublings = 4 if min(plane) >= 64 and not any(n % 16 for n in plane) else 3
        self.start = (plane[0] // 2**doublings, plane[1] // 2**doublings)
        self.width = width
        cells = 4 * width * self.start[0] * self.start[1]
        seeds = (16 * width, 8 * width, 4 * width, 2 * width, 2 * width, code_size)
        self.slice_codes = SliceCodes(slices=slices, code_size=code_size, widths=seeds)
        self.slow = nn.Linear(code_size, cells)
        self.fast = nn.Linear(code_size, cells)
        squeeze = 2 ** (doublings - 2)
        self.looks = nn.ModuleList(
            [
                nn.Conv3d(1, width, 4, stride=2, padding=1),
                nn.Conv3d(width, 2 * width, 4, stride=2, padding=1),
                nn.Conv3d(2 * width, 4 * width, (squeeze, squeeze, slices // 4), stride=(squeeze, squeeze, 1)),
                nn.Conv3d(4 * width, 8 * width, 1),
            ]
        )
        painted = (16 * width, 4 * width, 2 * width, width, width // 2)[: doublings + 1]
        self.stages = nn.ModuleList(_SliceStage(a, b) for a, b in itertools.pairwise(painted))
        self.finish = nn.Conv3d(painted[-1], 1, (3, 3, 1), padding=(1, 1, 0))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.uniform_(parameter, -self.START, self.START)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(self, code: Tensor, masks: Tensor) -> Tensor:
        """(N, C), (N, 1, D, H, W) -> (N, 1, D, H, W)."""
        code = torch.erf(code / 2**0.5)  # a standard normal number to a uniform one
        fast = self.fast(self.slice_codes(code).transpose(1, 2)).unflatten(2, (4 * self.width, *self.start))
        fast = fast.permute(0, 2, 3, 4, 1)  # (N, 4w, d, h, W)
        slow = self.slow(code).unflatten(1, (4 * self.width, *self.start))[..., None].expand_as(fast)
        seen = masks
        for look in self.looks:
            seen = F.relu(look(seen))
        seen = (self.QUIET * seen).expand(-1, -1, -1, -1, fast.shape[4])
        x = torch.cat([slow, fast, seen], dim=1).contiguous(memory_format=torch.channels_last_3d)
        for stage in self.stages:
            x = stage(x)
        image: Tensor = self.finish(x).tanh()
        return image


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(gcd(4, channels), channels)
