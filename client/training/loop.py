"""One round of the adversarial game at a site, under a plan.

The critic sees real patients only through `PatientClipper.clipped_sum` -> `noisy`. Everything else here
touches generated volumes, public constants and the noised critic, so it is post-processing:

(1) draw patients, and the canaries that take part: one fresh Poisson draw for each critic step, never reused
(2) real part: gradient per patient, clipped and summed; fake part: a fixed number of generated volumes, clipped
    the same way, with a public weight; both in one pass. Canaries are clipped and added
(3) the sum is noised once; the canaries are listened to in what comes out; it is divided by a public constant
(4) Lipschitz control on weights or on generated volumes
(5) generator step through the critic, which is not updated by it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.cohort import Cohort, poisson_draw
from client.randomness import SecureStream
from client.training.canaries import Canaries
from client.training.clipping.engine import PatientClipper
from client.training.clipping.memory import patients_within
from client.training.clipping.part import Given, Part
from client.training.compute import CPU, Compute
from client.training.ladder import GRACE, accuracy_on_fakes
from client.training.noise import noisy
from client.training.state import GameState
from common.adversary.lipschitz import limit_slope
from common.adversary.losses import fake_gradient_penalty, fake_loss, real_loss
from common.adversary.steps import generator_step
from common.generator.network import load_weights, weights_of
from common.generator.weights import Weights
from common.privacy.mechanism import Plan
from common.settings.study import Family, Lipschitz, Study
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
    canaries: Canaries | None = None,
    task: str = "training",
    compute: Compute = CPU,
) -> tuple[Weights, GameState]:
    """Train `plan.steps_per_round` critic steps; return the generator's weights and the state to keep.

    weights: the round's generator. stream: keyed for this round alone; the same key gives the same bits on the
    same machine. canaries: as many as the study says, None for a study without them.
    compute: how this hospital's machine does it; changes rounding, never the mechanism.
    Raises SettingsError for a critic in which patients cannot be told apart, or when not one fits the memory.
    """
    if (0 if canaries is None else len(canaries.inside)) != study.audit.canaries:
        raise ValueError(f"the study has {study.audit.canaries} canaries, others were given; nothing was trained")
    takers = canaries.takers if canaries else ()
    load_weights(state.generator, weights)
    at_once = patients_within(
        state.critic,
        cohort.pair_shape,
        views=study.training.views_per_patient,
        limit_bytes=compute.memory_mib * 2**20,
    )
    clipper = PatientClipper(state.critic, patients_at_once=at_once, autocast=compute.autocast, channels_last=True)
    draws, noise, fakes = stream.fork("draw"), stream.fork("noise"), stream.fork("latent")
    for step in range(plan.steps_per_round):
        patients, numbers = draw_units(cohort, takers, draws, plan.mechanism.sampling_probability)  # (1)
        views = gather_views(cohort, patients, study.training.views_per_patient, draws, slices=slice_reach(study)).to(
            state.device
        )
        given = None
        if canaries is not None:
            given = Given(gradients=canaries.gradients(numbers, state.device), clip_norm=plan.clip_norm)
        noised = _critic_step(
            study, plan, state, clipper, step=step + 1, views=views, given=given, noise=noise, fakes=fakes
        )
        if canaries is not None:
            state = replace(state, heard=state.heard + canaries.hear(noised))
        state = replace(state, critic_steps=state.critic_steps + 1)
        if state.critic_steps >= _critic_steps_wanted(study, state):
            state = _generator_turn(study, plan, state, _latents(fakes, study, state.device))  # (5)
        observer(Progress(task=task, done=step + 1, total=plan.steps_per_round))
    return weights_of(state.generator), state


def draw_units(
    cohort: Cohort, takers: Sequence[int], stream: SecureStream, probability: float
) -> tuple[list[str], list[int]]:
    """Patients and canaries of one step, from one draw: a sampler that is wrong for patients is wrong for canaries."""
    drawn: list[str | int] = poisson_draw([*cohort.members, *takers], stream, probability)
    return [unit for unit in drawn if isinstance(unit, str)], [unit for unit in drawn if isinstance(unit, int)]


def _critic_steps_wanted(study: Study, state: GameState) -> int:
    """Critic steps for each generator step: the study's number, or what the ladder has climbed to."""
    stated = study.training.critic_steps_per_generator_step
    return state.ladder.critic_steps if stated == "adaptive" else stated


def _generator_turn(study: Study, plan: Plan, state: GameState, latent: Tensor) -> GameState:
    """One generator step. The ladder looks at how the noised critic judges generated volumes, so it costs nothing."""
    ladder = state.ladder
    if study.training.critic_steps_per_generator_step == "adaptive":
        with torch.no_grad():
            accuracy = accuracy_on_fakes(state.critic(state.generator(latent)))
        ladder = ladder.after(accuracy, grace=max(1, min(GRACE, plan.mechanism.steps // 100)))
    generator_step(state.generator, state.critic, state.generator_optimiser, study.training.loss, latent)
    return replace(state, ladder=ladder, critic_steps=0)


def slice_reach(study: Study) -> int:
    """By how many slices a view of a scan may be moved along the body, a public constant: the `trgan` family learns
    from windows of slices, an eighth of the grid up or down.
    """
    match study.family:
        case Family.WGAN:
            return 0
        case Family.TRGAN:
            return study.grid.shape[2] // 8
        case _:
            assert_never(study.family)


def gather_views(
    cohort: Cohort, patients: Sequence[str], views: int, stream: SecureStream, *, slices: int = 0
) -> Tensor:
    """(B, views, 1+K, D, H, W) float32: `views` random scans of each patient, shifted by up to one voxel.

    slices: how far a view's window of slices may lie from the scan's, along the last axis.
    """
    rows = [
        np.stack([_shifted(scans[index], shift) for index, shift in _draw_views(stream, len(scans), views, slices)])
        for scans in (cohort.scans(patient) for patient in patients)
    ]
    if not rows:
        return torch.zeros((0, views, *cohort.pair_shape), dtype=torch.float32)
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def _draw_views(stream: SecureStream, scans: int, views: int, slices: int) -> list[tuple[int, tuple[int, int, int]]]:
    """Which scan and which shift, one entry a view. The first view of a single scan is the scan itself."""
    indices = stream.integers(views, 0, scans)
    shifts = stream.integers(3 * views, -1, 2).reshape(views, 3)
    if slices:
        shifts[:, 2] = stream.integers(views, -slices, slices + 1)
    shifts[0] = 0
    return [(int(i), (int(a), int(b), int(c))) for i, (a, b, c) in zip(indices, shifts, strict=True)]


def _shifted(pair: NDArray[np.float16], shift: tuple[int, int, int]) -> NDArray[np.float16]:
    """The pair moved by whole voxels. Beyond an edge it goes on as its mirror image: the edge voxel is repeated once,
    and the next ones follow, because a stack of equal slices is what no scan looks like.
    """
    if shift == (0, 0, 0):
        return pair
    axes = [_mirrored(np.arange(n) - s, n) for n, s in zip(pair.shape[1:], shift, strict=True)]
    moved: NDArray[np.float16] = pair[np.ix_(np.arange(len(pair)), *axes)]
    return moved


def _mirrored(index: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Indices into 0..n-1 of a row that is mirrored at both ends; by one voxel that is the same as repeating it."""
    return np.where(index < 0, -1 - index, np.where(index >= n, 2 * n - 1 - index, index))


def _critic_step(
    study: Study,
    plan: Plan,
    state: GameState,
    clipper: PatientClipper,
    *,
    step: int,
    views: Tensor,
    given: Given | None,
    noise: SecureStream,
    fakes: SecureStream,
) -> Tensor:
    """Steps (2) to (4): ((sum of clipped real + (divisor / F) * sum of clipped fake) + noise) / divisor.

    Returns the noised sum (P,), before the division: exactly what leaves the mechanism.
    """
    training, critic = study.training, state.critic
    with torch.no_grad():
        generated = state.generator(_latents(fakes, study, state.device))
    real = Part(views=views, loss=partial(real_loss, training.loss), clip_norm=plan.clip_norm)
    fake = Part(
        views=generated[:, None],
        loss=partial(fake_loss, training.loss),
        clip_norm=plan.clip_norm,  # as public as its weight; clipped so that both sides of the game pull alike
        weight=plan.divisor / study.training.fake_batch,
    )
    total = clipper.clipped_sum([real, fake], given)  # (2)
    scale = plan.mechanism.noise_multiplier * plan.clip_norm
    noised = noisy(total, scale=scale, stream=noise)  # (3)
    gradient = noised / plan.divisor
    if training.lipschitz is Lipschitz.FAKE_PENALTY:
        gradient = gradient + _penalty_gradient(state, generated, fakes)
    _assign_gradient(critic, gradient)
    state.critic_optimiser.step()
    limit_slope(critic, study, step)  # (4)
    return noised


def _assign_gradient(critic: nn.Module, flat: Tensor) -> None:
    """Write a flat (P,) gradient into the parameters' `.grad`."""
    parameters = list(critic.parameters())
    for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


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
