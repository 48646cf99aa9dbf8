"""The mechanism audit as a stage: what is asked, what is kept, what a resumed run reads back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from loopback_sites import LoopbackSites, SiteFunction

from common.errors import IntegrityError
from common.evidence.chain import EvidenceChain
from common.measure.one_run import GUESS_RULES, Guesses
from common.protocol.messages import CanaryOrder, CanaryReply, LedgerHead, Order, RefusalCode, RefusalReply, Reply
from common.settings.load import study_digest
from server.audit.result import MechanismAudit, MechanismVerdict
from server.mechanism_stage import CANARIES_FILE, conduct_mechanism_audit, has_claim_to_check, rejudge_mechanism
from server.sites import NoReply, NoReplyReason
from tests.tiny_studies import tiny_plan, tiny_study

STUDY = tiny_study(audit={"canaries": 100})
PLAN = tiny_plan(STUDY, noise=1.0)
NOW = datetime(2026, 11, 20, tzinfo=UTC)


def reply(right: float, study: str = study_digest(STUDY)) -> CanaryReply:
    made = [rule.guesses(100) for rule in GUESS_RULES]
    return CanaryReply(
        study_digest=study,
        guesses=tuple(
            Guesses(rule=rule, guesses=n, correct=round(n * right)) for rule, n in zip(GUESS_RULES, made, strict=True)
        ),
        ledger_head=LedgerHead(rows=1, hash="a" * 64),
    )


def site(answer: Reply | NoReply) -> SiteFunction:
    def answers(order: Order) -> Reply | NoReply:
        assert isinstance(order, CanaryOrder)
        return answer

    return answers


@dataclass
class Stage:
    """One run folder; `hold` may be called again, as a resumed run does."""

    folder: Path

    @property
    def chain(self) -> EvidenceChain:
        return EvidenceChain(self.folder / "evidence.jsonl")

    def hold(self, sites: LoopbackSites) -> MechanismAudit:
        return conduct_mechanism_audit(
            STUDY, PLAN, sites, self.folder, participants=("a", "b"), chain=self.chain, now=lambda: NOW
        )


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(folder=tmp_path)


def both(make: Callable[[], Reply | NoReply]) -> LoopbackSites:
    return LoopbackSites({"a": site(reply(0.6)), "b": site(make())})


def test_every_trainer_is_asked_and_the_answers_stand_in_the_evidence(stage: Stage) -> None:
    sites = both(lambda: reply(0.6))
    found = stage.hold(sites)
    assert [name for name, _ in sites.asked] == ["a", "b"]
    assert found.canaries == 200
    (record,) = stage.chain.verify()
    assert record.kind == "canaries"
    assert record.body["verdict"] == found.verdict.value


def test_a_resumed_run_reads_the_answers_back_and_asks_nobody(stage: Stage) -> None:
    first = stage.hold(both(lambda: reply(0.6)))
    sites = both(lambda: reply(1.0))
    assert stage.hold(sites) == first == rejudge_mechanism(STUDY, PLAN, stage.folder)
    assert sites.asked == []
    assert len(stage.chain.verify()) == 1


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        (NoReply(reason=NoReplyReason.DEADLINE), "no reply before the deadline"),
        (RefusalReply(code=RefusalCode.POLICY), "site refused (policy)"),
        (reply(0.6, study="0" * 64), "reply is to another question"),
        (replace(reply(0.6), guesses=reply(0.6).guesses[:-1]), "reply is to another question"),
    ],
)
def test_a_site_that_gives_nothing_usable_is_named_and_asked_again(
    stage: Stage, answer: Reply | NoReply, phrase: str
) -> None:
    found = stage.hold(both(lambda: answer))
    assert found.verdict is MechanismVerdict.UNINFORMATIVE
    assert any(f"b did not answer ({phrase})" in reason for reason in found.reasons)
    sites = both(lambda: reply(0.6))
    assert not any("b did not answer" in reason for reason in stage.hold(sites).reasons)
    assert [name for name, _ in sites.asked] == ["a", "b"]


def test_damaged_answers_are_refused(stage: Stage) -> None:
    stage.hold(both(lambda: reply(0.6)))
    (stage.folder / CANARIES_FILE).write_text('{"canaries": 100}')
    with pytest.raises(IntegrityError, match=r"canaries\.json is damaged.*the sites guess again, free"):
        rejudge_mechanism(STUDY, PLAN, stage.folder)


def test_a_study_without_canaries_or_without_noise_has_nothing_to_check(tmp_path: Path) -> None:
    assert has_claim_to_check(STUDY, PLAN)
    assert not has_claim_to_check(STUDY, tiny_plan(STUDY, noise=0.0))
    assert not has_claim_to_check(tiny_study(), PLAN)
    assert rejudge_mechanism(tiny_study(), PLAN, tmp_path) is None
