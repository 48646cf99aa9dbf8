"""The mechanism audit as the campaign conducts it, between training and the audit of the generator.

(1) one `CanaryOrder` to every site whose generator went in: guess the coins by the rules that the code fixes
(2) validate each answer; store the answers and put their digest into the evidence chain
(3) judge against what the plan claims for training

Nothing of it costs budget (`client/training/canaries.py` says why), so a campaign that is resumed may ask again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import rfc8785
from pydantic import TypeAdapter

from common.errors import IntegrityError
from common.evidence.atomic import write_atomic
from common.evidence.chain import EvidenceChain
from common.measure.one_run import GUESS_RULES, Guesses, GuessRule
from common.privacy.mechanism import Plan
from common.protocol.messages import CanaryOrder, CanaryReply, RefusalReply, Reply
from common.settings.load import study_digest
from common.settings.study import Study
from server.audit.mechanism import judge_mechanism
from server.audit.result import MechanismAudit
from server.evidence_log import append_once
from server.sites import NoReply, Sites

CANARIES_RECORD: Final = "canaries"
CANARIES_FILE: Final = "canaries.json"


@dataclass(frozen=True, kw_only=True)
class CanaryAnswers:
    """What the sites guessed. canaries: of each site. missing: fixed phrase by site that gave nothing usable."""

    study_digest: str
    canaries: int
    rules: tuple[GuessRule, ...]
    replies: Mapping[str, tuple[Guesses, ...]]
    missing: Mapping[str, str]

    def to_json(self) -> bytes:
        """Canonical JSON."""
        data: bytes = rfc8785.dumps(_ADAPTER.dump_python(self, mode="json"))
        return data


_ADAPTER = TypeAdapter(CanaryAnswers)


def conduct_mechanism_audit(
    study: Study,
    plan: Plan,
    sites: Sites,
    folder: Path,
    *,
    participants: tuple[str, ...],
    chain: EvidenceChain,
    now: Callable[[], datetime],
) -> MechanismAudit:
    """Steps (1) to (3), for a study that `has_claim_to_check`.

    folder: `audit/` of the run. Answers of all participants that are already there are not asked for again.
    """
    order = _order(study)
    answers = _stored(folder, order)
    if answers is None or set(answers.replies) != set(participants):
        replies = sites.ask(dict.fromkeys(participants, order), study.federation.deadline_s)  # (1)
        answers = _sorted_out(replies, order)  # (2)
        write_atomic(folder / CANARIES_FILE, answers.to_json())
    result = _judged(study, plan, answers)  # (3)
    append_once(
        chain,
        CANARIES_RECORD,
        {
            "sha256": hashlib.sha256(answers.to_json()).hexdigest(),
            "missing": dict(answers.missing),
            "verdict": result.verdict.value,
        },
        now,
    )
    return result


def rejudge_mechanism(study: Study, plan: Plan, folder: Path) -> MechanismAudit | None:
    """The verdict on the stored answers, reached again; None when there are none. IntegrityError when damaged."""
    answers = _stored(folder, _order(study)) if has_claim_to_check(study, plan) else None
    return None if answers is None else _judged(study, plan, answers)


def has_claim_to_check(study: Study, plan: Plan) -> bool:
    """Whether there are canaries, and noise: training without noise claims nothing that could be refuted."""
    return study.audit.canaries > 0 and plan.mechanism.noise_multiplier > 0


def _order(study: Study) -> CanaryOrder:
    return CanaryOrder(study_digest=study_digest(study), canaries=study.audit.canaries, rules=GUESS_RULES)


def _judged(study: Study, plan: Plan, answers: CanaryAnswers) -> MechanismAudit:
    return judge_mechanism(plan, answers.canaries, answers.replies, answers.missing, confidence=study.audit.confidence)


def _stored(folder: Path, order: CanaryOrder) -> CanaryAnswers | None:
    """The stored answers to this order, None when there are none or they are to another."""
    path = folder / CANARIES_FILE
    if not path.exists():
        return None
    try:
        answers = _ADAPTER.validate_json(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(
            f"{path} is damaged; nothing was judged. Delete it and repeat the command: the sites guess again, free."
        ) from error
    asked = (answers.study_digest, answers.canaries, answers.rules)
    return answers if asked == (order.study_digest, order.canaries, order.rules) else None


def _sorted_out(replies: Mapping[str, Reply | NoReply], order: CanaryOrder) -> CanaryAnswers:
    """Usable answers, and why others are missing."""
    prescribed = [(rule, rule.guesses(order.canaries)) for rule in order.rules]
    usable: dict[str, tuple[Guesses, ...]] = {}
    missing: dict[str, str] = {}
    for name, answer in replies.items():
        match answer:
            case NoReply(reason=reason):
                missing[name] = str(reason)
            case RefusalReply(code=code):
                missing[name] = f"site refused ({code})"
            case CanaryReply(guesses=guesses) if (
                answer.study_digest == order.study_digest and [(g.rule, g.guesses) for g in guesses] == prescribed
            ):
                usable[name] = guesses
            case _:
                missing[name] = "reply is to another question"
    return CanaryAnswers(
        study_digest=order.study_digest,
        canaries=order.canaries,
        rules=order.rules,
        replies=usable,
        missing=missing,
    )
