"""Hospitals that answer from a script, and a campaign with them: no data, no training, every order a site can get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from loopback_sites import LoopbackSites

from common.evidence.receipt import Answered, Receipt, sign_receipt
from common.evidence.signing import public_key_hex
from common.generator.weights import Weights
from common.measure.audit_plan import AuditPlan
from common.privacy.mechanism import NoisedCounts
from common.privacy.mechanism_json import mechanism_json
from common.protocol import codec
from common.protocol.messages import (
    CourseOrder,
    CourseReply,
    EnrolOrder,
    EnrolReply,
    LedgerHead,
    NoisedHistogram,
    Order,
    RefusalCode,
    RefusalReply,
    Reply,
    ScoreOrder,
    ScoreReply,
    StatementOrder,
    StatementReply,
    TrainOrder,
    TrainReply,
)
from common.settings.load import study_digest
from common.settings.study import Question, Study
from common.telemetry.events import Event, ignore
from server.campaign import CampaignOutcome, run_campaign
from server.run_folder import Engine, RunFacts, RunFolder
from tests.tiny_studies import tiny_study

STUDY = tiny_study(
    study="campaign",
    privacy={"target_epsilon": 4.0, "delta": 3e-5, "reference_patients": 3000},
    training={"rounds": 2, "critic_steps_per_round": 2},
    release={"volumes": 2},
    utility={"training_steps": 0},
)
DIGEST = study_digest(STUDY)
NOW = datetime.now(UTC).replace(microsecond=0)  # a release of another day would be too early or expired


class ScriptedSite:
    """A hospital with 6000 members and 3000 others who all score alike, and whose planted copies stand out.

    Its segmenter does worse with every round: the first is the best.
    """

    def __init__(self, number: int, study: Study = STUDY) -> None:
        self._number = number
        self._digest = study_digest(study)
        self._course: dict[int, CourseOrder] = {}
        self._plan: AuditPlan | None = None
        self._trained: dict[int, TrainOrder] = {}
        self._left: dict[str, Answered] = {}
        self._key = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)

    def _head(self, rows: int) -> LedgerHead:
        return LedgerHead(rows=rows, hash=f"{1000 * self._number + rows:064x}")

    def __call__(self, order: Order) -> Reply:
        match order:
            case EnrolOrder():
                return EnrolReply(
                    study_digest=self._digest,
                    holdout_commitment=f"{self._number:064x}",
                    policy_digest="b" * 64,
                    code_digest="c" * 64,
                    simulated=False,
                    receipt_key=public_key_hex(self._key.public_key()),
                )
            case TrainOrder():
                self._trained[order.round] = order
                step = np.float32(0.01 * self._number)
                moved = Weights({name: array + step for name, array in order.weights.arrays.items()})
                trained = TrainReply(
                    study_digest=self._digest,
                    round=order.round,
                    weights=moved,
                    weights_digest=moved.digest,
                    ledger_head=self._head(order.round + 10 * len(self._course)),
                )
                return self._noted("train", order, trained, round=order.round, weights=moved.digest)
            case CourseOrder():
                self._course[order.round] = order
                measured = CourseReply(
                    study_digest=self._digest,
                    round=order.round,
                    weights_digest=order.weights_digest,
                    dice_sum=(3000 * (0.75 - 0.125 * order.round),),
                    patients=3000.0,
                    epsilon=order.epsilon,
                    exact=None,
                    ledger_head=self._head(order.round + 10 * len(self._course)),
                )
                return self._noted("course", order, measured, round=order.round, weights=order.weights_digest)
            case ScoreOrder():
                self._plan = AuditPlan.from_json(order.audit_plan_json)
                scored = ScoreReply(
                    study_digest=self._digest,
                    weights_digest=order.weights_digest,
                    audit_plan_digest=order.audit_plan_digest,
                    histograms=tuple(histograms(self._plan)),
                    critic_tells=False if Question.CRITIC in self._plan.questions else None,
                    ledger_head=self._head(100),
                )
                asked = {"weights": order.weights_digest, "plan": order.audit_plan_digest}
                return self._noted("score", order, scored, **asked)
            case StatementOrder():
                rounds = tuple(order.plan.one_round for order in self._trained.values())
                return self._signed(
                    StatementReply(
                        study_digest=self._digest,
                        members=rounds + (self._plan.member_mechanisms if self._plan else ()),
                        nonmembers=(
                            *(NoisedCounts(epsilon=asked.epsilon) for asked in self._course.values()),
                            *(self._plan.nonmember_mechanisms if self._plan else ()),
                        ),
                        ledger_head=self._head(101),
                    )
                )
        return RefusalReply(code=RefusalCode.INTERNAL)

    def _noted(self, kind: str, order: Order, reply: Reply, **facts: object) -> Reply:
        digests = {"question": codec.digest(order), "answer": codec.digest(reply)}
        self._left[digests["question"]] = Answered.model_validate({"kind": kind, **digests, **facts})
        return reply

    def _signed(self, statement: StatementReply) -> StatementReply:
        receipt = Receipt(
            study_digest=self._digest,
            site="abc"[self._number - 1],
            simulated=False,
            holdout_commitment=f"{self._number:064x}",
            policy_digest="b" * 64,
            code_digest="c" * 64,
            ledger_rows=statement.ledger_head.rows,
            ledger_head=statement.ledger_head.hash,
            members=tuple(map(mechanism_json, statement.members)),
            nonmembers=tuple(map(mechanism_json, statement.nonmembers)),
            answers=tuple(self._left.values()),
        )
        return replace(statement, receipt=sign_receipt(receipt, self._key))


def histograms(plan: AuditPlan) -> Iterator[NoisedHistogram]:
    for question in sorted(plan.answers.keys() & {Question.LABEL_SIZE.value, Question.BLIND.value}):
        asked = plan.answers[question]
        counts = tuple(3000 // asked.bins for _ in range(asked.bins))
        for group in asked.groups:
            yield NoisedHistogram(endpoint=question, group=group.value, counts=counts, epsilon=asked.epsilon)
    for endpoint in plan.endpoints:
        place = np.arange(endpoint.bins) / endpoint.bins
        bell = np.where(place < 0.7, np.exp(-0.5 * ((place - 0.35) / 0.12) ** 2), 0.0)
        shape = bell / bell.sum()
        for group, patients in (("member_a", 3000), ("member_b", 3000), ("nonmember", 3000), ("planted", 3000)):
            copied = plan.planted_fraction if group == "planted" else 0.0
            counts = np.round(patients * (1 - copied) * shape).astype(int)
            counts[-1] += round(patients * copied)
            yield NoisedHistogram(
                endpoint=endpoint.name.value,
                group=group,
                counts=tuple(int(n) for n in counts),
                epsilon=plan.epsilon_per_answer,
            )


def run_folder(folder: Path, study: Study = STUDY) -> RunFolder:
    facts = RunFacts(
        engine=Engine.NETWORK, sites=("a", "b", "c"), seed=0, simulated=False, study_digest=study_digest(study)
    )
    return RunFolder.create_or_resume(folder, study, facts)


def scripted(study: Study = STUDY) -> dict[str, Callable[[Order], Reply]]:
    return {"a": ScriptedSite(1, study), "b": ScriptedSite(2, study), "c": ScriptedSite(3, study)}


def hold(
    folder: Path, sites: LoopbackSites, observer: Callable[[Event], None] = ignore, study: Study = STUDY
) -> tuple[CampaignOutcome, RunFolder]:
    run = run_folder(folder, study)
    return run_campaign(study, sites, run, seed=0, observer=observer, now=lambda: NOW), run
