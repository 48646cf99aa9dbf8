from dataclasses import replace

import pytest

from common.privacy.mechanism import DpSgd, GaussianRelease, Plan

TRAINING = DpSgd(noise_multiplier=2.0, sampling_probability=0.5, steps=8)
PLAN = Plan(
    mechanism=TRAINING, clip_norm=1.0, divisor=10.0, steps_per_round=2, rounds=4, target_epsilon=8.0, delta=1e-3
)
WARM_UP = GaussianRelease(noise_multiplier=3.0)


def test_a_plan_names_everything_it_does_to_a_patient():
    assert PLAN.mechanisms == (TRAINING,)
    assert replace(PLAN, warm_up=WARM_UP).mechanisms == (WARM_UP, TRAINING)


def test_a_round_is_training_alone():
    assert replace(PLAN, warm_up=WARM_UP).one_round == replace(TRAINING, steps=2)


def test_a_private_plan_has_no_part_without_noise():
    with pytest.raises(ValueError, match="everywhere"):
        replace(PLAN, warm_up=GaussianRelease(noise_multiplier=0.0))
    with pytest.raises(ValueError, match="everywhere"):
        replace(PLAN, mechanism=replace(TRAINING, noise_multiplier=0.0), target_epsilon=None, warm_up=WARM_UP)


@pytest.mark.parametrize("noise", [-1.0, float("inf"), float("nan")])
def test_a_release_has_finite_noise(noise):
    with pytest.raises(ValueError, match="noise_multiplier"):
        GaussianRelease(noise_multiplier=noise)
