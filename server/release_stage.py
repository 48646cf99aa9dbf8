"""From a finished training to a signed outcome: candidates, utility, statements, gate, report, bundle.

Every function reads back what an earlier attempt left, so a killed coordinator repeats nothing that counts.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from itertools import chain as joined
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.adversary.critic import build_critic
from common.errors import IntegrityError
from common.evidence.atomic import write_atomic
from common.evidence.canonical import Json, sha256_hex
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import STATEMENTS_RECORD, Outcome
from common.evidence.verification import DECISION, EVIDENCE
from common.generator.network import StudyGenerator, generator_from
from common.generator.sampling import sample_batches, sample_pairs
from common.generator.weights import Weights
from common.phantom.draw import public_phantoms
from common.privacy.mechanism import Plan
from common.privacy.mechanism_json import mechanism_json
from common.protocol.messages import StatementOrder, StatementReply
from common.settings.load import study_digest
from common.settings.study import Study
from common.telemetry.events import Observer
from server.audit.facts import AuditedScans, CampaignFacts, Gallery, ReportFacts, RoundCourse
from server.audit.json_report import report_json
from server.audit.mapping import AUDIT_PLAN, AUDIT_RESULT
from server.audit.report import render_markdown, render_report, render_summary
from server.audit.result import AuditResult
from server.audit_stage import Answers
from server.checkpoint import RoundRecord
from server.course import Chosen, Course
from server.enrolment import Enrolment
from server.evidence_log import append_once, last_record
from server.federation_epsilon import FederationEpsilon, federation_epsilon
from server.release.bundle import (
    Dossier,
    candidates_digest,
    write_candidates,
    write_refusal,
    write_release,
)
from server.release.evidence import ReleaseEvidence, SiteStatement
from server.release.gate import Decision, decide
from server.release.policies import default_policies
from server.round import training_epsilon
from server.run_folder import RunFolder
from server.seeds import derive
from server.sites import Sites
from server.utility import UtilityResult, measure_utility

_GALLERY: Final = 4  # volumes shown in the report
# Files that the report may cite, as they are called in a bundle and, but for the decision, in the run.
CITED: Final = {
    DECISION: "the signed decision, in the bundle only",
    EVIDENCE: "what happened, hash-linked: enrolment, audit plan before any answer, statements, decision",
    AUDIT_PLAN: "the audit's plan, fixed before looking",
    AUDIT_RESULT: "the audit's verdict and all numbers it rests on",
}
_VERSIONED: Final = ("consilium", "flwr", "torch", "opacus", "monai", "numpy")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What training left, as the later stages need it.

    generator: what is audited and may be released. rounds: every round held. released: sites whose warm-up was used.
    chosen_round: the round that the generator is of, where the course of training was followed; None for the last one.
    course, chosen: its points, and how the round was chosen.
    """

    study: Study
    plan: Plan
    enrolment: Enrolment
    generator: Weights
    rounds: tuple[RoundRecord, ...]
    released: tuple[str, ...] = ()
    chosen_round: int | None = None
    course: Course | None = None
    chosen: Chosen | None = None

    @property
    def entered(self) -> tuple[RoundRecord, ...]:
        """Rounds that the generator is made of; those after the chosen one are spent, and are not in it."""
        last = math.inf if self.chosen_round is None else self.chosen_round
        return tuple(record for record in self.rounds if record.round <= last)

    @property
    def participants(self) -> tuple[str, ...]:
        """Sites whose replies entered the generator, in the order of the study."""
        used = {*self.released, *joined.from_iterable(record.replies for record in self.entered)}
        return tuple(name for name in self.enrolment.names if name in used)

    @property
    def trainers(self) -> tuple[str, ...]:
        """Those of them whose rounds were used; a warm-up alone has no canaries."""
        return tuple(name for name in self.participants if any(name in record.replies for record in self.rounds))

    @property
    def network(self) -> StudyGenerator:
        """The generator, ready to sample."""
        return generator_from(self.study, self.generator)


def candidates_seed(seed: int) -> int:
    """Latent seed of the candidate volumes: those that sites score begin with those that may be released."""
    return derive(seed, "candidates")


def quarantine_candidates(
    trained: Trained,
    run: RunFolder,
    *,
    seed: int,
    chain: EvidenceChain,
    observer: Observer,
    now: Callable[[], datetime],
) -> str:
    """Draw the volumes that may be released and keep them under quarantine; returns their digest.

    Raises IntegrityError when volumes that were quarantined before have changed.
    """
    drawn_from: dict[str, Json] = {
        "weights_digest": trained.generator.digest,
        "seed": candidates_seed(seed),
        "volumes": trained.study.release.volumes,
    }
    earlier = last_record(chain, "candidates")
    if run.candidates.exists():
        digest = candidates_digest(run.candidates)
        if earlier is not None and earlier.body.get("digest") != digest:
            raise IntegrityError(
                f"the volumes in {run.candidates} changed after they were quarantined; nothing was released. "
                "Delete that folder and repeat the command to draw them again."
            )
    else:
        batches = sample_batches(
            trained.network, seed=candidates_seed(seed), first=0, count=trained.study.release.volumes
        )
        digest = write_candidates(run.candidates, joined.from_iterable(batches), trained.study, observer)
    append_once(chain, "candidates", {**drawn_from, "digest": digest}, now)
    return digest


def utility_of(
    trained: Trained,
    sites: Sites,
    run: RunFolder,
    *,
    seed: int,
    chain: EvidenceChain,
    observer: Observer,
    now: Callable[[], datetime],
) -> UtilityResult | None:
    """Measure, or read back, how useful the synthetic volumes are; None when the study does not ask for it."""
    study = trained.study
    if study.utility.training_steps == 0:
        return None
    if run.utility.exists():
        try:
            result = UtilityResult.from_json(run.utility.read_text(encoding="utf-8"))
        except ValueError as error:
            raise IntegrityError(
                f"{run.utility} is damaged; nothing was released. Delete it and repeat the command: the sites "
                "answer again from their caches."
            ) from error
    else:
        result = measure_utility(
            study,
            sites,
            synthetic=sample_pairs(trained.network, seed=derive(seed, "utility"), first=0, count=study.utility.volumes),
            phantom=public_phantoms(study, derive(seed, "utility phantoms"), study.utility.volumes),
            seed=derive(seed, "segmenter"),
            observer=observer,
        )
        write_atomic(run.utility, result.to_json().encode())
    append_once(chain, "utility", {"sha256": hashlib.sha256(result.to_json().encode()).hexdigest()}, now)
    return result


def statements_of(
    trained: Trained, sites: Sites, *, answers: Answers | None, chain: EvidenceChain, now: Callable[[], datetime]
) -> dict[str, SiteStatement]:
    """What each participant's ledger says now, after its last answer. A site that does not answer is missing.

    answers: what the sites answered to the audit; each site's receipt must name its own.
    """
    digest = study_digest(trained.study)
    order = StatementOrder(study_digest=digest)
    replies = sites.ask(dict.fromkeys(trained.participants, order), trained.study.federation.deadline_s)
    stated = {name: reply for name, reply in replies.items() if isinstance(reply, StatementReply)}
    body: dict[str, Json] = {
        name: {
            "members": [mechanism_json(m) for m in reply.members],
            "nonmembers": [mechanism_json(m) for m in reply.nonmembers],
            "ledger_head": asdict(reply.ledger_head),
            "receipt": reply.receipt and sha256_hex(reply.receipt.encode()),
        }
        for name, reply in stated.items()
    }
    append_once(chain, STATEMENTS_RECORD, body, now)
    return {
        name: SiteStatement.of(
            name,
            enrolled=trained.enrolment.participants[name],
            stated=reply,
            trained={r.round: r.replies[name] for r in trained.rounds if name in r.replies},
            scored=answers.replies.get(name) if answers else None,
            released=name in trained.released,
            delta=trained.study.privacy.delta,
        )
        for name, reply in stated.items()
    }


def decide_release(
    trained: Trained,
    *,
    statements: Mapping[str, SiteStatement],
    audit: AuditResult,
    simulated: bool,
    candidates: str,
) -> Decision:
    """Ask the gate with every default policy of the study."""
    evidence = ReleaseEvidence(
        study=trained.study,
        plan=trained.plan,
        sites=trained.participants,
        statements=statements,
        audit=audit,
        simulated=simulated,
        generator_digest=trained.generator.digest,
        candidates_digest=candidates,
        course=trained.course,
    )
    return decide(evidence, default_policies(trained.study))


def publish(
    trained: Trained,
    run: RunFolder,
    decision: Decision,
    *,
    statements: Mapping[str, SiteStatement],
    report: str,
    utility: UtilityResult | None,
    chain: EvidenceChain,
    key: Ed25519PrivateKey,
    now: datetime,
) -> None:
    """Write `release/`: the signed bundle, or the signed refusal. The candidates leave quarantine only in a bundle."""
    dossier = Dossier(
        study=trained.study,
        decision=decision,
        report_html=report,
        report_data=run.report_json.read_bytes() if run.report_json.exists() else None,
        utility=utility,
        receipts={name: s.receipt.sealed for name, s in statements.items() if s.receipt and s.receipt.sealed},
        audit=run.audit,
    )
    if decision.outcome is Outcome.RELEASE:
        write_release(
            run.release,
            dossier=dossier,
            candidates=run.candidates,
            generator=trained.generator,
            chain=chain,
            key=key,
            now=now,
        )
    else:
        write_refusal(run.release, dossier=dossier, chain=chain, key=key, now=now)


def write_report(
    trained: Trained,
    run: RunFolder,
    decision: Decision,
    *,
    statements: Mapping[str, SiteStatement],
    audit: AuditResult,
    utility: UtilityResult | None,
    seed: int,
    chain: EvidenceChain,
    now: datetime,
) -> str:
    """Write the run's report as page, Markdown, JSON and summary; returns the page.

    The copy in `release/` is the signed one.
    """
    study = trained.study
    facts = ReportFacts(
        title=study.study,
        purpose=study.purpose,
        audit=audit,
        scans=AuditedScans.of_study(study),
        gallery=Gallery(
            labels=tuple(study.labels[value] for value in sorted(study.labels)),
            synthetic=sample_pairs(trained.network, seed=candidates_seed(seed), first=0, count=_GALLERY),
            phantom=public_phantoms(study, derive(seed, "gallery"), _GALLERY),
        ),
        versions=_versions(),
        made_at=now,
        digests={"Evidence chain, head": chain.head},
        records=CITED,
        campaign=CampaignFacts(
            study=study,
            decision=decision.facts,
            plan=trained.plan,
            utility=utility,
            rounds=_course(trained),
            federation=_federation(statements, trained.plan),
            critic_parameters=sum(p.numel() for p in build_critic(study).parameters()),
            seed=seed if decision.facts.simulated else None,
            course=trained.course,
            chosen=trained.chosen,
        ),
    )
    page = render_report(facts)
    write_atomic(run.report, page.encode())
    write_atomic(run.report_text, render_markdown(facts).encode())
    write_atomic(run.report_json, report_json(facts))
    write_atomic(run.summary, render_summary(facts).encode())
    return page


def _federation(statements: Mapping[str, SiteStatement], plan: Plan) -> FederationEpsilon | None:
    stated = {site: statement.members.mechanisms for site, statement in statements.items()}
    return federation_epsilon(stated, plan.delta) if stated else None


def _course(trained: Trained) -> tuple[RoundCourse, ...]:
    return tuple(
        RoundCourse(
            round=record.round,
            epsilon=training_epsilon(trained.plan, record.round),
            used=tuple(record.replies),
            excluded=record.excluded,
            seconds=record.seconds,
            update_norms=record.update_norms,
        )
        for record in trained.rounds
    )


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _VERSIONED}}
