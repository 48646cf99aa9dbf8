"""The critic: small, without any layer that mixes records, so that a patient's gradient is that patient's own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.settings.study import Family, Study

# Of image and mask in the `trgan` family. Its masks follow a fixed law: judging them would move nothing.
SLICED_EMPHASIS = (1.0, 0.25)
PUBLISHED_EMPHASIS = (1.98, 0.02)  # [Bergen et al. 2023]


class Critic(nn.Module):
    """Strided 3-D convolutions and one linear read-out; about 12k parameters at 32³ and width 4, 44k at width 8.

    No batch normalisation and no minibatch statistics: under differential privacy every
    record's loss must depend on that record alone. Small, because the noise norm of a step
    grows with the square root of the number of parameters.

    stages: halvings; None reads out at 4³ (6³ at 48³). emphasis: how loud image and labels come in.
    groups: of the normalisation after every stage but the first, which sees grey values as they are; 0 for none.

    pairs (N, 1+K, D, H, W) -> scores (N,).
    """

    def __init__(
        self,
        *,
        shape: Sequence[int],
        labels: int,
        width: int,
        stages: int | None = None,
        emphasis: tuple[float, float] = (1.0, 1.0),
        groups: int = 0,
    ) -> None:
        super().__init__()
        stages = stages or (3 if min(shape) < 64 else 4)
        channels = [1 + labels, *(width * 2**i for i in range(stages))]
        self.stages = nn.ModuleList(
            nn.Conv3d(a, b, kernel_size=4, stride=2, padding=1) for a, b in itertools.pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(groups, c) for c in channels[2:] if groups)
        cells = 1
        for n in shape:
            cells *= n // 2**stages
        self.read_out = nn.Linear(channels[-1] * cells, 1)
        image, label = emphasis
        self.emphasis = None if emphasis == (1.0, 1.0) else [image, *(label for _ in range(labels))]

    def forward(self, pairs: Tensor) -> Tensor:
        """(N, 1+K, D, H, W) -> (N,)."""
        x = pairs
        if self.emphasis is not None:
            x = x * x.new_tensor(self.emphasis).view(-1, 1, 1, 1)
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if self.norms and number:
                x = self.norms[number - 1](x)
            x = F.leaky_relu(x, 0.2)
        scores: Tensor = self.read_out(x.flatten(1))
        return scores.squeeze(1)


def build_critic(study: Study, seed: int = 0) -> Critic:
    """The study's critic with weights drawn from a public seed."""
    shape, labels, width = study.grid.shape, len(study.labels), study.training.critic_width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match study.family:
            case Family.WGAN:
                return Critic(shape=shape, labels=labels, width=width)
            case Family.TRGAN if study.training.mode == "paper":
                stages = 4 if not any(n % 16 for n in shape) else 3
                return Critic(
                    shape=shape, labels=labels, width=width, stages=stages, emphasis=PUBLISHED_EMPHASIS, groups=2
                )
            case Family.TRGAN:
                return Critic(shape=shape, labels=labels, width=width, emphasis=SLICED_EMPHASIS, groups=2)
            case _:
                assert_never(study.family)
