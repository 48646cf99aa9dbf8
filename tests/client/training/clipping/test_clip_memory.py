"""The number of patients a pass holds follows the memory that is allowed."""

from __future__ import annotations

import pytest
import torch

from client.training.clipping.memory import patients_within
from common.adversary.critic import Critic
from common.errors import SettingsError

MIB = 2**20


def critic() -> Critic:
    torch.manual_seed(0)
    return Critic(shape=(32, 32, 32), labels=1, width=8)


def fit(mebibytes: int, views: int = 1) -> int:
    return patients_within(critic(), (2, 32, 32, 32), views=views, limit_bytes=mebibytes * MIB)


def test_twice_the_memory_holds_about_twice_the_patients() -> None:
    assert fit(200) == pytest.approx(2 * fit(100), rel=0.1)


def test_four_views_need_about_four_times_the_memory() -> None:
    assert fit(200) == pytest.approx(4 * fit(200, views=4), rel=0.35)


def test_the_estimate_covers_what_activations_alone_need() -> None:
    activations = 2 * 32**3 * 4 + 2 * 8 * 16**3 * 4 + 2 * 16 * 8**3 * 4 + 2 * 32 * 4**3 * 4
    assert fit(100) * activations < 100 * MIB


def test_too_little_memory_is_told() -> None:
    with pytest.raises(SettingsError, match="nothing was trained"):
        fit(1)
