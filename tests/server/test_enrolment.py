"""Enrolment: who takes part is settled and recorded before any training."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from loopback_sites import LoopbackSites

from common.errors import IntegrityError, Unreachable
from common.evidence.canonical import canonical_json
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import ENROLMENT_RECORD
from common.generator.weights import Weights
from common.protocol.messages import EnrolOrder, EnrolReply, Order, RefusalCode, RefusalReply, Reply
from common.settings.load import study_digest, study_json
from server.enrolment import Enrolment, enrol, enrolment_from
from server.evidence_log import last_record
from server.sites import NoReply, NoReplyReason
from tests.tiny_studies import tiny_study

STUDY = tiny_study()
DIGEST = study_digest(STUDY)
PUBLIC = Weights({"layer": np.zeros(2, np.float32)})
REPLY = EnrolReply(
    study_digest=DIGEST,
    holdout_commitment="a" * 64,
    policy_digest="b" * 64,
    code_digest="c" * 64,
    simulated=True,
    receipt_key="e" * 64,
)


MALFORMED = "commitment, policy or code digest is not a SHA-256, or receipt key not an Ed25519 key"


def joins(**changes: object) -> Callable[[Order], Reply]:
    return lambda _: replace(REPLY, **changes)


def enrolled(folder: Path, sites: LoopbackSites) -> Enrolment:
    return enrol(
        STUDY,
        sites,
        public_generator=PUBLIC,
        public_critic=None,
        coordinator_key="d" * 64,
        chain=EvidenceChain(folder / "evidence.jsonl"),
        now=lambda: datetime(2027, 1, 1, tzinfo=UTC),
    )


def test_every_site_gets_the_whole_study_and_the_public_start(tmp_path: Path):
    sites = LoopbackSites({"b": joins(), "a": joins()})
    assert enrolled(tmp_path, sites).names == ("b", "a")
    assert [name for name, _ in sites.asked] == ["b", "a"]
    order = sites.asked[0][1]
    assert isinstance(order, EnrolOrder)
    assert (order.study_json, order.study_digest) == (study_json(STUDY), DIGEST)
    assert (order.public_generator.digest, order.coordinator_key) == (PUBLIC.digest, "d" * 64)


def test_commitments_are_in_the_evidence_and_read_back_the_same(tmp_path: Path):
    sites = LoopbackSites(
        {"b": joins(holdout_commitment="d" * 64), "a": joins(), "c": lambda _: RefusalReply(code=RefusalCode.POLICY)}
    )
    enrolment = enrolled(tmp_path, sites)
    record = last_record(EvidenceChain(tmp_path / "evidence.jsonl"), ENROLMENT_RECORD)
    assert record is not None
    back = enrolment_from(record, DIGEST)
    assert back == enrolment
    assert back.names == ("b", "a")
    assert back.refused == {"c": "site refused (policy)"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (joins(study_digest="0" * 64), "reply is for another study"),
        (joins(holdout_commitment=""), MALFORMED),
        (joins(receipt_key="ssh-ed25519 AAAA"), MALFORMED),
        (joins(code_digest="e" * 64), "site runs another code version than most sites"),
        (lambda _: NoReply(reason=NoReplyReason.DEADLINE), "no reply before the deadline"),
    ],
)
def test_a_site_that_does_not_fit_is_left_out_with_its_reason(tmp_path: Path, answer, reason: str):
    enrolment = enrolled(tmp_path, LoopbackSites({"a": joins(), "b": joins(), "c": answer}))
    assert enrolment.names == ("a", "b")
    assert enrolment.refused == {"c": reason}


def test_an_enrolment_without_receipt_keys_is_of_an_older_version_and_is_not_resumed(tmp_path: Path):
    enrolled(tmp_path, LoopbackSites({"a": joins(), "b": joins()}))
    record = last_record(EvidenceChain(tmp_path / "evidence.jsonl"), ENROLMENT_RECORD)
    assert record is not None
    body = json.loads(canonical_json(record.body))
    del body["participants"]["a"]["receipt_key"]
    with pytest.raises(IntegrityError, match="older version"):
        enrolment_from(replace(record, body=body), DIGEST)


def test_below_the_quorum_nothing_is_recorded(tmp_path: Path):
    sites = LoopbackSites({"a": joins(), "b": lambda _: RefusalReply(code=RefusalCode.COHORT)})
    with pytest.raises(Unreachable, match=r"1 of 2 sites enrolled, the study needs 2.*b: site refused \(cohort\)"):
        enrolled(tmp_path, sites)
    assert EvidenceChain(tmp_path / "evidence.jsonl").verify() == ()


def test_two_sites_with_different_code_do_not_make_a_study(tmp_path: Path):
    with pytest.raises(Unreachable, match="another code version"):
        enrolled(tmp_path, LoopbackSites({"a": joins(), "b": joins(code_digest="e" * 64)}))


def test_one_seeded_site_makes_the_whole_campaign_simulated(tmp_path: Path):
    assert enrolled(tmp_path, LoopbackSites({"a": joins(simulated=False), "b": joins()})).simulated
