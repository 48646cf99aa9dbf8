"""Bounding the critic's slope after the noised step: functions of weights only, so free of privacy cost."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import nn

from common.settings.study import Family, Lipschitz, Study

PAPER_CLAMP = 0.01  # the published DP-WGAN's bound on every weight


PUBLISHED_PROJECTION_EVERY = 5  # critic steps of the published TrGAN


def limit_slope(critic: nn.Module, study: Study, step: int) -> None:
    """What the study's Lipschitz control does to the critic after its step; a penalty acts in the loss instead.

    step: number of the critic's step, from one, in its round; the published TrGAN projects at every fifth only.
    """
    sparse = study.family is Family.TRGAN and study.training.mode == "paper"
    if sparse and step % PUBLISHED_PROJECTION_EVERY:
        return
    match study.training.lipschitz:
        case Lipschitz.PROJECTION:
            project_singular_values(critic)
        case Lipschitz.CLAMP:
            clamp_weights(critic)
        case Lipschitz.FAKE_PENALTY | Lipschitz.NONE:
            pass
        case _:
            assert_never(study.training.lipschitz)


def project_singular_values(critic: nn.Module, largest: float = 1.0) -> None:
    """Cap the singular values of every layer's (out, -1) weight matrix.  [Bergen et al. 2023]"""
    with torch.no_grad():
        for parameter in critic.parameters():
            if parameter.ndim < 2:
                continue
            matrix = parameter.flatten(1)
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            if s[0] > largest:
                parameter.copy_(((u * s.clamp(max=largest)) @ vh).view_as(parameter))


def clamp_weights(critic: nn.Module, bound: float = PAPER_CLAMP) -> None:
    """Clamp every parameter to [-bound, bound].  [Arjovsky et al. 2017, Alg. 1]"""
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.clamp_(-bound, bound)
