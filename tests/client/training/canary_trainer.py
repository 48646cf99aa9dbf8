"""The noised steps of a site with nobody in its cohort but canaries: real draw, canaries, clipping and noise, no scans.

What a mutant changes is handed in from outside; nothing of the product is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.cohort import Cohort, commit_split
from client.randomness import SecureStream
from client.training.canaries import Canaries, guesses
from client.training.clipping.engine import PatientClipper
from client.training.clipping.part import Given
from client.training.loop import draw_units
from client.training.noise import noisy
from common.measure.one_run import GUESS_RULES, Guesses
from common.privacy.mechanism import DpSgd, Plan

DELTA = 1e-5
CLIP_NORM = 1.0
NOBODY = Cohort(patients={}, split=commit_split([], [], SecureStream.from_seed(0)))


class Sampler(Protocol):
    """What a draw is made with."""

    def bernoulli(self, n: int, probability: float) -> NDArray[np.bool_]: ...


def plan_of_toy(noise: float, probability: float, steps: int) -> Plan:
    return Plan(
        mechanism=DpSgd(noise_multiplier=noise, sampling_probability=probability, steps=steps),
        clip_norm=CLIP_NORM,
        divisor=1.0,
        steps_per_round=steps,
        rounds=1,
        target_epsilon=1.0,
        delta=DELTA,
    )


def summed(clipper: PatientClipper, gradients: Tensor, clip_norm: float) -> Tensor:
    """As `client.training.loop` sums: every gradient clipped by itself."""
    return clipper.clipped_sum([], Given(gradients=gradients, clip_norm=clip_norm))


def toy_training(
    plan: Plan,
    *,
    canaries: int,
    seed: int,
    noise: float | None = None,
    clip_norm: float = CLIP_NORM,
    sampler: Callable[[SecureStream], Sampler] = lambda stream: stream,
    total: Callable[[PatientClipper, Tensor, float], Tensor] = summed,
) -> tuple[Guesses, ...]:
    """Guesses after `plan.mechanism.steps` noised steps that use other noise, another bound, sampler or sum.

    noise: multiplier that is really used, the plan's if None. As many parameters as the next power of two.
    """
    stream, mechanism = SecureStream.from_seed(seed, "toy"), plan.mechanism
    parameters = 1 << (canaries - 1).bit_length()
    clipper = PatientClipper(nn.Linear(parameters, 1, bias=False))
    flock = Canaries.make(canaries, parameters=parameters, clip_norm=CLIP_NORM, stream=stream.fork("canaries"))
    draws, noises = sampler(stream.fork("draw")), stream.fork("noise")
    scale = (mechanism.noise_multiplier if noise is None else noise) * CLIP_NORM
    heard = torch.zeros(canaries, dtype=torch.float64)
    for _ in range(mechanism.steps):
        _, numbers = draw_units(NOBODY, flock.takers, draws, mechanism.sampling_probability)
        gradients = flock.gradients(numbers, torch.device("cpu"))
        heard += flock.hear(noisy(total(clipper, gradients, clip_norm), scale=scale, stream=noises))
    return guesses(heard, flock.inside, GUESS_RULES)


class Reused:
    """The first draw, again and again."""

    def __init__(self, stream: SecureStream) -> None:
        self._stream = stream
        self._first: NDArray[np.bool_] | None = None

    def bernoulli(self, n: int, probability: float) -> NDArray[np.bool_]:
        if self._first is None:
            self._first = self._stream.bernoulli(n, probability)
        return self._first


class Shuffled:
    """Batches of one size from a shuffled list, everybody once before anybody twice."""

    def __init__(self, stream: SecureStream) -> None:
        self._stream = stream
        self._left: list[int] = []

    def bernoulli(self, n: int, probability: float) -> NDArray[np.bool_]:
        size = max(1, round(n * probability))
        if len(self._left) < size:
            self._left = [int(i) for i in self._stream.permutation(n)]
        taken = np.zeros(n, dtype=bool)
        taken[self._left[:size]] = True
        self._left = self._left[size:]
        return taken


def clipped_after_averaging(_clipper: PatientClipper, gradients: Tensor, clip_norm: float) -> Tensor:
    """The mutant: the mean is clipped instead of every gradient, and multiplied by how many there were."""
    if len(gradients) == 0:
        return torch.zeros(gradients.shape[1])
    mean = gradients.mean(dim=0)
    return len(gradients) * mean * (clip_norm / mean.norm()).clamp(max=1.0)
