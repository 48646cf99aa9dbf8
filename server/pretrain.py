"""The public warm start: generator and critic trained on phantoms only, so it costs no privacy.

Two phases. (1) The generator is the decoder of a variational autoencoder on phantoms, which is
steady and fast; the Gaussian that the encoder's codes really follow is then folded into the generator's
first layer, so that standard normal latents land where the decoder was trained. (2) The critic learns to tell
phantoms from generated volumes while the generator answers, in the game the sites will play.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from common.adversary.critic import Critic, build_critic
from common.adversary.lipschitz import limit_slope
from common.adversary.losses import fake_loss, real_loss
from common.adversary.optimisers import critic_optimiser, generator_optimiser
from common.adversary.steps import generator_step
from common.generator.network import PairGenerator, build_generator, weights_of
from common.generator.weights import Weights
from common.phantom.draw import draw_pairs
from common.phantom.scanner import site_scanner
from common.settings.study import Study
from common.telemetry.events import Observer, Progress

TASK = "warm start"
RECONSTRUCTION_LEARNING_RATE = 1e-3
IMAGE_WEIGHT, LABEL_WEIGHT, CODE_WEIGHT = 10.0, 10.0, 0.003  # L1 per voxel, cross-entropy per voxel, KL per volume
GAME_SHARE = 0.3  # of the warm start's steps
ENCODER_WIDTH = 16
PUBLIC_SITE = 0  # the neutral scanner


@dataclass(frozen=True, kw_only=True, eq=False)
class WarmStart:
    """Public weights that every site starts from."""

    generator: Weights
    critic: Weights


def warm_start(study: Study, seed: int, observer: Observer, device: str = "cpu") -> WarmStart:
    """Train generator and critic on the study's phantoms. The same seed gives the same weights."""
    phantoms = public_phantoms(study, seed, study.warm_start.volumes)
    generator, critic = build_generator(study, seed).to(device), build_critic(study, seed).to(device)
    rng = torch.Generator().manual_seed(seed)
    game_steps = round(GAME_SHARE * study.warm_start.steps)
    steps = study.warm_start.steps - game_steps
    if steps:
        _reconstruct(study, generator=generator, phantoms=phantoms, steps=steps, rng=rng, observer=observer)
    if game_steps:
        _play(
            study, generator=generator, critic=critic, phantoms=phantoms, steps=game_steps, rng=rng, observer=observer
        )
    return WarmStart(generator=weights_of(generator), critic=weights_of(critic))


def public_phantoms(study: Study, seed: int, count: int) -> NDArray[np.float16]:
    """(count, 1+K, D, H, W) phantoms of the study's kind on its grid, from varied public scanners.

    One scanner per eighth of them: a warm start that has seen one contrast only would not transfer.
    """
    grid = study.grid.as_grid()
    parts = np.array_split(np.arange(count), 8)
    return np.concatenate(
        [
            draw_pairs(
                study.warm_start.phantom,
                seed=seed * 8 + part,
                count=len(members),
                scanner=site_scanner(seed=seed + 1_000_003, site=part if part else PUBLIC_SITE),
                study_grid=grid,
                intensity=study.intensity,
                labels=study.labels,
            )
            for part, members in enumerate(parts)
            if len(members)
        ]
    )


class _Encoder(nn.Module):
    """pairs (N, 1+K, D, H, W) -> mean and log-variance of the code, (N, L) each."""

    def __init__(self, study: Study) -> None:
        super().__init__()
        channels = [1 + len(study.labels), ENCODER_WIDTH, 2 * ENCODER_WIDTH, 4 * ENCODER_WIDTH]
        self.stages = nn.ModuleList(
            nn.Conv3d(a, b, kernel_size=4, stride=2, padding=1) for a, b in itertools.pairwise(channels)
        )
        d, h, w = study.grid.shape
        self.read_out = nn.Linear(channels[-1] * (d // 8) * (h // 8) * (w // 8), 2 * study.training.latent_size)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        x = pairs.contiguous(memory_format=torch.channels_last_3d)
        for stage in self.stages:
            x = F.leaky_relu(stage(x), 0.2)
        mean, log_variance = self.read_out(x.flatten(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-8.0, 4.0)


def reconstruction_loss(output: Tensor, pairs: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """L1 on the image, cross-entropy and Dice on the occupancies, and the KL term.  [Kingma and Welling 2014, App. B]

    output, pairs: (N, 1+K, D, H, W); mean, log_variance: (N, L).
    """
    image = (output[:, 0] - pairs[:, 0]).abs().mean()
    wanted = torch.cat([1.0 - pairs[:, 1:].sum(dim=1, keepdim=True), pairs[:, 1:]], dim=1)
    found = torch.cat([1.0 - output[:, 1:].sum(dim=1, keepdim=True), output[:, 1:]], dim=1).clamp(1e-5, 1.0)
    cross_entropy = -(wanted * found.log()).sum(dim=1).mean()
    space = (2, 3, 4)
    overlap = (pairs[:, 1:] * output[:, 1:]).sum(dim=space)
    dice = (2.0 * overlap + 1.0) / (pairs[:, 1:].sum(dim=space) + output[:, 1:].sum(dim=space) + 1.0)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=1).mean()
    return IMAGE_WEIGHT * image + LABEL_WEIGHT * cross_entropy + (1.0 - dice).mean() + CODE_WEIGHT * divergence


def _reconstruct(
    study: Study,
    *,
    generator: PairGenerator,
    phantoms: NDArray[np.float16],
    steps: int,
    rng: torch.Generator,
    observer: Observer,
) -> None:
    """Phase (1): train the generator as a decoder, then fold the codes' distribution into its first layer."""
    device = next(generator.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
        encoder = _Encoder(study).to(device)
    parameters = [*generator.parameters(), *encoder.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=RECONSTRUCTION_LEARNING_RATE, betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, RECONSTRUCTION_LEARNING_RATE * 2, total_steps=steps + 1, cycle_momentum=False
    )
    for step in range(steps):
        pairs = _batch(phantoms, study.warm_start.batch, rng).to(device)
        mean, log_variance = encoder(pairs)
        code = mean + torch.randn(mean.shape, generator=rng).to(device) * (0.5 * log_variance).exp()
        loss = reconstruction_loss(generator(code), pairs, mean, log_variance)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        observer(Progress(task=TASK, done=step + 1, total=study.warm_start.steps))
    fold_codes(generator, encoder, phantoms, study.warm_start.batch)


def fold_codes(generator: PairGenerator, encoder: nn.Module, phantoms: NDArray[np.float16], batch: int) -> None:
    """Let code = m + A z with A A' the codes' covariance; then stem(m + A z) is again a linear layer of z.

    The covariance of the aggregate posterior is cov(mean) + E[variance].
    """
    device = next(generator.parameters()).device
    means, variances = [], []
    with torch.inference_mode():
        for start in range(0, len(phantoms), batch):
            pairs = torch.from_numpy(phantoms[start : start + batch].astype(np.float32)).to(device)
            mean, log_variance = encoder(pairs)
            means.append(mean.cpu().double())
            variances.append(log_variance.exp().cpu().double())
    codes = torch.cat(means)
    centre = codes.mean(dim=0)
    covariance = codes.T.cov() + torch.diag(torch.cat(variances).mean(dim=0))
    spread = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(len(centre), dtype=torch.float64))
    with torch.no_grad():
        matrix = generator.stem.weight.cpu().double()
        generator.stem.bias.add_((matrix @ centre).to(generator.stem.bias))
        generator.stem.weight.copy_((matrix @ spread).to(generator.stem.weight))


def _play(
    study: Study,
    *,
    generator: PairGenerator,
    critic: Critic,
    phantoms: NDArray[np.float16],
    steps: int,
    rng: torch.Generator,
    observer: Observer,
) -> None:
    """Phase (2): the sites' game on phantoms, without noise; the generator keeps a moving average."""
    device = next(generator.parameters()).device
    training, every = study.training, study.training.critic_steps_per_generator_step
    critic_steps = critic_optimiser(critic.parameters(), training)
    generator_steps = generator_optimiser(generator.parameters(), training)
    average = [p.detach().clone() for p in generator.parameters()]
    first = study.warm_start.steps - steps
    for step in range(steps):
        pairs = _batch(phantoms, study.warm_start.batch, rng).to(device)
        with torch.no_grad():
            fakes = generator(_latents(study, rng).to(device))
        loss = real_loss(training.loss, critic(pairs)) + fake_loss(training.loss, critic(fakes))
        critic_steps.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        critic_steps.step()
        limit_slope(critic, training.lipschitz)
        if (step + 1) % every == 0 and step >= steps // 2:  # the critic first: it starts knowing nothing
            generator_step(generator, critic, generator_steps, training.loss, _latents(study, rng).to(device))
            for mean, parameter in zip(average, generator.parameters(), strict=True):
                mean.lerp_(parameter.detach(), 1.0 - training.generator_ema)
        observer(Progress(task=TASK, done=first + step + 1, total=study.warm_start.steps))
    with torch.no_grad():
        for mean, parameter in zip(average, generator.parameters(), strict=True):
            parameter.copy_(mean)


def _batch(phantoms: NDArray[np.float16], size: int, rng: torch.Generator) -> Tensor:
    """(size, 1+K, D, H, W) float32, drawn with replacement."""
    chosen = torch.randint(len(phantoms), (size,), generator=rng).numpy()
    return torch.from_numpy(phantoms[chosen].astype(np.float32))


def _latents(study: Study, rng: torch.Generator) -> Tensor:
    """(fake_batch, L) standard normal."""
    return torch.randn((study.training.fake_batch, study.training.latent_size), generator=rng)
