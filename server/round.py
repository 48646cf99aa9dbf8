"""One round of federated training, and the loop over rounds. Read together with `client/site.py`.

(1) enrolment: enough participants are connected, or the round is recorded as not held
(2) one `TrainOrder` for all: study, round, generator, digest, plan, deadline
(3)-(6) at each site: check, reserve in the ledger, train, cache the reply
(7) validate each reply; a bad one becomes `SiteExcluded(reason)`
(8) norm screen, weighted mean with public weights, average over rounds; in a fine-tune round each site's generator is
    kept for itself
(9) checkpoint, evidence record, telemetry

The last `federation.fine_tune_rounds` of an ensemble are fine-tune rounds: (2) sends each site its own last generator,
at first the common one. A site whose reply is not used keeps the one it had. Budget and checks are those of any round.

A round that is repeated costs nothing: a site answers the same (study, round) from its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Final

from common.errors import Unreachable
from common.evidence.canonical import Json
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import ROUND_NOT_HELD_RECORD, ROUND_RECORD
from common.generator.weights import Weights
from common.privacy.accounting import epsilon
from common.privacy.mechanism import Plan
from common.protocol.messages import RefusalReply, Reply, TrainOrder, TrainReply
from common.settings.study import Study
from common.telemetry.events import Observer, RoundFinished, SiteExcluded
from server.aggregation import moving_average, screen, update_norm, weighted_mean
from server.checkpoint import Checkpoint, CheckpointStore, RoundRecord
from server.sites import NoReply, NoReplyReason, RoundSites

# Three failures in a row are an outage, not a straggler: stop, say so, and let a person resume.
FAILURES_BEFORE_STOP: Final = 3


@dataclass(frozen=True, kw_only=True)
class TrainingCampaign:
    """What stays the same over all rounds of a campaign.

    participants: enrolled sites. site_weights: public weight of each in the mean.
    """

    study: Study
    study_digest: str
    plan: Plan
    participants: tuple[str, ...]
    site_weights: Mapping[str, float]
    sites: RoundSites
    store: CheckpointStore
    chain: EvidenceChain
    observer: Observer
    now: Callable[[], datetime]


@dataclass(frozen=True, kw_only=True)
class RoundNotHeld:
    """Fewer than the quorum could be used; the generator is unchanged."""

    round: int
    excluded: tuple[SiteExcluded, ...]


def hold_rounds(
    campaign: TrainingCampaign, start: Weights, *, after: Callable[[Checkpoint], None] = lambda _: None
) -> Checkpoint:
    """Hold every round that has no checkpoint yet; returns the last checkpoint.

    start: the public generator that round 1 begins with. after: called with each checkpoint before the next round, and
    with the last one there is when a campaign goes on. Raises Unreachable after three rounds in a row that could not be
    held, and IntegrityError when the last checkpoint is damaged.
    """
    last = campaign.store.latest()
    if last is not None:
        _record_once(campaign, last.record)
        after(last)
    failures = 0
    while last is None or last.record.round < campaign.plan.rounds:
        result = hold_round(campaign, last, start)
        if isinstance(result, Checkpoint):
            last, failures = result, 0
            after(last)
            continue
        failures += 1
        if failures == FAILURES_BEFORE_STOP:
            reasons = "; ".join(f"{e.site}: {e.reason}" for e in result.excluded)
            raise Unreachable(
                f"round {result.round} could not be held {failures} times in a row: fewer than "
                f"{campaign.study.federation.quorum} sites could be used ({reasons}). The generator of round "
                f"{result.round - 1} is kept. Repeat the command to resume when the sites are back."
            )
    return last


def hold_round(campaign: TrainingCampaign, last: Checkpoint | None, start: Weights) -> Checkpoint | RoundNotHeld:
    """Steps (1) to (9) for the round after `last`."""
    number = last.record.round + 1 if last else 1
    weights = last.weights if last else start
    fine_tunes = number > campaign.plan.rounds - campaign.study.federation.fine_tune_rounds
    own = dict(last.own) if last else {}
    began = campaign.now()

    online = campaign.sites.online(campaign.participants)  # (1)
    if len(online) < campaign.study.federation.quorum:
        absent = [name for name in campaign.participants if name not in online]
        # Nobody is asked: the sites that are there would spend budget on a round that cannot be held.
        return _not_held(campaign, number, _excluded(dict.fromkeys(absent, NoReplyReason.NOT_CONNECTED), number))

    order = TrainOrder(  # (2)
        study_digest=campaign.study_digest,
        round=number,
        weights=weights,
        weights_digest=weights.digest,
        plan=campaign.plan,
        deadline_s=campaign.study.federation.deadline_s,
    )
    orders = {name: _with_weights(order, own.get(name, weights)) for name in online}
    answers = campaign.sites.ask(orders, order.deadline_s)  # (3)-(6) there

    usable: dict[str, Weights] = {}
    reasons: dict[str, str] = {}
    for name in campaign.participants:  # (7)
        answer = answers.get(name, NoReply(reason=NoReplyReason.NOT_CONNECTED))
        checked = check_reply(answer, orders.get(name, order))
        if isinstance(checked, Weights):
            usable[name] = checked
        else:
            reasons[name] = checked

    sent = {name: orders[name].weights for name in usable}
    screened = screen(sent, usable)  # (8)
    for name, ratio in screened.excluded.items():
        reasons[name] = f"update is {ratio:.1f} times as long as the median update"
    used = {name: usable[name] for name in screened.kept}
    excluded = _excluded(reasons, number)
    if len(used) < campaign.study.federation.quorum:
        return _not_held(campaign, number, excluded)
    if fine_tunes:
        mean, average, own = weights, last.average if last else weights, {**own, **used}
    else:
        mean = weighted_mean(used, campaign.site_weights)
        average = moving_average(last.average if last else None, mean, campaign.study.federation.server_ema)

    seconds = (campaign.now() - began).total_seconds()
    record = RoundRecord(  # (9)
        study_digest=campaign.study_digest,
        round=number,
        replies={name: reply.digest for name, reply in used.items()},
        update_norms={name: update_norm(sent[name], reply) for name, reply in used.items()},
        excluded=reasons,
        start_digest=weights.digest,
        weights_digest=mean.digest,
        average_digest=average.digest,
        seconds=round(seconds, 3),
        own_digests={name: own[name].digest for name in sorted(own)},
    )
    checkpoint = Checkpoint(record=record, weights=mean, average=average, own=own)
    campaign.store.save(checkpoint)
    _record_once(campaign, record)
    _tell(campaign, record, excluded)
    return checkpoint


def _with_weights(order: TrainOrder, weights: Weights) -> TrainOrder:
    return replace(order, weights=weights, weights_digest=weights.digest)


def check_reply(answer: Reply | NoReply, order: TrainOrder) -> Weights | str:  # noqa: PLR0911  # one return a case
    """The generator in a reply to `order`, or the fixed phrase why it is not used.

    `Weights` cannot hold a value that is not finite or not float32; everything else is checked here.
    """
    match answer:
        case NoReply(reason=reason):
            return str(reason)
        case RefusalReply(code=code):
            return f"site refused ({code})"
        case TrainReply() if answer.study_digest != order.study_digest:
            return "reply is for another study"
        case TrainReply() if answer.round != order.round:
            return "reply is for another round"
        case TrainReply() if answer.weights.digest != answer.weights_digest:
            return "weights are not what their digest says"
        case TrainReply() if answer.weights.shapes != order.weights.shapes:
            return "weights have other names or shapes"
        case TrainReply():
            return answer.weights
        case _:
            return "reply is of another kind"


@cache
def training_epsilon(plan: Plan, rounds: int) -> float | None:
    """What warm-up and training have cost each member after so many rounds; None for a plan without noise."""
    if plan.mechanism.noise_multiplier == 0:
        return None
    before = [] if plan.warm_up is None else [plan.warm_up]
    return epsilon([*before, replace(plan.mechanism, steps=rounds * plan.steps_per_round)], plan.delta).value


def _not_held(campaign: TrainingCampaign, number: int, excluded: tuple[SiteExcluded, ...]) -> RoundNotHeld:
    body: dict[str, Json] = {"round": number, "excluded": {e.site: e.reason for e in excluded}}
    campaign.chain.append(ROUND_NOT_HELD_RECORD, body, campaign.now())
    for event in excluded:
        campaign.observer(event)
    return RoundNotHeld(round=number, excluded=excluded)


def _record_once(campaign: TrainingCampaign, record: RoundRecord) -> None:
    """Append the round to the evidence, unless a run that was killed after its checkpoint had done so."""
    for earlier in reversed(campaign.chain.verify()):
        if earlier.kind == ROUND_RECORD and earlier.body.get("round") == record.round:
            if earlier.body.get("weights_digest") == record.weights_digest and (
                earlier.body.get("own_digests", {}) == record.own_digests
            ):
                return
            break
    campaign.chain.append(ROUND_RECORD, record.body(), campaign.now())


def _tell(campaign: TrainingCampaign, record: RoundRecord, excluded: tuple[SiteExcluded, ...]) -> None:
    for event in excluded:
        campaign.observer(event)
    campaign.observer(
        RoundFinished(
            round=record.round,
            rounds=campaign.plan.rounds,
            sites_used=len(record.replies),
            sites_excluded=len(excluded),
            epsilon_spent=training_epsilon(campaign.plan, record.round),
            seconds=record.seconds,
        )
    )


def _excluded(reasons: Mapping[str, str], number: int) -> tuple[SiteExcluded, ...]:
    return tuple(SiteExcluded(site=name, round=number, reason=str(reason)) for name, reason in reasons.items())
