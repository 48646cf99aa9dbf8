"""What a site signs about its part in a study, from what it keeps: digests of what left, and facts stated before."""

from __future__ import annotations

from typing import Final, Literal, assert_never

from client.orders import PaidOrder
from client.store import StudyStore
from common.evidence.receipt import Answered, Receipt
from common.privacy.mechanism_json import mechanism_json
from common.protocol import codec
from common.protocol.messages import (
    CourseOrder,
    EnrolReply,
    Reply,
    ScoreOrder,
    StatementReply,
    TrainOrder,
    TrainReply,
    UtilityOrder,
    WarmUpOrder,
)

_KINDS: Final[dict[type, Literal["warm-up", "train", "course", "score", "utility"]]] = {
    WarmUpOrder: "warm-up",
    TrainOrder: "train",
    CourseOrder: "course",
    ScoreOrder: "score",
    UtilityOrder: "utility",
}


def answered(order: PaidOrder, reply: Reply, policy: str) -> Answered:
    """The digests of one answer. Nothing of the answer itself is in them, and it has left when they do.

    policy: digest of the policy that allowed it.
    """
    bare = Answered(kind=_KINDS[type(order)], question=codec.digest(order), answer=codec.digest(reply), policy=policy)
    match order:
        case TrainOrder():
            weights = reply.weights_digest if isinstance(reply, TrainReply) else None
            return bare.model_copy(update={"round": order.round, "weights": weights})
        case CourseOrder():
            return bare.model_copy(update={"round": order.round, "weights": order.weights_digest})
        case ScoreOrder(weights_digest=weights, audit_plan_digest=plan):
            return bare.model_copy(update={"weights": weights, "plan": plan})
        case WarmUpOrder() | UtilityOrder():
            return bare
        case _:
            assert_never(order)


def receipt_of(site: str, joined: EnrolReply, statement: StatementReply, store: StudyStore) -> Receipt:
    """The receipt that goes with a statement. joined: the site's public facts as they are now."""
    return Receipt(
        study_digest=statement.study_digest,
        site=site,
        simulated=joined.simulated,
        holdout_commitment=joined.holdout_commitment,
        policy_digest=joined.policy_digest,
        code_digest=joined.code_digest,
        ledger_rows=statement.ledger_head.rows,
        ledger_head=statement.ledger_head.hash,
        members=tuple(map(mechanism_json, statement.members)),
        nonmembers=tuple(map(mechanism_json, statement.nonmembers)),
        answers=store.answers(),
    )
