"""Made-up facts for the report's tests: scores drawn from two bell curves, scans drawn as soft balls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any

import numpy as np

from common.evidence.predicate import AuditBound, AuditFacts, CohortEpsilon, DecisionFacts, Outcome, SiteFacts
from common.measure.audit_plan import Endpoint, default_edges
from common.measure.epsilon_bounds import EpsilonBound
from common.measure.intervals import Bound, Interval, Side
from common.privacy.mechanism import DpSgd, NoisedCounts, Plan
from common.protocol.messages import SegmenterSource
from common.settings.study import Study
from server.audit.facts import AuditedScans, CampaignFacts, Gallery, ReportFacts, RoundCourse
from server.audit.report import render_report
from server.audit.result import (
    AttributeInference,
    AuditResult,
    AuditThresholds,
    BlindBaseline,
    CriticControl,
    EndpointResult,
    MechanismAudit,
    MechanismVerdict,
    NullControl,
    PlantedControl,
    PooledHistogram,
    Power,
    RocPoint,
    SetMembership,
    SiteAuc,
    Verdict,
)
from server.federation_epsilon import federation_epsilon
from server.utility import NotMeasured, UtilityResult, UtilityRow

DIGEST = "4f" * 32
MADE_AT = datetime(2026, 11, 20, 14, 5, tzinfo=UTC)
EXAMPLE_RECORDS = {
    "decision.json": "the signed decision",
    "evidence.jsonl": "what happened, hash-linked",
    "audit/plan.json": "the plan, fixed before looking",
}
SITES = ("site-1", "site-2", "site-3")
MEMBERS, NONMEMBERS = 910, 490
EXAMPLE_MECHANISM = DpSgd(noise_multiplier=1.37, sampling_probability=0.1, steps=480)


def example_study(**changes: Any) -> Study:
    """A hippocampus study; `changes` replace whole sections."""
    body: dict[str, Any] = {
        "study": "hippocampus-example",
        "purpose": "Labelled synthetic hippocampus scans for training and teaching of segmentation methods.",
        "family": "wgan",
        "modality": "T1w",
        "labels": {1: "anterior", 2: "posterior"},
        "grid": {"shape": (32, 32, 32), "spacing_mm": (1.5, 1.5, 1.5)},
        "intensity": {"kind": "robust", "low": 1.0, "high": 99.0},
        "privacy": {
            "target_epsilon": 6.0,
            "delta": 1e-4,
            "sampling_probability": 0.1,
            "reference_patients": 300,
            "epsilon_cap": 12.0,
        },
        "training": {"rounds": 12, "critic_steps_per_round": 40},
        "warm_start": {"phantom": "hippocampus"},
    }
    return Study.model_validate({**body, **changes}, strict=False)


def example_facts(
    *,
    outcome: Outcome = Outcome.RELEASE,
    simulated: bool = True,
    leak: float = 0.0,
    audited: bool = True,
    study: Study | None = None,
    coarser: tuple[str, ...] = (),
    reasons: tuple[str, ...] = (),
    everything: bool = False,
) -> ReportFacts:
    """A finished campaign of three hospitals. leak: shift of the members' scores in standard deviations.

    everything: with canaries, the hospitals' own critics, attribute inference and lower bounds on epsilon.
    """
    study = study or example_study()
    audit = example_audit(leak, everything=everything) if audited else None
    return ReportFacts(
        title=study.study,
        purpose=study.purpose,
        audit=audit,
        scans=AuditedScans.of_study(study),
        gallery=Gallery(
            labels=tuple(study.labels[value] for value in sorted(study.labels)),
            synthetic=example_pairs(seed=1, count=6),
            phantom=example_pairs(seed=2, count=6),
        ),
        versions={"consilium": "0.1.0", "torch": "2.13.0", "flwr": "1.41.0", "python": "3.11.9"},
        made_at=MADE_AT,
        digests={"Evidence chain, head": "1b" * 32},
        records=EXAMPLE_RECORDS,
        campaign=CampaignFacts(
            study=study,
            decision=example_decision(
                study, outcome=outcome, simulated=simulated, coarser=coarser, reasons=reasons, audit=audit
            ),
            plan=Plan(
                mechanism=EXAMPLE_MECHANISM,
                clip_norm=1.0,
                divisor=30.0,
                steps_per_round=40,
                rounds=12,
                target_epsilon=6.0,
                delta=1e-4,
            ),
            utility=example_utility(),
            rounds=tuple(example_round(number) for number in range(1, 13)),
            federation=federation_epsilon(
                {site: [EXAMPLE_MECHANISM, NoisedCounts(epsilon=2.0)] for site in SITES}, 1e-4
            ),
            critic_parameters=11_777,
            seed=7 if simulated else None,
        ),
    )


def example_audit_alone(leak: float = 0.0, *, exact: bool = False) -> ReportFacts:
    """An audit of volumes that no campaign made: no ledger, no decision, no labels, no random hold-out.

    exact: counted without noise, on the machine where the scans are.
    """
    audit = replace(example_audit(leak), sites=("here",), weights_digest=None)
    if exact:
        audit = replace(audit, epsilon_members=None, epsilon_nonmembers=None)
    return ReportFacts(
        title="Volumes of another maker",
        purpose="To see whether a folder of synthetic volumes gives away who was used for them.",
        audit=audit,
        scans=AuditedScans(
            modality="pet",
            shape=(32, 32, 32),
            spacing_mm=(4.0, 4.0, 4.0),
            volumes=400,
            holdout="As the folder of patients held out was given; nobody committed to it beforehand.",
            random_holdout=False,
            preparation=("Resampled to the grid above.", "Defacing: none by this software."),
            attacks=("near_copy", "nearest"),
        ),
        gallery=Gallery(
            labels=(),
            synthetic=example_pairs(seed=1, count=2)[:, :1],
            phantom=np.zeros((0, 1, 32, 32, 32), dtype=np.float32),
        ),
        versions={"consilium": "0.1.0"},
        made_at=MADE_AT,
    )


def example_pairs(*, seed: int, count: int) -> np.ndarray:
    """(count, 3, 32, 32, 32): two touching soft balls, bright on a noisy ground."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, 32),) * 3, indexing="ij")
    pairs = np.zeros((count, 3, 32, 32, 32), dtype=np.float32)
    for pair in pairs:
        for label, middle in ((1, 0.28), (2, -0.28)):
            centre = rng.normal([0, middle, 0], 0.05)
            distance = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, (0.28, 0.36, 0.26), strict=True))
            pair[label] = 1 / (1 + np.exp(8 * (np.sqrt(distance) - 1)))
        pair[1:] /= np.maximum(pair[1:].sum(axis=0), 1)
        ground = -0.4 + 0.25 * np.sin(3 * axes[0] + rng.normal()) * np.cos(2 * axes[2] + rng.normal())
        pair[0] = np.clip(ground + 0.8 * pair[1:].sum(axis=0) + rng.normal(0, 0.08, (32, 32, 32)), -1, 1)
    return pairs


def example_round(number: int) -> RoundCourse:
    """A round; the third leaves site-3 out."""
    excluded = {"site-3": "no reply before the deadline"} if number == 3 else {}
    used = tuple(site for site in SITES if site not in excluded)
    return RoundCourse(
        round=number,
        epsilon=6.0 * (number / 12) ** 0.6,
        used=used,
        excluded=excluded,
        seconds=9.0 + number % 3,
        update_norms={site: (1.2 + 0.2 * i) * 0.93**number for i, site in enumerate(used)},
    )


def example_utility() -> UtilityResult:
    """Synthetic beats phantoms; one site did not answer for phantoms."""
    return UtilityResult(
        labels=("anterior", "posterior"),
        rows=(
            UtilityRow(
                source=SegmenterSource.SYNTHETIC,
                dice=(interval(0.781, 0.02), interval(0.763, 0.02)),
                mean=interval(0.772, 0.02),
                patients=487.3,
                exact=False,
                sites=SITES,
            ),
            UtilityRow(
                source=SegmenterSource.PHANTOM,
                dice=(interval(0.702, 0.025), interval(0.688, 0.025)),
                mean=interval(0.695, 0.025),
                patients=331.0,
                exact=False,
                sites=SITES[:2],
            ),
        ),
        not_measured=(
            NotMeasured(source=SegmenterSource.PHANTOM, site="site-3", reason="no reply before the deadline"),
        ),
        epsilon_nonmembers=2.0,
        training_steps=150,
    )


def example_audit(leak: float, *, everything: bool = False) -> AuditResult:
    """Every endpoint on 910 members and 490 non-members."""
    endpoints = tuple(_endpoint(name, leak, seed) for seed, name in enumerate(Endpoint))
    leaking = leak > 0.5
    found = AuditResult(
        verdict=Verdict.FAIL if leaking else Verdict.PASS,
        reasons=("near_copy: members are told from non-members, AUC at least 0.71",) if leaking else (),
        endpoints=endpoints,
        sites=SITES,
        members=MEMBERS,
        nonmembers=NONMEMBERS,
        epsilon_members=2.0,
        epsilon_nonmembers=4.0,
        false_positive_rate=0.01,
        confidence=0.95,
        thresholds=AuditThresholds(
            max_auc=0.6,
            max_auc_site=0.7,
            max_tpr=0.06,
            max_detectable_copies=0.05,
            max_inference_lift=0.05,
            max_blind_auc=0.55,
        ),
        plan_digest=DIGEST,
        weights_digest=DIGEST,
    )
    return _with_everything(found) if everything else found


def _with_everything(found: AuditResult) -> AuditResult:
    """All that a plan may ask for beside the endpoints."""
    bound = EpsilonBound(
        method="Clopper–Pearson, split threshold",
        assumption="",
        value=Bound(value=0.31, side=Side.LOWER, confidence=0.95),
        ceiling=4.87,
        delta=1e-4,
    )
    return replace(
        found,
        endpoints=tuple(replace(endpoint, epsilon_lower=bound) for endpoint in found.endpoints),
        inference=AttributeInference(
            question="Is the labelled structure larger than the median of the synthetic ones?",
            members=interval(0.612, 0.03),
            nonmembers=interval(0.604, 0.04),
            lift=interval(0.008, 0.05),
            lower=Bound(value=-0.033, side=Side.LOWER, confidence=0.95),
            upper=Bound(value=0.049, side=Side.UPPER, confidence=0.95),
        ),
        blind=BlindBaseline(auc=interval(0.503, 0.03), passed=True),
        critic=CriticControl(sites=3, found=1, epsilon=1.0, share=interval(0.14, 0.5)),
        mechanism=MechanismAudit(
            verdict=MechanismVerdict.CONSISTENT,
            canaries=3000,
            guesses=300,
            correct=203,
            claimed_epsilon=6.0,
            delta=1e-4,
            bounds=(
                replace(bound, method="one run, any mechanism", ceiling=6.4),
                replace(bound, method="one run, f-DP", assumption="the accountant's own trade-off curve", ceiling=9.1),
            ),
            without_noise=6.4,
            reasons=(),
        ),
    )


def example_decision(
    study: Study,
    *,
    outcome: Outcome,
    simulated: bool,
    coarser: tuple[str, ...],
    reasons: tuple[str, ...],
    audit: AuditResult | None,
) -> DecisionFacts:
    """What the gate would say."""
    sites = {
        site: SiteFacts(
            members=_spent(8.0 - 0.1 * i),
            nonmembers=_spent(6.0, accountant="pure"),
            rounds=12 - (site == "site-3"),
            holdout_commitment=f"{i + 1}a" * 32,
            policy_digest=DIGEST,
            code_digest=DIGEST,
            ledger_head=f"{i + 1}c" * 32,
        )
        for i, site in enumerate(SITES)
    }
    stated = (
        None
        if audit is None
        else AuditFacts(
            verdict=audit.verdict.value,
            reasons=audit.reasons,
            bounds=(AuditBound(name="near_copy auc", estimate=0.5, lower=0.47, upper=0.53, threshold=0.6),),
            confidence=0.95,
            smallest_detectable_copies=audit.smallest_detectable_copies,
            controls_caught=audit.controls_caught,
            plan_digest=DIGEST,
            result_digest=DIGEST,
        )
    )
    return DecisionFacts(
        outcome=outcome,
        reasons=reasons,
        policies=("epsilon-within", "audit-passed", "controls-caught", "power-sufficient", "sites-stated"),
        study=study.study,
        study_digest=DIGEST,
        simulated=simulated,
        coarser=coarser,
        sites=sites,
        audit=stated,
        generator_digest=DIGEST,
        candidates_digest="7d" * 32,
    )


def interval(estimate: float, half: float) -> Interval:
    return Interval(low=estimate - half, estimate=estimate, high=estimate + half, confidence=0.95)


def _spent(epsilon: float, accountant: str = "prv") -> CohortEpsilon:
    return CohortEpsilon(
        epsilon=epsilon,
        lower=epsilon - 0.01,
        upper=epsilon + 0.01,
        delta=1e-4,
        accountant=accountant,
        second_opinion=epsilon * 1.06,
    )


def _endpoint(name: Endpoint, leak: float, seed: int) -> EndpointResult:
    rng = np.random.default_rng(seed)
    edges = default_edges()
    counts = {
        "member_a": _counts(rng.normal(0.42 + 0.16 * leak, 0.16, MEMBERS // 2), rng),
        "member_b": _counts(rng.normal(0.42 + 0.16 * leak, 0.16, MEMBERS // 2), rng),
        "nonmember": _counts(rng.normal(0.42, 0.16, NONMEMBERS), rng),
        "planted": _counts(np.concatenate([rng.normal(0.42, 0.16, NONMEMBERS - 25), rng.normal(1.7, 0.3, 25)]), rng),
    }
    members = np.array(counts["member_a"]) + np.array(counts["member_b"])
    found = np.append(0, np.cumsum(members[::-1])) / members.sum()
    accused = np.append(0, np.cumsum(counts["nonmember"][::-1])) / sum(counts["nonmember"])
    auc = float(np.trapezoid(found, accused))
    tpr = float(np.interp(0.01, accused, found))
    return EndpointResult(
        name=name,
        edges=edges,
        members=MEMBERS,
        nonmembers=NONMEMBERS,
        auc=interval(auc, 0.033),
        auc_lower=Bound(value=auc - 0.028, side=Side.LOWER, confidence=0.95),
        auc_upper=Bound(value=auc + 0.028, side=Side.UPPER, confidence=0.95),
        sites=tuple(
            SiteAuc(
                site=site,
                members=303,
                nonmembers=163,
                auc=interval(auc + shift, 0.06),
                lower=Bound(value=auc + shift - 0.05, side=Side.LOWER, confidence=0.95),
                upper=Bound(value=auc + shift + 0.05, side=Side.UPPER, confidence=0.95),
            )
            for site, shift in zip(SITES, (0.01, -0.02, 0.0), strict=True)
        ),
        tpr=interval(tpr, 0.016),
        tpr_lower=Bound(value=tpr - 0.014, side=Side.LOWER, confidence=0.95),
        tpr_upper=Bound(value=tpr + 0.022, side=Side.UPPER, confidence=0.95),
        copies_lower=Bound(value=-0.01 + 0.2 * leak, side=Side.LOWER, confidence=0.99),
        copies_upper=Bound(value=0.021 + 0.3 * leak, side=Side.UPPER, confidence=0.95),
        set_membership=tuple(
            SetMembership(site=site, p_value=p) for site, p in zip(SITES, (0.38, 0.71, 0.5), strict=True)
        ),
        epsilon_lower=None,
        roc=tuple(
            RocPoint(false_positive_rate=a, true_positive_rate=f, low=f - 0.03, high=f + 0.03)
            for a, f in zip(np.maximum.accumulate(accused), found, strict=True)
        ),
        histograms=tuple(PooledHistogram(group=group, counts=c) for group, c in counts.items()),
        null=NullControl(auc=interval(0.497, 0.045), passed=True),
        planted=PlantedControl(
            planted_fraction=0.05,
            tpr=interval(0.058, 0.02),
            tpr_lower=Bound(value=0.04, side=Side.LOWER, confidence=0.95),
            excess_lower=Bound(value=0.021, side=Side.LOWER, confidence=0.99),
            detected=True,
        ),
        power=Power(probability=0.9, planned=0.031, achieved=0.036),
    )


def _counts(scores: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """Noised counts, as sites send them."""
    bins = np.histogram(scores, bins=[-np.inf, *default_edges(), np.inf])[0]
    return tuple(int(c) for c in bins + rng.integers(-2, 3, len(bins)))


VARIANTS: Mapping[str, dict[str, Any]] = {
    "release": {},
    "reject": {
        "outcome": Outcome.REJECT,
        "simulated": False,
        "leak": 1.2,
        "reasons": ("the audit shows a leak: near_copy AUC is at least 0.71, the study allows 0.60",),
    },
    "inconclusive": {
        "outcome": Outcome.INCONCLUSIVE,
        "coarser": (
            "release.max_auc is 0.7; the default is 0.6",
            "audit.false_positive_rate is 0.05; the default is 0.01",
        ),
        "reasons": ("the smallest fraction of copies the audit could have seen is 11.0%; the study asks for 5.0%",),
    },
}

REPORTS: Mapping[str, Callable[[], ReportFacts]] = {
    **{name: partial(example_facts, **settings) for name, settings in VARIANTS.items()},
    "everything": partial(example_facts, everything=True),
    "no audit": partial(example_facts, audited=False, outcome=Outcome.INCONCLUSIVE),
    "alone": example_audit_alone,
    "exact": partial(example_audit_alone, exact=True),
}


@cache
def rendered(name: str) -> str:
    """The page of one of `REPORTS`; drawing it takes seconds."""
    return render_report(REPORTS[name]())
