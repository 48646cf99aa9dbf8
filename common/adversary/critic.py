"""The critic: small, without any layer that mixes records, so that a patient's gradient is that patient's own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.settings.study import Study


class Critic(nn.Module):
    """Strided 3-D convolutions and one linear read-out; about 12k parameters at 32³ and width 4, 44k at width 8.

    No batch normalisation and no minibatch statistics: under differential privacy every
    record's loss must depend on that record alone. Small, because the noise norm of a step
    grows with the square root of the number of parameters.

    pairs (N, 1+K, D, H, W) -> scores (N,).
    """

    def __init__(self, *, shape: Sequence[int], labels: int, width: int) -> None:
        super().__init__()
        stages = 3 if min(shape) < 64 else 4  # the read-out sees a grid of 4³ (6³ at 48³)
        channels = [1 + labels, *(width * 2**i for i in range(stages))]
        self.stages = nn.ModuleList(
            nn.Conv3d(a, b, kernel_size=4, stride=2, padding=1) for a, b in itertools.pairwise(channels)
        )
        cells = 1
        for n in shape:
            cells *= n // 2**stages
        self.read_out = nn.Linear(channels[-1] * cells, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        """(N, 1+K, D, H, W) -> (N,)."""
        x = pairs
        for stage in self.stages:
            x = F.leaky_relu(stage(x), 0.2)
        scores: Tensor = self.read_out(x.flatten(1))
        return scores.squeeze(1)


def build_critic(study: Study, seed: int = 0) -> Critic:
    """The study's critic with weights drawn from a public seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Critic(shape=study.grid.shape, labels=len(study.labels), width=study.training.critic_width)
