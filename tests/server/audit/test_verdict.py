"""Known answers at the level of noised histograms: audit notes K2, K6, K8, K10, K11."""

import dataclasses
import math

import numpy as np
import pytest

from common.measure.audit_plan import AuditPlan, Group
from common.protocol.messages import LedgerHead, NoisedHistogram, ScoreReply
from common.settings.study import Question, ReleaseSettings
from server.audit.verdict import AuditResult, Verdict, judge
from tests.tiny_studies import tiny_audit_plan

THRESHOLDS = ReleaseSettings()


def plan(patients: int = 800, epsilon: float = 1.0) -> AuditPlan:
    return tiny_audit_plan(
        sites=("site-1", "site-2", "site-3"),
        quorum=2,
        volumes=1000,
        calibration_volumes=64,
        epsilon_per_answer=epsilon,
        expected_members=round(patients * 0.65),
        expected_nonmembers=round(patients * 0.35),
    )


def answer(
    p: AuditPlan,
    rng: np.random.Generator,
    *,
    patients: int = 800,
    copied: float = 0.0,
    shift: float = 0.0,
    site: float = 0.0,
    blind: bool = False,
    constant: bool = False,
    guessed: float = 0.9,
    unfair: float = 0.0,
) -> ScoreReply:
    """One site: non-members score 0.5 +- 0.2 of the public unit, copies about 1.8, 8 % of copies are not recognised.

    blind: the score cannot see copies. constant: it gives everybody the same number. guessed: share of members, of
    whom the question is answered right; 0.9 of non-members. unfair: shift of members in the blind score.
    """
    member = rng.random(patients) < 0.65
    half = rng.random(patients) < 0.5
    is_copied, is_planted = rng.random(patients) < copied, rng.random(patients) < p.planted_fraction
    histograms = []
    for endpoint in p.endpoints:
        own = rng.normal(0.5 + site, 0.2, patients) + np.where(member, shift, 0.0)

        def as_copy(own: np.ndarray = own) -> np.ndarray:
            seen = (rng.random(patients) > 0.08) & (not blind)
            return np.where(seen, np.maximum(own, rng.normal(1.8, 0.4, patients)), own)

        scores = np.where(member & is_copied, as_copy(), own)
        planted = np.where(is_planted, as_copy(), own)
        if constant:
            scores, planted = np.full(patients, np.nan), np.full(patients, np.nan)
        groups = {
            Group.MEMBER_A: scores[member & half],
            Group.MEMBER_B: scores[member & ~half],
            Group.NONMEMBER: scores[~member],
            Group.PLANTED: planted[~member],
        }
        for group, values in groups.items():
            bins = np.where(np.isnan(values), 0, np.searchsorted(endpoint.edges, values, side="right"))
            histograms.append(noised(p, rng, endpoint.name, group, np.bincount(bins, minlength=endpoint.bins)))
    structure = np.clip(rng.normal(5, 2, patients) + np.where(member, unfair, 0), 0, 10).astype(int)
    right = (rng.random(patients) < np.where(member, guessed, 0.9)).astype(int)
    for group, those in (
        (Group.MEMBER_A, member & half),
        (Group.MEMBER_B, member & ~half),
        (Group.NONMEMBER, ~member),
    ):
        histograms.append(noised(p, rng, Question.LABEL_SIZE, group, np.bincount(right[those], minlength=2)))
        histograms.append(noised(p, rng, Question.BLIND, group, np.bincount(structure[those], minlength=11)))
    return ScoreReply(
        study_digest="s",
        weights_digest="w",
        audit_plan_digest=p.digest,
        histograms=tuple(histograms),
        critic_tells=False,
        ledger_head=LedgerHead(rows=1, hash="e" * 64),
    )


def noised(p: AuditPlan, rng: np.random.Generator, name: str, group: Group, counts: np.ndarray) -> NoisedHistogram:
    epsilon = p.answers[name].epsilon
    ratio = 1 - math.exp(-epsilon)
    noise = rng.geometric(ratio, len(counts)) - rng.geometric(ratio, len(counts))
    return NoisedHistogram(
        endpoint=name, group=group.value, counts=tuple(int(c) for c in counts + noise), epsilon=epsilon
    )


def audit(seed: int, p: AuditPlan | None = None, sites: tuple[float, ...] = (0.0, 0.0, 0.0), **facts) -> AuditResult:
    p = p or plan()
    rng = np.random.default_rng(seed)
    answers = {f"site-{i}": answer(p, rng, site=s, **facts) for i, s in enumerate(sites, start=1)}
    return judge(p, answers, THRESHOLDS, participants=p.sites)


def test_a_generator_without_a_leak_passes_and_the_result_says_what_it_rests_on():
    result = audit(0)
    assert result.verdict is Verdict.PASS
    assert result.reasons == ()
    assert result.controls_caught
    assert result.members == pytest.approx(1560, abs=120)
    assert result.nonmembers == pytest.approx(840, abs=90)
    assert (result.epsilon_members, result.epsilon_nonmembers) == (4.0, 6.0)
    assert result.smallest_detectable_copies <= 0.05
    for e in result.endpoints:
        assert e.auc.estimate == pytest.approx(0.5, abs=0.05)
        assert e.tpr_upper.value <= 0.06
        assert e.copies_lower.value <= 0
        assert len(e.roc) == len(e.edges) + 2
        assert {h.group for h in e.histograms} == set(Group)
        assert all(len(h.counts) == len(e.edges) + 1 for h in e.histograms)


def test_a_generator_that_copied_five_percent_of_its_members_fails():
    result = audit(1, copied=0.05)
    assert result.verdict is Verdict.FAIL
    assert any("stand out as copies" in reason for reason in result.reasons)


def test_a_memorising_generator_fails_even_at_small_sites():
    result = audit(2, plan(150), patients=150, copied=1.0)
    assert result.verdict is Verdict.FAIL
    assert any("AUC" in reason for reason in result.reasons)


def test_an_attribute_that_is_guessed_better_for_members_fails():
    result = audit(8, guessed=1.0)
    assert result.verdict is Verdict.FAIL
    assert any("attribute inference" in reason for reason in result.reasons)
    assert audit(9, guessed=0.88).verdict is Verdict.PASS


def test_groups_that_were_not_drawn_alike_are_inconclusive():
    result = audit(10, unfair=1.0)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert not result.controls_caught
    assert any("other reasons than membership" in reason for reason in result.reasons)


def test_members_that_score_clearly_higher_fail_without_any_copy():
    assert audit(3, shift=0.2).verdict is Verdict.FAIL


def test_scanner_shift_between_sites_is_no_leak():
    assert audit(4, sites=(-0.25, 0.0, 0.25)).verdict is Verdict.PASS


@pytest.mark.parametrize("patients", [20, 46, 200])
def test_small_sites_are_inconclusive_never_passed(patients):
    for seed in range(10):
        result = audit(seed, plan(patients), patients=patients)
        assert result.verdict is not Verdict.PASS
    assert audit(11, plan(patients), patients=patients).verdict is Verdict.INCONCLUSIVE


def test_a_plan_that_boasts_of_more_patients_than_came_does_not_buy_power():
    result = audit(5, plan(800), patients=200)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.smallest_detectable_copies > 0.05


def test_an_attack_that_cannot_see_copies_is_inconclusive_although_its_numbers_are_clean():
    result = audit(6, blind=True, copied=0.3)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert not result.controls_caught
    assert any("missed planted copies" in reason for reason in result.reasons)


def test_scores_that_are_all_alike_are_inconclusive():
    result = audit(7, constant=True)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert any("all alike" in reason for reason in result.reasons)


def tampered(case: str) -> tuple[AuditPlan, dict[str, ScoreReply]]:
    p, rng = plan(), np.random.default_rng(8)
    answers = {site: answer(p, rng) for site in p.sites}
    first = answers["site-1"]
    match case:
        case "no answers":
            answers = {}
        case "a site is missing":
            del answers["site-2"]
        case "a site is not in the plan":
            answers["site-9"] = first
        case "another plan":
            answers["site-1"] = dataclasses.replace(first, audit_plan_digest="other")
        case "another generator":
            answers["site-1"] = dataclasses.replace(first, weights_digest="other")
        case "a group is missing":
            answers["site-1"] = dataclasses.replace(first, histograms=first.histograms[1:])
        case "a group is there twice":
            answers["site-1"] = dataclasses.replace(first, histograms=(*first.histograms, first.histograms[0]))
        case "too few bins" | "other epsilon":
            h = first.histograms[0]
            odd = dataclasses.replace(h, counts=h.counts[1:]) if case == "too few bins" else None
            odd = odd or dataclasses.replace(h, epsilon=9.0)
            answers["site-1"] = dataclasses.replace(first, histograms=(odd, *first.histograms[1:]))
        case "counts of zero":
            empty = tuple(dataclasses.replace(h, counts=(0,) * len(h.counts)) for h in first.histograms)
            answers["site-1"] = dataclasses.replace(first, histograms=empty)
    return p, answers


@pytest.mark.parametrize(
    "case",
    [
        "no answers",
        "a site is missing",
        "a site is not in the plan",
        "another plan",
        "another generator",
        "a group is missing",
        "a group is there twice",
        "too few bins",
        "other epsilon",
        "counts of zero",
    ],
)
def test_answers_that_do_not_fit_the_plan_are_inconclusive_with_a_reason(case):
    p, answers = tampered(case)
    result = judge(p, answers, THRESHOLDS, participants=p.sites)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.reasons
    assert AuditResult.from_json(result.to_json()) == result


def test_a_bound_a_hair_above_its_limit_is_not_rounded_into_a_pass():
    result = audit(0)
    worst = max(e.tpr_upper.value for e in result.endpoints)
    p, rng = plan(), np.random.default_rng(0)
    answers = {site: answer(p, rng) for site in p.sites}
    assert (
        judge(p, answers, THRESHOLDS.model_copy(update={"max_tpr": worst}), participants=p.sites).verdict
        is Verdict.PASS
    )
    hair = THRESHOLDS.model_copy(update={"max_tpr": worst - 1e-12})
    assert judge(p, answers, hair, participants=p.sites).verdict is Verdict.INCONCLUSIVE


def test_the_verdict_does_not_depend_on_the_order_of_answers_or_histograms():
    p, rng = plan(), np.random.default_rng(9)
    answers = {site: answer(p, rng) for site in p.sites}
    shuffled = {
        site: dataclasses.replace(answers[site], histograms=answers[site].histograms[::-1])
        for site in reversed(answers)
    }
    first, second = (judge(p, each, THRESHOLDS, participants=p.sites) for each in (shuffled, answers))
    assert first.digest == second.digest


def test_the_result_survives_json_unchanged():
    result = audit(1, copied=0.05)
    back = AuditResult.from_json(result.to_json())
    assert back == result
    assert back.digest == result.digest


def test_a_pass_with_reasons_or_without_measurements_cannot_exist():
    result = audit(0)
    with pytest.raises(ValueError, match="reasons"):
        dataclasses.replace(result, reasons=("but",))
    with pytest.raises(ValueError, match="nothing"):
        dataclasses.replace(result, endpoints=())


@pytest.mark.slow
def test_operating_characteristics_at_default_thresholds():
    clean = [audit(1000 + s).verdict for s in range(150)]
    leaky = [audit(2000 + s, copied=0.05).verdict for s in range(150)]
    small = [audit(3000 + s, plan(46), patients=46).verdict for s in range(150)]
    assert np.mean([v is Verdict.PASS for v in clean]) >= 0.9
    assert np.mean([v is Verdict.FAIL for v in clean]) <= 0.04
    assert np.mean([v is Verdict.PASS for v in leaky]) <= 0.05
    assert np.mean([v is Verdict.INCONCLUSIVE for v in small]) >= 0.97
    assert Verdict.PASS not in small
