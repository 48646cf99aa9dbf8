import math

import pytest

from common.privacy.calibration import calibrate
from common.privacy.rule import Feasibility, choose, feasibility, feasibility_text, law, noise_to_signal
from common.settings.study import PrivacySettings, TrainingSettings


def c(patients, target):
    """The law's constant at delta = N^-1.1."""
    return law(target_epsilon=target, delta=patients**-1.1, reference_patients=patients, critic_parameters=patients**2)


@pytest.mark.parametrize(
    ("patients", "constants"),
    [
        (50, (1.78, 0.80, 0.55, 0.42, 0.34)),
        (200, (2.26, 0.94, 0.64, 0.47, 0.38)),
        (1000, (2.77, 1.10, 0.72, 0.53, 0.42)),
        (4000, (3.16, 1.22, 0.79, 0.58, 0.45)),
        (10_000, (3.41, 1.29, 0.84, 0.60, 0.47)),
    ],
)
def test_the_law_has_the_constants_of_our_notes(patients, constants):
    assert [c(patients, target) for target in (1, 3, 5, 7.4, 10)] == pytest.approx(constants, abs=0.0051)


@pytest.mark.parametrize(("patients", "target", "weak"), [(50, 5, 66), (200, 10, 2233), (1000, 5, 15_498)])
def test_the_largest_critic_trainable_from_nothing_is_the_tables(patients, target, weak):
    def found(parameters):
        rho = law(
            target_epsilon=target,
            delta=patients**-1.1,
            reference_patients=patients,
            critic_parameters=parameters,
        )
        return feasibility(rho, warm_start=False)

    assert found(weak) is Feasibility.WEAK
    assert found(round(1.02 * weak) + 1) is Feasibility.INFEASIBLE


@pytest.mark.parametrize(
    ("patients", "target", "probability", "steps"),
    [
        (20, 8.0, 1.0, 1000),
        (50, 7.4, 0.64, 1000),
        (128, 1.0, 0.25, 1000),
        (200, 5.0, 0.25, 2000),
        (1000, 10.0, 0.25, 5000),
    ],
)
def test_small_cohorts_are_drawn_nearly_whole(patients, target, probability, steps):
    chosen = choose(reference_patients=patients, target_epsilon=target, delta=patients**-1.1, warm_start=True)
    assert (chosen.sampling_probability, chosen.steps) == (probability, steps)


@pytest.mark.parametrize("patients", [10, 40, 150, 600])
@pytest.mark.parametrize("target", [1.0, 8.0, 40.0])
def test_the_rules_noise_stays_above_two_so_that_the_law_holds(patients, target):
    delta = 1 / (10 * patients)
    chosen = choose(reference_patients=patients, target_epsilon=target, delta=delta, warm_start=True)
    sigma = c_of(target, delta) * chosen.sampling_probability * math.sqrt(chosen.steps)
    assert sigma >= 2.0 or chosen.steps == 20_000


def c_of(target, delta):
    return law(target_epsilon=target, delta=delta, reference_patients=1, critic_parameters=1)


def test_a_public_start_takes_five_critic_steps_and_none_lets_the_ladder_climb():
    fixed = choose(reference_patients=40, target_epsilon=8.0, delta=1e-3, warm_start=True)
    climbing = choose(reference_patients=40, target_epsilon=8.0, delta=1e-3, warm_start=False)
    assert (fixed.critic_steps_per_generator_step, fixed.adaptive) == (5, False)
    assert (climbing.critic_steps_per_generator_step, climbing.adaptive) == (1, True)


@pytest.mark.parametrize(("probability", "rounds"), [(1.0, 4), (0.5, 8), (0.25, 40)])
def test_batch_and_number_of_steps_cancel(probability, rounds):
    privacy = PrivacySettings(
        target_epsilon=5.0, delta=1e-3, sampling_probability=probability, reference_patients=60, epsilon_cap=9.0
    )
    plan = calibrate(privacy, TrainingSettings(rounds=rounds, critic_steps_per_round=25))
    expected = law(target_epsilon=5.0, delta=1e-3, reference_patients=60, critic_parameters=12_000)
    assert 1.0 <= noise_to_signal(plan, 12_000) / expected <= 1.08


def test_a_public_start_makes_more_worth_trying():
    assert feasibility(1.1, warm_start=True) is Feasibility.WEAK  # 40 patients at epsilon 8 with 9400 parameters
    assert feasibility(1.1, warm_start=False) is Feasibility.INFEASIBLE
    assert feasibility(5.6, warm_start=True) is Feasibility.INFEASIBLE  # the same at epsilon 1
    assert feasibility(0.08, warm_start=True) is Feasibility.COMFORTABLE


def test_the_verdict_says_what_to_do():
    assert "smaller critic" in feasibility_text(6.0, warm_start=True)
    assert "public start" in feasibility_text(6.0, warm_start=False)
    assert "comfortable" in feasibility_text(0.01, warm_start=False)
    assert "0.91 of the strongest possible signal" in feasibility_text(0.912, warm_start=True)


@pytest.mark.parametrize("changes", [{"reference_patients": 0}, {"target_epsilon": 0.0}, {"delta": 0.0}])
def test_constants_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=r"patient|epsilon|delta"):
        choose(**{"reference_patients": 40, "target_epsilon": 8.0, "delta": 1e-3, "warm_start": True, **changes})
