from dataclasses import replace

import numpy as np
import pytest

from client.cohort import Cohort, commit_split
from client.randomness import SecureStream
from client.scoring.utility import answer
from common.errors import PolicyRefusal
from common.measure.dice_sums import noise_variance
from common.measure.segmentation import dice_per_patient, train_segmenter
from common.protocol.messages import LedgerHead, SegmenterSource, UtilityOrder
from tests.tiny_studies import tiny_study

HEAD = LedgerHead(rows=7, hash="e" * 64)

STUDY = tiny_study(
    labels={1: "box"},
    grid={"shape": (8, 8, 8)},
    privacy={"target_epsilon": 3.0, "delta": 1e-4, "reference_patients": 10, "epsilon_cap": 8.0},
    utility={"epsilon_per_answer": 2.0},
)


def boxes(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    pairs = np.zeros((count, 2, 8, 8, 8), dtype=np.float32)
    for pair in pairs:
        i, j, k = rng.integers(1, 4, 3)
        pair[1, i : i + 4, j : j + 4, k : k + 4] = 1
        pair[0] = 1.2 * pair[1] - 0.6 + rng.normal(0, 0.1, (8, 8, 8))
    return pairs


@pytest.fixture(scope="module")
def segmenter():
    return train_segmenter(boxes(0, 8), labels=1, steps=15, seed=0)


@pytest.fixture(scope="module")
def cohort():
    """Three members; two held-out patients, the first with three scans."""
    patients = {"m1": boxes(1, 1), "m2": boxes(2, 2), "m3": boxes(3, 1), "n1": boxes(4, 3), "n2": boxes(5, 1)}
    split = commit_split(["m1", "m2", "m3"], ["n1", "n2"], SecureStream.from_seed(0))
    return Cohort.from_patients(patients, split)


def order(source: SegmenterSource, segmenter=None) -> UtilityOrder:
    return UtilityOrder(study_digest="d", source=source, segmenter=segmenter, training_steps=5, seed=1)


def ask(the_order: UtilityOrder, cohort: Cohort, *, research: bool = False, seed: int = 9):
    stream = SecureStream.from_seed(seed)
    return answer(the_order, cohort=cohort, study=STUDY, research_answers=research, stream=stream, ledger_head=HEAD)


def exact_truth(segmenter, cohort) -> float:
    return sum(dice_per_patient(segmenter, cohort.scans(p), labels=1).mean() for p in cohort.nonmembers)


def test_answers_centre_on_the_truth_with_the_noise_that_was_paid_for(segmenter, cohort):
    """Fails when the noise is left out, scaled wrongly, or put on members instead of held-out patients."""
    replies = [ask(order(SegmenterSource.SYNTHETIC, segmenter), cohort, seed=s) for s in range(60)]
    counts = np.array([r.patients for r in replies]) - 2
    centred = np.array([r.dice_sum[0] - 0.5 * r.patients for r in replies]) - (exact_truth(segmenter, cohort) - 1)
    noise, stated = np.concatenate([counts, centred]), noise_variance(1, 2.0)
    assert abs(counts.mean()) < 3 * np.sqrt(stated / 60)
    assert abs(centred.mean()) < 3 * np.sqrt(stated / 60)
    # The mean size of Laplace noise is its scale; its variance, with these tails, would need thousands of answers.
    assert 2 / 3 < np.abs(noise).mean() / np.sqrt(stated / 2) < 3 / 2


def test_a_noised_answer_states_its_cost_and_that_it_is_not_exact(segmenter, cohort):
    reply = ask(order(SegmenterSource.PHANTOM, segmenter), cohort)
    assert (reply.exact, reply.epsilon, reply.source) == (False, 2.0, SegmenterSource.PHANTOM)


def test_a_patient_with_many_scans_counts_once(cohort):
    reply = ask(order(SegmenterSource.REAL), cohort, research=True)
    assert reply.patients == 2
    assert 0 <= reply.dice_sum[0] <= 2


def test_noise_comes_from_the_sites_own_stream(segmenter, cohort):
    the_order = order(SegmenterSource.SYNTHETIC, segmenter)
    assert ask(the_order, cohort, seed=1).patients == ask(the_order, cohort, seed=1).patients
    assert ask(the_order, cohort, seed=1).patients != ask(the_order, cohort, seed=2).patients


def test_an_exact_answer_has_no_epsilon(cohort):
    reply = ask(order(SegmenterSource.REAL), cohort, research=True)
    assert (reply.exact, reply.epsilon) == (True, None)


def test_an_exact_answer_is_refused_outside_research(cohort):
    with pytest.raises(PolicyRefusal, match="no privacy"):
        ask(order(SegmenterSource.REAL), cohort)


def test_an_exact_answer_never_uses_a_segmenter_that_was_sent_along(segmenter, cohort):
    """Otherwise a coordinator could have any model of its choice scored exactly."""
    sent = replace(order(SegmenterSource.REAL), segmenter=segmenter)
    assert ask(sent, cohort, research=True) == ask(order(SegmenterSource.REAL), cohort, research=True)


def test_an_order_without_a_segmenter_is_refused(cohort):
    with pytest.raises(PolicyRefusal, match="carries none"):
        ask(order(SegmenterSource.SYNTHETIC), cohort)


def test_a_segmenter_for_other_labels_is_refused(cohort):
    two_labels = train_segmenter(np.zeros((1, 3, 8, 8, 8), dtype=np.float32), labels=2, steps=0, seed=0)
    with pytest.raises(PolicyRefusal, match="does not fit"):
        ask(order(SegmenterSource.SYNTHETIC, two_labels), cohort)


def test_a_site_without_held_out_patients_still_answers_with_noise(segmenter, cohort):
    """An answer of exactly zero, or none, would say that nobody was held out."""
    members = {p: cohort.scans(p) for p in cohort.members}
    nobody = Cohort.from_patients(members, commit_split(cohort.members, [], SecureStream.from_seed(0)))
    assert ask(order(SegmenterSource.SYNTHETIC, segmenter), nobody).patients != 0
