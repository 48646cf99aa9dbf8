"""The public warm start: generator and critic trained on phantoms only, so it costs no privacy.

Two phases. (1) Every phantom gets a code, its principal component scores, which have zero mean and unit variance
like the latents the generator will be fed; the generator learns to decode them. Where it paints on masks of a fixed
law, it is shown the phantom's own, which is nobody's, and the code says only what the mask does not: how hot the lesion
is and how unevenly, and how everything around it looks. (2) The critic learns to tell
phantoms from generated volumes while the generator answers, in the game the sites will play.

`reconstruct` and `play` take their pairs from anywhere public: `server.distillation` gives them volumes of the sites'
generators, for the same two lessons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm, rankdata
from torch import Tensor

from common.adversary.critic import Critic, build_critic
from common.adversary.lipschitz import limit_slope
from common.adversary.losses import fake_loss, real_loss
from common.adversary.optimisers import critic_optimiser, generator_optimiser
from common.adversary.steps import generator_step
from common.generator.network import PairGenerator, StudyGenerator, build_generator, weights_of
from common.generator.transversal import TransversalGenerator, code_size
from common.generator.uptake import UptakeCode, warm_spots, wave_numbers
from common.generator.weights import Weights
from common.phantom.draw import public_phantoms
from common.settings.study import Family, Study
from common.telemetry.events import Observer, Progress

TASK = "warm start"
DECODER_LEARNING_RATE = 4e-3
IMAGE_WEIGHT, LABEL_WEIGHT = 10.0, 10.0  # L1 and cross-entropy per voxel
CODE_NOISE = 0.25  # standard deviation of the noise on a code
LABEL_EMPHASIS = 2.0  # occupancies count twice in the components
GAME_SHARE = 0.3  # of the warm start's steps
CRITIC_STEPS = 4  # for each generator step, where the study states no number


@dataclass(frozen=True, kw_only=True, eq=False)
class WarmStart:
    """Public weights that every site starts from."""

    generator: Weights
    critic: Weights


def warm_start(study: Study, seed: int, observer: Observer, device: str = "cpu") -> WarmStart:
    """Train generator and critic on the study's phantoms. The same seed gives the same weights."""
    lesson = phantom_lesson(public_phantoms(study, seed, study.warm_start.volumes), study, seed)
    generator, critic = build_generator(study, seed).to(device), build_critic(study, seed).to(device)
    rng = torch.Generator().manual_seed(seed)
    total = study.warm_start.steps
    game_steps = round(GAME_SHARE * total)
    steps = total - game_steps
    if steps:
        reconstruct(
            study,
            generator=generator,
            output=lambda chosen, pairs: _decoded(generator, _blurred(lesson, chosen, rng).to(device), pairs[:, 1:]),
            pairs=lesson.pairs,
            steps=steps,
            learning_rate=DECODER_LEARNING_RATE,
            rng=rng,
            done=lambda step: observer(Progress(task=TASK, done=step, total=total)),
        )
    if game_steps:
        play(
            study,
            generator=generator,
            critic=critic,
            pairs=lesson.pairs,
            steps=game_steps,
            rng=rng,
            done=lambda step: observer(Progress(task=TASK, done=steps + step, total=total)),
        )
    return WarmStart(generator=weights_of(generator), critic=weights_of(critic))


def principal_codes(phantoms: NDArray[np.floating], size: int) -> NDArray[np.float32]:
    """(n, size) principal component scores of the phantoms at half resolution, zero mean and unit variance each.

    phantoms: (n, 1+K, D, H, W). The scores are the leading eigenvectors of the (n, n) Gram matrix times sqrt(n), so no
    covariance of voxels is formed.  [Turk and Pentland 1991] Columns beyond the rank are zero: the decoder
    then learns from noise alone in them.
    """
    n, channels, d, h, w = phantoms.shape
    blocks = phantoms.astype(np.float32).reshape(n, channels, d // 2, 2, h // 2, 2, w // 2, 2).mean(axis=(3, 5, 7))
    blocks[:, 1:] *= LABEL_EMPHASIS
    rows = blocks.reshape(n, -1)
    rows -= rows.mean(axis=0)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    usable = min(size, int((values > values[-1] * 1e-6).sum()))
    codes = np.zeros((n, size), dtype=np.float32)
    codes[:, :usable] = vectors[:, ::-1][:, :usable] * np.sqrt(n)
    return codes


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """What phase (1) teaches: pairs (n, 1+K, D, H, W), and codes (n, C) of what the generator takes beside a mask.

    drawn: numbers of a code that were drawn as latents are. They need no noise, and a warm spot that noise had moved
    would be painted nowhere.
    """

    pairs: NDArray[np.float16]
    codes: NDArray[np.float32]
    drawn: slice


def phantom_lesson(phantoms: NDArray[np.float16], study: Study, seed: int) -> Lesson:
    """Codes of phantoms. Where the generator paints on masks, warm spots whose numbers are known are put into them.

    seed: of the spots. Spots cannot be found again in an image, as waves can.
    """
    match study.family:
        case Family.WGAN:
            codes = principal_codes(phantoms, study.training.latent_size)
            return Lesson(pairs=phantoms, codes=codes, drawn=slice(0))
        case Family.TRGAN:
            size = code_size(study.training.latent_size)
            codes = image_codes(phantoms, size)
            drawn = UptakeCode.of(size).spots_at
            spots = torch.from_numpy(codes[:, drawn])
            spots.normal_(generator=torch.Generator().manual_seed(seed))
            pairs = torch.from_numpy(phantoms.astype(np.float32))
            pairs[:, :1] = torch.maximum(pairs[:, :1], 2 * warm_spots(spots, pairs[:, 1:]) - 1)
            return Lesson(pairs=pairs.numpy().astype(np.float16), codes=codes, drawn=drawn)
        case _:
            assert_never(study.family)


def image_codes(phantoms: NDArray[np.float16], size: int) -> NDArray[np.float32]:
    """(n, size): how an image looks when its mask is known, zero mean and unit variance each.

    First the lesion's mean and standard deviation and the numbers of the waves in and around it; each is turned into
    the normal number of its rank, because a heavy tail would lie where no latent is drawn. Then zeros for warm spots,
    and principal component scores of what is not lesion, in which the lesion's voxels hold the mean of the others.
    phantoms: (n, 2, D, H, W).
    """
    images, masks = phantoms[:, 0].astype(np.float32), phantoms[:, 1].astype(np.float32)
    space = (1, 2, 3)
    inside = np.maximum(masks.sum(axis=space), 1e-3)
    mean = (images * masks).sum(axis=space) / inside
    deviation = np.sqrt(((images - mean[:, None, None, None]) ** 2 * masks).sum(axis=space) / inside)
    outside = ((1 - masks) * images).sum(axis=space) / np.maximum((1 - masks).sum(axis=space), 1e-3)
    around = images * (1 - masks) + outside[:, None, None, None] * masks
    shares = torch.from_numpy((images[:, None] + 1) / 2)
    uptake = UptakeCode.of(size)
    waves = wave_numbers(shares, torch.from_numpy(masks[:, None]), uptake).numpy()
    codes = np.zeros((len(phantoms), size), dtype=np.float32)
    spots = uptake.spots_at
    codes[:, : spots.start] = normal_scores(np.concatenate([np.stack([mean, deviation], axis=1), waves], axis=1))
    codes[:, spots.stop :] = principal_codes(around[:, None], size - spots.stop)
    return codes


def normal_scores(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """(n, C): the normal quantile of each number's rank in its column; rounding is no order.  [van der Waerden 1952]"""
    ranks = rankdata(values.round(4), axis=0)  # equal numbers share the mean of their ranks
    scores: NDArray[np.float32] = norm.ppf((ranks - 0.5) / len(values)).astype(np.float32)
    return scores


def _decoded(generator: StudyGenerator, code: Tensor, masks: Tensor) -> Tensor:
    """(N, C), (N, K, D, H, W) -> pairs (N, 1+K, D, H, W). masks: of phantoms, for a generator that paints on masks."""
    match generator:
        case PairGenerator():
            pairs: Tensor = generator(code)
            return pairs
        case TransversalGenerator():
            return torch.cat([generator.painter(code, masks), masks], dim=1)
        case _:
            assert_never(generator)


def reconstruction_loss(output: Tensor, pairs: Tensor) -> Tensor:
    """L1 on the image, cross-entropy and soft Dice on the occupancies.  [Milletari et al. 2016 for Dice]

    output, pairs: (N, 1+K, D, H, W).
    """
    image = (output[:, 0] - pairs[:, 0]).abs().mean()
    wanted = torch.cat([1.0 - pairs[:, 1:].sum(dim=1, keepdim=True), pairs[:, 1:]], dim=1)
    found = torch.cat([1.0 - output[:, 1:].sum(dim=1, keepdim=True), output[:, 1:]], dim=1).clamp(1e-5, 1.0)
    cross_entropy = -(wanted * found.log()).sum(dim=1).mean()
    space = (2, 3, 4)
    overlap = (pairs[:, 1:] * output[:, 1:]).sum(dim=space)
    dice = (2.0 * overlap + 1.0) / (pairs[:, 1:].sum(dim=space) + output[:, 1:].sum(dim=space) + 1.0)
    return IMAGE_WEIGHT * image + LABEL_WEIGHT * cross_entropy + (1.0 - dice).mean()


def reconstruct(
    study: Study,
    *,
    generator: StudyGenerator,
    output: Callable[[Tensor, Tensor], Tensor],
    pairs: NDArray[np.float16],
    steps: int,
    learning_rate: float,
    rng: torch.Generator,
    done: Callable[[int], None],
) -> None:
    """Phase (1): the generator learns to give `pairs`, (n, 1+K, D, H, W).

    output: what it gives for the chosen ones, from their numbers and themselves. done: told the number of each step.
    """
    device = next(generator.parameters()).device
    optimiser = torch.optim.Adam(generator.parameters(), lr=learning_rate, betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps + 1, pct_start=0.2, cycle_momentum=False
    )
    for step in range(steps):
        chosen = torch.randint(len(pairs), (study.warm_start.batch,), generator=rng)
        wanted = torch.from_numpy(pairs[chosen.numpy()].astype(np.float32)).to(device)
        loss = reconstruction_loss(output(chosen, wanted), wanted)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        done(step + 1)


def _blurred(lesson: Lesson, chosen: Tensor, rng: torch.Generator) -> Tensor:
    """Codes with noise of their own scale, so that every latent lies near a trained one. They keep unit variance."""
    codes = torch.from_numpy(lesson.codes)[chosen]
    keep = (1.0 - CODE_NOISE**2) ** 0.5
    blurred: Tensor = keep * codes + CODE_NOISE * torch.randn(codes.shape, generator=rng)
    blurred[:, lesson.drawn] = codes[:, lesson.drawn]
    return blurred


def play(
    study: Study,
    *,
    generator: StudyGenerator,
    critic: Critic,
    pairs: NDArray[np.float16],
    steps: int,
    rng: torch.Generator,
    done: Callable[[int], None],
) -> None:
    """Phase (2): the sites' game on `pairs`, without noise; the generator keeps a moving average.

    done: told the number of each step.
    """
    device = next(generator.parameters()).device
    training = study.training
    stated = training.critic_steps_per_generator_step
    every = CRITIC_STEPS if stated == "adaptive" else stated  # the ladder answers noise, and here is none
    critic_steps = critic_optimiser(critic.parameters(), study)
    generator_steps = generator_optimiser(generator.parameters(), study)
    average = [p.detach().clone() for p in generator.parameters()]
    for step in range(steps):
        real = _batch(pairs, study.warm_start.batch, rng).to(device)
        with torch.no_grad():
            fakes = generator(_latents(study, rng).to(device))
        loss = real_loss(training.loss, critic(real)) + fake_loss(training.loss, critic(fakes))
        critic_steps.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        critic_steps.step()
        limit_slope(critic, study, step + 1)
        if (step + 1) % every == 0 and step >= steps // 2:  # the critic first: it starts knowing nothing
            generator_step(generator, critic, generator_steps, training.loss, _latents(study, rng).to(device))
            for mean, parameter in zip(average, generator.parameters(), strict=True):
                mean.lerp_(parameter.detach(), 1.0 - training.generator_ema)
        done(step + 1)
    with torch.no_grad():
        for mean, parameter in zip(average, generator.parameters(), strict=True):
            parameter.copy_(mean)


def _batch(pairs: NDArray[np.float16], size: int, rng: torch.Generator) -> Tensor:
    """(size, 1+K, D, H, W) float32, drawn with replacement."""
    chosen = torch.randint(len(pairs), (size,), generator=rng).numpy()
    return torch.from_numpy(pairs[chosen].astype(np.float32))


def _latents(study: Study, rng: torch.Generator) -> Tensor:
    """(fake_batch, L) standard normal."""
    return torch.randn((study.training.fake_batch, study.training.latent_size), generator=rng)
