"""The per-patient gradient: exact, bounded, noised once, divided by a public constant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from client.randomness import SecureStream
from client.training.gradient import assign_gradient, clip_rows, noised_mean, patient_gradients
from common.adversary.critic import Critic
from common.adversary.losses import real_loss
from common.settings.study import Loss


def small_critic(seed: int = 0) -> Critic:
    torch.manual_seed(seed)
    return Critic(shape=(16, 16, 16), labels=1, width=2)


def views(patients: int, per_patient: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randn(patients, per_patient, 2, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("per_patient", [1, 3])
def test_each_row_is_the_gradient_of_that_patient_alone(loss: Loss, per_patient: int) -> None:
    """Against the naive second implementation: one backward pass a patient, in float64."""
    critic = small_critic().double()
    batch = views(5, per_patient).double()
    rows = patient_gradients(critic, batch, loss, real=True)
    for row, patient in zip(rows, batch, strict=True):
        naive = torch.autograd.grad(real_loss(loss, critic(patient)), list(critic.parameters()), allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for g, p in zip(naive, critic.parameters(), strict=True)
            ]
        )
        assert torch.allclose(row, flat, rtol=1e-9, atol=1e-12)


def test_views_of_one_patient_are_averaged_before_the_norm() -> None:
    critic, batch = small_critic(), views(1, per_patient=4)
    together = patient_gradients(critic, batch, Loss.WASSERSTEIN, real=True)
    apart = patient_gradients(critic, batch.transpose(0, 1), Loss.WASSERSTEIN, real=True)
    assert torch.allclose(together[0], apart.mean(dim=0), atol=1e-6)


def test_no_patients_give_no_rows() -> None:
    critic = small_critic()
    rows = patient_gradients(critic, views(5)[:0], Loss.WASSERSTEIN, real=True)
    assert rows.shape == (0, sum(p.numel() for p in critic.parameters()))


def test_clipping_bounds_every_row_and_leaves_short_rows_alone() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    clipped = clip_rows(rows, 1.0)
    assert torch.allclose(clipped, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_a_row_that_is_not_finite_counts_as_nothing() -> None:
    rows = torch.tensor([[float("nan"), 1.0], [float("inf"), 0.0], [0.5, 0.0]])
    assert torch.equal(clip_rows(rows, 1.0), torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 0.0]]))


def test_one_patient_moves_the_clipped_sum_by_at_most_the_clip_norm() -> None:
    critic, batch = small_critic(), 100.0 * views(6)  # far outside the usual range: every row is clipped
    clipped = clip_rows(patient_gradients(critic, batch, Loss.WASSERSTEIN, real=True), 0.7)
    whole = clipped.double().sum(dim=0)
    for left_out in range(6):
        without = torch.cat([clipped[:left_out], clipped[left_out + 1 :]]).double().sum(dim=0)
        assert (whole - without).norm() <= 0.7 * (1 + 1e-6)
    assert clipped.norm(dim=1).min() > 0.69, "the case must really clip, or this test proves nothing"


def test_noise_has_the_planned_scale_and_is_added_once() -> None:
    """Two-sided: accepts the right scale, and would reject two thirds and three halves of it."""
    zero = torch.zeros(4, 20_000)
    out = noised_mean(
        zero, clip_norm=0.5, noise_multiplier=3.0, divisor=10.0, stream=SecureStream.from_seed(0, "noise")
    )
    assert out.std().item() == pytest.approx(3.0 * 0.5 / 10.0, rel=0.03)
    assert abs(out.mean().item()) < 4 * 0.15 / np.sqrt(20_000)


def test_an_empty_draw_is_noised_like_any_other() -> None:
    empty = noised_mean(
        torch.zeros(0, 1000), clip_norm=1.0, noise_multiplier=1.0, divisor=2.0, stream=SecureStream.from_seed(0)
    )
    full = noised_mean(
        torch.zeros(7, 1000), clip_norm=1.0, noise_multiplier=1.0, divisor=2.0, stream=SecureStream.from_seed(0)
    )
    assert torch.equal(empty, full)
    assert empty.std() > 0.4


def test_the_divisor_is_the_constant_and_not_the_batch() -> None:
    one, three = torch.ones(1, 8), torch.ones(3, 8)
    stream = SecureStream.from_seed(0)
    assert torch.allclose(
        noised_mean(one, clip_norm=9.0, noise_multiplier=0.0, divisor=4.0, stream=stream), torch.full((8,), 0.25)
    )
    assert torch.allclose(
        noised_mean(three, clip_norm=9.0, noise_multiplier=0.0, divisor=4.0, stream=stream), torch.full((8,), 0.75)
    )


def test_flat_gradients_land_in_parameter_order() -> None:
    layer = nn.Linear(2, 1)
    assign_gradient(layer, torch.tensor([1.0, 2.0, 3.0]))
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    assert layer.weight.grad.tolist() == [[1.0, 2.0]]
    assert layer.bias.grad.tolist() == [3.0]
