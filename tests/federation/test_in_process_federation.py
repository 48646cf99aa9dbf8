"""Three hospitals in one process, by the real apps: what is left behind, and what a stop or a refusal changes."""

import json
from pathlib import Path

import pytest
from tiny_federation import answers, federate, generator_digest, kinds

from common.errors import IntegrityError, Unreachable
from common.evidence.predicate import Outcome
from common.privacy.ledger import Ledger
from common.protocol.messages import LedgerHead
from common.telemetry.events import Event, RoundFinished, StageFinished
from server.run_folder import RunFolder, RunState, read_decision


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return federate(tmp_path_factory.mktemp("federation"))


def stop_at(wanted: Event | type[Event] | str):
    """An observer that presses Ctrl-C at a round or at the end of a stage."""

    def observer(event: Event) -> None:
        match event:
            case StageFinished(stage=stage) if stage == wanted:
                raise KeyboardInterrupt
            case RoundFinished(round=1) if wanted == "round 1":
                raise KeyboardInterrupt

    return observer


def test_the_run_ends_in_a_signed_refusal_because_thirty_patients_show_nothing(finished: RunFolder):
    decision = read_decision(finished.release)
    assert decision.outcome is Outcome.INCONCLUSIVE
    assert decision.simulated
    assert finished.facts.state is RunState.FINISHED
    assert sorted(decision.sites) == ["site-1", "site-2", "site-3"]


def test_everything_the_contract_names_lies_in_the_run_folder(finished: RunFolder):
    names = {path.relative_to(finished.path).as_posix() for path in finished.path.rglob("*")}
    assert names >= {
        "study.json",
        "run.json",
        "evidence.jsonl",
        "events.jsonl",
        "log.jsonl",
        "checkpoint/round-0002.json",
        "checkpoint/round-0002.safetensors",
        "warm-start/generator.safetensors",
        "warm-start/critic.safetensors",
        "candidates",
        "audit/plan.json",
        "audit/answers.json",
        "audit/result.json",
        "utility.json",
        "witness.json",
        "report.html",
        "summary.md",
        "release/decision.json",
        "release/attestation.dsse.json",
        "sites/site-1/site.yaml",
        "sites/site-1/policy.yaml",
        "sites/site-1/ledger.sqlite",
        "private/auditor.key",
    }
    assert "release/generator.safetensors" not in names


def test_the_audit_plan_is_in_the_evidence_before_any_round_and_any_answer(finished: RunFolder):
    order = kinds(finished)
    assert order.index("enrolment") < order.index("audit-plan") < order.index("round") < order.index("audit-answers")
    assert order[-1] == "decision"


def test_every_head_that_was_countersigned_is_in_its_sites_ledger(finished: RunFolder):
    witnessed = json.loads(finished.witness.read_text())
    assert set(witnessed) == set(finished.facts.sites)
    for site, seen in witnessed.items():
        heads = [LedgerHead(**witness["head"]) for witness in seen]
        assert len(heads) > finished.study.training.rounds  # each round, the audit, the answers
        Ledger(finished.sites / site / "ledger.sqlite").verify(*heads)


def test_no_site_failed_on_the_way(finished: RunFolder):
    assert "site failed" not in finished.log.read_text()
    for site in finished.sites.iterdir():
        assert '"internal"' not in (site / "state" / "site.log").read_text()


def test_a_finished_run_is_not_run_again(finished: RunFolder):
    before = finished.evidence.read_bytes()
    events: list[Event] = []
    assert federate(finished.path.parent, observer=events.append).facts.outcome == "INCONCLUSIVE"
    assert finished.evidence.read_bytes() == before
    assert events == []


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(finished: RunFolder, tmp_path: Path):
    assert generator_digest(federate(tmp_path, name="again")) == generator_digest(finished)
    assert generator_digest(federate(tmp_path, name="other", seed=1)) != generator_digest(finished)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["warm start", "enrolment", "round 1", "training", "audit", "candidates", "utility"])
def test_ctrl_c_loses_nothing_and_changes_no_bit(finished: RunFolder, tmp_path: Path, moment: str):
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path, observer=stop_at(moment))
    run = federate(tmp_path)
    assert generator_digest(run) == generator_digest(finished)
    assert len(kinds(run)) == len(kinds(finished))
    assert answers(run) == answers(finished)
    epsilon = {name: site.members.epsilon for name, site in read_decision(run.release).sites.items()}
    assert epsilon == {name: site.members.epsilon for name, site in read_decision(finished.release).sites.items()}


@pytest.mark.slow
def test_a_truncated_checkpoint_stops_the_run_and_its_remedy_gives_the_same_weights(
    finished: RunFolder, tmp_path: Path
):
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path, observer=stop_at("training"))
    damaged = tmp_path / "run" / "checkpoint" / "round-0002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(IntegrityError, match=r"round 2 is damaged.*round 1 is intact.*delete .*round-0002\.json"):
        federate(tmp_path)
    damaged.with_suffix(".json").unlink()
    run = federate(tmp_path)
    assert generator_digest(run) == generator_digest(finished)
    spent = read_decision(run.release).sites["site-1"].members.epsilon
    assert spent == read_decision(finished.release).sites["site-1"].members.epsilon


@pytest.mark.slow
def test_a_paused_hospital_is_left_out_and_the_others_go_on(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path, observer=stop_at("enrolment"))
    (tmp_path / "run" / "sites" / "site-2" / "state" / "paused").touch()
    run = federate(tmp_path)
    decision = read_decision(run.release)
    assert sorted(decision.sites) == ["site-1", "site-3"]
    assert '"site-2": "site refused (paused)"' in (run.checkpoints / "round-0001.json").read_text()


@pytest.mark.slow
def test_two_paused_hospitals_stop_the_campaign_and_it_resumes_when_one_is_back(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path, observer=stop_at("enrolment"))
    paused = [tmp_path / "run" / "sites" / name / "state" / "paused" for name in ("site-2", "site-3")]
    for file in paused:
        file.touch()
    with pytest.raises(Unreachable, match=r"round 1 could not be held 3 times .*site-2: site refused \(paused\)"):
        federate(tmp_path)
    paused[0].unlink()
    assert sorted(read_decision(federate(tmp_path).release).sites) == ["site-1", "site-2"]
