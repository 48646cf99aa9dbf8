"""What a site answers about the generator of one round: the noise that was paid for, and the truth only in research."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from client.cohort import Cohort, commit_split
from client.randomness import SecureStream
from client.scoring.course import Held, answer, on_grid
from client.training.state import GameState
from common.errors import PolicyRefusal
from common.generator.network import build_generator, weights_of
from common.generator.weights import Weights
from common.measure.dice_sums import noise_variance
from common.measure.fidelity.encoder import Encoder, train_encoder
from common.measure.segmentation import dice, labels_of, segment, train_segmenter
from common.measure.surface_distance import hd95_mm
from common.phantom.draw import public_phantoms
from common.protocol.manifest import objections
from common.protocol.messages import CourseOrder, CourseReply, FidelityMeasure, LedgerHead
from common.settings.study import Study
from tests.tiny_studies import tiny_study

HEAD = LedgerHead(rows=7, hash="e" * 64)
STUDY = tiny_study(audit={"volumes": 16}, course={"every_rounds": 1, "volumes": 16, "answers": "exact"})
GENERATOR = weights_of(build_generator(STUDY))


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    """Twelve members and eight held-out patients, the first of them with two scans."""
    scans = public_phantoms(STUDY, 1, 21)
    patients = {f"p{i:02d}": scans[i : i + 1] for i in range(20)}
    patients["p12"] = scans[[12, 20]]
    names = sorted(patients)
    return Cohort.from_patients(patients, commit_split(names[:12], names[12:], SecureStream.from_seed(0)))


@pytest.fixture(scope="module")
def segmenter() -> Weights:
    return train_segmenter(public_phantoms(STUDY, 2, 8), labels=1, steps=10, seed=0)


def order(segmenter: Weights, **changes: object) -> CourseOrder:
    facts = {
        "study_digest": "5" * 64,
        "round": 1,
        "weights": GENERATOR,
        "weights_digest": GENERATOR.digest,
        "segmenter": segmenter,
        "seed": 3,
        "volumes": 16,
        "training_steps": 10,
        "epsilon": 2.0,
    }
    return CourseOrder(**{**facts, **changes})


def held(cohort: Cohort, *, seed: int = 9, critic=None) -> Held:
    return Held(
        study=STUDY,
        cohort=cohort,
        public_generator=GENERATOR,
        critic=critic,
        stream=SecureStream.from_seed(seed),
        device="cpu",
        encoder=quick_encoder,
    )


def quick_encoder(study: Study) -> Encoder:
    """Features that tell little, in no time; how good the declared ones are is tested beside them."""
    phantoms = public_phantoms(study, 5, 16).astype(np.float32)
    return train_encoder(phantoms, name="quick", steps=2, seed=0)


def ask(the_order: CourseOrder, cohort: Cohort, *, research: bool = False, seed: int = 9, critic=None) -> CourseReply:
    reply = answer(the_order, held(cohort, seed=seed, critic=critic), research_answers=research, ledger_head=HEAD)
    assert objections(reply, order=the_order, shapes={}, labels=1) == []
    return reply


def truth(segmenter: Weights, cohort: Cohort) -> tuple[float, float]:
    """Sums over the held-out patients of Dice and of the distance of borders, one patient at a time."""
    overlap = distance = 0.0
    for patient in cohort.nonmembers:
        scans = cohort.scans(patient)
        found, real = segment(segmenter, scans[:, 0], labels=1), labels_of(scans)
        overlap += float(dice(found, real, labels=1).mean())
        distance += float(np.mean([hd95_mm(f == 1, r == 1, (1.0, 1.0, 1.0)) for f, r in zip(found, real, strict=True)]))
    return overlap, distance


def test_a_priced_answer_centres_on_the_truth_with_the_noise_that_was_paid_for(cohort, segmenter):
    """Fails when the noise is left out, scaled wrongly, or put on members instead of held-out patients."""
    replies = [ask(order(segmenter), cohort, seed=s) for s in range(60)]
    counts = np.array([r.patients for r in replies]) - 8
    overlap = truth(segmenter, cohort)[0]
    centred = np.array([r.dice_sum[0] - 0.5 * r.patients for r in replies]) - (overlap - 4)
    noise, stated = np.concatenate([counts, centred]), noise_variance(1, 2.0)
    assert abs(counts.mean()) < 3 * np.sqrt(stated / 60)
    assert abs(centred.mean()) < 3 * np.sqrt(stated / 60)
    assert 2 / 3 < np.abs(noise).mean() / np.sqrt(stated / 2) < 3 / 2


def test_a_priced_answer_depends_on_no_member(cohort, segmenter):
    """Members pay nothing for it: with other members, and none at all, it is the same to the last bit."""
    names = cohort.nonmembers
    others = {p: cohort.scans(p) for p in names} | {"q1": np.ones((1, 2, 16, 16, 16), np.float32)}
    changed = Cohort.from_patients(others, commit_split(["q1"], names, SecureStream.from_seed(1)))
    nobody = {p: cohort.scans(p) for p in names}
    emptied = Cohort.from_patients(nobody, commit_split([], names, SecureStream.from_seed(1)))
    assert ask(order(segmenter), changed) == ask(order(segmenter), cohort) == ask(order(segmenter), emptied)


def test_a_priced_answer_says_nothing_exact_even_where_research_is_allowed(cohort, segmenter):
    assert ask(order(segmenter), cohort, research=True).exact is None


def test_an_exact_answer_is_refused_where_research_is_not_allowed(cohort, segmenter):
    with pytest.raises(PolicyRefusal, match="research_answers"):
        ask(order(segmenter, epsilon=None), cohort)


def test_a_segmenter_of_another_study_is_refused(cohort):
    with pytest.raises(PolicyRefusal, match="does not fit"):
        ask(order(GENERATOR), cohort)


@pytest.fixture(scope="module")
def exact(cohort, segmenter) -> CourseReply:
    critic = GameState.start(STUDY, None).tensors()
    return ask(order(segmenter, epsilon=None), cohort, research=True, critic=critic)


def test_an_exact_answer_is_the_truth(exact, cohort, segmenter):
    overlap, distance = truth(segmenter, cohort)
    assert exact.exact is not None
    assert (exact.patients, exact.exact.members, exact.exact.nonmembers) == (8.0, 12, 8)
    assert exact.dice_sum[0] == pytest.approx(overlap, abs=8 / 1024)
    assert exact.exact.hd95_sum_mm == (on_grid(distance),)


def test_an_exact_answer_measures_everything_and_attacks_with_a_control(exact):
    facts = exact.exact
    assert [a.measure for a in facts.fidelity] == list(FidelityMeasure)
    assert all(a.value is not None for a in facts.fidelity if a.measure is not FidelityMeasure.RADIOMICS_CORRELATION)
    for attack in (facts.critic, facts.critic_control):
        assert 0 <= attack.auc <= 1
        assert attack.deviation > 0


def test_a_critic_that_knows_its_members_is_seen_and_the_control_is_not(cohort, segmenter):
    """The attack is white box: a critic made to score members higher separates them, and random halves stay alike."""
    state = GameState.start(STUDY, None)
    members = torch.from_numpy(np.concatenate([cohort.scans(p) for p in cohort.members]).astype(np.float32))
    others = torch.from_numpy(np.concatenate([cohort.scans(p) for p in cohort.nonmembers]).astype(np.float32))
    optimiser = torch.optim.Adam(state.critic.parameters(), lr=1e-2)
    for _ in range(60):
        loss = state.critic(others).mean() - state.critic(members).mean()
        loss = loss + 0.1 * torch.cat([state.critic(others), state.critic(members)]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    facts = ask(order(segmenter, epsilon=None), cohort, research=True, critic=state.tensors()).exact
    assert facts.critic.auc > 0.9
    assert abs(facts.critic_control.auc - 0.5) < 3 * facts.critic_control.deviation


def test_a_generator_that_gives_one_volume_has_no_score_and_not_a_good_one(cohort, segmenter):
    """Nothing measured must not look like nothing leaked."""
    silent = Weights({name: np.zeros_like(array) for name, array in GENERATOR.arrays.items()})
    reply = ask(
        order(segmenter, epsilon=None, weights=silent, weights_digest=silent.digest), cohort, research=True, critic=None
    )
    assert reply.exact.generator is None
    assert reply.exact.generator_control is None
    assert reply.exact.critic is None  # before training there is none


def test_two_answers_never_share_their_noise(cohort, segmenter):
    stream = SecureStream.from_seed(4)
    both = [
        answer(order(segmenter), replace(held(cohort), stream=stream), research_answers=False, ledger_head=HEAD)
        for _ in range(2)
    ]
    assert both[0].dice_sum != both[1].dice_sum
