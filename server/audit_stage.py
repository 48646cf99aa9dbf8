"""The audit as the campaign conducts it: the plan is fixed and recorded before anybody looks, and before training.

`fix_plan`, right after enrolment:
(1) plan made from public settings, written, signed, and its digest put into the evidence chain
`conduct_audit`, after training:
(2) one `ScoreOrder` to every site whose generator went in
(3) validate each answer; store the answers
(4) judge, store the result
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import TypeAdapter

from common.errors import IntegrityError, UsageError
from common.evidence.atomic import write_atomic
from common.evidence.canonical import Json, sha256_hex
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import ANSWERS_RECORD, PLAN_RECORD, QUESTION_RECORD, RESULT_RECORD
from common.evidence.signing import Purpose, seal_json
from common.generator.weights import Weights
from common.measure.audit_plan import AuditPlan, make_plan
from common.privacy.calibration import plan_of
from common.protocol.messages import RefusalReply, Reply, ScoreOrder, ScoreReply
from common.settings.load import study_digest
from common.settings.study import Study
from server.audit.result import AuditResult, MechanismAudit
from server.audit.verdict import judge
from server.evidence_log import append_once
from server.mechanism_stage import rejudge_mechanism
from server.sites import NoReply, Sites

_PROSE: Final = frozenset({"reasons", "question", "method", "assumption"})  # fields of sentences in a result
_SAME_RELATIVE: Final = 1e-6  # of two numbers that were computed from the same answers, on different machines
_SAME_ABSOLUTE: Final = 1e-9


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the sites answered to one plan about one generator. missing: fixed phrase by site that was asked."""

    plan_digest: str
    weights_digest: str
    replies: Mapping[str, ScoreReply]
    missing: Mapping[str, str]

    @property
    def participants(self) -> tuple[str, ...]:
        """Every site that was asked: those whose weights went in."""
        return tuple(sorted({*self.replies, *self.missing}))

    def to_json(self) -> bytes:
        """Canonical JSON."""
        data: bytes = rfc8785.dumps(_ADAPTER.dump_python(self, mode="json"))
        return data

    @classmethod
    def from_json(cls, data: bytes) -> Answers:
        """Read back what `to_json` wrote. Raises ValueError for anything else."""
        return _ADAPTER.validate_json(data)


_ADAPTER = TypeAdapter(Answers)


@dataclass(frozen=True, kw_only=True)
class AuditFolder:
    """`audit/` of a run."""

    path: Path

    @property
    def plan_file(self) -> Path:
        """The plan, fixed before looking."""
        return self.path / "plan.json"

    @property
    def sealed_plan_file(self) -> Path:
        """The plan under the auditor's signature, made before any site was asked to train."""
        return self.path / "plan.dsse.json"

    @property
    def answers_file(self) -> Path:
        """The sites' noised answers."""
        return self.path / "answers.json"

    @property
    def result_file(self) -> Path:
        """The verdict and all it rests on."""
        return self.path / "result.json"

    def plan(self) -> AuditPlan | None:
        """The stored plan. Raises IntegrityError when it is damaged."""
        if not self.plan_file.exists():
            return None
        try:
            return AuditPlan.from_json(self.plan_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise _damaged(self.plan_file) from error

    def answers(self) -> Answers | None:
        """The stored answers. Raises IntegrityError when they are damaged."""
        if not self.answers_file.exists():
            return None
        try:
            return Answers.from_json(self.answers_file.read_bytes())
        except ValueError as error:
            raise _damaged(self.answers_file) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What is audited, by whom, and by which plan.

    participants: sites whose generators went in. reference: the public start. seed: of the candidate volumes.
    """

    plan: AuditPlan
    participants: tuple[str, ...]
    generator: Weights
    reference: Weights
    seed: int


def conduct_audit(
    study: Study,
    sites: Sites,
    folder: AuditFolder,
    question: Question,
    *,
    mechanism: MechanismAudit | None = None,
    chain: EvidenceChain,
    now: Callable[[], datetime],
) -> AuditResult:
    """Steps (2) to (4). What is already on disk is not asked again; a site would answer from its cache anyway.

    mechanism: what the canaries told, to stand in the result beside the rest.
    """
    participants, generator, plan = question.participants, question.generator, question.plan
    asked: dict[str, Json] = {
        "plan_digest": plan.digest,
        "weights_digest": generator.digest,
        "reference_digest": question.reference.digest,
        "seed": question.seed,
    }
    append_once(chain, QUESTION_RECORD, asked, now)

    answers = folder.answers()
    if not _complete(answers, plan, generator, participants):
        order = ScoreOrder(  # (2)
            study_digest=study_digest(study),
            weights=generator,
            weights_digest=generator.digest,
            reference_digest=question.reference.digest,
            audit_plan_json=plan.to_json(),
            audit_plan_digest=plan.digest,
            seed=question.seed,
            volumes=plan.volumes,
        )
        replies = sites.ask(dict.fromkeys(participants, order), study.federation.deadline_s)
        answers = _sorted_out(replies, order)  # (3)
        write_atomic(folder.answers_file, answers.to_json())
    assert answers is not None  # noqa: S101  # for mypy: `_complete` refuses None
    stored = hashlib.sha256(answers.to_json()).hexdigest()
    append_once(chain, ANSWERS_RECORD, {"sha256": stored, "missing": dict(answers.missing)}, now)

    judged = judge(plan, answers.replies, study.release, participants=participants)  # (4)
    result = replace(judged, mechanism=mechanism)
    write_atomic(folder.result_file, result.to_json().encode())
    append_once(chain, RESULT_RECORD, {"verdict": result.verdict.value, "result_digest": result.digest}, now)
    return result


def fix_plan(
    study: Study,
    folder: AuditFolder,
    enrolled: tuple[str, ...],
    *,
    key: Ed25519PrivateKey,
    chain: EvidenceChain,
    now: Callable[[], datetime],
) -> AuditPlan:
    """Step (1): the stored plan, or a new one. It follows from public settings, so another one on disk is damage.

    key: the auditor's. Signing again gives the same bytes.
    """
    plan = make_plan(study, enrolled)
    stored = folder.plan()
    if stored is None:
        write_atomic(folder.plan_file, plan.to_json().encode())
    elif stored != plan:
        raise IntegrityError(
            f"{folder.plan_file} is not the plan that the study prescribes; nothing was scored. "
            "It was changed, or written by another version: start a new run."
        )
    sealed = seal_json(json.loads(plan.to_json()), key, Purpose.AUDIT_PLAN)
    write_atomic(folder.sealed_plan_file, sealed)
    append_once(chain, PLAN_RECORD, {"plan_digest": plan.digest, "sealed": sha256_hex(sealed)}, now)
    return plan


def _complete(answers: Answers | None, plan: AuditPlan, generator: Weights, participants: tuple[str, ...]) -> bool:
    return (
        answers is not None
        and (answers.plan_digest, answers.weights_digest) == (plan.digest, generator.digest)
        and set(answers.replies) == set(participants)
    )


def _sorted_out(replies: Mapping[str, Reply | NoReply], order: ScoreOrder) -> Answers:
    """Usable answers, and why others are missing."""
    usable: dict[str, ScoreReply] = {}
    missing: dict[str, str] = {}
    for name, answer in replies.items():
        match answer:
            case NoReply(reason=reason):
                missing[name] = str(reason)
            case RefusalReply(code=code):
                missing[name] = f"site refused ({code})"
            case ScoreReply() if (answer.study_digest, answer.weights_digest, answer.audit_plan_digest) == (
                order.study_digest,
                order.weights_digest,
                order.audit_plan_digest,
            ):
                usable[name] = answer
            case _:
                missing[name] = "reply is to another question"
    return Answers(
        plan_digest=order.audit_plan_digest, weights_digest=order.weights_digest, replies=usable, missing=missing
    )


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError(
        f"{path} is damaged; nothing was judged. Delete it and repeat the command: "
        "the sites answer again from their caches, at no further cost."
    )


def rejudge(study: Study, folder: AuditFolder) -> tuple[AuditResult, bool]:
    """The verdict on the stored answers, reached again; and whether it is the one that was recorded.

    The recorded result itself where it is: its digest is the one that chain and decision name.
    Raises UsageError when the run has not been audited yet.
    """
    plan, answers = folder.plan(), folder.answers()
    if plan is None or answers is None:
        raise UsageError(
            f"the run has no answers of its sites yet ({folder.path}); nothing was judged. Resume the run."
        )
    judged = judge(plan, answers.replies, study.release, participants=answers.participants)
    again = replace(judged, mechanism=rejudge_mechanism(study, plan_of(study), folder.path))
    recorded = folder.result_file.read_text(encoding="utf-8") if folder.result_file.is_file() else "null"
    try:
        if _agree(json.loads(recorded), json.loads(again.to_json())):
            return AuditResult.from_json(recorded), True
    except ValueError:  # not JSON, or no result: then it is not the one reached again
        pass
    return again, False


def _agree(recorded: object, again: object, name: str = "") -> bool:
    """Whether two results in JSON say the same, apart from rounding and from how sentences are worded.

    name: of the field. Sums differ in their last digits with the number of threads, and a later version may word a
    reason otherwise, but never have none; a field that an earlier version did not know is absent there, here null.
    """
    match recorded, again:
        case dict(), dict():
            keys = recorded.keys() | again.keys()
            same = all(_agree(recorded.get(key), again.get(key), key) for key in keys)
        case (list(), list()) if name in _PROSE:
            same = bool(recorded) == bool(again)
        case list(), list():
            same = len(recorded) == len(again) and all(map(_agree, recorded, again))
        case str(), str():
            same = name in _PROSE or recorded == again
        case (bool(), _) | (_, bool()):  # before the numbers: in Python, True is one
            same = recorded is again
        case (int() | float(), int() | float()):
            same = math.isclose(recorded, again, rel_tol=_SAME_RELATIVE, abs_tol=_SAME_ABSOLUTE)
        case _:
            same = recorded is None and again is None
    return same
