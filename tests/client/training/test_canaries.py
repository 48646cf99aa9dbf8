"""Canaries: what they are, that they go the patients' way, that they change nothing for patients, and what is kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from canary_trainer import NOBODY
from hypothesis import given, settings
from hypothesis import strategies as st

from client.cohort import Cohort, commit_split, poisson_draw
from client.randomness import SecureStream
from client.training.canaries import CANARY_NORMS, HEARD, Canaries, canaries_of, coins, guesses, heard_of
from client.training.clipping.engine import PatientClipper
from client.training.clipping.part import Given
from client.training.loop import draw_units, train_round
from client.training.state import GameState
from common.errors import IntegrityError, SettingsError
from common.generator.network import build_generator, weights_of
from common.measure.one_run import GUESS_RULES
from common.privacy.mechanism import Plan
from common.settings.study import Study
from common.telemetry.events import ignore
from tests.tiny_studies import tiny_plan, tiny_study

CPU = torch.device("cpu")
STUDY = tiny_study(
    privacy={"sampling_probability": 0.5, "reference_patients": 10},
    training={"rounds": 2, "critic_steps_per_round": 3, "critic_steps_per_generator_step": 1},
    audit={"canaries": 60},
)


def secret(key: int = 8) -> SecureStream:
    return SecureStream.from_seed(key, "canaries")


def flock(count: int = 20, parameters: int = 97, key: int = 8) -> Canaries:
    return Canaries.make(count, parameters=parameters, clip_norm=0.5, stream=secret(key))


def cohort(members: int = 6) -> Cohort:
    rng = np.random.default_rng(0)
    names = [f"p{i:02d}" for i in range(members)]
    patients = {n: rng.uniform(-1, 1, (1, 2, 16, 16, 16)).astype(np.float16) for n in names}
    return Cohort.from_patients(patients, commit_split(names, [], SecureStream.from_seed(0)))


def one_round(state: GameState, key: int, *, study: Study = STUDY, plan: Plan | None = None) -> GameState:
    return train_round(
        study=study,
        plan=plan or tiny_plan(study, noise=1.0),
        weights=weights_of(build_generator(study)),
        state=state,
        cohort=cohort(),
        stream=SecureStream.from_seed(key, "round"),
        observer=ignore,
        canaries=canaries_of(study, state.critic, secret()),
    )[1]


# --- what they are ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(parameters=st.integers(1, 300), share=st.floats(0, 1))
def test_directions_are_at_right_angles_for_any_number_of_parameters(parameters: int, share: float) -> None:
    count = max(1, int(share * parameters))
    rows = flock(count, parameters).gradients(range(count), CPU).double() / (CANARY_NORMS * 0.5)
    torch.testing.assert_close(rows @ rows.T, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_canary_hears_itself_in_clip_norms_and_nobody_else() -> None:
    canaries = flock()
    heard = canaries.hear(canaries.gradients([3], CPU)[0])
    assert heard[3] == pytest.approx(CANARY_NORMS, rel=1e-6)
    assert heard[torch.arange(20) != 3].abs().max() < 1e-5


def test_a_direction_is_spread_over_all_parameters() -> None:
    """One that lay in few parameters would be disturbed by patients who use just those."""
    rows = flock(50, 2000).gradients(range(50), CPU)
    assert rows.abs().max() < 2 * CANARY_NORMS * 0.5 / 2000**0.5


def test_the_same_secret_gives_the_same_canaries_and_another_does_not() -> None:
    first, again, other = flock(), flock(), flock(key=9)
    assert torch.equal(first.gradients([0, 5], CPU), again.gradients([0, 5], CPU))
    assert list(first.inside) == list(again.inside) == list(coins(20, secret()))
    assert not torch.allclose(first.gradients([0], CPU), other.gradients([0], CPU))
    assert list(flock(200, 400).inside) != list(flock(200, 400, key=9).inside)


def test_coins_are_fair() -> None:
    assert coins(20_000, secret()).mean() == pytest.approx(0.5, abs=0.015)


def test_more_canaries_than_parameters_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"audit\.canaries: 98 canaries .* 97 parameters"):
        flock(98, 97)


# --- the patients' way ------------------------------------------------------------------------------------------------


def test_a_canary_is_clipped_like_a_patient() -> None:
    canaries, clipper = flock(), PatientClipper(torch.nn.Linear(97, 1, bias=False))
    total = clipper.clipped_sum([], Given(gradients=canaries.gradients([1, 4], CPU), clip_norm=0.5))
    heard = canaries.hear(total)
    assert heard[[1, 4]] == pytest.approx([1.0, 1.0], rel=1e-6)
    assert total.norm() == pytest.approx(0.5 * 2**0.5, rel=1e-6)


def test_a_given_gradient_that_is_short_stays_as_it_is_and_one_that_is_not_finite_counts_as_nothing() -> None:
    rows = torch.zeros(3, 97)
    rows[0, 0], rows[1, 1], rows[2, 2] = 0.1, torch.nan, torch.inf
    total = PatientClipper(torch.nn.Linear(97, 1, bias=False)).clipped_sum([], Given(gradients=rows, clip_norm=0.5))
    assert total[0] == pytest.approx(0.1)
    assert total[1:].abs().max() == 0


def test_nobody_drawn_adds_nothing() -> None:
    nothing = Given(gradients=flock().gradients([], CPU), clip_norm=0.5)
    assert nothing.gradients.shape == (0, 97)
    assert PatientClipper(torch.nn.Linear(97, 1, bias=False)).clipped_sum([], nothing).abs().max() == 0


def test_patients_and_canaries_come_from_one_draw_and_patients_are_drawn_as_without_canaries() -> None:
    the_cohort, takers = cohort(), (1, 5, 7)
    patients, numbers = draw_units(the_cohort, takers, SecureStream.from_seed(2), 0.5)
    units = poisson_draw([*the_cohort.members, *takers], SecureStream.from_seed(2), 0.5)
    assert [*patients, *numbers] == units
    assert patients == poisson_draw(the_cohort.members, SecureStream.from_seed(2), 0.5)


def test_only_canaries_that_take_part_are_ever_drawn() -> None:
    canaries, stream = flock(), SecureStream.from_seed(1)
    drawn = {n for _ in range(200) for n in draw_units(NOBODY, canaries.takers, stream, 0.2)[1]}
    assert drawn == set(np.flatnonzero(canaries.inside))


def test_canaries_change_neither_the_patients_part_of_a_step_nor_its_noise() -> None:
    """The step with canaries is the step without, plus what the drawn canaries add: nothing else moved."""
    everybody = {"sampling_probability": 1.0}
    gradients = []
    for study in (STUDY, STUDY.model_copy(update={"audit": STUDY.audit.model_copy(update={"canaries": 0})})):
        plan = tiny_plan(study, noise=1.0)
        plan = dataclasses.replace(
            plan,
            steps_per_round=1,
            mechanism=dataclasses.replace(plan.mechanism, steps=plan.rounds, **everybody),
        )
        state = GameState.start(study, None)
        one_round(state, 3, study=study, plan=plan)
        gradients.append(torch.cat([p.grad.flatten() for p in state.critic.parameters()]) * plan.divisor)
        canaries = canaries_of(STUDY, state.critic, secret())
        assert canaries is not None
    expected = canaries.gradients(canaries.takers, CPU).sum(dim=0) / CANARY_NORMS
    torch.testing.assert_close(gradients[0] - gradients[1], expected, rtol=0, atol=2e-3)  # the grid of the noise


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_what_was_heard_adds_up_over_rounds_and_a_restored_site_hears_the_same() -> None:
    first = one_round(GameState.start(STUDY, None), 1)
    kept = first.tensors()
    second = [one_round(GameState.restore(STUDY, kept), 2).heard for _ in range(2)]  # a round that is done again
    assert torch.equal(second[0], second[1])
    assert torch.equal(second[0], one_round(first, 2).heard)
    alone = one_round(GameState.restore(STUDY, {**kept, HEARD: torch.zeros_like(first.heard)}), 2).heard
    torch.testing.assert_close(second[0] - first.heard, alone)


def test_drawn_canaries_are_heard_through_a_whole_round() -> None:
    """Without noise, drawn in every step: each that takes part is heard once a step, beside what patients say."""
    plan = tiny_plan(STUDY, noise=0.0)
    plan = dataclasses.replace(plan, mechanism=dataclasses.replace(plan.mechanism, sampling_probability=1.0))
    state = one_round(GameState.start(STUDY, None), 1, plan=plan)
    inside = torch.from_numpy(coins(60, secret()))
    assert float(state.heard[inside].mean()) == pytest.approx(plan.steps_per_round, abs=0.5)
    assert abs(float(state.heard[~inside].mean())) < 0.5
    assert all(g.correct == g.guesses for g in guesses(state.heard, inside.numpy(), GUESS_RULES))


def test_a_round_with_other_canaries_than_the_study_says_is_refused() -> None:
    with pytest.raises(ValueError, match="the study has 60 canaries"):
        train_round(
            study=STUDY, plan=tiny_plan(STUDY, noise=1.0), weights=weights_of(build_generator(STUDY)),
            state=GameState.start(STUDY, None), cohort=cohort(), stream=SecureStream.from_seed(1), observer=ignore,
        )  # fmt: skip


@pytest.mark.parametrize("damage", ["missing", "short", "not finite"])
def test_a_state_that_lost_what_was_heard_is_refused(damage: str) -> None:
    kept = GameState.start(STUDY, None).tensors()
    match damage:
        case "missing":
            del kept[HEARD]
        case "short":
            kept[HEARD] = kept[HEARD][1:]
        case _:
            kept[HEARD][0] = torch.nan
    with pytest.raises(IntegrityError, match="heard of 60 canaries"):
        GameState.restore(STUDY, kept)
    with pytest.raises(IntegrityError, match="heard of 60 canaries"):
        heard_of(kept, 60)
