"""The clipped sum is what one backward pass a patient gives, for every layer, route, part and pass size."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from naive_clipping import naive_sum, relative_error
from random_critics import random_critic, random_parts
from torch import nn

from client.training.clipping.engine import PatientClipper
from client.training.clipping.geometry import Task
from client.training.clipping.part import Part
from client.training.clipping.routes import Route, route_by_rule

CASES = 240
FAST_CASES = 25
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")  # torch, in the plain forward

ROUTES: list[Callable[[Task], Route]] = [route_by_rule, *[lambda _, route=route: route for route in Route]]
ROUTE_NAMES = ["rule", *[str(route) for route in Route]]


def case(seed: int) -> tuple[random.Random, nn.Module, list[Part]]:
    dice = random.Random(seed)  # noqa: S311 - chooses test cases
    shape = (dice.randint(1, 4), *[dice.randint(3, 6) for _ in range(dice.choice([1, 2, 3, 3]))])
    torch.manual_seed(seed)
    critic = random_critic(dice, shape)
    return dice, critic, random_parts(dice, shape, seed)


def in_single(parts: Sequence[Part]) -> list[Part]:
    return [replace(part, views=part.views.float()) for part in parts]


def settings_of(cases: int) -> settings:
    return settings(max_examples=cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings_of(FAST_CASES)
@given(seed=st.integers(0, 2**31))
def test_the_clipped_sum_is_that_of_one_backward_pass_a_patient(seed: int) -> None:
    compare_with_naive(seed)


@pytest.mark.slow
@settings_of(CASES)
@given(seed=st.integers(0, 2**31))
def test_the_clipped_sum_is_exact_in_hundreds_of_critics(seed: int) -> None:
    compare_with_naive(seed)


def compare_with_naive(seed: int) -> None:
    """Random critic, cohort, route and pass size: 1e-10 in float64, 1e-5 in float32."""
    dice, critic, parts = case(seed)
    route, at_once = dice.choice(ROUTES), dice.choice([None, 1, 2, 4])
    channels_last = dice.random() < 0.3
    options = {"route": route, "patients_at_once": at_once, "channels_last": channels_last}
    critic.double()
    expected = naive_sum(critic, parts, channels_last=channels_last)
    found = PatientClipper(critic, **options).clipped_sum(parts)
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= 1e-10
    critic.float()
    single = in_single(parts)
    longer, expected = expected, naive_sum(critic, single, channels_last=channels_last)
    assume(relative_error(expected, longer) < 3e-6)  # else the critic itself is beyond float32: kinks, tiny variances
    found = PatientClipper(critic, **options).clipped_sum(single)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("route", ROUTES, ids=ROUTE_NAMES)
@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("views", [1, 3])
def test_every_route_gives_the_same_sum(route: Callable[[Task], Route], kernel: int, views: int) -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(
        nn.Conv3d(2, 6, kernel, 2, 1), nn.Tanh(), nn.Conv3d(6, 8, kernel, 2, 1), nn.Flatten(), nn.Linear(64, 1)
    ).double()
    parts = [
        Part(views=torch.randn(4, views, 2, 8, 8, 8).double(), loss=lambda s: -s.mean(), clip_norm=0.2),
        Part(views=torch.randn(3, 1, 2, 8, 8, 8).double(), loss=lambda s: s.mean(), clip_norm=None, weight=0.5),
    ]
    found = PatientClipper(critic, route=route).clipped_sum(parts)
    assert relative_error(found, naive_sum(critic, parts)) <= 1e-12
