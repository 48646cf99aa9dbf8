"""What a coordinator's Prometheus gets, read from the federation folder as it lies on disk."""

import os
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.errors import Unreachable
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import ROUND_RECORD
from common.protocol.messages import RefusalCode
from common.settings.load import study_digest
from common.telemetry.events import RoundFinished
from common.telemetry.logs import events_file
from common.telemetry.metrics import PAGE, Where
from common.telemetry.security_log import SecurityLog
from server.federation import exporter
from server.federation.authority import expires
from server.federation.exporter import OUTCOMES, Seen, reply_outcome, serve_coordinator_metrics
from server.federation.network_run import Activity
from server.federation.registry import Registry
from server.round import ROUND_NOT_HELD_RECORD
from server.run_folder import Engine, RunFacts, RunFolder
from server.sites import NoReplyReason
from tests.provisioned import make_federation, site_request
from tests.tiny_studies import tiny_study

NOW = datetime.now(UTC)
STUDY = tiny_study(privacy={"target_epsilon": 3.0})
ROUND = {"round": 1, "seconds": 12.5, "replies": {"alpha": "d1"}, "excluded": {"beta": "site refused (budget)"}}


@pytest.fixture
def federation(tmp_path):
    """Two enrolled sites and one that was revoked."""
    found = make_federation(tmp_path / "federation", now=NOW)
    registry = Registry(found)
    for name in ("alpha", "beta", "gone"):
        registry.enrol(site_request(name), now=NOW, days=100)
    registry.revoke("gone", reason="left", now=NOW)
    return found


@pytest.fixture
def run(federation):
    """A run with one round held, before it one that was not."""
    facts = RunFacts(
        engine=Engine.NETWORK, sites=("alpha", "beta"), seed=1, simulated=False, study_digest=study_digest(STUDY)
    )
    made = RunFolder.create_or_resume(federation.runs / "tiny", STUDY, facts)
    chain = EvidenceChain(made.evidence)
    chain.append(ROUND_NOT_HELD_RECORD, {"round": 1, "excluded": {"beta": NoReplyReason.DEADLINE.value}}, NOW)
    chain.append(ROUND_RECORD, ROUND, NOW + timedelta(seconds=20))
    finished = RoundFinished(round=1, rounds=4, sites_used=1, sites_excluded=1, epsilon_spent=1.25, seconds=12.5)
    events_file(made.events, lambda: NOW)(finished)
    return made


def nobody(_folder):
    raise Unreachable("no SuperLink")


@pytest.fixture
def served(federation):
    """served(ask) -> the running page."""
    running = []

    def start(ask=nobody):
        running.append(serve_coordinator_metrics(federation.path, 0, ask=ask, ask_s=0.02))
        return running[-1]

    yield start
    for page in running:
        page.stop()


def text(page) -> str:
    with urlopen(f"http://127.0.0.1:{page.port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def fetch(page) -> dict[str, float]:
    """Values by name without our prefix and labels, `name{a=b}`."""
    return {
        s.name.removeprefix("consilium_")
        + (f"{{{','.join(f'{k}={v}' for k, v in sorted(s.labels.items()))}}}" if s.labels else ""): s.value
        for family in text_string_to_metric_families(text(page))
        for s in family.samples
    }


def wait_for(page, name: str, value: float) -> dict[str, float]:
    end = time.monotonic() + 20
    while (found := fetch(page)).get(name) != value:
        assert time.monotonic() < end, f"{name} did not become {value}"
        time.sleep(0.02)
    return found


def test_a_run_shows_its_rounds_replies_and_epsilon(served, run):
    found = fetch(served())
    assert found["coordinator_run_rounds{run=tiny}"] == 1
    assert found["coordinator_run_rounds_planned{run=tiny}"] == STUDY.training.rounds
    assert found["coordinator_run_rounds_not_held_total{run=tiny}"] == 1
    assert found["coordinator_run_round_seconds{run=tiny}"] == 12.5
    assert found["coordinator_replies_total{outcome=used,run=tiny,site=alpha}"] == 1
    assert found["coordinator_replies_total{outcome=refused-budget,run=tiny,site=beta}"] == 1
    assert found["coordinator_replies_total{outcome=deadline,run=tiny,site=beta}"] == 1
    assert found["coordinator_epsilon_target{run=tiny}"] == 3.0
    assert found["coordinator_epsilon_spent{run=tiny}"] == 1.25
    assert found["coordinator_evidence_verified{run=tiny}"] == 1
    last = found["coordinator_run_last_record_timestamp_seconds{run=tiny}"]
    assert last == pytest.approx((NOW + timedelta(seconds=20)).timestamp(), abs=1)


def test_a_round_that_is_added_is_seen_at_the_next_scrape(served, run):
    page = served()
    assert fetch(page)["coordinator_run_rounds{run=tiny}"] == 1
    EvidenceChain(run.evidence).append(ROUND_RECORD, {**ROUND, "round": 2, "excluded": {}}, NOW)
    found = fetch(page)
    assert found["coordinator_run_rounds{run=tiny}"] == 2
    assert found["coordinator_replies_total{outcome=used,run=tiny,site=alpha}"] == 2


def test_edited_evidence_is_said_and_shows_no_figures(served, run):
    page = served()
    run.evidence.write_bytes(run.evidence.read_bytes().replace(b"12.5", b"13.5"))
    found = fetch(page)
    assert found["coordinator_evidence_verified{run=tiny}"] == 0
    assert "coordinator_run_rounds{run=tiny}" not in found


def test_a_damaged_run_hides_no_other(served, run, federation):
    shutil.copytree(run.path, federation.runs / "other")
    (federation.runs / "other" / "run.json").write_text("{}")
    found = fetch(served())
    assert found["read_failed{source=runs}"] == 1
    assert found["coordinator_run_rounds{run=tiny}"] == 1


def test_sites_and_certificates_are_those_of_the_registry(served, federation):
    found = fetch(served())
    assert found["coordinator_sites{state=enrolled}"] == 2
    assert found["coordinator_sites{state=revoked}"] == 1
    ends = expires(federation.path)
    for name in ("authority", "gateway", "superlink", "coordinator", "revocation-list", "site/alpha", "site/beta"):
        assert found[f"certificate_expiry_timestamp_seconds{{certificate={name}}}"] == ends[name].timestamp()
    assert "certificate_expiry_timestamp_seconds{certificate=site/gone}" not in found  # needs no renewal


def test_processes_that_do_not_run_are_down(served):
    found = fetch(served())
    assert {found[f"coordinator_process_up{{process={name}}}"] for name in exporter.PROCESSES} == {0}


def test_what_only_the_superlink_knows_is_unknown_while_it_is_away_and_not_offline(served):
    answers = []

    def ask(_folder):
        if not answers:
            raise Unreachable("away")
        return answers[-1]

    page = served(ask)
    assert not [name for name in wait_for(page, "read_failed{source=superlink}", 1) if "online" in name]
    answers.append(Seen(online={"alpha": True, "beta": False}, activities={"tiny": Activity.GIVEN_UP}))
    found = wait_for(page, "read_failed{source=superlink}", 0)
    assert (found["coordinator_site_online{site=alpha}"], found["coordinator_site_online{site=beta}"]) == (1, 0)
    assert found["coordinator_run_state{run=tiny,state=given-up}"] == 1
    assert sum(value for name, value in found.items() if name.startswith("coordinator_run_state")) == 1


def test_every_reason_of_the_round_record_has_a_word():
    assert set(OUTCOMES) == {reason.value for reason in NoReplyReason}
    assert ROUND_NOT_HELD_RECORD == exporter.NOT_HELD_RECORD
    assert {reply_outcome(f"site refused ({code})") for code in RefusalCode} == {f"refused-{c}" for c in RefusalCode}
    assert reply_outcome("update is 9.1 times as long as the median update") == "outlier"
    assert reply_outcome("weights are not what their digest says") == "invalid"
    assert reply_outcome("site refused (a patient's name)") == "invalid"  # only a word may become a label


def test_a_page_does_not_grow_with_the_years(served, run, federation):
    for number in range(exporter.RUNS_SHOWN + 5):
        copy = federation.runs / f"old-{number}"
        shutil.copytree(run.path, copy)
        os.utime(copy / "run.json", (number, number))  # long ago
    found = fetch(served())
    shown = [name for name in found if name.startswith("coordinator_run_rounds{")]
    assert len(shown) == exporter.RUNS_SHOWN
    assert "coordinator_run_rounds{run=tiny}" in found


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")
def test_prometheus_has_no_complaint_and_every_name_is_on_the_page(served, run, federation):
    SecurityLog(federation.security_log).note(operation="enrol", outcome="refused")
    page = served(lambda _: Seen(online={"alpha": True}, activities={"tiny": Activity.WORKING}))
    names = {f"consilium_{name.partition('{')[0]}" for name in wait_for(page, "read_failed{source=superlink}", 0)}
    here = {metric.name for metric in PAGE if metric.where in {Where.COORDINATOR, Where.BOTH}}
    assert names <= here
    # Only a run that has ended has these two.
    assert here - names == {"consilium_coordinator_run_outcome_info", "consilium_coordinator_epsilon_stated"}
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text(page).encode(), capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
