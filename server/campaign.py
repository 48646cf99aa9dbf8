"""One study from enrolment to a signed outcome.

(1) warm start on public phantoms; its digest goes into every enrolment
(2) enrolment: who takes part, hold-outs committed; the audit's plan fixed
(3) warm-up, where the study has one: noised sums of public features, and the public start fitted to them
(4) rounds; where the study follows the course of training, points between them, and after the last one the choice of
    the round that everything below is about; for an ensemble, one student distilled from the sites' own generators
(5) canaries: did training deliver the epsilon it claims; audit: scores, then verdict
(6) candidates drawn and quarantined
(7) utility
(8) statements: what each site's ledger says after its last answer
(9) gate
(10) report, and the signed release or refusal
(11) simulation only, after everything is signed: segmenters trained on real members, for comparison

Each stage leaves its result on disk and is read back from there, so a killed coordinator goes on where it was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import IntegrityError
from common.evidence.atomic import write_atomic
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import ENROLMENT_RECORD, CohortEpsilon, DecisionFacts, Outcome
from common.generator.network import read_weights, save_weights
from common.generator.weights import Weights
from common.measure.audit_plan import AuditPlan
from common.privacy.calibration import plan_of
from common.privacy.mechanism import Plan
from common.privacy.mechanism_json import mechanism_json
from common.settings.load import study_digest
from common.settings.study import Strategy, Study
from common.telemetry.events import CampaignStarted, Observer, StageFinished
from server.audit.result import MechanismAudit
from server.audit_stage import AuditFolder, Question, conduct_audit, fix_plan
from server.checkpoint import Checkpoint, CheckpointStore
from server.course_stage import CourseStage, read_course
from server.distillation import DISTILLATION_RECORD, distillation
from server.enrolment import Enrolment, enrol, enrolment_from
from server.evidence_log import append_once, last_record
from server.mechanism_stage import CANARIES_RECORD, conduct_mechanism_audit, has_claim_to_check
from server.pretrain import WarmStart, warm_start
from server.release.bundle import record_decision
from server.release_stage import (
    Trained,
    candidates_seed,
    decide_release,
    publish,
    quarantine_candidates,
    statements_of,
    utility_of,
    write_report,
)
from server.round import TrainingCampaign, hold_rounds
from server.run_folder import RunFolder, RunState, read_decision
from server.seeds import derive
from server.sites import RoundSites
from server.utility import with_real
from server.warm_up import WARM_UP_RECORD, WarmedUp, warm_up
from server.witness import WitnessedSites

# Sites count equally whatever their size: exact counts are private, and no study states other weights yet.
EQUAL_WEIGHT: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class CampaignOutcome:
    """How a campaign ended. sites: epsilon of members and non-members by site, from the ledgers' statements."""

    outcome: Outcome
    reasons: tuple[str, ...]
    decision_id: str
    generator_digest: str
    simulated: bool
    sites: Mapping[str, tuple[CohortEpsilon, CohortEpsilon]]
    release: Path
    report: Path

    @classmethod
    def of(cls, facts: DecisionFacts, run: RunFolder) -> CampaignOutcome:
        """From the decision in the signed outcome."""
        return cls(
            outcome=facts.outcome,
            reasons=facts.reasons,
            decision_id=facts.id,
            generator_digest=facts.generator_digest,
            simulated=facts.simulated,
            sites={name: (site.members, site.nonmembers) for name, site in facts.sites.items()},
            release=run.release,
            report=run.report,
        )


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What every stage needs. sites: with the heads of their ledgers. key: countersigns those and signs the outcome."""

    study: Study
    sites: WitnessedSites
    key: Ed25519PrivateKey
    run: RunFolder
    seed: int
    observer: Observer
    now: Callable[[], datetime]

    @property
    def chain(self) -> EvidenceChain:
        """The run's evidence; the object holds no state of its own."""
        return EvidenceChain(self.run.evidence)

    @property
    def simulated(self) -> bool:
        """Whether the run as such is a simulation."""
        return self.run.facts.simulated

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a stage; the block says how it ended."""
        began = time.monotonic()
        words = ["done"]
        yield words.append
        self.observer(StageFinished(stage=name, outcome=words[-1], seconds=round(time.monotonic() - began, 3)))


def run_campaign(
    study: Study,
    sites: RoundSites,
    run: RunFolder,
    *,
    seed: int,
    observer: Observer,
    now: Callable[[], datetime],
) -> CampaignOutcome:
    """Stages (1) to (10), or what is left of them. The caller holds the run folder's lock.

    Raises Unreachable when too few sites enrol or train, IntegrityError when something on disk is damaged,
    SettingsError when the privacy target cannot be met; the run can be resumed after all of them but the last.
    """
    if run.facts.state is RunState.FINISHED or run.release.exists():
        return _finish(run)
    key = run.signing_key()
    watched = WitnessedSites(sites, study_digest=study_digest(study), key=key, file=run.witness)
    campaign = Campaign(study=study, sites=watched, key=key, run=run, seed=seed, observer=observer, now=now)
    plan = plan_of(study)
    _record_beginning(campaign, plan)
    public = _warm_start(campaign)  # (1)
    enrolment = _enrol(campaign, public)  # (2)
    fixed = fix_plan(  # what decides the verdict stands before any patient is looked at
        study, AuditFolder(path=run.audit), enrolment.names, key=key, chain=campaign.chain, now=now
    )
    warmed = _warm_up(campaign, plan, public, enrolment)  # (3)
    trained = _train(campaign, plan, public, enrolment, warmed)  # (4)
    _audit_and_decide(campaign, trained, public, fixed)  # (5) to (10)
    return _finish(run)


def _record_beginning(campaign: Campaign, plan: Plan) -> None:
    facts = campaign.run.facts
    append_once(
        campaign.chain,
        "campaign",
        {
            "study": campaign.study.study,
            "study_digest": facts.study_digest,
            "sites": list(facts.sites),
            "engine": facts.engine.value,
            "simulated": facts.simulated,
            "seed": campaign.seed if facts.simulated else None,
            "mechanism": mechanism_json(plan.mechanism),
            "warm_up": mechanism_json(plan.warm_up) if plan.warm_up else None,
            "clip_norm": plan.clip_norm,
            "divisor": plan.divisor,
            "code_version": version("consilium"),
        },
        campaign.now,
    )


def _warm_start(campaign: Campaign) -> WarmStart:
    """Stage (1), from disk when it is there: it depends on the study and the seed alone."""
    folder = campaign.run.warm_start
    generator, critic = folder / "generator.safetensors", folder / "critic.safetensors"
    with campaign.stage("warm start") as ended:
        if generator.exists() and critic.exists():
            public = WarmStart(generator=read_weights(generator), critic=read_weights(critic))
            ended("read back")
        else:
            public = warm_start(campaign.study, derive(campaign.seed, "warm start"), campaign.observer)
            save_weights(generator, public.generator)
            save_weights(critic, public.critic)
        body = {"generator_digest": public.generator.digest, "critic_digest": public.critic.digest}
        append_once(campaign.chain, "warm-start", body, campaign.now)
    return public


def _enrol(campaign: Campaign, public: WarmStart) -> Enrolment:
    """Stage (2), from the evidence when it is there: participants never change within a run."""
    record = last_record(campaign.chain, ENROLMENT_RECORD)
    with campaign.stage("enrolment") as ended:
        if record is not None:
            enrolment = enrolment_from(record, study_digest(campaign.study))
            if record.body.get("coordinator_key") != campaign.sites.public_key:
                raise IntegrityError(
                    f"{campaign.run.auditor_key} is not the key that the sites enrolled with; no site was asked. "
                    "Restore it: the sites believe no other."
                )
        else:
            enrolment = enrol(
                campaign.study,
                campaign.sites,
                public_generator=public.generator,
                public_critic=public.critic,
                coordinator_key=campaign.sites.public_key,
                chain=campaign.chain,
                now=campaign.now,
            )
        ended(f"{len(enrolment.names)} of {len(campaign.sites.names)} sites")
    return enrolment


def _warm_up(campaign: Campaign, plan: Plan, public: WarmStart, enrolment: Enrolment) -> WarmedUp | None:
    """Stage (3), from disk as far as it is there; None for a study without a warm-up."""
    if plan.warm_up is None:
        return None
    with campaign.stage(WARM_UP_RECORD) as ended:
        warmed = warm_up(
            campaign.study,
            plan,
            campaign.sites,
            campaign.run.warm_up,
            participants=enrolment.names,
            start=public.generator,
            seed=derive(campaign.seed, WARM_UP_RECORD),
            chain=campaign.chain,
            observer=campaign.observer,
            now=campaign.now,
        )
        ended(f"{len(warmed.sums)} of {len(enrolment.names)} sites")
    return warmed


def _train(campaign: Campaign, plan: Plan, public: WarmStart, enrolment: Enrolment, warmed: WarmedUp | None) -> Trained:
    """Stage (4)."""
    digest = study_digest(campaign.study)
    kept = campaign.study.course.rounds(plan.rounds) if campaign.study.course else ()
    store = CheckpointStore(campaign.run.checkpoints, study_digest=digest, kept=kept)
    course = _course(campaign, plan, store, enrolment, warmed)
    campaign.observer(
        CampaignStarted(
            study=campaign.study.study,
            sites=len(enrolment.names),
            rounds=plan.rounds,
            first_round=len(store.rounds()) + 1,
            simulated=campaign.simulated or enrolment.simulated,
        )
    )
    with campaign.stage("training") as ended:
        last = hold_rounds(
            TrainingCampaign(
                study=campaign.study,
                study_digest=digest,
                plan=plan,
                participants=enrolment.names,
                site_weights=dict.fromkeys(enrolment.names, EQUAL_WEIGHT),
                sites=campaign.sites,
                store=store,
                chain=campaign.chain,
                observer=campaign.observer,
                now=campaign.now,
            ),
            warmed.generator if warmed else public.generator,
            after=course.after if course else lambda _: None,
        )
        ended(f"{last.record.round} rounds")
    trained = Trained(
        study=campaign.study,
        plan=plan,
        enrolment=enrolment,
        generator=last.average,
        rounds=tuple(store.records()),
        released=tuple(warmed.sums) if warmed else (),
    )
    if course is not None:
        return _chosen(campaign, course, last, trained)
    return replace(trained, generator=_distilled(campaign, trained, last, public))


def _course(
    campaign: Campaign, plan: Plan, store: CheckpointStore, enrolment: Enrolment, warmed: WarmedUp | None
) -> CourseStage | None:
    if campaign.study.course is None:
        return None
    return CourseStage(
        study=campaign.study,
        settings=campaign.study.course,
        plan=plan,
        sites=campaign.sites,
        run=campaign.run,
        store=store,
        participants=enrolment.names,
        released=frozenset(warmed.sums) if warmed else frozenset(),
        seed=campaign.seed,
        chain=campaign.chain,
        observer=campaign.observer,
        now=campaign.now,
    )


def _chosen(campaign: Campaign, course: CourseStage, last: Checkpoint, trained: Trained) -> Trained:
    """The end of stage (4): the training as it stood at the chosen round."""
    with campaign.stage("course") as ended:
        at, chosen = course.choose(last)
        seconds, share = course.share_of_time()
        how = "chosen" if chosen.row is not None else "kept, because the rule allows no point"
        ended(f"round {at.record.round} {how}; points took {seconds:.1f} s, {share:.1%} of the time with training")
    measured = read_course(campaign.run)
    return replace(trained, generator=at.average, chosen_round=at.record.round, course=measured, chosen=chosen)


def _distilled(campaign: Campaign, trained: Trained, last: Checkpoint, public: WarmStart) -> Weights:
    """The end of stage (4): what is audited, from disk when it is there."""
    if campaign.study.federation.strategy is Strategy.FEDAVG:
        return trained.generator
    # A site that missed every fine-tune round speaks through the common generator, which it helped to train.
    generators = {name: last.own.get(name, last.weights) for name in trained.trainers}
    with campaign.stage(DISTILLATION_RECORD) as ended:
        student = distillation(
            campaign.study,
            generators,
            campaign.run.distillation,
            common=last.average,
            public=public,
            site_weights=dict.fromkeys(generators, EQUAL_WEIGHT),
            seed=derive(campaign.seed, DISTILLATION_RECORD),
            chain=campaign.chain,
            observer=campaign.observer,
            now=campaign.now,
        )
        ended(f"of {len(generators)} generators")
    return student


def _guess_canaries(campaign: Campaign, trained: Trained) -> MechanismAudit | None:
    """The first half of stage (5); None for a study that has nothing to refute."""
    if not has_claim_to_check(trained.study, trained.plan):
        return None
    with campaign.stage(CANARIES_RECORD) as ended:
        mechanism = conduct_mechanism_audit(
            trained.study,
            trained.plan,
            campaign.sites,
            campaign.run.audit,
            participants=trained.trainers,
            chain=campaign.chain,
            now=campaign.now,
        )
        ended(mechanism.verdict.value)
    return mechanism


def _audit_and_decide(campaign: Campaign, trained: Trained, public: WarmStart, fixed: AuditPlan) -> None:
    """Stages (5) to (11)."""
    run, chain, now = campaign.run, campaign.chain, campaign.now
    mechanism = _guess_canaries(campaign, trained)  # (5)
    with campaign.stage("audit") as ended:
        audit = conduct_audit(
            trained.study,
            campaign.sites,
            AuditFolder(path=run.audit),
            Question(
                plan=fixed,
                participants=trained.participants,
                generator=trained.generator,
                reference=public.generator,
                seed=candidates_seed(campaign.seed),
            ),
            mechanism=mechanism,
            chain=chain,
            now=now,
        )
        ended(audit.verdict.value)
    with campaign.stage("candidates"):  # (6)
        candidates = quarantine_candidates(
            trained, run, seed=campaign.seed, chain=chain, observer=campaign.observer, now=now
        )
    with campaign.stage("utility"):  # (7)
        utility = utility_of(
            trained, campaign.sites, run, seed=campaign.seed, chain=chain, observer=campaign.observer, now=now
        )
    with campaign.stage("release") as ended:
        answers = AuditFolder(path=run.audit).answers()
        statements = statements_of(trained, campaign.sites, answers=answers, chain=chain, now=now)  # (8)
        decision = decide_release(  # (9)
            trained,
            statements=statements,
            audit=audit,
            simulated=campaign.simulated or trained.enrolment.simulated,
            candidates=candidates,
        )
        record_decision(chain, decision, now())  # (10) first: the page shows the digest of the chain that holds it
        page = partial(
            write_report, trained, run, decision, statements=statements, audit=audit, seed=campaign.seed, chain=chain
        )
        publish(
            trained,
            run,
            decision,
            statements=statements,
            report=page(utility=utility, now=now()),
            utility=utility,
            chain=chain,
            key=campaign.key,
            now=now(),
        )
        ended(decision.outcome.value)
    if utility is not None and run.facts.simulated:
        with campaign.stage("comparison"):  # (11) exact answers: never in what was signed, never in a real study
            compared = with_real(trained.study, campaign.sites, utility, seed=derive(campaign.seed, "segmenter"))
            write_atomic(run.path / "comparison.json", compared.to_json().encode())
            page(utility=compared, now=now())


def _finish(run: RunFolder) -> CampaignOutcome:
    """The outcome as it was signed, and a run that says it is finished."""
    facts = read_decision(run.release)
    if facts.outcome is Outcome.RELEASE and run.candidates.exists():
        shutil.rmtree(run.candidates)  # a kill right after the release was written left them in quarantine
    if run.facts.state is not RunState.FINISHED:
        run.finish(facts.outcome.value)
    return CampaignOutcome.of(facts, run)
