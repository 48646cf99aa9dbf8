"""The audit's judgement: from the sites' noised answers to PASS, FAIL or INCONCLUSIVE.

(1) Can the answers be used at all: every site of the plan, this plan, one generator, every group on the plan's grid,
    patients in every group, scores that differ. If not: INCONCLUSIVE, whatever the numbers say.
(2) Is a leak shown: a lower bound above its threshold, or members that stand out as copies. Then: FAIL.
(3) Are leaks ruled out: every upper bound within its threshold, the null control silent, planted copies caught, and a
    small enough leak detectable. Then: PASS. Anything else: INCONCLUSIVE.

"Not significant" is never read as safe, a missing control is a failed one, nothing is rounded before it is compared.
All conditions of (3) must hold together, so their bounds need no correction for multiplicity (intersection-union).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from common.measure.audit_plan import AnswerPlan, AuditPlan, EndpointPlan, Group
from common.measure.intervals import Bound, Interval, Side
from common.measure.membership import (
    Exceedance,
    Stratum,
    copies_lower_bound,
    copies_upper_bound,
    exceedance,
    far_edges,
    fitted_roc,
    rate_difference,
    set_membership_p_value,
    shared_level,
    smallest_detectable_copies,
    stratified_auc,
    true_positives,
)
from common.measure.monotone import rising
from common.measure.noised_counts import CountNoise
from common.measure.proven_epsilon import clopper_pearson_epsilon
from common.protocol.messages import ScoreReply
from common.settings.study import Question, ReleaseSettings
from server.audit.beside import attribute_inference, blind_baseline, critic_control
from server.audit.power import PROBABILITY, planned_smallest_copies
from server.audit.result import (
    AttributeInference,
    AuditResult,
    AuditThresholds,
    BlindBaseline,
    EndpointResult,
    NullControl,
    PlantedControl,
    PooledHistogram,
    Power,
    RocPoint,
    SetMembership,
    SiteAuc,
    Verdict,
)

__all__ = ["AuditResult", "Verdict", "judge", "judge_counts"]

_ALIKE = 0.95  # share of patients in one bin above which scores tell nobody apart
_NOISE_MARGIN = 4.0  # a group's noised size must exceed this many standard deviations of its own noise

Counts = NDArray[np.float64]
SiteCounts = Mapping[Group, Counts]


def judge(
    plan: AuditPlan, answers: Mapping[str, ScoreReply], thresholds: ReleaseSettings, *, participants: Sequence[str]
) -> AuditResult:
    """The verdict on the answers by site. Pure; never raises for what a site sent.

    participants: sites whose weights went in; all of them must have answered.
    """
    counts, objections = _usable(plan, answers, participants)
    digests = {answer.weights_digest for answer in answers.values()}
    result = judge_counts(
        plan,
        {site: {name: counts[site, name] for name in plan.answers} for site in sorted(answers)}
        if not objections
        else {},
        thresholds,
        objections=objections,
        weights_digest=digests.pop() if len(digests) == 1 else None,
    )
    asked = Question.CRITIC in plan.questions and not objections
    critic = critic_control(answers, plan) if asked else None
    return replace(result, sites=tuple(sorted(answers)), critic=critic)


def judge_counts(
    plan: AuditPlan,
    by_site: Mapping[str, Mapping[str, SiteCounts]],
    thresholds: ReleaseSettings,
    *,
    objections: Sequence[str] = (),
    weights_digest: str | None,
) -> AuditResult:
    """The verdict on counts that are known to be whole: site -> answer of the plan -> group -> counts.

    objections: why they cannot be used all the same. Pure.
    """
    sites, objections = tuple(by_site), list(objections)
    found: list[EndpointResult] = []
    for endpoint in plan.endpoints if by_site else ():
        counts = [answers[endpoint.name] for answers in by_site.values()]
        objections += _too_little(plan, endpoint, sites, counts)
        if all(c.sum() >= 1 for groups in counts for c in (_members(groups), *groups.values())):
            found.append(_measure(plan, endpoint, sites, counts, thresholds))
    inference = blind = None
    if len(found) < len(plan.endpoints):
        found = []
        objections = objections or ["a group is empty"]
    elif lost := _lost_questions(plan, by_site):
        objections += lost
    else:
        if Question.LABEL_SIZE in plan.questions:
            inference = attribute_inference(_strata(plan, Question.LABEL_SIZE, by_site), plan.confidence)
        if Question.BLIND in plan.questions:
            blind = blind_baseline(_strata(plan, Question.BLIND, by_site), plan.confidence, thresholds.max_blind_auc)
    if objections:
        verdict, reasons = Verdict.INCONCLUSIVE, objections
    elif leaks := [*(r for e in found for r in _leaks(e, thresholds)), *_inference_leaks(inference, thresholds)]:
        verdict, reasons = Verdict.FAIL, leaks
    elif doubts := [
        *(r for e in found for r in _doubts(e, thresholds)),
        *_inference_doubts(inference, thresholds),
        *_blind_doubts(blind, thresholds),
    ]:
        verdict, reasons = Verdict.INCONCLUSIVE, doubts
    else:
        verdict, reasons = Verdict.PASS, []
    return AuditResult(
        verdict=verdict,
        reasons=tuple(reasons),
        endpoints=tuple(found),
        inference=inference,
        blind=blind,
        sites=sites,
        members=found[0].members if found else None,
        nonmembers=found[0].nonmembers if found else None,
        epsilon_members=plan.epsilon_members,
        epsilon_nonmembers=plan.epsilon_nonmembers,
        false_positive_rate=plan.false_positive_rate,
        confidence=plan.confidence,
        thresholds=AuditThresholds(
            max_auc=thresholds.max_auc,
            max_auc_site=thresholds.max_auc_site,
            max_tpr=thresholds.max_tpr,
            max_detectable_copies=thresholds.max_detectable_copies,
            max_inference_lift=thresholds.max_inference_lift,
            max_blind_auc=thresholds.max_blind_auc,
        ),
        plan_digest=plan.digest,
        weights_digest=weights_digest,
    )


# (1) Can the answers be used at all


def _usable(
    plan: AuditPlan, answers: Mapping[str, ScoreReply], participants: Sequence[str]
) -> tuple[dict[tuple[str, str], SiteCounts], list[str]]:
    """Counts by (site, answer), and why they cannot be used."""
    objections = [f"{site} did not answer" for site in participants if site not in answers]
    objections += [
        f"{site} answered but is not in the plan" for site in answers if plan.sites and site not in plan.sites
    ]
    objections += [f"{site} answered but gave nothing" for site in answers if site not in participants]
    if len(answers) < max(plan.quorum, 1):
        objections.append(f"{len(answers)} sites answered, the plan needs {max(plan.quorum, 1)}")
    if len({answer.weights_digest for answer in answers.values()}) > 1:
        objections.append("the sites scored different generators")
    counts: dict[tuple[str, str], SiteCounts] = {}
    for site, answer in sorted(answers.items()):
        if answer.audit_plan_digest != plan.digest:
            objections.append(f"{site} answered another audit plan")
            continue
        if (answer.critic_tells is None) == (Question.CRITIC in plan.questions):
            objections.append(f"{site}: the bit about its critic is not what the plan asks for")
        for name in plan.answers:
            groups = _groups(plan, name, answer)
            if groups is None:
                objections.append(f"{site}: the {name} answer does not have the plan's groups, bins and epsilon")
            else:
                counts[site, name] = groups
    return counts, objections


def _groups(plan: AuditPlan, name: str, answer: ScoreReply) -> SiteCounts | None:
    """One answer's counts by group; None unless every group is there once, on the grid, at the plan's epsilon."""
    mine = [h for h in answer.histograms if h.endpoint == name]
    asked = plan.answers[name]
    if sorted(h.group for h in mine) != sorted(asked.groups):
        return None
    if any(len(h.counts) != asked.bins or h.epsilon != asked.epsilon for h in mine):
        return None
    counts = {Group(h.group): np.array(h.counts, dtype=np.float64) for h in mine}
    return counts if all(np.isfinite(c).all() for c in counts.values()) else None


def _too_little(
    plan: AuditPlan, endpoint: EndpointPlan, sites: Sequence[str], by_site: Sequence[SiteCounts]
) -> list[str]:
    """Groups lost in their own noise, and scores that all fall together."""
    objections = []
    one = endpoint.bins * plan.answers[endpoint.name].noise().variance
    for site, groups in zip(sites, by_site, strict=True):
        sizes = {"members": (_members(groups), 2 * one), "non-members": (groups[Group.NONMEMBER], one)}
        for name, (counts, variance) in sizes.items():
            if counts.sum() < _NOISE_MARGIN * variance**0.5:
                objections.append(
                    f"{endpoint.name}: {site} has about {counts.sum():.0f} {name}, too few beside noise of "
                    f"standard deviation {variance**0.5:.0f}"
                )
    pooled = np.sum([_members(groups) + groups[Group.NONMEMBER] for groups in by_site], axis=0)
    if not objections and pooled.max() > _ALIKE * pooled.sum():
        objections.append(f"{endpoint.name}: scores are all alike, so that nobody could be told from anybody")
    return objections


def _lost_questions(plan: AuditPlan, by_site: Mapping[str, Mapping[str, SiteCounts]]) -> list[str]:
    """Questions whose answers are lost in their own noise, by site."""
    return [
        f"{name}: {site} has too few patients beside the noise"
        for name in (Question.LABEL_SIZE, Question.BLIND)
        if name in plan.questions
        for site, answers in by_site.items()
        if min(_members(answers[name]).sum(), answers[name][Group.NONMEMBER].sum()) < 1
    ]


def _strata(plan: AuditPlan, name: str, by_site: Mapping[str, Mapping[str, SiteCounts]]) -> list[Stratum]:
    return [_stratum(plan.answers[name], answers[name]) for answers in by_site.values()]


def _stratum(asked: AnswerPlan, groups: SiteCounts) -> Stratum:
    """Members against non-members of one site. Members came in two halves, each noised."""
    return Stratum(
        members=_members(groups),
        nonmembers=groups[Group.NONMEMBER],
        member_noise=asked.noise(2),
        nonmember_noise=asked.noise(),
    )


def _members(groups: SiteCounts) -> Counts:
    return np.asarray(groups[Group.MEMBER_A] + groups[Group.MEMBER_B], dtype=np.float64)


# Measuring


def _measure(
    plan: AuditPlan,
    endpoint: EndpointPlan,
    sites: Sequence[str],
    by_site: Sequence[SiteCounts],
    thresholds: ReleaseSettings,
) -> EndpointResult:
    asked = plan.answers[endpoint.name]
    noise = asked.noise()
    strata = [_stratum(asked, groups) for groups in by_site]
    auc = stratified_auc(strata)
    tpr = true_positives(strata, plan.false_positive_rate, plan.confidence)
    copy_level = shared_level(plan.copy_confidence, len(far_edges(strata, plan.false_positive_rate)))
    pooled = {group: np.sum([g[group] for g in by_site], axis=0) for group in Group}
    return EndpointResult(
        name=endpoint.name,
        edges=endpoint.edges,
        members=round(sum(s.member_total for s in strata)),
        nonmembers=round(sum(s.nonmember_total for s in strata)),
        auc=auc.interval(plan.confidence),
        auc_lower=auc.bound(Side.LOWER, plan.confidence),
        auc_upper=auc.bound(Side.UPPER, plan.confidence),
        sites=tuple(_site_auc(site, s, plan.confidence) for site, s in zip(sites, strata, strict=True)),
        tpr=tpr.interval,
        tpr_lower=tpr.lower,
        tpr_upper=tpr.upper,
        copies_lower=copies_lower_bound(strata, plan.false_positive_rate, plan.copy_confidence),
        copies_upper=copies_upper_bound(strata, plan.false_positive_rate, plan.confidence),
        set_membership=tuple(
            SetMembership(site=site, p_value=set_membership_p_value(s)) for site, s in zip(sites, strata, strict=True)
        ),
        # The non-members alone choose this edge; without a delta, which for a claim's 1e-5 or so changes nothing.
        epsilon_lower=clopper_pearson_epsilon([tpr.beyond], delta=0.0, confidence=plan.confidence),
        roc=_roc(strata, endpoint, plan.confidence),
        histograms=tuple(
            PooledHistogram(group=group.value, counts=tuple(round(c) for c in rising(counts)))
            for group, counts in pooled.items()
        ),
        null=_null_control(plan, by_site, noise, thresholds),
        planted=_planted_control(plan, by_site, noise),
        power=Power(
            probability=PROBABILITY,
            planned=planned_smallest_copies(plan, endpoint),
            achieved=smallest_detectable_copies(tpr.beyond, copy_level, PROBABILITY),
        ),
    )


def _site_auc(site: str, stratum: Stratum, confidence: float) -> SiteAuc:
    auc = stratified_auc([stratum])
    return SiteAuc(
        site=site,
        members=round(stratum.member_total),
        nonmembers=round(stratum.nonmember_total),
        auc=auc.interval(confidence),
        lower=auc.bound(Side.LOWER, confidence),
        upper=auc.bound(Side.UPPER, confidence),
    )


def _roc(strata: Sequence[Stratum], endpoint: EndpointPlan, confidence: float) -> tuple[RocPoint, ...]:
    """The fitted curve from (0, 0) to (1, 1) with a band from sampling and noise of both groups."""
    (_, *fitted, _) = fitted_roc(strata)
    edges = reversed(range(len(endpoint.edges)))
    return (
        RocPoint(false_positive_rate=0.0, true_positive_rate=0.0, low=0.0, high=0.0),
        *(_roc_point(fpr, tpr, exceedance(strata, e), confidence) for e, (fpr, tpr) in zip(edges, fitted, strict=True)),
        RocPoint(false_positive_rate=1.0, true_positive_rate=1.0, low=1.0, high=1.0),
    )


def _roc_point(fpr: float, tpr: float, at: Exceedance, confidence: float) -> RocPoint:
    """The fitted rates of an edge. Its band is as wide as the limits of TPR - FPR and ends where a rate does."""
    d = rate_difference(at, (1 + confidence) / 2)
    return RocPoint(
        false_positive_rate=float(fpr),
        true_positive_rate=float(tpr),
        low=max(float(tpr) - (d.estimate - d.low), 0.0),
        high=min(float(tpr) + (d.high - d.estimate), 1.0),
    )


def _null_control(
    plan: AuditPlan, by_site: Sequence[SiteCounts], noise: CountNoise, thresholds: ReleaseSettings
) -> NullControl:
    """Members against members: 0.5 inside, the release threshold outside."""
    halves = [
        Stratum(members=g[Group.MEMBER_A], nonmembers=g[Group.MEMBER_B], member_noise=noise, nonmember_noise=noise)
        for g in by_site
    ]
    auc = stratified_auc(halves).interval(plan.control_confidence)
    return NullControl(auc=auc, passed=bool(auc.contains(0.5) and auc.high < thresholds.max_auc))


def _planted_control(plan: AuditPlan, by_site: Sequence[SiteCounts], noise: CountNoise) -> PlantedControl:
    """All non-members, a few of them copied, against the same non-members without copies.

    The two groups are the same people, so their sampling errors cancel in part; treating them as independent
    makes the control harder to satisfy, never easier.
    """
    strata = [
        Stratum(members=g[Group.PLANTED], nonmembers=g[Group.NONMEMBER], member_noise=noise, nonmember_noise=noise)
        for g in by_site
    ]
    tpr = true_positives(strata, plan.false_positive_rate, plan.confidence)
    excess = copies_lower_bound(strata, plan.false_positive_rate, plan.confidence)
    return PlantedControl(
        planted_fraction=plan.planted_fraction,
        tpr=tpr.interval,
        tpr_lower=tpr.lower,
        excess_lower=excess,
        detected=bool(excess.value > 0),
    )


# (2) Is a leak shown; (3) are leaks ruled out


def _leaks(e: EndpointResult, t: ReleaseSettings) -> list[str]:
    reasons = _above(f"{e.name}: AUC", e.auc, e.auc_lower, t.max_auc)
    for s in e.sites:
        reasons += _above(f"{e.name}: AUC at {s.site}", s.auc, s.lower, t.max_auc_site)
    reasons += _above(f"{e.name}: true-positive rate", e.tpr, e.tpr_lower, t.max_tpr)
    if e.copies_lower.value > 0:
        reasons.append(
            f"{e.name}: members stand out as copies: at least {e.copies_lower.value:.3f} of them "
            f"({e.copies_lower.confidence:.1%} confidence), which no held-out patient explains"
        )
    return reasons


def _doubts(e: EndpointResult, t: ReleaseSettings) -> list[str]:
    reasons = _above(f"{e.name}: AUC", e.auc, e.auc_upper, t.max_auc)
    for s in e.sites:
        reasons += _above(f"{e.name}: AUC at {s.site}", s.auc, s.upper, t.max_auc_site)
    reasons += _above(f"{e.name}: true-positive rate", e.tpr, e.tpr_upper, t.max_tpr)
    if not e.null.passed:
        reasons.append(
            f"{e.name}: the null control must hold 0.5 and stay below {t.max_auc}, members against members gave "
            f"{e.null.auc.low:.3f} to {e.null.auc.high:.3f}"
        )
    if not e.planted.detected:
        reasons.append(f"{e.name}: the audit missed planted copies of {e.planted.planted_fraction:.1%} of the held-out")
    if not e.power.smallest_copies <= t.max_detectable_copies:
        reasons.append(
            f"{e.name}: copies of fewer than {e.power.smallest_copies:.1%} of members would not be seen with "
            f"{e.power.probability:.0%} probability; at most {t.max_detectable_copies:.1%} is allowed"
        )
    return reasons


def _inference_leaks(found: AttributeInference | None, t: ReleaseSettings) -> list[str]:
    return [] if found is None else _above("attribute inference: lift", found.lift, found.lower, t.max_inference_lift)


def _inference_doubts(found: AttributeInference | None, t: ReleaseSettings) -> list[str]:
    return [] if found is None else _above("attribute inference: lift", found.lift, found.upper, t.max_inference_lift)


def _blind_doubts(found: BlindBaseline | None, t: ReleaseSettings) -> list[str]:
    if found is None or found.passed:
        return []
    return [
        f"a score that ignores the generator must stay between {1 - t.max_blind_auc:.2f} and {t.max_blind_auc:.2f} for "
        f"members against held-out; it gave {found.auc.low:.3f} to {found.auc.high:.3f}, so that they may differ "
        "for other reasons than membership"
    ]


def _above(what: str, estimate: Interval, bound: Bound, limit: float) -> list[str]:
    """A reason unless the bound is within the limit; written so that NaN would object, too."""
    if bound.value <= limit:
        return []
    shown = min(max(bound.value, 0.0), 1.0)  # noise can push a bound past what a rate can be; only the text is cut
    return [
        f"{what} is {estimate.estimate:.3f}, {bound.side} bound {shown:.3f} "
        f"({bound.confidence:.0%} confidence); the limit is {limit}"
    ]
