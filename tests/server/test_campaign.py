"""A whole campaign against sites that answer from a script: order of stages, resuming, what the gate sees."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from loopback_sites import LoopbackSites, SiteFunction
from scripted_hospitals import NOW, hold, scripted

from common.errors import IntegrityError
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import Outcome
from common.evidence.verification import verify_bundle
from common.privacy.ledger_witness import is_countersigned
from common.protocol.messages import (
    EnrolOrder,
    LedgerHead,
    Order,
    RefusalCode,
    RefusalReply,
    Reply,
    ScoreOrder,
    ScoreReply,
    StatementOrder,
    StatementReply,
    TrainOrder,
)
from common.telemetry.events import Event, StageFinished
from server.run_folder import RunFolder, RunState
from server.sites import NoReply

STAGES = ("warm start", "enrolment", "training", "audit", "candidates", "utility")


def kinds(run: RunFolder) -> list[str]:
    return [record.kind for record in EvidenceChain(run.evidence).verify()]


def test_a_campaign_whose_audit_finds_nothing_ends_in_a_release_that_verifies(released):
    outcome, run = released
    assert outcome.outcome is Outcome.RELEASE, outcome.reasons
    assert not outcome.simulated
    assert verify_bundle(run.release, trusted_key=None, now=NOW).outcome is Outcome.RELEASE
    assert len(list(run.release.glob("sub-*"))) == 2
    assert not run.candidates.exists()
    assert run.facts.state is RunState.FINISHED
    assert kinds(run) == [
        "campaign",
        "warm-start",
        "enrolment",
        "audit-plan",
        "round",
        "round",
        "audit-question",
        "audit-answers",
        "audit-result",
        "candidates",
        "statements",
        "decision",
    ]


def test_the_audit_plan_is_on_record_before_the_first_site_is_asked_to_train(tmp_path: Path):
    seen: list[bool] = []
    sites = scripted()
    honest = sites["a"]

    def looks_first(order: Order) -> Reply:
        if isinstance(order, TrainOrder | ScoreOrder):
            records = EvidenceChain(tmp_path / "run" / "evidence.jsonl").verify()
            fixed = [r.body["plan_digest"] for r in records if r.kind == "audit-plan"]
            asked = order.audit_plan_digest if isinstance(order, ScoreOrder) else None
            seen.append(len(fixed) == 1 and asked in (None, fixed[0]))
        return honest(order)

    hold(tmp_path / "run", LoopbackSites({**sites, "a": looks_first}))
    assert seen == [True, True, True]  # two rounds and the scores


@pytest.mark.parametrize(
    "stage",
    [pytest.param(stage, marks=() if stage in {"training", "candidates"} else pytest.mark.slow) for stage in STAGES],
)
def test_a_campaign_that_stops_after_a_stage_goes_on_to_the_same_decision(tmp_path: Path, released, stage: str):
    def ctrl_c(event: Event) -> None:
        if isinstance(event, StageFinished) and event.stage == stage:
            raise KeyboardInterrupt

    hospitals = scripted()
    with pytest.raises(KeyboardInterrupt):
        hold(tmp_path / "run", LoopbackSites(hospitals), ctrl_c)
    sites = LoopbackSites(hospitals)
    resumed, run = hold(tmp_path / "run", sites)
    assert resumed.decision_id == released[0].decision_id
    assert len(kinds(run)) == 12
    done = STAGES[: STAGES.index(stage) + 1]
    asked = {type(order) for _, order in sites.asked}
    assert (EnrolOrder in asked) == ("enrolment" not in done)
    assert (TrainOrder in asked) == ("training" not in done)
    assert (ScoreOrder in asked) == ("audit" not in done)


def test_a_kill_after_the_release_was_written_leaves_it_as_it_is(tmp_path: Path):
    first, run = hold(tmp_path / "run", LoopbackSites(scripted()))
    attestation = (run.release / "attestation.dsse.json").read_bytes()
    run.facts_file.write_bytes(run.facts_file.read_bytes().replace(b'"finished"', b'"open"'))
    run.candidates.mkdir()
    sites = LoopbackSites({})
    again, _ = hold(tmp_path / "run", sites)
    assert again == first
    assert (run.release / "attestation.dsse.json").read_bytes() == attestation
    assert not run.candidates.exists()
    assert run.facts.state is RunState.FINISHED


def test_a_site_that_does_not_state_what_it_spent_prevents_a_release(tmp_path: Path):
    sites = scripted()
    honest = sites["b"]
    sites["b"] = lambda order: (
        RefusalReply(code=RefusalCode.PAUSED) if isinstance(order, StatementOrder) else honest(order)
    )
    outcome, run = hold(tmp_path / "run", LoopbackSites(sites))
    assert outcome.outcome is Outcome.INCONCLUSIVE
    assert "b has not stated what it spent" in outcome.reasons
    assert run.candidates.exists()
    assert not list(run.release.glob("sub-*"))


def test_a_site_whose_ledger_says_less_than_it_trained_is_a_reject(tmp_path: Path):
    sites = scripted()
    honest = sites["b"]

    def forgets(order: Order) -> Reply:
        reply = honest(order)
        return replace(reply, members=reply.members[1:]) if isinstance(reply, StatementReply) else reply

    outcome, _ = hold(tmp_path / "run", LoopbackSites({**sites, "b": forgets}))
    assert outcome.outcome is Outcome.REJECT
    assert any("b states 2 training steps, but its replies took 4" in reason for reason in outcome.reasons)


def test_a_site_that_does_not_answer_the_audit_prevents_a_release_and_is_asked_again_on_resume(tmp_path: Path):
    sites = scripted()
    honest = sites["c"]
    sites["c"] = lambda order: RefusalReply(code=RefusalCode.BUDGET) if isinstance(order, ScoreOrder) else honest(order)

    def ctrl_c(event: Event) -> None:
        if isinstance(event, StageFinished) and event.stage == "audit":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hold(tmp_path / "run", LoopbackSites(sites), ctrl_c)
    stored = json.loads((tmp_path / "run" / "audit" / "answers.json").read_text())
    assert stored["missing"] == {"c": "site refused (budget)"}
    sites["c"] = honest
    outcome, _ = hold(tmp_path / "run", LoopbackSites(sites))
    assert outcome.outcome is Outcome.RELEASE, outcome.reasons


def test_every_order_after_a_sites_first_paid_answer_brings_its_own_last_head(tmp_path: Path):
    brought: dict[str, list[Order]] = {}
    sites = scripted()

    def watching(name: str) -> SiteFunction:
        def answer(order: Order) -> Reply | NoReply:
            brought.setdefault(name, []).append(order)
            return hospital(order)

        hospital = sites[name]
        return answer

    _, run = hold(tmp_path / "run", LoopbackSites({name: watching(name) for name in sites}))
    for number, (name, orders) in enumerate(brought.items(), start=1):
        enrolment, first, *later = orders
        assert isinstance(enrolment, EnrolOrder)
        assert first.witness is None
        for order in later:
            assert order.witness.site == name
            assert order.witness.head.hash == f"{1000 * number + order.witness.head.rows:064x}"
            assert is_countersigned(order.witness, study=run.facts.study_digest, key=enrolment.coordinator_key)
        assert [order.witness.head.rows for order in later] == [1, 2, 100]  # two rounds, then the audit


def test_a_site_whose_ledger_goes_back_does_not_count_and_is_named(tmp_path: Path):
    sites = scripted()
    honest = sites["b"]

    def put_back(order: Order) -> Reply:
        reply = honest(order)
        forged = LedgerHead(rows=1, hash="f" * 64)
        return replace(reply, ledger_head=forged) if isinstance(reply, ScoreReply) else reply

    def ctrl_c(event: Event) -> None:
        if isinstance(event, StageFinished) and event.stage == "audit":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hold(tmp_path / "run", LoopbackSites({**sites, "b": put_back}), ctrl_c)
    stored = json.loads((tmp_path / "run" / "audit" / "answers.json").read_text())
    assert stored["missing"] == {"b": "ledger went back behind a head that was countersigned"}


def test_a_run_whose_key_was_replaced_asks_no_site(tmp_path: Path):
    def ctrl_c(event: Event) -> None:
        if isinstance(event, StageFinished) and event.stage == "enrolment":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hold(tmp_path / "run", LoopbackSites(scripted()), ctrl_c)
    (tmp_path / "run" / "private" / "auditor.key").unlink()
    sites = LoopbackSites(scripted())
    with pytest.raises(IntegrityError, match="not the key that the sites enrolled with"):
        hold(tmp_path / "run", sites)
    assert sites.asked == []


def test_candidates_that_changed_in_quarantine_stop_the_campaign(tmp_path: Path):
    def ctrl_c(event: Event) -> None:
        if isinstance(event, StageFinished) and event.stage == "candidates":
            raise KeyboardInterrupt

    hospitals = scripted()
    with pytest.raises(KeyboardInterrupt):
        hold(tmp_path / "run", LoopbackSites(hospitals), ctrl_c)
    volume = next((tmp_path / "run" / "candidates").rglob("*.nii.gz"))
    volume.write_bytes(volume.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match="changed after they were quarantined"):
        hold(tmp_path / "run", LoopbackSites(hospitals))


@pytest.mark.parametrize("name", ["plan.json", "answers.json"])
def test_a_damaged_audit_file_is_one_clear_error(tmp_path: Path, name: str):
    def ctrl_c(event: Event) -> None:
        if isinstance(event, StageFinished) and event.stage == "audit":
            raise KeyboardInterrupt

    hospitals = scripted()
    with pytest.raises(KeyboardInterrupt):
        hold(tmp_path / "run", LoopbackSites(hospitals), ctrl_c)
    (tmp_path / "run" / "audit" / name).write_text("{}")
    with pytest.raises(IntegrityError, match=rf"{name} is damaged"):
        hold(tmp_path / "run", LoopbackSites(hospitals))
