"""Who takes part: every approved site is asked once, and what it commits to is recorded before any training.

(1) ask every approved site
(2) validate each answer; a bad one is a refusal with its reason
(3) quorum
(4) record commitments, policies, code and receipt keys of the participants in the evidence chain
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from common.errors import IntegrityError, Unreachable
from common.evidence.canonical import Json
from common.evidence.chain import EvidenceChain, Record
from common.evidence.predicate import ENROLMENT_RECORD
from common.generator.weights import Weights
from common.protocol.messages import EnrolOrder, EnrolReply, RefusalReply, Reply
from common.settings.load import study_digest, study_json
from common.settings.study import Study
from server.sites import NoReply, Sites

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Enrolment:
    """Participants with what they committed to, and why others do not take part."""

    participants: Mapping[str, EnrolReply]
    refused: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Participating sites in the order of the study."""
        return tuple(self.participants)

    @property
    def simulated(self) -> bool:
        """Whether any participant's randomness is seeded: then every artefact says so."""
        return any(reply.simulated for reply in self.participants.values())


def enrol(
    study: Study,
    sites: Sites,
    *,
    public_generator: Weights,
    public_critic: Weights | None,
    coordinator_key: str,
    chain: EvidenceChain,
    now: Callable[[], datetime],
) -> Enrolment:
    """Ask, validate and record. Raises Unreachable below the quorum; nothing was trained then.

    coordinator_key: Ed25519 public key, hex, that will countersign the heads of the sites' ledgers.
    """
    digest = study_digest(study)
    order = EnrolOrder(
        study_json=study_json(study),
        study_digest=digest,
        public_critic=public_critic,
        public_generator=public_generator,
        coordinator_key=coordinator_key,
    )
    answers = sites.ask(dict.fromkeys(sites.names, order), study.federation.deadline_s)  # (1)
    participants: dict[str, EnrolReply] = {}
    refused: dict[str, str] = {}
    for name, answer in answers.items():  # (2)
        checked = _checked(answer, digest)
        if isinstance(checked, EnrolReply):
            participants[name] = checked
        else:
            refused[name] = checked
    refused |= _with_other_code(participants)
    participants = {name: reply for name, reply in participants.items() if name not in refused}
    if len(participants) < study.federation.quorum:  # (3)
        raise Unreachable(
            f"{len(participants)} of {len(sites.names)} sites enrolled, the study needs {study.federation.quorum}; "
            f"nothing was trained. Not enrolled: {_listed(refused)}. Each site's own log has the details; "
            "repeat the command when they are ready."
        )
    enrolment = Enrolment(participants=participants, refused=refused)
    chain.append(ENROLMENT_RECORD, _body(digest, enrolment) | {"coordinator_key": coordinator_key}, now())  # (4)
    return enrolment


def enrolment_from(record: Record, digest: str) -> Enrolment:
    """Read back what `enrol` recorded. Raises IntegrityError when the record is of another study."""
    body = record.body
    participants, refused = body.get("participants"), body.get("refused")
    if body.get("study_digest") != digest or not isinstance(participants, Mapping) or not isinstance(refused, Mapping):
        raise IntegrityError(
            "the enrolment in the evidence chain is not of this study; nothing was done. Use the folder of this study."
        )
    replies: dict[str, EnrolReply] = {}
    for name in _order(body, participants):
        facts = participants[name]
        if not isinstance(facts, Mapping) or "receipt_key" not in facts:
            raise IntegrityError(
                f"the enrolment record of {name} is unreadable, or of an older version; nothing was done. "
                "Start a new run."
            )
        replies[name] = EnrolReply(
            study_digest=digest,
            holdout_commitment=str(facts["holdout_commitment"]),
            policy_digest=str(facts["policy_digest"]),
            code_digest=str(facts["code_digest"]),
            simulated=bool(facts["simulated"]),
            receipt_key=str(facts["receipt_key"]),
        )
    return Enrolment(participants=replies, refused={str(k): str(v) for k, v in refused.items()})


def _checked(answer: Reply | NoReply, digest: str) -> EnrolReply | str:
    """The reply, or why it does not count."""
    match answer:
        case NoReply(reason=reason):
            return str(reason)
        case RefusalReply(code=code):
            return f"site refused ({code})"
        case EnrolReply() if answer.study_digest != digest:
            return "reply is for another study"
        case EnrolReply() if not all(
            _DIGEST.fullmatch(text)
            for text in (answer.holdout_commitment, answer.policy_digest, answer.code_digest, answer.receipt_key)
        ):
            return "commitment, policy or code digest is not a SHA-256, or receipt key not an Ed25519 key"
        case EnrolReply():
            return answer
        case _:
            return "reply is of another kind"


def _with_other_code(participants: Mapping[str, EnrolReply]) -> dict[str, str]:
    """Sites whose code differs from that of most sites; all of them when no version has a majority.

    A study is one program run in several places: a site left on another release would silently train another game.
    """
    codes = [reply.code_digest for reply in participants.values()]
    majority = {code for code in codes if 2 * codes.count(code) > len(codes)}
    return {
        name: "site runs another code version than most sites"
        for name, reply in participants.items()
        if reply.code_digest not in majority
    }


def _body(digest: str, enrolment: Enrolment) -> dict[str, Json]:
    return {
        "study_digest": digest,
        "order": list(enrolment.participants),
        "participants": {
            name: {
                "holdout_commitment": reply.holdout_commitment,
                "policy_digest": reply.policy_digest,
                "code_digest": reply.code_digest,
                "simulated": reply.simulated,
                "receipt_key": reply.receipt_key,
            }
            for name, reply in enrolment.participants.items()
        },
        "refused": dict(enrolment.refused),
    }


def _order(body: Mapping[str, Json], participants: Mapping[str, Json]) -> list[str]:
    """Names in the order of the study, which canonical JSON does not keep."""
    order = body.get("order")
    if not isinstance(order, list) or sorted(order) != sorted(participants):
        raise IntegrityError("the enrolment record does not list its participants; nothing was done.")
    return [str(name) for name in order]


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "none"
