"""Random small critics of every supported layer, and random cohorts for them."""

from __future__ import annotations

import random
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from client.training.clipping.part import Part
from common.adversary.losses import fake_loss, real_loss
from common.settings.study import Loss

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def random_critic(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    """One to four blocks and a read-out. shape: (C, ...) of one view."""
    dimensions = len(shape) - 1
    blocks: list[nn.Module] = []
    for _ in range(dice.randint(1, 4)):
        channels = blocks_shape(blocks, shape)[0]
        blocks.append(_layer(dice, dimensions, channels))
        if min(blocks_shape(blocks, shape)[1:]) < 1 or torch.Size(blocks_shape(blocks, shape)).numel() > 3000:
            blocks.pop()  # pragma: no cover
            continue
        blocks.extend(_around(dice, dimensions, blocks_shape(blocks, shape)))
    features = torch.Size(blocks_shape(blocks, shape)).numel()
    hidden = dice.choice([1, 5])
    read_out = [nn.Linear(features, hidden, bias=dice.random() < 0.7)]
    if hidden > 1:
        read_out += [nn.Softplus(), nn.Linear(hidden, 1)]
    return nn.Sequential(*blocks, nn.Flatten(), *read_out)


def blocks_shape(blocks: list[nn.Module], shape: tuple[int, ...]) -> tuple[int, ...]:
    """(C, ...) after the blocks; (C, 0, ...) when they do not fit."""
    try:
        with torch.no_grad():
            return tuple(nn.Sequential(*blocks)(torch.zeros(1, *shape)).shape[1:])
    except RuntimeError:
        return (1, *[0] * (len(shape) - 1))


def _layer(dice: random.Random, dimensions: int, channels: int) -> nn.Module:
    groups = dice.choice([g for g in (1, 1, 2, 3) if channels % g == 0])
    out = groups * dice.randint(1, 4)
    bias = dice.random() < 0.7
    kernel = dice.choice([1, 2, 3, 4])
    kind = dice.random()
    layer: nn.Module
    if kind < 0.25:
        stride = dice.choice([1, 2, 3])
        extra = dice.randint(0, stride - 1)
        layer = TRANSPOSED[dimensions](
            channels, out, kernel, stride, dice.randint(0, kernel - 1), extra, groups, bias, dice.choice([1, 1, 2])
        )
    elif kind < 0.4:
        layer = CONVOLUTIONS[dimensions](
            channels,
            out,
            kernel,
            padding=dice.choice(["same", "valid"]),
            dilation=dice.choice([1, 2]),
            groups=groups,
            bias=bias,
            padding_mode=dice.choice(["zeros", "replicate"]),
        )
    elif kind < 0.5:  # different numbers along different axes
        sizes = [tuple(dice.choice(options) for _ in range(dimensions)) for options in ([1, 2, 3], [1, 2], [0, 1])]
        layer = CONVOLUTIONS[dimensions](channels, out, *sizes, groups=groups, bias=bias)
    else:
        layer = CONVOLUTIONS[dimensions](
            channels,
            out,
            kernel,
            dice.choice([1, 2, 2, 3]),
            dice.choice([0, 1, 2]),
            dice.choice([1, 1, 1, 2]),
            groups,
            bias,
            dice.choice(["zeros", "zeros", "replicate"]),
        )
    if dice.random() < 0.25:
        layer = weight_norm(layer, dim=dice.choice([0, 1, None]))
    return layer


def _around(dice: random.Random, dimensions: int, shape: tuple[int, ...]) -> list[nn.Module]:
    channels = shape[0]
    several = torch.Size(shape[1:]).numel() >= 8  # a norm over two values is all rounding
    norm = dice.random()
    found: list[nn.Module] = []
    if norm < 0.2 and several:
        found.append(nn.GroupNorm(dice.choice([g for g in (1, 2, 3) if channels % g == 0]), channels))
    elif norm < 0.35 and several:
        found.append(INSTANCE_NORMS[dimensions](channels, affine=True))
    elif norm < 0.5 and several:
        found.append(nn.LayerNorm(list(shape[dice.randint(1, len(shape) - 1) :]), bias=dice.random() < 0.7))
    elif norm < 0.55:
        found.append(_Last(shape[-1], dice.randint(1, 4)))
    # Smooth or one-sided: on both sides of a kink float32 and float64 would take different slopes.
    found.append(
        dice.choice([nn.Softplus(), nn.Tanh(), nn.PReLU(), nn.PReLU(channels), nn.LeakyReLU(0.2), nn.Identity()])
    )
    return found


class _Last(nn.Module):
    """A linear layer on the last axis: many places, one weight."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def random_parts(dice: random.Random, shape: tuple[int, ...], seed: int) -> list[Part]:
    """One to three parts: equal or ragged views, clipped or public."""
    source = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(dice.randint(1, 3)):
        loss = partial(dice.choice([real_loss, fake_loss]), dice.choice([Loss.WASSERSTEIN, Loss.NONSATURATING]))
        clip_norm = dice.choice([None, 0.01, 0.3, 30.0])
        patients, weight = dice.randint(0, 5), dice.choice([1.0, 0.4, -2.0])
        if dice.random() < 0.4:
            counts = [dice.randint(1, 3) for _ in range(patients)]
            views = torch.randn(sum(counts), *shape, generator=source, dtype=torch.float64)
            parts.append(Part(views=views, views_per_patient=counts, loss=loss, clip_norm=clip_norm, weight=weight))
        else:
            views = torch.randn(patients, dice.randint(1, 3), *shape, generator=source, dtype=torch.float64)
            parts.append(Part(views=views, loss=loss, clip_norm=clip_norm, weight=weight))
    return parts
