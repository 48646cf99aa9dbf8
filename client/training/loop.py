"""One round of the adversarial game at a site, under a plan.

The critic sees real patients only through `patient_gradients` -> `clip_rows` -> `noised_mean`. Everything
else here touches generated volumes, public constants and the noised critic, so it is post-processing:

(1) draw patients: a fresh Poisson draw for each critic step, never reused
(2) real part: gradient per patient, clipped, summed, noised once, divided by a public constant
(3) fake part: a fixed number of generated volumes, clipped the same way, no noise
(4) Lipschitz control on weights or on generated volumes
(5) generator step through the critic, which is not updated by it
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.cohort import Cohort
from client.randomness import SecureStream
from client.training.gradient import assign_gradient, clip_rows, noised_mean, patient_gradients
from client.training.state import GameState
from common.adversary.lipschitz import limit_slope
from common.adversary.losses import fake_gradient_penalty
from common.adversary.steps import generator_step
from common.generator.network import load_weights, weights_of
from common.generator.weights import Weights
from common.privacy.mechanism import Plan
from common.settings.study import Lipschitz, Study
from common.telemetry.events import Observer, Progress

PENALTY_WEIGHT = 10.0  # [Gulrajani et al. 2017]


def train_round(
    *,
    study: Study,
    plan: Plan,
    weights: Weights,
    state: GameState,
    cohort: Cohort,
    stream: SecureStream,
    observer: Observer,
    task: str = "training",
) -> tuple[Weights, GameState]:
    """Train `plan.steps_per_round` critic steps; return the generator's weights and the state to keep.

    weights: the round's generator. stream: keyed for this round alone; the same key gives the same bits.
    """
    load_weights(state.generator, weights)
    device = next(state.critic.parameters()).device
    draws, noise, fakes = stream.fork("draw"), stream.fork("noise"), stream.fork("latent")
    for step in range(plan.steps_per_round):
        drawn = cohort.draw(draws, plan.mechanism.sampling_probability)  # (1)
        views = gather_views(cohort, drawn, study.training.views_per_patient, draws).to(device)
        _critic_step(study, plan, state, views=views, noise=noise, fakes=fakes)
        if (step + 1) % study.training.critic_steps_per_generator_step == 0:
            latent = _latents(fakes, study, device)
            generator_step(state.generator, state.critic, state.generator_optimiser, study.training.loss, latent)  # (5)
        observer(Progress(task=task, done=step + 1, total=plan.steps_per_round))
    return weights_of(state.generator), state


def gather_views(cohort: Cohort, patients: Sequence[str], views: int, stream: SecureStream) -> Tensor:
    """(B, views, 1+K, D, H, W) float32: `views` random scans of each patient, shifted by up to one voxel."""
    rows = [
        np.stack([_shifted(scans[index], shift) for index, shift in _draw_views(stream, len(scans), views)])
        for scans in (cohort.scans(patient) for patient in patients)
    ]
    if not rows:
        return torch.zeros((0, views, *cohort.pair_shape), dtype=torch.float32)
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def _draw_views(stream: SecureStream, scans: int, views: int) -> list[tuple[int, tuple[int, int, int]]]:
    """Which scan and which shift, one entry a view. The first view of a single scan is the scan itself."""
    indices = stream.integers(views, 0, scans)
    shifts = stream.integers(3 * views, -1, 2).reshape(views, 3)
    shifts[0] = 0
    return [(int(i), (int(a), int(b), int(c))) for i, (a, b, c) in zip(indices, shifts, strict=True)]


def _shifted(pair: NDArray[np.float16], shift: tuple[int, int, int]) -> NDArray[np.float16]:
    """The pair moved by whole voxels, edges repeated."""
    if shift == (0, 0, 0):
        return pair
    axes = [np.clip(np.arange(n) - s, 0, n - 1) for n, s in zip(pair.shape[1:], shift, strict=True)]
    moved: NDArray[np.float16] = pair[np.ix_(np.arange(len(pair)), *axes)]
    return moved


def _critic_step(
    study: Study, plan: Plan, state: GameState, *, views: Tensor, noise: SecureStream, fakes: SecureStream
) -> None:
    """Steps (2) to (4)."""
    training, critic = study.training, state.critic
    device = views.device
    real = clip_rows(patient_gradients(critic, views, training.loss, real=True), plan.clip_norm)
    gradient = noised_mean(  # (2)
        real,
        clip_norm=plan.clip_norm,
        noise_multiplier=plan.mechanism.noise_multiplier,
        divisor=plan.divisor,
        stream=noise,
    )
    with torch.no_grad():
        generated = state.generator(_latents(fakes, study, device))
    fake = clip_rows(patient_gradients(critic, generated[:, None], training.loss, real=False), plan.clip_norm)
    gradient = gradient + fake.mean(dim=0)  # (3) a public number of rows
    if training.lipschitz is Lipschitz.FAKE_PENALTY:
        gradient = gradient + _penalty_gradient(state, generated, fakes)
    assign_gradient(critic, gradient)
    state.critic_optimiser.step()
    limit_slope(critic, training.lipschitz)  # (4)


def _penalty_gradient(state: GameState, generated: Tensor, fakes: SecureStream) -> Tensor:
    """(P,) gradient of the fake-fake penalty; needs an even number of generated rows."""
    rows = generated[: len(generated) // 2 * 2]
    mix = torch.from_numpy(fakes.uniform(len(rows) // 2)).to(generated.device, torch.float32)
    penalty = PENALTY_WEIGHT * fake_gradient_penalty(state.critic, rows, mix)
    gradients = torch.autograd.grad(penalty, list(state.critic.parameters()), allow_unused=True)
    return torch.cat(
        [
            torch.zeros(p.numel(), device=p.device) if g is None else g.flatten()
            for g, p in zip(gradients, state.critic.parameters(), strict=True)
        ]
    )


def _latents(stream: SecureStream, study: Study, device: torch.device) -> Tensor:
    """(fake_batch, L) float32 standard normal: a fixed number, never the realised draw."""
    n, size = study.training.fake_batch, study.training.latent_size
    return torch.from_numpy(stream.normal(n * size).reshape(n, size)).to(device, torch.float32)
