import dataclasses

import numpy as np
import pytest
import torch

from client.cohort import Cohort, Split
from client.randomness import SecureStream
from client.scoring.score import public_suite, score_site
from common.attacks.patient import count, score_patient
from common.attacks.suite import Material, Suite, build_suite
from common.errors import PolicyRefusal
from common.measure.audit_plan import AuditPlan, Endpoint, EndpointPlan, Group
from common.telemetry.events import ignore
from tests.stored_pairs import Stored, noise_pairs
from tests.tiny_studies import tiny_audit_plan

PLAN = tiny_audit_plan(volumes=12, calibration_volumes=10, planted_fraction=0.5)
GENERATOR, REFERENCE = Stored(noise_pairs(1, 200)), Stored(noise_pairs(2, 200))


def suite(generator: Stored = GENERATOR, reference: Stored = REFERENCE) -> Suite:
    candidate, start = (
        Material.drawn(module, seed=7, count=count, fresh=PLAN.calibration_volumes)
        for module, count in ((generator, PLAN.volumes), (reference, PLAN.reference_volumes))
    )
    return build_suite(candidate=candidate, start=start, plan=PLAN)


def cohort(members: int, nonmembers: int, *, without: str | None = None, changed: str | None = None) -> Cohort:
    names = {f"m{i:02}": (1 + i % 3, 100 + i) for i in range(members)}
    names |= {f"n{i:02}": (1 + i % 3, 500 + i) for i in range(nonmembers)}
    names.pop(without, None)
    scans = {p: noise_pairs(seed + (10_000 if p == changed else 0), n) for p, (n, seed) in names.items()}
    split = Split(
        members=tuple(p for p in sorted(scans) if p[0] == "m"),
        nonmembers=tuple(p for p in sorted(scans) if p[0] == "n"),
        commitment="",
        salts={p: bytes(32) for p in scans},
    )
    return Cohort.from_patients(scans, split)


def answer(who: Cohort, stream: SecureStream, plan: AuditPlan = PLAN) -> dict[tuple[str, str], np.ndarray]:
    histograms = score_site(
        cohort=who,
        suite=public_suite(generator=GENERATOR, reference=REFERENCE, plan=plan, seed=7),
        plan=plan,
        stream=stream,
        observer=ignore,
    ).histograms
    return {(h.endpoint, h.group): np.array(h.counts) for h in histograms}


@pytest.mark.parametrize("patient", ["m03", "n02", "n05"])
def test_one_patient_changes_one_count_by_one_in_each_answer_that_is_charged(patient):
    # Equal stream seeds give equal noise and equal coins, so what differs is the exact count.
    full = answer(cohort(6, 6), SecureStream.from_seed(1))
    less = answer(cohort(6, 6, without=patient), SecureStream.from_seed(1))
    for endpoint in PLAN.answers:
        main = np.concatenate([full[endpoint, g] - less[endpoint, g] for g in Group if g is not Group.PLANTED])
        assert sorted(main[main != 0]) == [1]
        if Group.PLANTED not in PLAN.answers[endpoint].groups:
            continue
        planted = full[endpoint, Group.PLANTED] - less[endpoint, Group.PLANTED]
        assert sorted(planted[planted != 0]) == ([] if patient.startswith("m") else [1])


def test_replacing_one_patient_moves_that_patient_and_nobody_else():
    for patient in ("m01", "n01"):
        first = answer(cohort(4, 4), SecureStream.from_seed(2))
        second = answer(cohort(4, 4, changed=patient), SecureStream.from_seed(2))
        for key, counts in first.items():
            assert np.abs(counts - second[key]).sum() in (0, 2)


def test_a_patients_score_is_bit_for_bit_the_same_alone_and_in_company():
    scores = suite()
    scans = noise_pairs(100, 3)

    def score() -> object:
        coins = SecureStream.from_seed(3)
        return score_patient(scans, member=False, suite=scores, planted_fraction=1.0, coins=coins)

    alone = score()
    score_patient(noise_pairs(9, 2), member=True, suite=scores, planted_fraction=0.5, coins=SecureStream.from_seed(4))
    assert score() == alone


def test_a_copy_raises_only_the_planted_score_of_its_own_patient():
    scores = suite()
    coins = SecureStream.from_seed(5)
    patient = score_patient(noise_pairs(11, 2), member=False, suite=scores, planted_fraction=1.0, coins=coins)
    assert patient.group is Group.NONMEMBER
    assert patient.planted is not None
    for endpoint in (e.name for e in PLAN.endpoints):
        assert patient.own[endpoint] < 1.0 < patient.planted[endpoint]
    member = score_patient(noise_pairs(11, 2), member=True, suite=scores, planted_fraction=1.0, coins=coins)
    assert member.planted is None


def test_members_are_halved_by_their_own_coins():
    scores = suite()
    halves = [
        score_patient(
            noise_pairs(12, 1), member=True, suite=scores, planted_fraction=0.5, coins=SecureStream.from_seed(s)
        ).group
        for s in range(40)
    ]
    assert 8 <= halves.count(Group.MEMBER_A) <= 32
    assert set(halves) == {Group.MEMBER_A, Group.MEMBER_B}


def test_every_bin_of_every_group_carries_noise_even_of_an_empty_cohort():
    def scores(plan: AuditPlan) -> np.ndarray:
        found = answer(cohort(0, 0), SecureStream.from_seed(6), plan)
        return np.concatenate([found[e.name, g] for e in plan.endpoints for g in Group])

    assert len(scores(PLAN)) == 2 * 4 * 15
    assert 1.0 < scores(PLAN).var() < 3.0  # 1.84 at epsilon 1; zero if the noise were off
    assert scores(dataclasses.replace(PLAN, epsilon_per_answer=0.25)).var() > 15


def test_a_second_answer_from_the_same_stream_has_fresh_noise():
    stream, who = SecureStream.from_seed(7), cohort(2, 2)
    first, second = answer(who, stream), answer(who, stream)
    assert any((first[key] != second[key]).any() for key in first)


def test_the_exact_count_puts_each_patient_into_one_bin_and_nan_into_the_lowest():
    edges = EndpointPlan(name=Endpoint.FUSED, edges=(0.0, 1.0))
    plan = dataclasses.replace(PLAN, endpoints=(edges,))
    one = score_patient(
        noise_pairs(13, 1), member=False, suite=suite(), planted_fraction=0.01, coins=SecureStream.from_seed(8)
    )
    values = (float("nan"), -3.0, 0.0, 0.5, 1.0, 9.0)
    patients = [dataclasses.replace(one, own={Endpoint.FUSED: v}) for v in values]
    assert count(patients, plan, name="fused", group=Group.NONMEMBER).tolist() == [2, 2, 2]
    assert count(patients, plan, name="fused", group=Group.MEMBER_A).tolist() == [0, 0, 0]


def test_volumes_that_are_all_alike_put_everybody_into_the_lowest_bin():
    collapsed = suite(generator=Stored(noise_pairs(1, 1)))
    same = suite(generator=REFERENCE)
    scan = torch.from_numpy(noise_pairs(14, 1))[0]
    for scores in (collapsed, same):
        assert all(np.isnan(score) for score in scores.scores(scan).values())


def test_a_plan_for_other_scoring_code_is_refused():
    with pytest.raises(PolicyRefusal, match="version 99"):
        answer(cohort(1, 1), SecureStream.from_seed(9), dataclasses.replace(PLAN, score_version=99))


def test_answers_without_noise_are_refused():
    with pytest.raises(PolicyRefusal, match="without noise"):
        answer(cohort(1, 1), SecureStream.from_seed(10), dataclasses.replace(PLAN, epsilon_per_question=None))


def test_a_guess_counts_once_a_patient_right_or_wrong():
    one = score_patient(
        noise_pairs(15, 3), member=True, suite=suite(), planted_fraction=0.5, coins=SecureStream.from_seed(11)
    )
    patients = [dataclasses.replace(one, group=Group.NONMEMBER, guessed=g) for g in (True, True, False)]
    assert count(patients, PLAN, name="label_size", group=Group.NONMEMBER).tolist() == [1, 2]
    assert count(patients, PLAN, name="label_size", group=Group.MEMBER_A).tolist() == [0, 0]
