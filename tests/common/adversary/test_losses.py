"""The adversarial game against hand-checked numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from common.adversary.critic import Critic, build_critic
from common.adversary.lipschitz import clamp_weights, limit_slope, project_singular_values
from common.adversary.losses import fake_gradient_penalty, fake_loss, generator_loss, real_loss
from common.adversary.optimisers import critic_optimiser, generator_optimiser
from common.adversary.steps import generator_step
from common.settings.study import Loss
from tests.tiny_studies import tiny_study

SCORES = torch.tensor([2.0, -1.0])


@pytest.mark.parametrize(
    ("loss", "real", "fake", "generator"),
    [
        (Loss.WASSERSTEIN, -0.5, 0.5, -0.5),
        (Loss.HINGE, 1.0, 1.5, -0.5),
        (Loss.NONSATURATING, (math.log1p(math.exp(-2)) + math.log1p(math.e)) / 2,
         (math.log1p(math.exp(2)) + math.log1p(math.exp(-1))) / 2,
         (math.log1p(math.exp(-2)) + math.log1p(math.e)) / 2),
    ],
)  # fmt: skip
def test_losses_are_their_equations(loss: Loss, real: float, fake: float, generator: float) -> None:
    assert real_loss(loss, SCORES).item() == pytest.approx(real)
    assert fake_loss(loss, SCORES).item() == pytest.approx(fake)
    assert generator_loss(loss, SCORES).item() == pytest.approx(generator)


class Slope(nn.Module):
    """A critic with a known slope: s times the sum over eight voxels."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slope * x.flatten(1).sum(dim=1)


def test_the_penalty_is_one_sided_and_taken_row_by_row() -> None:
    fakes, mix = torch.randn(6, 1, 2, 2, 2), torch.tensor([0.0, 0.5, 1.0])
    norm = math.sqrt(8)  # slope norm of a row at slope 1
    assert fake_gradient_penalty(Slope(1.0), fakes, mix).item() == pytest.approx((norm - 1) ** 2, rel=1e-5)
    assert fake_gradient_penalty(Slope(0.1), fakes, mix).item() == 0.0


def test_projection_caps_singular_values_and_leaves_small_layers_alone() -> None:
    critic = Critic(shape=(16, 16, 16), labels=1, width=2)
    with torch.no_grad():
        critic.stages[0].weight.mul_(50)
        critic.read_out.weight.mul_(0.01)
    untouched = critic.read_out.weight.clone()
    project_singular_values(critic)
    assert torch.linalg.matrix_norm(critic.stages[0].weight.flatten(1), 2).item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(critic.read_out.weight, untouched)


def test_clamping_bounds_every_weight() -> None:
    critic = Critic(shape=(16, 16, 16), labels=1, width=2)
    clamp_weights(critic)
    assert max(p.abs().max().item() for p in critic.parameters()) <= 0.01


def test_a_generator_step_leaves_no_trace_in_the_critic() -> None:
    critic = Critic(shape=(16, 16, 16), labels=1, width=2)
    generator = nn.Sequential(nn.Linear(3, 2 * 16**3), nn.Unflatten(1, (2, 16, 16, 16)))
    before = [p.clone() for p in critic.parameters()]
    moved = [p.clone() for p in generator.parameters()]
    generator_step(generator, critic, torch.optim.Adam(generator.parameters()), Loss.WASSERSTEIN, torch.randn(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True))
    assert all(p.grad is None for p in critic.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(moved, generator.parameters(), strict=True))


@pytest.mark.parametrize("size", [32, 48, 64])
def test_critics_are_small_and_score_each_record_alone(size: int) -> None:
    critic = Critic(shape=(size,) * 3, labels=1, width=4)
    assert sum(p.numel() for p in critic.parameters()) < 60_000
    pairs = torch.randn(2, 2, size, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together, alone = critic(pairs), critic(pairs[:1])
    assert together[0].item() == pytest.approx(alone[0].item(), abs=1e-5)


@pytest.mark.parametrize(("mode", "projected"), [("platform", [1, 2, 3, 4, 5, 6]), ("paper", [5])])
def test_the_published_trgan_projects_at_every_fifth_step_and_the_platform_at_each(
    mode: str, projected: list[int]
) -> None:
    study = tiny_study(family="trgan", training={"latent_size": 32, "mode": mode})
    found = []
    for step in range(1, 7):
        critic = build_critic(study)
        with torch.no_grad():
            critic.stages[0].weight.mul_(50)
        limit_slope(critic, study, step)
        if torch.linalg.matrix_norm(critic.stages[0].weight.flatten(1), 2) < 1.01:
            found.append(step)
    assert found == projected


def test_the_published_learning_rates_are_the_families_own() -> None:
    for family, rate in (("wgan", 5e-5), ("trgan", 3e-5)):
        study = tiny_study(family=family, training={"latent_size": 32, "mode": "paper"})
        for optimiser in (critic_optimiser, generator_optimiser):
            made = optimiser(build_critic(study).parameters(), study)
            assert isinstance(made, torch.optim.RMSprop)
            assert made.param_groups[0]["lr"] == rate


def test_the_trgan_critic_hears_the_mask_softly_and_keeps_absolute_grey_values() -> None:
    critic = build_critic(tiny_study(family="trgan", training={"latent_size": 32, "critic_width": 4}))
    assert len(critic.norms) == len(critic.stages) - 1  # the first stage sees grey values as they are
    pairs = torch.randn((2, 2, 16, 16, 16), generator=torch.Generator().manual_seed(0)).requires_grad_()
    (slope,) = torch.autograd.grad(critic(pairs).sum(), pairs)
    image, mask = slope[:, 0].norm().item(), slope[:, 1].norm().item()
    assert mask < image / 2
