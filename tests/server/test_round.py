"""One round: what is asked, what is believed, what is recorded."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from loopback_sites import LoopbackSites

from common.errors import Unreachable
from common.evidence.chain import EvidenceChain
from common.generator.weights import Weights
from common.privacy.mechanism import DpSgd
from common.protocol.messages import (
    LedgerHead,
    Order,
    RefusalCode,
    RefusalReply,
    Reply,
    StatementReply,
    TrainOrder,
    TrainReply,
)
from common.settings.study import FederationSettings
from common.telemetry.events import Event, RoundFinished, SiteExcluded
from server.checkpoint import CheckpointStore
from server.round import TrainingCampaign, check_reply, hold_rounds, training_epsilon
from server.sites import NoReply, NoReplyReason
from tests.tiny_studies import tiny_plan, tiny_study

DIGEST = "5" * 64
HEAD = LedgerHead(rows=1, hash="e" * 64)
START = Weights({"layer": np.zeros(3, np.float32)})
STUDY = tiny_study(training={"rounds": 3, "critic_steps_per_round": 5})
PLAN = tiny_plan(STUDY, noise=1.0)


def trains(by: float) -> Callable[[Order], Reply]:
    """A site whose training adds `by` to every weight."""

    def site(order: Order) -> Reply:
        assert isinstance(order, TrainOrder)
        moved = Weights({"layer": order.weights.arrays["layer"] + np.float32(by)})
        return TrainReply(
            study_digest=order.study_digest,
            round=order.round,
            weights=moved,
            weights_digest=moved.digest,
            ledger_head=HEAD,
        )

    return site


def campaign(
    folder: Path, sites: LoopbackSites, *, events: list[Event] | None = None, **federation
) -> TrainingCampaign:
    study = STUDY.model_copy(update={"federation": FederationSettings(**federation)})
    (folder / "checkpoint").mkdir(exist_ok=True)
    return TrainingCampaign(
        study=study,
        study_digest=DIGEST,
        plan=PLAN,
        participants=sites.names,
        site_weights=dict.fromkeys(sites.names, 1.0),
        sites=sites,
        store=CheckpointStore(folder / "checkpoint", study_digest=DIGEST),
        chain=EvidenceChain(folder / "evidence.jsonl"),
        observer=(events if events is not None else []).append,
        now=lambda: datetime(2027, 1, 1, tzinfo=UTC),
    )


def kinds(folder: Path) -> list[str]:
    return [record.kind for record in EvidenceChain(folder / "evidence.jsonl").verify()]


def test_three_rounds_of_three_sites_average_their_generators(tmp_path: Path):
    sites = LoopbackSites({"a": trains(1), "b": trains(2), "c": trains(3)})
    last = hold_rounds(campaign(tmp_path, sites), START)
    assert last.weights.arrays["layer"].tolist() == [6, 6, 6]
    assert kinds(tmp_path) == ["round"] * 3


def test_every_site_gets_the_same_order_with_the_current_generator(tmp_path: Path):
    sites = LoopbackSites({"a": trains(1), "b": trains(1)})
    hold_rounds(campaign(tmp_path, sites), START)
    orders = [order for _, order in sites.asked if isinstance(order, TrainOrder)]
    assert [order.round for order in orders] == [1, 1, 2, 2, 3, 3]
    assert [float(order.weights.arrays["layer"][0]) for order in orders] == [0, 0, 1, 1, 2, 2]
    assert all(order.weights_digest == order.weights.digest and order.plan == PLAN for order in orders)


def test_the_order_in_which_sites_reply_changes_no_bit(tmp_path: Path):
    digests = set()
    for i, order in enumerate([("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a")]):
        (tmp_path / str(i)).mkdir()
        sites = LoopbackSites({"a": trains(0.1), "b": trains(0.7), "c": trains(1 / 3)}, reply_order=order)
        digests.add(hold_rounds(campaign(tmp_path / str(i), sites), START).weights.digest)
    assert len(digests) == 1


def test_a_refusing_site_is_excluded_with_its_code_and_the_round_is_held(tmp_path: Path):
    events: list[Event] = []
    sites = LoopbackSites(
        {"a": trains(1), "b": trains(3), "c": lambda _: RefusalReply(code=RefusalCode.BUDGET)},
    )
    last = hold_rounds(campaign(tmp_path, sites, events=events), START)
    assert last.weights.arrays["layer"].tolist() == [6, 6, 6]
    assert SiteExcluded(site="c", round=1, reason="site refused (budget)") in events
    assert last.record.excluded == {"c": "site refused (budget)"}
    assert events[-1] == RoundFinished(
        round=3, rounds=3, sites_used=2, sites_excluded=1, epsilon_spent=training_epsilon(PLAN, 3), seconds=0.0
    )


def test_one_exploding_update_among_three_is_excluded(tmp_path: Path):
    sites = LoopbackSites({"a": trains(1), "b": trains(1.5), "c": trains(1000)})
    last = hold_rounds(campaign(tmp_path, sites), START)
    assert last.weights.arrays["layer"].tolist() == [3.75] * 3
    assert last.record.excluded["c"].startswith("update is 666.7 times as long as the median")


def test_nobody_is_asked_when_fewer_than_the_quorum_are_connected(tmp_path: Path):
    sites = LoopbackSites({"a": trains(1), "b": trains(1)})
    sites.offline = {"b"}
    with pytest.raises(Unreachable, match=r"round 1 could not be held 3 times in a row.*b: site is not connected"):
        hold_rounds(campaign(tmp_path, sites), START)
    assert sites.asked == []
    assert kinds(tmp_path) == ["round-not-held"] * 3


def test_a_round_without_quorum_leaves_the_generator_and_is_tried_again(tmp_path: Path):
    failures = iter([True, True, False, False, False])
    sites = LoopbackSites(
        {
            "a": trains(1),
            "b": lambda order: NoReply(reason=NoReplyReason.DEADLINE) if next(failures) else trains(1)(order),
        }
    )
    last = hold_rounds(campaign(tmp_path, sites), START)
    assert last.weights.arrays["layer"].tolist() == [3, 3, 3]
    assert kinds(tmp_path) == ["round-not-held"] * 2 + ["round"] * 3


def test_a_resumed_campaign_continues_after_the_last_checkpoint_bit_for_bit(tmp_path: Path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    whole = hold_rounds(campaign(straight, LoopbackSites({"a": trains(0.1), "b": trains(0.3)})), START)

    def killed_in_round_two(order: Order) -> Reply:
        assert isinstance(order, TrainOrder)
        if order.round == 2:
            raise KeyboardInterrupt
        return trains(0.3)(order)

    with pytest.raises(KeyboardInterrupt):
        hold_rounds(campaign(broken, LoopbackSites({"a": trains(0.1), "b": killed_in_round_two})), START)
    sites = LoopbackSites({"a": trains(0.1), "b": trains(0.3)})
    resumed = hold_rounds(campaign(broken, sites), START)
    assert resumed.weights.digest == whole.weights.digest
    assert [order.round for _, order in sites.asked if isinstance(order, TrainOrder)] == [2, 2, 3, 3]


def test_a_kill_between_checkpoint_and_evidence_leaves_no_gap_in_the_evidence(tmp_path: Path):
    sites = LoopbackSites({"a": trains(1), "b": trains(1)})
    hold_rounds(campaign(tmp_path, sites), START)
    lines = (tmp_path / "evidence.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "evidence.jsonl").write_bytes(b"".join(lines[:-1]))
    hold_rounds(campaign(tmp_path, sites), START)
    records = EvidenceChain(tmp_path / "evidence.jsonl").verify()
    assert [record.body["round"] for record in records] == [1, 2, 3]


def test_the_running_average_is_not_trained_on(tmp_path: Path):
    sites = LoopbackSites({"a": trains(1), "b": trains(1)})
    last = hold_rounds(campaign(tmp_path, sites, server_ema=0.5), START)
    assert last.weights.arrays["layer"].tolist() == [3, 3, 3]
    assert last.average.arrays["layer"].tolist() == [2.25] * 3  # ((1 + 2) / 2 + 3) / 2


def test_the_epsilon_of_training_grows_with_the_rounds_and_is_not_stated_without_noise():
    spent = [training_epsilon(PLAN, rounds) for rounds in (1, 2, 3)]
    assert spent == sorted(spent)
    assert len(set(spent)) == 3
    bare = DpSgd(noise_multiplier=0.0, sampling_probability=0.1, steps=15)
    assert training_epsilon(replace(PLAN, mechanism=bare, target_epsilon=None), 1) is None


# --- check_reply -------------------------------------------------------------------------------

ORDER = TrainOrder(study_digest=DIGEST, round=2, weights=START, weights_digest=START.digest, plan=PLAN, deadline_s=10.0)
GOOD = trains(1)(ORDER)
OTHER_SHAPE = Weights({"layer": np.zeros((3, 1), np.float32)})


def test_a_good_reply_gives_its_weights():
    assert isinstance(check_reply(GOOD, ORDER), Weights)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (replace(GOOD, round=1), "reply is for another round"),
        (replace(GOOD, study_digest="6" * 64), "reply is for another study"),
        (replace(GOOD, weights_digest="0" * 64), "weights are not what their digest says"),
        (replace(GOOD, weights=OTHER_SHAPE, weights_digest=OTHER_SHAPE.digest), "weights have other names or shapes"),
        (StatementReply(study_digest=DIGEST, members=(), nonmembers=(), ledger_head=HEAD), "reply is of another kind"),
        (RefusalReply(code=RefusalCode.PAUSED), "site refused (paused)"),
        (NoReply(reason=NoReplyReason.FAILED), "site software failed"),
    ],
)
def test_a_bad_reply_is_excluded_with_a_fixed_reason(reply: Reply, reason: str):
    assert check_reply(reply, ORDER) == reason
