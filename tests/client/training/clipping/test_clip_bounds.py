"""What one patient can do to the clipped sum: at most C, whatever their scan holds; nothing when it is broken."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from naive_clipping import naive_sum, patient_gradient, relative_error
from torch import Tensor, nn

from client.training.clipping.book import clip_factors
from client.training.clipping.engine import PatientClipper
from client.training.clipping.geometry import squares_of_rows
from client.training.clipping.part import Part
from client.training.clipping.routes import Route
from common.adversary.critic import Critic
from common.adversary.losses import fake_loss, real_loss
from common.errors import DataError
from common.settings.study import Loss

CLIP_NORM = 0.7
loss = partial(real_loss, Loss.WASSERSTEIN)


def small_critic(seed: int = 0) -> Critic:
    torch.manual_seed(seed)
    return Critic(shape=(16, 16, 16), labels=1, width=2)


def cohort(patients: int = 5, views: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(patients, views, 2, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


def clipped(critic: nn.Module, views: Tensor, clip_norm: float | None = CLIP_NORM) -> Tensor:
    return PatientClipper(critic).clipped_sum([Part(views=views, loss=loss, clip_norm=clip_norm)])


def adversarial_cohorts() -> dict[str, Tensor]:
    ordinary = cohort()
    with_nan, with_infinity = ordinary.clone(), ordinary.clone()
    with_nan[2, 0, 0, 3, 4, 5] = float("nan")
    with_infinity[2, 0, 1, 3, 4, 5] = float("inf")
    scales = torch.tensor([1e6, 1e-6, 1.0, 1e3, 1e-30]).view(5, 1, 1, 1, 1, 1)
    return {
        "huge": 1e4 * ordinary,
        "tiny": 1e-4 * ordinary,
        "mixed": scales * ordinary,
        "aligned": ordinary[:1].expand(5, -1, -1, -1, -1, -1).clone() * 100,
        "constant": torch.full_like(ordinary, 50.0),
        "opposed": torch.cat([100 * ordinary[:1], -100 * ordinary[:1], ordinary[:3]]),
        "nan": with_nan,
        "infinite": with_infinity,
        "overflowing": torch.full_like(ordinary, 1e30),
    }


@pytest.mark.parametrize("name", list(adversarial_cohorts()))
@pytest.mark.parametrize("route", list(Route))
def test_one_patient_moves_the_sum_by_at_most_the_clip_norm(name: str, route: Route) -> None:
    critic = small_critic()
    views = adversarial_cohorts()[name]
    clipper = PatientClipper(critic, route=lambda _: route)

    def total(rows: Tensor) -> Tensor:
        return clipper.clipped_sum([Part(views=rows, loss=loss, clip_norm=CLIP_NORM)]).double()

    whole = total(views)
    assert whole.isfinite().all()
    for left_out in range(len(views)):
        moved = whole - total(torch.cat([views[:left_out], views[left_out + 1 :]]))
        assert moved.norm() <= CLIP_NORM * (1 + 1e-5)


def test_the_bound_is_reached_and_not_undercut() -> None:
    """Or the sensitivity test would pass for a sum of nothing."""
    for patient in 1e4 * cohort():
        assert clipped(small_critic(), patient[None]).double().norm() == pytest.approx(CLIP_NORM, rel=1e-5)


def test_a_short_gradient_is_left_alone() -> None:
    critic, views = small_critic(), 1e-3 * cohort(1)
    plain = patient_gradient(critic, views[0], loss)
    assert relative_error(clipped(critic, views, clip_norm=10 * float(plain.norm())), plain) < 1e-6


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("at_once", [None, 2])
def test_a_broken_patient_counts_as_if_they_had_not_been_drawn(broken: float, at_once: int | None) -> None:
    critic, views = small_critic(), cohort()
    views[3, 0, 0, :8] = broken
    clipper = PatientClipper(critic, patients_at_once=at_once)
    part = Part(views=views, loss=loss, clip_norm=CLIP_NORM)
    others = Part(views=views[[0, 1, 2, 4]], loss=loss, clip_norm=CLIP_NORM)
    assert relative_error(clipper.clipped_sum([part]), clipper.clipped_sum([others]).double()) < 1e-6


def test_one_broken_view_takes_the_whole_patient_out() -> None:
    critic, views = small_critic(), cohort(3, views=2)
    views[1, 0] = float("nan")
    assert relative_error(clipped(critic, views), clipped(critic, views[[0, 2]]).double()) < 1e-6


def test_views_of_one_patient_are_averaged_before_the_norm() -> None:
    """k views are one person: their opposite gradients cancel, and the bound is not k times as wide."""
    critic, views = small_critic(), 1e3 * cohort(1, views=4)
    assert clipped(critic, views).double().norm() == pytest.approx(CLIP_NORM, rel=1e-5)
    assert clipped(critic, views.transpose(0, 1)).norm() > 1.5 * CLIP_NORM


def test_every_layer_counts_in_the_norm() -> None:
    """One factor for all of a patient's layers: the clipped gradient is parallel to the plain one, layer by layer."""
    critic, views = small_critic(), 10 * cohort(1)
    plain = patient_gradient(critic, views[0], loss)
    found = clipped(critic, views).double()
    sizes = [p.numel() for p in critic.parameters()]
    shares = [
        float(a.norm() / b.norm()) for a, b in zip(found.split(sizes), plain.split(sizes), strict=True) if b.norm() > 0
    ]
    assert shares == pytest.approx([CLIP_NORM / float(plain.norm())] * len(shares), rel=1e-5)


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_an_empty_draw_gives_zeros_of_the_right_size(parts: int) -> None:
    critic = small_critic()
    empty = Part(views=cohort()[:0], loss=loss, clip_norm=CLIP_NORM)
    found = PatientClipper(critic).clipped_sum([empty] * parts)
    assert torch.equal(found, torch.zeros(sum(p.numel() for p in critic.parameters())))


def test_an_empty_draw_beside_public_rows_is_the_public_part() -> None:
    critic, fakes = small_critic(), cohort(3)
    empty = Part(views=cohort()[:0], loss=loss, clip_norm=CLIP_NORM)
    public = Part(views=fakes, loss=partial(fake_loss, Loss.HINGE), clip_norm=None, weight=0.25)
    assert relative_error(PatientClipper(critic).clipped_sum([empty, public]), naive_sum(critic, [public])) < 1e-6


def test_the_sum_does_not_know_how_many_were_drawn() -> None:
    critic, views = small_critic(), cohort(4)
    together = clipped(critic, views)
    apart = torch.stack([clipped(critic, views[i : i + 1]) for i in range(4)]).sum(dim=0)
    assert relative_error(together, apart.double()) < 1e-6


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 100])
def test_the_size_of_a_pass_changes_rounding_only(at_once: int) -> None:
    critic = small_critic()
    ragged = Part(views=cohort(9)[:, 0], views_per_patient=[2, 1, 3, 1, 2], loss=loss, clip_norm=CLIP_NORM)
    fakes = Part(views=cohort(4, seed=2), loss=loss, clip_norm=CLIP_NORM, weight=0.5)
    whole = PatientClipper(critic).clipped_sum([ragged, fakes])
    found = PatientClipper(critic, patients_at_once=at_once).clipped_sum([ragged, fakes])
    assert relative_error(found, whole.double()) < 1e-6


def test_repeating_a_sum_gives_the_same_bits() -> None:
    critic, views = small_critic(), cohort(6, views=2)
    assert torch.equal(clipped(critic, views), clipped(critic, views))


def test_bfloat16_forward_keeps_the_bound_and_stays_close() -> None:
    critic, views = small_critic(), cohort(6)
    clipper = PatientClipper(critic, autocast=torch.bfloat16)
    found = clipper.clipped_sum([Part(views=views, loss=loss, clip_norm=0.01)])
    exact = clipped(critic, views, clip_norm=0.01).double()
    assert found.dtype == torch.float32
    assert 1e-6 < relative_error(found, exact) < 0.05
    for patient in 1e3 * views:
        alone = clipper.clipped_sum([Part(views=patient[None], loss=loss, clip_norm=CLIP_NORM)])
        assert alone.double().norm() <= CLIP_NORM * (1 + 1e-5)


def test_long_rows_lose_no_norm() -> None:
    """A float32 sum over a long row falls short; the clip would then be too weak."""
    rows = torch.rand(2, 2**20 + 7, generator=torch.Generator().manual_seed(0))
    assert squares_of_rows(rows) == pytest.approx(rows.double().square().sum(dim=1), rel=2e-7)


def test_factors_are_one_for_short_and_zero_for_broken_gradients() -> None:
    squares = torch.tensor([0.0, 0.25, 4.0, float("nan"), float("inf")], dtype=torch.float64)
    expected = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    assert torch.equal(clip_factors(squares, torch.ones(5, dtype=torch.float64)), expected)


@pytest.mark.parametrize("counts", [[2, 0, 1], [3, -1, 1], [2, 2]])
def test_a_patient_without_views_is_refused(counts: list[int]) -> None:
    with pytest.raises(DataError, match="nothing was trained"):
        Part(views=cohort(3)[:, 0], views_per_patient=counts, loss=loss, clip_norm=1.0)


def test_zero_views_a_patient_are_refused() -> None:
    with pytest.raises(DataError, match="without any view"):
        Part(views=cohort(3)[:, :0], loss=loss, clip_norm=1.0)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_bounds_nothing_is_refused(clip_norm: float) -> None:
    with pytest.raises(ValueError, match="clip_norm"):
        Part(views=cohort(1), loss=loss, clip_norm=clip_norm)
