"""Fine-tune rounds of an ensemble: to each site its own generator and nobody else's; without any, all is as ever."""

import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from loopback_sites import LoopbackSites

from common.errors import IntegrityError
from common.evidence.chain import EvidenceChain
from common.generator.weights import Weights
from common.protocol.messages import LedgerHead, Order, RefusalCode, RefusalReply, Reply, TrainOrder, TrainReply
from common.settings.study import FederationSettings, Strategy
from server.checkpoint import Checkpoint, CheckpointStore
from server.round import TrainingCampaign, hold_rounds
from tests.tiny_studies import tiny_plan, tiny_study

DIGEST = "5" * 64
START = Weights({"layer": np.zeros(3, np.float32)})
STUDY = tiny_study(training={"rounds": 4, "critic_steps_per_round": 5})
SitesByName = Mapping[str, Callable[[Order], Reply]]
# Made by the code as it was before there were fine-tune rounds: SHA-256 over every file that three rounds leave.
BEFORE_ENSEMBLES = "cd0a4f118550594d03f2a143e2044e7a54a8648b5b05648f28e3c1681c6ff586"


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
            ledger_head=LedgerHead(rows=1, hash="e" * 64),
        )

    return site


def missing_in(rounds: set[int], site: Callable[[Order], Reply]) -> Callable[[Order], Reply]:
    """A site that is paused in these rounds."""

    def sometimes(order: Order) -> Reply:
        assert isinstance(order, TrainOrder)
        return RefusalReply(code=RefusalCode.PAUSED) if order.round in rounds else site(order)

    return sometimes


def hold(folder: Path, sites: SitesByName, *, fine_tune_rounds: int = 2) -> tuple[Checkpoint, LoopbackSites]:
    """Four rounds, the last `fine_tune_rounds` of them for each site alone, or what is left of them."""
    federation = {"strategy": Strategy.ENSEMBLE, "fine_tune_rounds": fine_tune_rounds} if fine_tune_rounds else {}
    loopback = LoopbackSites(sites)
    return hold_rounds(campaign(folder, loopback, **federation), START), loopback


def campaign(folder: Path, sites: LoopbackSites, *, rounds: int = 4, **federation) -> TrainingCampaign:
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint").mkdir(exist_ok=True)
    training = STUDY.training.model_copy(update={"rounds": rounds})
    study = STUDY.model_copy(update={"federation": FederationSettings(**federation), "training": training})
    return TrainingCampaign(
        study=study,
        study_digest=DIGEST,
        plan=tiny_plan(study, noise=1.0),
        participants=sites.names,
        site_weights=dict.fromkeys(sites.names, 1.0),
        sites=sites,
        store=CheckpointStore(folder / "checkpoint", study_digest=DIGEST),
        chain=EvidenceChain(folder / "evidence.jsonl"),
        observer=lambda _: None,
        now=lambda: datetime(2027, 1, 1, tzinfo=UTC),
    )


def first(weights: Weights) -> float:
    return float(weights.arrays["layer"][0])


def own(checkpoint: Checkpoint) -> dict[str, float]:
    return {site: first(weights) for site, weights in checkpoint.own.items()}


def sent(sites: LoopbackSites) -> dict[int, dict[str, float]]:
    """First weight that each site was sent, by round."""
    found: dict[int, dict[str, float]] = {}
    for name, order in sites.asked:
        assert isinstance(order, TrainOrder)
        assert order.weights_digest == order.weights.digest
        found.setdefault(order.round, {})[name] = first(order.weights)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_site_is_sent_the_common_generator_first_and_then_its_own_and_nobody_elses(tmp_path: Path):
    _, sites = hold(tmp_path, {"b": trains(1), "a": trains(2), "c": trains(3)})
    assert sent(sites) == {
        1: {"a": 0, "b": 0, "c": 0},
        2: {"a": 2, "b": 2, "c": 2},
        3: {"a": 4, "b": 4, "c": 4},  # the first fine-tune round begins at the mean
        4: {"a": 6, "b": 5, "c": 7},
    }


def test_the_common_generator_stays_as_the_last_mean_and_every_site_has_its_own(tmp_path: Path):
    last, _ = hold(tmp_path, {"b": trains(1), "a": trains(2), "c": trains(3)})
    assert own(last) == {"a": 8, "b": 6, "c": 10}
    assert first(last.weights) == first(last.average) == 4
    records = EvidenceChain(tmp_path / "evidence.jsonl").verify()
    assert [record.body.get("own_digests", {}).keys() for record in records] == [set(), set(), {*"abc"}, {*"abc"}]
    assert records[-1].body["own_digests"] == {site: weights.digest for site, weights in last.own.items()}
    assert records[-1].body["replies"] == records[-1].body["own_digests"]


def test_a_site_that_misses_a_fine_tune_round_keeps_its_generator_and_is_recorded(tmp_path: Path):
    last, _ = hold(
        tmp_path, {"a": trains(1), "b": missing_in({4}, trains(2)), "c": missing_in({3}, trains(3))}, fine_tune_rounds=2
    )
    assert own(last) == {"a": 6, "b": 6, "c": 7}  # from 4: b stopped after one round, c began one later
    assert last.record.excluded == {"b": "site refused (paused)"}
    assert set(last.record.replies) == {"a", "c"}
    third = EvidenceChain(tmp_path / "evidence.jsonl").verify()[2].body
    assert third["excluded"] == {"c": "site refused (paused)"}
    assert "c" not in third["own_digests"]


def test_an_exploding_reply_in_a_fine_tune_round_leaves_its_site_where_it_was(tmp_path: Path):
    def explodes(order: Order) -> Reply:
        assert isinstance(order, TrainOrder)
        return trains(1000 if order.round == 4 else 1)(order)

    last, _ = hold(tmp_path, {"a": trains(1), "b": trains(1), "c": explodes})
    assert own(last) == {"a": 4, "b": 4, "c": 3}
    assert last.record.excluded["c"].startswith("update is 1000.0 times as long")


@pytest.mark.parametrize("killed_in", [3, 4])
def test_a_kill_in_a_fine_tune_round_changes_no_bit(tmp_path: Path, killed_in: int):
    honest = {"b": trains(0.1), "a": trains(0.7), "c": trains(1 / 3)}

    def killed(order: Order) -> Reply:
        assert isinstance(order, TrainOrder)
        if order.round == killed_in:
            raise KeyboardInterrupt
        return honest["c"](order)

    whole, _ = hold(tmp_path / "straight", honest)
    with pytest.raises(KeyboardInterrupt):
        hold(tmp_path / "broken", {**honest, "c": killed})
    resumed, sites = hold(tmp_path / "broken", honest)
    assert min(sent(sites)) == killed_in
    assert own(resumed) == own(whole)
    assert files(tmp_path / "broken") == files(tmp_path / "straight")


def test_a_kill_between_checkpoint_and_evidence_leaves_no_gap_even_if_only_own_generators_changed(tmp_path: Path):
    sites = {"a": trains(1), "b": trains(1)}
    hold(tmp_path, sites)
    whole = (tmp_path / "evidence.jsonl").read_bytes()
    (tmp_path / "evidence.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    hold(tmp_path, sites)
    assert (tmp_path / "evidence.jsonl").read_bytes() == whole
    (tmp_path / "checkpoint" / "round-0004.json").unlink()
    hold(tmp_path, {**sites, "b": trains(2)})  # the round is held again and ends elsewhere
    assert len(EvidenceChain(tmp_path / "evidence.jsonl").verify()) == 5


def test_own_generators_that_changed_places_on_disk_are_damage(tmp_path: Path):
    last, _ = hold(tmp_path, {"a": trains(1), "b": trains(2)})
    swapped = Checkpoint(
        record=last.record, weights=last.weights, average=last.average, own={"a": last.own["b"], "b": last.own["a"]}
    )
    store = CheckpointStore(tmp_path / "checkpoint", study_digest=DIGEST)
    store.save(swapped)  # with a matching checksum of the file: only the digests of the record tell
    with pytest.raises(IntegrityError, match=r"round 4 is damaged.*other weights"):
        store.latest()


def test_a_fine_tune_round_without_quorum_is_tried_again_from_the_same_generators(tmp_path: Path):
    attempts = iter([True, False])

    def late(order: Order) -> Reply:
        assert isinstance(order, TrainOrder)
        if order.round == 4 and next(attempts):
            return RefusalReply(code=RefusalCode.PAUSED)
        return trains(1)(order)

    last, sites = hold(tmp_path, {"a": trains(2), "b": late})
    fourth = [(name, first(order.weights)) for name, order in sites.asked if order.round == 4]
    assert fourth == [("a", 5), ("b", 4), ("a", 5), ("b", 4)]
    assert own(last) == {"a": 7, "b": 5}


def test_without_fine_tune_rounds_every_file_is_what_it_was_before_there_were_any(tmp_path: Path):
    sites = LoopbackSites({"a": trains(0.1), "b": trains(0.7), "c": trains(1 / 3)})
    hold_rounds(campaign(tmp_path, sites, rounds=3, strategy=Strategy.FEDAVG, server_ema=0.5), START)
    h = hashlib.sha256()
    for name, data in files(tmp_path).items():
        h.update(name.encode() + b"\0" + data)
    assert h.hexdigest() == BEFORE_ENSEMBLES
