"""The adversarial game, one equation a function. Scores are (N,); every loss is a mean over its own rows."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.settings.study import Loss


def real_loss(loss: Loss, scores: Tensor) -> Tensor:
    """The critic's loss on real rows.

    Wasserstein: -D(x) [Arjovsky et al. 2017, Eq. 2]; hinge: max(0, 1 - D(x)) [Lim and Ye 2017];
    non-saturating: softplus(-D(x)) [Goodfellow et al. 2014].
    """
    match loss:
        case Loss.WASSERSTEIN:
            return -scores.mean()
        case Loss.HINGE:
            return F.relu(1.0 - scores).mean()
        case Loss.NONSATURATING:
            return F.softplus(-scores).mean()
        case _:
            assert_never(loss)


def fake_loss(loss: Loss, scores: Tensor) -> Tensor:
    """The critic's loss on generated rows: the mirror image of `real_loss`."""
    match loss:
        case Loss.WASSERSTEIN:
            return scores.mean()
        case Loss.HINGE:
            return F.relu(1.0 + scores).mean()
        case Loss.NONSATURATING:
            return F.softplus(scores).mean()
        case _:
            assert_never(loss)


def generator_loss(loss: Loss, scores: Tensor) -> Tensor:
    """The generator's loss on its own rows: -D(G(z)), or softplus(-D(G(z))) in the non-saturating game."""
    match loss:
        case Loss.WASSERSTEIN | Loss.HINGE:
            return -scores.mean()
        case Loss.NONSATURATING:
            return F.softplus(-scores).mean()
        case _:
            assert_never(loss)


def fake_gradient_penalty(critic: nn.Module, fakes: Tensor, mix: Tensor) -> Tensor:
    """Mean of max(0, ||dD/dx|| - 1)^2 at fake-fake interpolates.  [Gulrajani et al. 2017, Eq. 3; one-sided]

    fakes: (2M, C, D, H, W) generated rows; mix: (M,) in [0, 1]. Both ends are generated, so no
    patient enters and the penalty costs no privacy. The norm is per row, not over the batch.
    """
    a, b = fakes.chunk(2)
    weight = mix.view(-1, 1, 1, 1, 1)
    points = (weight * a + (1 - weight) * b).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return F.relu(slope.flatten(1).norm(dim=1) - 1.0).square().mean()
