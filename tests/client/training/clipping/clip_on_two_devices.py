"""One of two processes of a hospital: clips its own patients, joins the sum, writes it down."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import distributed

from client.training.clipping.engine import PatientClipper
from client.training.clipping.group import sum_over_group
from client.training.clipping.part import Part
from common.adversary.critic import Critic
from common.adversary.losses import real_loss
from common.settings.study import Loss


def critic() -> Critic:
    """The same on every device."""
    torch.manual_seed(0)
    return Critic(shape=(16, 16, 16), labels=1, width=2)


def patients() -> torch.Tensor:
    """(5, 1, 2, 16, 16, 16)"""
    return torch.randn(5, 1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(1))


def clipped(views: torch.Tensor) -> torch.Tensor:
    """Their sum."""
    return PatientClipper(critic()).clipped_sum(
        [Part(views=views, loss=partial(real_loss, Loss.HINGE), clip_norm=0.05)]
    )


if __name__ == "__main__":
    rank, first, last, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    total = sum_over_group(clipped(patients()[first:last]))
    torch.save(total, folder / f"total-{rank}.pt")
    distributed.destroy_process_group()
