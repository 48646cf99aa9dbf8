"""Optimisers of the adversarial game, and their state as flat named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import assert_never

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, Optimizer, RMSprop

from common.settings.study import Family, Study


def critic_optimiser(parameters: Iterable[Parameter], study: Study) -> Optimizer:
    """Adam with beta1 = 0, or the paper's RMSprop."""
    if study.training.mode == "paper":
        return RMSprop(parameters, lr=paper_learning_rate(study.family))
    return Adam(parameters, lr=study.training.critic_learning_rate, betas=(0.0, 0.9))


def generator_optimiser(parameters: Iterable[Parameter], study: Study) -> Optimizer:
    """Adam with beta1 = 0, or the paper's RMSprop."""
    if study.training.mode == "paper":
        return RMSprop(parameters, lr=paper_learning_rate(study.family))
    return Adam(parameters, lr=study.training.generator_learning_rate, betas=(0.0, 0.9))


def paper_learning_rate(family: Family) -> float:
    """Of both networks, as published."""
    match family:
        case Family.WGAN:
            return 5e-5  # [Kossen et al. 2022]
        case Family.TRGAN:
            return 3e-5  # [Bergen et al. 2023]
        case _:
            assert_never(family)


def optimiser_tensors(optimiser: Optimizer, prefix: str) -> dict[str, Tensor]:
    """The optimiser's state, flat: `prefix.parameter number.name`."""
    state = optimiser.state_dict()["state"]
    return {
        f"{prefix}.{number}.{name}": torch.as_tensor(value).detach().clone()
        for number, values in state.items()
        for name, value in values.items()
    }


def restore_optimiser(optimiser: Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimiser_tensors`; a missing state leaves a fresh optimiser."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        head, _, rest = key.partition(".")
        if head == prefix:
            number, _, name = rest.partition(".")
            state.setdefault(int(number), {})[name] = value.clone()
    whole = optimiser.state_dict()
    optimiser.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
