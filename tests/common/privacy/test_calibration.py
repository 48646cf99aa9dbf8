import pytest

from common.errors import SettingsError
from common.privacy.accounting import epsilon
from common.privacy.calibration import calibrate
from common.privacy.mechanism import DpSgd, GaussianRelease
from common.settings.study import PrivacySettings, TrainingSettings


def privacy(**changes):
    fields = {
        "target_epsilon": 8.0,
        "delta": 1e-3,
        "sampling_probability": 0.25,
        "reference_patients": 80,
        "epsilon_cap": 20.0,
    }
    return PrivacySettings(**{**fields, **changes})


def training(rounds=4, steps=25):
    return TrainingSettings(rounds=rounds, critic_steps_per_round=steps)


@pytest.mark.parametrize(
    ("target", "probability", "rounds"),
    [(8.0, 0.25, 4), (1.0, 0.25, 10), (0.05, 0.5, 1), (3.0, 1.0, 4), (40.0, 0.1, 2)],
)
def test_the_whole_campaign_keeps_the_target_and_less_noise_would_not(target, probability, rounds):
    settings = privacy(target_epsilon=target, sampling_probability=probability, epsilon_cap=100.0)
    plan = calibrate(settings, training(rounds=rounds))
    noise = plan.mechanism.noise_multiplier
    assert plan.mechanism.steps == rounds * 25
    assert epsilon([plan.one_round] * rounds, 1e-3).upper <= target
    less = DpSgd(noise_multiplier=noise * (1 - 1.5e-3), sampling_probability=probability, steps=rounds * 25)
    assert epsilon([less], 1e-3).upper > target


def test_the_divisor_is_a_public_constant_of_the_study():
    plan = calibrate(privacy(reference_patients=60), training())
    assert plan.divisor == 0.25 * 60
    assert plan.clip_norm == 1.0
    assert plan.mechanism.sampling_probability == 0.25
    assert (plan.rounds, plan.steps_per_round, plan.target_epsilon, plan.delta) == (4, 25, 8.0, 1e-3)


def test_without_a_target_there_is_no_noise_and_the_plan_says_so():
    plan = calibrate(privacy(target_epsilon=None), training())
    assert plan.mechanism.noise_multiplier == 0
    assert plan.target_epsilon is None


@pytest.mark.parametrize(("share", "probability"), [(0.1, 1.0), (0.5, 1.0), (0.25, 0.5)])
def test_a_warm_up_alone_costs_its_share_and_all_together_the_target(share, probability):
    plan = calibrate(privacy(sampling_probability=probability), training(), share)
    assert epsilon([plan.warm_up], 1e-3).upper == pytest.approx(share * 8.0, rel=1e-6)
    assert epsilon(plan.mechanisms, 1e-3).upper <= 8.0
    less = DpSgd(
        noise_multiplier=plan.mechanism.noise_multiplier * (1 - 1.5e-3), sampling_probability=probability, steps=100
    )
    assert epsilon([plan.warm_up, less], 1e-3).upper > 8.0


def test_a_warm_up_leaves_training_less_but_more_than_a_budget_of_its_own_would():
    settings = privacy(sampling_probability=1.0)
    plan, without = calibrate(settings, training(), 0.5), calibrate(settings, training())
    apart = calibrate(privacy(sampling_probability=1.0, target_epsilon=4.0), training())
    assert without.warm_up is None
    noises = [p.mechanism.noise_multiplier for p in (without, plan, apart)]
    assert noises == sorted(noises)
    assert noises[1] < 0.8 * noises[2]


def test_a_research_plan_releases_its_warm_up_without_noise_too():
    plan = calibrate(privacy(target_epsilon=None), training(), 0.25)
    assert plan.warm_up == GaussianRelease(noise_multiplier=0.0)


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_share_that_leaves_training_nothing_is_refused(share):
    with pytest.raises(SettingsError, match="warm_up_share"):
        calibrate(privacy(), training(), share)


def test_a_share_that_leaves_training_too_little_is_refused_and_says_why():
    with pytest.raises(SettingsError, match="the warm-up release included"):
        calibrate(privacy(), training(), 0.9999)


def test_an_impossible_target_is_refused_with_the_nearest_that_can_be_kept():
    with pytest.raises(
        SettingsError, match=r"target_epsilon: 0.001 at delta 1e-05 .* costs 0\.\d+.*Nothing was started"
    ):
        calibrate(privacy(target_epsilon=0.001, delta=1e-5, sampling_probability=1.0), training(rounds=400))


def test_a_delta_that_gives_one_patient_away_is_refused_with_a_better_one():
    with pytest.raises(SettingsError, match=r"below 1/reference_patients = 0\.0125.*0\.00125"):
        calibrate(privacy(delta=0.0125), training())


def test_a_draw_of_less_than_one_patient_is_refused():
    with pytest.raises(SettingsError, match="fewer than one patient a step"):
        calibrate(privacy(sampling_probability=0.01), training())


def test_every_problem_of_a_target_is_told_at_once():
    with pytest.raises(SettingsError) as told:
        calibrate(privacy(delta=0.05, sampling_probability=0.01, target_epsilon=30.0), training())
    assert len(str(told.value).splitlines()) == 3
