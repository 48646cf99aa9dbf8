"""A campaign through gateway, TLS, node keys and a hospital's forward proxy: what it leaves behind on both sides."""

import json
import subprocess
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from connect_proxy import LEAVES_BY
from network import APPROVED, Campaign, Site, approve, command, make_site, phantom_site, small_study, study_file

from client.ledger_report import planned_charges
from client.service import Part, children, prepare
from common.cli import run as consilium
from common.evidence.predicate import Outcome
from common.evidence.signing import load_signing_key, public_pem
from common.evidence.verification import verify_bundle
from common.identity.keys import create_node_key
from common.privacy.ledger import Ledger
from common.privacy.ledger_rows import Cohort, EntryState
from common.protocol.messages import LedgerHead
from common.settings.load import study_digest
from server.checkpoint import CheckpointStore
from server.federation.bundle import app_digest
from server.run_folder import read_decision

pytestmark = pytest.mark.slow


def test_three_rounds_end_in_a_refusal_that_the_coordinators_key_signed(finished: Campaign):
    run = finished.run
    decision = read_decision(run.release)
    assert decision.outcome is Outcome.INCONCLUSIVE  # thirty patients show nothing
    assert sorted(decision.sites) == list(APPROVED)
    assert not decision.simulated
    rounds = CheckpointStore(run.checkpoints, study_digest=study_digest(finished.study)).records()
    assert [sorted(record.replies) for record in rounds] == [list(APPROVED)] * 3
    public = public_pem(load_signing_key(finished.network.folder.signing_key).public_key())
    verified = verify_bundle(run.release, trusted_key=public, now=datetime.now(UTC))
    assert verified.pinned
    assert verified.outcome is Outcome.INCONCLUSIVE
    assert consilium(["verify", str(run.release)]) == 1  # authentic, and no release


@pytest.mark.parametrize("name", APPROVED)
def test_a_ledger_is_charged_exactly_what_the_plan_says(finished: Campaign, name: str):
    site = finished.network.sites[name]
    ledger = Ledger(site.ledger)
    for cohort, planned in planned_charges(finished.study).items():
        entries = ledger.entries(study_digest(finished.study), cohort)
        assert Counter((entry.key, entry.mechanism) for entry in entries) == Counter(planned)
        assert {entry.state for entry in entries} == {EntryState.DONE}
    assert len(ledger.entries()) == sum(map(len, planned_charges(finished.study).values()))
    assert consilium(["site", "ledger", str(site.folder), "--verify"]) == 0
    witnessed = json.loads(finished.run.witness.read_text())[name]
    ledger.verify(*[LedgerHead(**witness["head"]) for witness in witnessed])
    assert len(witnessed) > finished.study.training.rounds
    spent = ledger.epsilon(Cohort.MEMBERS, delta=finished.study.privacy.delta)
    stated = read_decision(finished.run.release).sites[name].members.epsilon
    assert stated == pytest.approx(spent.value, rel=1e-9)


def test_a_connected_site_that_the_run_does_not_name_is_never_asked(finished: Campaign):
    outsider = finished.network.sites[finished.outsider]
    assert finished.outsider in finished.network.online()
    assert not outsider.ledger.exists()
    assert outsider.log == ""
    assert "Receiving" in (finished.network.sites["site-1"].folder / "log" / "supernode.log").read_text()
    assert "Receiving" not in (outsider.folder / "log" / "supernode.log").read_text()


def test_a_site_behind_a_proxy_reaches_the_gateway_through_it_and_nobody_else(finished: Campaign):
    log = finished.network.folder.log / "gateway-access.log"
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    through = [r for r in requests if r["address"] == LEAVES_BY]
    assert {r["status"] for r in through} == {200}
    assert any(r["path"].endswith("push-object") for r in through)
    assert finished.proxy.refused == []  # no telemetry, no update check, no second destination
    # Other tests ask as strangers, from another address, and get nothing.
    taken = {r["address"] for r in requests if r["path"].endswith("push-object") and r["status"] == 200}
    assert taken == {"127.0.0.1", LEAVES_BY}


def test_a_bundle_that_the_policy_does_not_name_is_refused_before_any_patient_is_looked_at(finished: Campaign):
    network, study = finished.network, small_study("other-app", rounds=1, steps=1)
    for name in APPROVED:
        approve(network.sites[name], study)
        policy = network.sites[name].folder / "policy.yaml"
        assert app_digest() in policy.read_text()
        policy.write_text(policy.read_text().replace(app_digest(), "0" * 64))
    before = {name: network.sites[name].ledger.read_bytes() for name in APPROVED}
    file = study_file(network.root, study)
    command("federation", "start", network.federation.folder, file, "--sites", ",".join(APPROVED))
    run = network.run("other-app")
    network.wait("the run says why it ended", run.failure.exists, 180)
    failure = json.loads(run.failure.read_text())
    command("federation", "stop", network.federation.folder, "other-app")
    for name in APPROVED:
        assert f"{name}: site refused (policy)" in failure["text"]
        assert app_digest() in (network.sites[name].folder / "log" / "security.jsonl").read_text()
        assert network.sites[name].ledger.read_bytes() == before[name]
        approve(network.sites[name], finished.study)


def test_a_key_that_was_never_enrolled_cannot_connect(finished: Campaign, tmp_path: Path):
    create_node_key(tmp_path / "node.key")
    ended = connect_with(finished.network.sites["site-1"], tmp_path / "node.key", tmp_path)
    assert ended.returncode != 0
    assert "2004" in ended.stdout


def test_a_revoked_site_loses_its_connection_and_does_not_come_back(finished: Campaign):
    network = finished.network
    site = make_site(network.root, network.federation.folder, phantom_site("site-4", 4, seed=None))
    site.arguments = ("site", "serve", "--only", "supernode")
    approve(site, finished.study)
    site.start()
    try:
        network.wait_until_online("site-4")
        command("federation", "revoke", network.federation.folder, "site-4", "--reason", "a test")
        assert "site-4" not in network.online()
        log = site.folder / "log" / "supernode.log"
        network.wait("its next try is refused", lambda: "2004" in log.read_text(), 180)
    finally:
        site.stop()
    assert network.online() == {"site-1", "site-2", "site-3"}


def connect_with(site: Site, key: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A SuperNode as the site starts it, with another key, until it gives up."""
    (supernode,) = children(prepare(site.folder, datetime.now(UTC)), (Part.SUPERNODE,))
    own = str(site.folder / "identity" / "node.key")
    argv = [str(key) if part == own else part for part in supernode.argv]
    assert argv != list(supernode.argv)
    return subprocess.run(
        argv, env=dict(supernode.env), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False, timeout=180,
    )  # fmt: skip
