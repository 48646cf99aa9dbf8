import math
from dataclasses import replace

import pytest

from common.privacy.accounting import epsilon, epsilon_rdp
from common.privacy.calibration import calibrate
from common.privacy.mechanism import DpSgd, Plan
from common.settings.study import PrivacySettings, TrainingSettings
from server.published import (
    README,
    as_executed,
    as_printed,
    by_unit,
    by_unit_text,
    fresh_draws,
    patient_level,
)


def plan(noise=2.0, probability=0.1, steps=200) -> Plan:
    return Plan(
        mechanism=DpSgd(noise_multiplier=noise, sampling_probability=probability, steps=steps),
        clip_norm=1.0,
        divisor=4.0,
        steps_per_round=steps,
        rounds=1,
        target_epsilon=9.0 if noise else None,
        delta=1e-4,
    )


def test_the_readme_of_the_published_system_has_its_batches():
    assert (README.patches, README.draws, README.delta) == (41_000, 64_050, 1 / 41_000)


def test_the_published_epsilon_is_reproduced_as_printed_as_executed_and_with_fresh_draws():
    assert as_printed(README) == pytest.approx(3.61, abs=0.01)
    assert as_executed(README) == pytest.approx(14.99, abs=0.01)
    assert fresh_draws(README) == pytest.approx(2.44, abs=0.01)


def test_using_a_draw_again_costs_more_than_drawing_afresh_and_once_costs_the_same():
    assert as_executed(README) > 6 * fresh_draws(README)
    once = replace(README, steps_per_draw=1)
    assert as_executed(once) == fresh_draws(once) == pytest.approx(1.04, abs=0.01)


def test_a_patient_of_the_published_system_has_no_guarantee_at_all():
    """Above 1e4 even for somebody who has one clipped patch in a draw, with draws used once."""
    assert 1e5 < patient_level(README) < 3e5
    once = replace(README, steps_per_draw=1)
    present = 1 - (1 - README.sampling_probability) ** README.patches_per_patient
    one_patch = DpSgd(noise_multiplier=1.0, sampling_probability=present, steps=README.draws)
    assert 1.0e4 < epsilon_rdp([one_patch], README.delta) < patient_level(once) < patient_level(README)


def test_a_patient_of_one_patch_is_a_patch():
    found = by_unit(plan(), 1)
    assert found.patch == found.patient.upper
    assert found.patient_of_patches == pytest.approx(epsilon_rdp(plan().mechanisms, 1e-4), rel=0.01)


def test_patches_that_are_always_drawn_are_a_group_of_their_number():
    """Group privacy of the Gaussian mechanism: four patches are one with a quarter of the noise."""
    found = by_unit(plan(noise=20.0, probability=1.0), 4)
    exact = epsilon(plan(noise=5.0, probability=1.0).mechanisms, 1e-4).upper
    assert exact <= found.patient_of_patches <= 1.15 * exact


def test_more_patches_cost_a_patient_more_while_the_patch_sees_nothing():
    costs = [by_unit(plan(), k) for k in (1, 2, 8, 64, 1000)]
    assert len({cost.patch for cost in costs}) == 1
    paid = [cost.patient_of_patches for cost in costs]
    assert paid == sorted(paid)
    assert paid[1] > 1.5 * paid[0]
    assert paid[-1] > 1000 * paid[0]


def test_both_epsilons_of_a_study_stand_side_by_side():
    privacy = PrivacySettings(
        target_epsilon=7.4, delta=1e-3, sampling_probability=1.0, reference_patients=30, epsilon_cap=16.0
    )
    found = by_unit(calibrate(privacy, TrainingSettings(rounds=2, critic_steps_per_round=20), 0.2), 64)
    assert found.patch < found.patient.upper <= 7.4  # the warm-up is in the patient's alone
    text = by_unit_text(found)
    assert f"{found.patch:.2f}" in text
    assert f"{found.patient.upper:.2f} for a patient" in text
    assert f"{found.patient_of_patches:.3g}" in text
    assert "NOT a guarantee for a patient" in text


def test_without_noise_every_unit_pays_without_bound():
    found = by_unit(plan(noise=0.0), 8)
    assert found.patch == found.patient_of_patches == found.patient.upper == math.inf


def test_a_patient_without_patches_is_refused():
    with pytest.raises(ValueError, match="at least one patch"):
        by_unit(plan(), 0)
