"""The generator's step, the same at a hospital and in the public warm start."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.adversary.losses import generator_loss
from common.settings.study import Loss


def generator_step(generator: nn.Module, critic: nn.Module, optimiser: Optimizer, loss: Loss, latent: Tensor) -> None:
    """One step of the generator through the critic. The critic's parameters get no gradient and do not move.

    latent: (N, L). The critic has no hooks and no buffers, so going through it leaves no trace in it.
    """
    value = generator_loss(loss, critic(generator(latent)))
    parameters = list(generator.parameters())
    gradients = torch.autograd.grad(value, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
