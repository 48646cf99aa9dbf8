"""A tiny study whose evidence lets a release pass; tests change one thing and see the gate close."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from signed_evidence import AUDIT_PLAN_DIGEST, SITES, receipts_of, record_campaign, with_receipt

from common.evidence.chain import EvidenceChain
from common.evidence.predicate import Outcome
from common.evidence.signing import create_signing_key
from common.generator.network import build_generator, weights_of
from common.generator.sampling import sample_pairs
from common.generator.weights import Weights
from common.measure.audit_plan import Endpoint
from common.measure.intervals import Bound, Interval, Side
from common.privacy.mechanism import DpSgd, NoisedCounts, Plan
from common.settings.load import study_digest
from common.settings.study import Study
from server.audit.result import (
    AttributeInference,
    AuditResult,
    AuditThresholds,
    BlindBaseline,
    EndpointResult,
    MechanismAudit,
    MechanismVerdict,
    NullControl,
    PlantedControl,
    Power,
    SiteAuc,
    Verdict,
)
from server.release.bundle import Dossier, write_candidates, write_refusal, write_release
from server.release.evidence import ReleaseEvidence, SiteStatement, Spending
from server.release.gate import decide
from server.release.policies import default_policies
from tests.tiny_studies import tiny_study

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
ROUND = DpSgd(noise_multiplier=1.5, sampling_probability=0.1, steps=10)


@pytest.fixture(scope="session")
def study() -> Study:
    return tiny_study(
        grid={"spacing_mm": (1.0, 1.0, 2.0)},
        intensity={"kind": "window", "low": 0.0, "high": 1.0},
        privacy={"target_epsilon": 3.0, "delta": 1e-4, "reference_patients": 100, "epsilon_cap": 8.0},
        training={"rounds": 2, "critic_steps_per_round": 10},
        release={"volumes": 2},
        audit={"volumes": 10_000, "inversion_steps": 10, "canaries": 400},  # as by default: nothing here is coarser
    )


@pytest.fixture(scope="session")
def generator_weights(study: Study) -> Weights:
    return weights_of(build_generator(study, seed=3))


def upper(value: float) -> Bound:
    return Bound(value=value, side=Side.UPPER, confidence=0.95)


def lower(value: float) -> Bound:
    return Bound(value=value, side=Side.LOWER, confidence=0.95)


def interval(low: float, estimate: float, high: float) -> Interval:
    return Interval(low=low, estimate=estimate, high=high, confidence=0.95)


def passing_endpoint(name: Endpoint) -> EndpointResult:
    auc = interval(0.46, 0.5, 0.54)
    site_aucs = tuple(
        SiteAuc(site=site, members=400, nonmembers=200, auc=auc, lower=lower(0.45), upper=upper(0.56)) for site in SITES
    )
    return EndpointResult(
        name=name,
        edges=(0.0, 1.0),
        members=800,
        nonmembers=400,
        auc=auc,
        auc_lower=lower(0.46),
        auc_upper=upper(0.54),
        sites=site_aucs,
        tpr=interval(0.0, 0.01, 0.04),
        tpr_lower=lower(0.0),
        tpr_upper=upper(0.04),
        copies_lower=lower(-0.01),
        copies_upper=upper(0.03),
        set_membership=(),
        epsilon_lower=None,
        roc=(),
        histograms=(),
        null=NullControl(auc=auc, passed=True),
        planted=PlantedControl(
            planted_fraction=0.05,
            tpr=interval(0.03, 0.06, 0.09),
            tpr_lower=lower(0.03),
            excess_lower=lower(0.01),
            detected=True,
        ),
        power=Power(probability=0.9, planned=0.03, achieved=0.04),
    )


@pytest.fixture(scope="session")
def evidence(study: Study, generator_weights: Weights) -> ReleaseEvidence:
    """Evidence to which no default policy objects."""
    plan = Plan(
        mechanism=replace(ROUND, steps=20),
        clip_norm=1.0,
        divisor=10.0,
        steps_per_round=10,
        rounds=2,
        target_epsilon=3.0,
        delta=1e-4,
    )
    statements = {
        site: SiteStatement(
            study_digest=study_digest(study),
            rounds=2,
            members=Spending(mechanisms=(ROUND, ROUND, NoisedCounts(epsilon=1.0)), delta=1e-4),
            nonmembers=Spending(mechanisms=(NoisedCounts(epsilon=2.0),), delta=1e-4),
            holdout_commitment=str(index) * 64,
            policy_digest="a" * 64,
            code_digest="b" * 64,
            ledger_head="c" * 64,
            simulated=True,
        )
        for index, site in enumerate(SITES)
    }
    statements = {s: with_receipt(s, stated, study, generator_weights.digest) for s, stated in statements.items()}
    limits = study.release
    audit = AuditResult(
        verdict=Verdict.PASS,
        reasons=(),
        endpoints=tuple(passing_endpoint(name) for name in Endpoint),
        inference=AttributeInference(
            question="is it so",
            members=interval(0.87, 0.9, 0.93),
            nonmembers=interval(0.87, 0.9, 0.93),
            lift=interval(-0.02, 0.0, 0.02),
            lower=lower(-0.02),
            upper=upper(0.02),
        ),
        blind=BlindBaseline(auc=interval(0.47, 0.5, 0.53), passed=True),
        mechanism=MechanismAudit(
            verdict=MechanismVerdict.CONSISTENT,
            canaries=800,
            guesses=200,
            correct=110,
            claimed_epsilon=3.0,
            delta=1e-4,
            bounds=(),
            without_noise=6.0,
            reasons=(),
        ),
        sites=SITES,
        members=800,
        nonmembers=400,
        epsilon_members=1.0,
        epsilon_nonmembers=2.0,
        false_positive_rate=study.audit.false_positive_rate,
        confidence=study.audit.confidence,
        thresholds=AuditThresholds(**{field.name: getattr(limits, field.name) for field in fields(AuditThresholds)}),
        plan_digest=AUDIT_PLAN_DIGEST,
        weights_digest=generator_weights.digest,
    )
    return ReleaseEvidence(
        study=study,
        plan=plan,
        sites=SITES,
        statements=statements,
        audit=audit,
        simulated=True,
        generator_digest=generator_weights.digest,
        candidates_digest="e" * 64,
    )


@pytest.fixture
def change_audit() -> Callable[..., ReleaseEvidence]:
    """The same evidence with fields of the audit, or of its first endpoint, replaced."""

    def change(evidence: ReleaseEvidence, *, endpoint: dict[str, Any] | None = None, **fields: Any) -> ReleaseEvidence:
        audit = evidence.audit
        assert audit is not None
        if endpoint:
            fields["endpoints"] = (replace(audit.endpoints[0], **endpoint), *audit.endpoints[1:])
        return replace(evidence, audit=replace(audit, **fields))

    return change


@pytest.fixture
def change_site() -> Callable[..., ReleaseEvidence]:
    """The same evidence with fields of site-1's statement replaced."""

    def change(evidence: ReleaseEvidence, **fields: Any) -> ReleaseEvidence:
        changed = replace(evidence.statements["site-1"], **fields)
        return replace(evidence, statements={**evidence.statements, "site-1": changed})

    return change


@pytest.fixture(scope="session")
def synthetic(study: Study) -> Any:
    """(2, 1+K, D, H, W) volumes of the generator that is released."""
    return sample_pairs(build_generator(study, seed=3).eval(), seed=1, first=0, count=2)


Publish = Callable[..., Path]


@pytest.fixture(scope="session")
def publish(study: Study, generator_weights: Weights, synthetic: Any) -> Publish:
    """publish(run, evidence, now): candidates, decision and the signed outcome in RUN/release."""

    def write(run: Path, evidence: ReleaseEvidence, now: datetime = NOW) -> Path:
        candidates = run / "candidates"
        digest = write_candidates(candidates, iter(synthetic), study)
        decision = decide(replace(evidence, candidates_digest=digest), default_policies(evidence.study))
        page = f"<html><body>{decision.id}</body></html>"
        receipts = receipts_of(evidence)
        dossier = Dossier(study=evidence.study, decision=decision, report_html=page, receipts=receipts)
        chain = EvidenceChain(run / "evidence.jsonl")
        record_campaign(chain, evidence, now)
        key = create_signing_key(run / "auditor.key")
        target = run / "release"
        if decision.outcome is Outcome.RELEASE:
            write_release(
                target,
                dossier=dossier,
                candidates=candidates,
                generator=generator_weights,
                chain=chain,
                key=key,
                now=now,
            )
        else:
            write_refusal(target, dossier=dossier, chain=chain, key=key, now=now)
        return target

    return write


@pytest.fixture(scope="session")
def released(publish: Publish, evidence: ReleaseEvidence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release; read it or copy it, never change it."""
    return publish(tmp_path_factory.mktemp("released"), evidence)


@pytest.fixture(scope="session")
def refused(publish: Publish, evidence: ReleaseEvidence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed refusal: nobody audited; read it or copy it, never change it."""
    return publish(tmp_path_factory.mktemp("refused"), replace(evidence, audit=None))
