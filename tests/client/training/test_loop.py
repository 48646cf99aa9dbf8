"""A round of the game: what is drawn, what is noised, what is kept, and that it can be repeated bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from client.cohort import Cohort, commit_split, poisson_draw
from client.randomness import SecureStream
from client.training.clipping.memory import patients_within
from client.training.compute import CPU, Compute
from client.training.ladder import Ladder
from client.training.loop import gather_views, train_round
from client.training.state import GameState
from common.adversary.losses import fake_loss, real_loss
from common.adversary.steps import generator_step
from common.errors import IntegrityError
from common.generator.network import build_generator, weights_of
from common.privacy.mechanism import DpSgd, Plan
from common.settings.study import Lipschitz, Study
from common.telemetry.events import Event, ignore
from tests.tiny_studies import tiny_plan, tiny_study


def study_of(**training: object) -> Study:
    return tiny_study(
        privacy={"sampling_probability": 0.5, "reference_patients": 10},
        training={"rounds": 2, "critic_steps_per_round": 3, "critic_steps_per_generator_step": 1, **training},
    )


def plan(noise: float = 1.0) -> Plan:
    return tiny_plan(study_of(), noise=noise)


def tiny_cohort(members: int = 6, seed: int = 0, *, most_scans: int = 2) -> Cohort:
    rng = np.random.default_rng(seed)
    names = [f"p{i:02d}" for i in range(members + 2)]
    patients = {
        n: rng.uniform(-1, 1, (1 + i % most_scans, 2, 16, 16, 16)).astype(np.float16) for i, n in enumerate(names)
    }
    split = commit_split(names[:members], names[members:], SecureStream.from_seed(seed, "salt"))
    return Cohort.from_patients(patients, split)


def one_round(study: Study, the_plan: Plan, cohort: Cohort, key: int = 3) -> tuple[dict[str, torch.Tensor], str]:
    weights, state = train_round(
        study=study,
        plan=the_plan,
        weights=weights_of(build_generator(study)),
        state=GameState.start(study, None),
        cohort=cohort,
        stream=SecureStream.from_seed(key, "round", 1),
        observer=ignore,
    )
    return state.tensors(), weights.digest


def first_step_gradient(
    the_plan: Plan, cohort: Cohort, *, study: Study | None = None, key: int = 3, compute: Compute = CPU
) -> torch.Tensor:
    """(P,) what the critic's optimiser got in a round of a single step."""
    study = study or study_of(critic_steps_per_round=1)
    state = GameState.start(study, None)
    train_round(
        study=study,
        plan=dataclasses.replace(
            the_plan,
            steps_per_round=1,
            mechanism=dataclasses.replace(the_plan.mechanism, steps=the_plan.rounds),
        ),
        weights=weights_of(build_generator(study)),
        state=state,
        cohort=cohort,
        stream=SecureStream.from_seed(key, "round", 1),
        observer=ignore,
        compute=compute,
    )
    return torch.cat([p.grad.flatten() for p in state.critic.parameters()])


def clipped_gradients(study: Study, losses: list[torch.Tensor], critic: torch.nn.Module) -> torch.Tensor:
    """(B, P) by one backward pass a row, in the plainest way."""
    rows = []
    for loss in losses:
        row = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(critic.parameters()), retain_graph=True)])
        rows.append(row * min(1.0, study.privacy.clip_norm / float(row.double().norm())))
    return torch.stack(rows)


def critic_vector(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for n, t in sorted(tensors.items()) if n.startswith("critic.")])


def test_the_same_key_repeats_a_round_bit_for_bit_and_another_does_not() -> None:
    study, cohort = study_of(), tiny_cohort()
    first, again, other = (one_round(study, plan(), cohort, key) for key in (3, 3, 4))
    assert first[1] == again[1]
    assert all(torch.equal(first[0][n], again[0][n]) for n in first[0])
    assert first[1] != other[1]


def test_a_restored_state_continues_exactly_where_it_stopped() -> None:
    study, cohort = study_of(), tiny_cohort()
    weights, state = train_round(
        study=study, plan=plan(), weights=weights_of(build_generator(study)), state=GameState.start(study, None),
        cohort=cohort, stream=SecureStream.from_seed(1), observer=ignore,
    )  # fmt: skip
    kept = state.tensors()
    second = [
        train_round(
            study=study, plan=plan(), weights=weights, state=GameState.restore(study, kept),
            cohort=cohort, stream=SecureStream.from_seed(2), observer=ignore,
        )[0].digest
        for _ in range(2)
    ]  # fmt: skip
    straight = train_round(
        study=study, plan=plan(), weights=weights, state=state,
        cohort=cohort, stream=SecureStream.from_seed(2), observer=ignore,
    )[0].digest  # fmt: skip
    assert second == [straight, straight]


def test_a_step_is_the_clipped_sum_over_the_public_divisor_plus_the_mean_of_clipped_fakes() -> None:
    """The whole formula, by another way: neither the realised batch nor the cohort's size is in it."""
    study = study_of(critic_steps_per_round=1)
    cohort = tiny_cohort(members=5)  # the divisor is 0.5 * 10 patients, and all five are drawn
    everybody = dataclasses.replace(plan(0.0).mechanism, sampling_probability=1.0)
    found = first_step_gradient(dataclasses.replace(plan(0.0), mechanism=everybody), cohort, study=study)

    stream, critic = SecureStream.from_seed(3, "round", 1), GameState.start(study, None).critic
    generator = build_generator(study)
    n, size = study.training.fake_batch, study.training.latent_size
    latent = torch.from_numpy(stream.fork("latent").normal(n * size).reshape(n, size)).float()
    draws = stream.fork("draw")
    views = gather_views(cohort, poisson_draw(cohort.members, draws, 1.0), 1, draws)
    real = clipped_gradients(study, [real_loss(study.training.loss, critic(v)) for v in views], critic)
    fakes = generator(latent).detach()
    fake = clipped_gradients(study, [fake_loss(study.training.loss, critic(f[None])) for f in fakes], critic)
    expected = real.sum(dim=0) / 5.0 + fake.mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("probability", [1e-9, 1.0], ids=["nobody drawn", "everybody drawn"])
def test_noise_of_the_planned_scale_is_added_once_whoever_was_drawn(probability: float) -> None:
    study = study_of(critic_steps_per_round=1, critic_width=8)  # many parameters: a standard deviation to read
    cohort = tiny_cohort()
    plans = [
        dataclasses.replace(p, mechanism=dataclasses.replace(p.mechanism, sampling_probability=probability))
        for p in (plan(3.0), plan(0.0))
    ]
    noisy, plain = (first_step_gradient(p, cohort, study=study) for p in plans)
    noise = (noisy - plain) * plans[0].divisor
    assert noise.std() == pytest.approx(3.0 * study.privacy.clip_norm, rel=0.03)


def test_a_patient_whose_gradient_is_not_finite_counts_as_nothing() -> None:
    """An error or a NaN would tell the outside who was drawn."""
    cohort = tiny_cohort(members=4, most_scans=1)  # the only view is then the scan itself
    broken = {p: cohort.scans(p).copy() for p in cohort.patients}
    broken[cohort.members[1]][:] = np.inf
    spoilt = Cohort.from_patients(broken, cohort.split)
    without = Cohort.from_patients(
        {p: s for p, s in broken.items() if p != cohort.members[1]},
        commit_split(
            [m for m in cohort.members if m != cohort.members[1]], cohort.nonmembers, SecureStream.from_seed(0, "salt")
        ),
    )
    everybody = dataclasses.replace(plan(0.0).mechanism, sampling_probability=1.0)
    the_plan = dataclasses.replace(plan(0.0), mechanism=everybody)
    found, expected = first_step_gradient(the_plan, spoilt), first_step_gradient(the_plan, without)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_draw_that_does_not_fit_the_memory_is_worked_on_in_parts() -> None:
    """A draw that failed for its size would tell the coordinator how many were drawn."""
    study, cohort = study_of(critic_steps_per_round=1), tiny_cohort(members=12)
    critic = GameState.start(study, None).critic
    assert patients_within(critic, cohort.pair_shape, views=1, limit_bytes=2**20) < study.training.fake_batch + 12
    everybody = dataclasses.replace(plan(0.0).mechanism, sampling_probability=1.0)
    the_plan = dataclasses.replace(plan(0.0), mechanism=everybody)
    whole = first_step_gradient(the_plan, cohort)
    parts = first_step_gradient(the_plan, cohort, compute=Compute(memory_mib=1))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_an_adaptive_pace_takes_more_critic_steps_and_is_kept_between_rounds() -> None:
    study = study_of(critic_steps_per_generator_step="adaptive", critic_steps_per_round=3, loss="hinge")
    high = GameState.start(study, None)
    climbed = dataclasses.replace(high, ladder=Ladder(rung=2), critic_steps=1)  # five critic steps, one is done
    kept = GameState.restore(study, climbed.tensors())
    assert (kept.ladder, kept.critic_steps) == (climbed.ladder, 1)
    weights = weights_of(build_generator(study))
    after, state = train_round(
        study=study, plan=plan(), weights=weights, state=kept, cohort=tiny_cohort(),
        stream=SecureStream.from_seed(1), observer=ignore,
    )  # fmt: skip
    assert after.digest == weights.digest  # three more steps make four: the generator waits
    assert state.critic_steps == 4


def test_the_planned_noise_reaches_the_critic() -> None:
    """The mutant without noise gives the critic that this test compares with."""
    study, cohort = study_of(), tiny_cohort()
    noised = critic_vector(one_round(study, plan(5.0), cohort)[0])
    quiet = critic_vector(one_round(study, plan(0.0), cohort)[0])
    assert not torch.allclose(noised, quiet, atol=1e-4)


def test_patients_reach_the_generator_only_through_the_noised_gradient() -> None:
    """With nobody drawn, two different cohorts leave the same critic and the same generator."""
    study = study_of()
    never = dataclasses.replace(plan(), mechanism=DpSgd(noise_multiplier=1.0, sampling_probability=1e-12, steps=6))
    assert one_round(study, never, tiny_cohort(seed=0))[1] == one_round(study, never, tiny_cohort(seed=1))[1]


def test_the_generator_learns_from_the_noised_critic_alone() -> None:
    """Done again by hand with the critic that the round left: any other copy of it gives another generator."""
    study = study_of(critic_steps_per_round=1)
    the_plan = dataclasses.replace(
        plan(5.0), steps_per_round=1, mechanism=dataclasses.replace(plan(5.0).mechanism, steps=plan().rounds)
    )
    state = GameState.start(study, None)
    found, state = train_round(
        study=study, plan=the_plan, weights=weights_of(build_generator(study)), state=state, cohort=tiny_cohort(),
        stream=SecureStream.from_seed(3, "round", 1), observer=ignore,
    )  # fmt: skip

    fakes, again = SecureStream.from_seed(3, "round", 1).fork("latent"), GameState.start(study, None)
    n, size = study.training.fake_batch, study.training.latent_size
    fakes.normal(n * size)  # the critic's
    latent = torch.from_numpy(fakes.normal(n * size).reshape(n, size)).float()
    generator_step(again.generator, state.critic, again.generator_optimiser, study.training.loss, latent)
    assert weights_of(again.generator).digest == found.digest


def test_every_critic_step_draws_its_own_patients() -> None:
    cohort, stream = tiny_cohort(members=40), SecureStream.from_seed(0, "draw")
    draws = [tuple(poisson_draw(cohort.members, stream, 0.5)) for _ in range(4)]
    assert len(set(draws)) == 4


def test_held_out_patients_are_never_gathered() -> None:
    cohort = tiny_cohort()
    drawn = poisson_draw(cohort.members, SecureStream.from_seed(0), 1.0)
    assert sorted(drawn) == sorted(cohort.members)
    assert not set(drawn) & set(cohort.nonmembers)


def test_views_are_scans_of_the_patient_and_the_first_is_unmoved() -> None:
    cohort = tiny_cohort()
    views = gather_views(cohort, ["p00"], 3, SecureStream.from_seed(0))
    assert views.shape == (1, 3, 2, 16, 16, 16)
    assert torch.equal(views[0, 0], torch.from_numpy(cohort.scans("p00")[0].astype(np.float32)))


@pytest.mark.parametrize("control", list(Lipschitz))
def test_every_lipschitz_control_keeps_its_bound(control: Lipschitz) -> None:
    study = study_of(lipschitz=control)
    tensors = one_round(study, plan(), tiny_cohort())[0]
    matrices = [t.flatten(1) for n, t in tensors.items() if n.startswith("critic.") and t.ndim > 1]
    assert critic_vector(tensors).isfinite().all()
    if control is Lipschitz.PROJECTION:
        assert max(torch.linalg.matrix_norm(m, 2).item() for m in matrices) <= 1 + 1e-5
    if control is Lipschitz.CLAMP:
        assert critic_vector(tensors).abs().max() <= 0.01 + 1e-7


def test_paper_mode_uses_rmsprop_and_still_a_fresh_draw_each_step() -> None:
    study = study_of(mode="paper", lipschitz="clamp")
    state = GameState.start(study, None)
    assert type(state.critic_optimiser).__name__ == "RMSprop"
    assert one_round(study, plan(), tiny_cohort())[1]


def test_progress_counts_critic_steps_and_nothing_else() -> None:
    seen: list[Event] = []
    study = study_of()
    train_round(
        study=study, plan=plan(), weights=weights_of(build_generator(study)), state=GameState.start(study, None),
        cohort=tiny_cohort(), stream=SecureStream.from_seed(1), observer=seen.append, task="round 1",
    )  # fmt: skip
    assert [(e.task, e.done, e.total) for e in seen] == [("round 1", i, 3) for i in (1, 2, 3)]  # type: ignore[union-attr]


def test_another_studys_critic_is_refused() -> None:
    kept = GameState.start(study_of(), None).tensors()
    with pytest.raises(IntegrityError, match="does not fit this study"):
        GameState.restore(study_of(critic_width=4), kept)
