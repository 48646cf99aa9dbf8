"""Trainers that do not keep their promise, at toy size: each is a VIOLATION, or fails a test that is named here.

noise off, noise of half the size, clipping skipped, clipping after averaging, a batch used again: VIOLATION below.
shuffled batches instead of Poisson draws: what is heard in total has the same mean and less spread, so that no bound
of these can see it; `test_sampling_that_is_no_poisson_draw_...` below and `tests/client/test_cohort.py` fail for it.
a generator trained through a critic that was not noised: `test_the_generator_learns_from_the_noised_critic_alone`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from canary_trainer import NOBODY, Reused, Sampler, Shuffled, clipped_after_averaging, plan_of_toy, toy_training

from client.cohort import Cohort, commit_split
from client.randomness import SecureStream
from client.training.canaries import canaries_of, guesses
from client.training.loop import draw_units, train_round
from client.training.state import GameState
from common.generator.network import build_generator, weights_of
from common.measure.one_run import GUESS_RULES, Guesses
from common.privacy.mechanism import Plan
from common.telemetry.events import ignore
from server.audit.mechanism import judge_mechanism
from server.audit.result import MechanismAudit, MechanismVerdict
from tests.tiny_studies import tiny_plan, tiny_study

SAMPLED = plan_of_toy(noise=3.0, probability=0.5, steps=8)  # epsilon 2.1
WHOLE = plan_of_toy(noise=2.0, probability=1.0, steps=1)  # epsilon 2.0, its curve exactly that of a Gaussian
LONG = plan_of_toy(noise=4.0, probability=0.2, steps=160)  # epsilon 2.7


def verdict(plan: Plan, canaries: int, totals: tuple[Guesses, ...]) -> MechanismAudit:
    return judge_mechanism(plan, canaries, {"toy": totals}, {}, confidence=0.95)


MUTANTS: dict[str, tuple[Plan, int, dict[str, Any]]] = {
    "noise off": (SAMPLED, 1000, {"noise": 1e-9}),
    "half the noise": (WHOLE, 4096, {"noise": 1.0}),
    "clipping skipped": (SAMPLED, 1000, {"clip_norm": 1e9}),
    "clipped after averaging": (SAMPLED, 1000, {"total": clipped_after_averaging}),
    "batch used again": (LONG, 2048, {"sampler": Reused}),
}


@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_a_trainer_that_breaks_its_promise_is_a_violation(mutant: str) -> None:
    plan, canaries, changes = MUTANTS[mutant]
    for seed in range(2):
        found = verdict(plan, canaries, toy_training(plan, canaries=canaries, seed=seed, **changes))
        assert found.verdict is MechanismVerdict.VIOLATION
        assert found.reasons


@pytest.mark.parametrize(("plan", "canaries"), [(SAMPLED, 1000), (WHOLE, 4096), (LONG, 2048)])
def test_the_faithful_trainer_is_consistent_at_the_mutants_sizes(plan: Plan, canaries: int) -> None:
    for seed in range(2):
        assert verdict(plan, canaries, toy_training(plan, canaries=canaries, seed=seed)).reasons == ()


@pytest.mark.slow
def test_a_faithful_trainer_is_never_a_violation() -> None:
    plan = plan_of_toy(noise=3.0, probability=0.5, steps=4)
    found = [verdict(plan, 256, toy_training(plan, canaries=256, seed=seed)) for seed in range(500)]
    assert [f for f in found if f.verdict is MechanismVerdict.VIOLATION] == []


# --- the whole round --------------------------------------------------------------------------------------------------

STUDY = tiny_study(
    privacy={"sampling_probability": 0.5, "reference_patients": 10, "clip_norm": 1.0, "delta": 1e-5},
    training={"rounds": 1, "critic_steps_per_round": 24, "critic_steps_per_generator_step": 8},
    audit={"canaries": 300},
)
PROMISED = tiny_plan(STUDY, noise=5.0)


def trained(plan: Plan) -> MechanismAudit:
    """A round of the real loop under `plan`, with six patients, judged by what was promised."""
    rng = np.random.default_rng(0)
    names = [f"p{i}" for i in range(6)]
    patients = {n: rng.uniform(-1, 1, (1, 2, 16, 16, 16)).astype(np.float16) for n in names}
    state = GameState.start(STUDY, None)
    canaries = canaries_of(STUDY, state.critic, SecureStream.from_seed(4, "canaries"))
    assert canaries is not None
    _, state = train_round(
        study=STUDY,
        plan=plan,
        weights=weights_of(build_generator(STUDY)),
        state=state,
        cohort=Cohort.from_patients(patients, commit_split(names, [], SecureStream.from_seed(0))),
        stream=SecureStream.from_seed(4, "round"),
        observer=ignore,
        canaries=canaries,
    )
    return verdict(PROMISED, 300, guesses(state.heard, canaries.inside, GUESS_RULES))


def with_noise(multiplier: float, clip_norm: float = 1.0) -> Plan:
    mechanism = dataclasses.replace(PROMISED.mechanism, noise_multiplier=multiplier)
    target = PROMISED.target_epsilon if multiplier else None
    return dataclasses.replace(PROMISED, mechanism=mechanism, clip_norm=clip_norm, target_epsilon=target)


def test_a_round_as_promised_is_consistent() -> None:
    assert trained(PROMISED).verdict is MechanismVerdict.CONSISTENT


@pytest.mark.parametrize(
    "plan", [with_noise(0.0), with_noise(5.0 / 1e6, clip_norm=1e6)], ids=["noise off", "clipping skipped"]
)
def test_a_round_that_breaks_its_promise_is_a_violation(plan: Plan) -> None:
    assert trained(plan).verdict is MechanismVerdict.VIOLATION


# --- sampling ---------------------------------------------------------------------------------------------------------


def draws_look_poisson(sampler: Sampler) -> bool:
    """Sizes of draws vary like a binomial, and one draw says nothing about the next."""
    takers, probability, steps = range(400), 0.25, 200
    taken = np.zeros((steps, 400))
    for step in range(steps):
        taken[step, draw_units(NOBODY, takers, sampler, probability)[1]] = 1.0
    spread = taken.sum(axis=1).var() / (400 * probability * (1 - probability))
    again = (taken[1:] * taken[:-1]).mean() / probability**2
    return 0.6 < spread < 1.6 and 0.95 < again < 1.05


def test_sampling_that_is_no_poisson_draw_is_told_from_one() -> None:
    stream = SecureStream.from_seed(6)
    assert draws_look_poisson(stream)
    assert not draws_look_poisson(Shuffled(stream))
    assert not draws_look_poisson(Reused(stream))
