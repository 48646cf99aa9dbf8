"""`consilium site serve`: what keeps a site from starting, and that what it started ends with it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from health_gateway import gateway
from joined_site import Joined, join, utc_now

from client.service import Part, children, prepare, serve
from common.cli import run as consilium
from common.errors import ConsiliumError, ExitCode, PolicyRefusal, SettingsError, UsageError, VerificationFailed
from common.evidence.canonical import canonical_json
from common.processes import alive, recorded_pids, seen
from common.telemetry.security_log import SecurityLog
from common.telemetry.serving import READINESS, is_healthy


@pytest.fixture
def site(tmp_path: Path) -> Joined:
    return join(tmp_path)


# --- what keeps a site from starting ----------------------------------------------------------------------------------


def test_a_joined_site_with_a_policy_may_start(site):
    service = prepare(site.folder, utc_now())
    assert (service.site, service.welcome.federation, service.notes) == ("site-1", "demo", ())


def test_a_site_without_a_policy_does_not_start(site):
    (site.folder / "policy.yaml").unlink()
    with pytest.raises(SettingsError, match=r"policy\.yaml") as refused:
        prepare(site.folder, utc_now())
    assert refused.value.exit_code == ExitCode.USAGE


def test_a_site_whose_policy_cannot_be_read_does_not_start(site):
    (site.folder / "policy.yaml").write_text("studys: []\n")
    with pytest.raises(SettingsError, match="studys"):
        prepare(site.folder, utc_now())


def test_a_site_whose_policy_has_expired_does_not_start(site):
    site.allow(expires=utc_now().date() - timedelta(days=1))
    with pytest.raises(PolicyRefusal, match=r"expired on .* nothing was started.*set `expires`"):
        prepare(site.folder, utc_now())
    site.allow(expires=utc_now().date())  # the last day is a day
    prepare(site.folder, utc_now())


def test_a_site_whose_welcome_has_expired_does_not_start(tmp_path):
    site = join(tmp_path, now=utc_now() - timedelta(days=31))
    with pytest.raises(PolicyRefusal, match=r"expired on .* Ask the coordinator for a renewed welcome"):
        prepare(site.folder, utc_now())


def test_a_site_whose_clock_is_behind_its_welcome_is_told_of_the_clock(site):
    with pytest.raises(PolicyRefusal, match="clocks"):
        prepare(site.folder, utc_now() - timedelta(days=2))


def test_a_site_with_another_flower_does_not_start(site):
    site.rewrite_welcome(flower_version="1.42.0")
    with pytest.raises(UsageError, match=r"runs Flower 1\.42\.0, here Flower 1\.41\.0"):
        prepare(site.folder, utc_now())


def test_a_site_that_has_not_joined_does_not_start(site):
    (site.folder / "federation" / "welcome.json").unlink()
    with pytest.raises(UsageError, match="has joined no federation"):
        prepare(site.folder, utc_now())


def test_a_changed_welcome_does_not_start(site):
    file = site.folder / "federation" / "welcome.json"
    body = json.loads(file.read_text())
    payload = body["welcome"]["payload"]
    body["welcome"]["payload"] = payload[:100] + ("A" if payload[100] != "A" else "B") + payload[101:]
    file.write_bytes(canonical_json(body))
    with pytest.raises(VerificationFailed):
        prepare(site.folder, utc_now())


def test_a_site_without_its_key_does_not_start(site):
    site.node_key.unlink()
    with pytest.raises(ConsiliumError):
        prepare(site.folder, utc_now())


def test_another_federations_app_and_a_pause_are_notes_for_the_operator(site):
    site.allow(app_digests=("0" * 64,))
    (site.folder / "state" / "paused").touch()
    notes = prepare(site.folder, utc_now()).notes
    assert [note.partition(" ")[0] for note in notes] == ["`app_digests`", "the"]
    assert "every order is refused" in notes[0]
    assert "paused" in notes[1]


def test_the_commands_exit_codes_are_those_of_the_guide(site, capsys):
    site.allow(expires=utc_now().date() - timedelta(days=1))
    assert consilium(["site", "serve", str(site.folder)]) == ExitCode.REFUSED
    (site.folder / "policy.yaml").unlink()
    assert consilium(["site", "serve", str(site.folder)]) == ExitCode.USAGE
    assert consilium(["site", "serve", str(site.folder / "nowhere")]) == ExitCode.USAGE
    assert consilium(["site", "serve", str(site.folder), "--only", "gateway"]) == ExitCode.USAGE
    assert "nothing was started" in capsys.readouterr().err


def test_a_gateway_of_another_authority_keeps_the_site_from_starting_and_is_logged(tmp_path):
    other = join(tmp_path / "other")
    with gateway(other.federation) as port:
        site = join(tmp_path, port=port)
        with pytest.raises(VerificationFailed, match=r"not trusted.*nothing was started") as refused:
            serve(site.folder, stop=threading.Event())
    assert refused.value.exit_code == ExitCode.REFUSED
    (record,) = SecurityLog.of_folder(site.folder).verify()
    assert (record.operation, record.outcome) == ("service", "gateway-not-trusted")
    assert recorded_pids(site.folder / "pids.json") == {}


def test_a_taken_port_keeps_the_site_from_starting(site):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        site.connect(health_port=port)
        with pytest.raises(UsageError, match=f"port {port} is taken .*`health_port` in connection.yaml"):
            serve(site.folder, stop=threading.Event())
    assert recorded_pids(site.folder / "pids.json") == {}


def test_a_runner_alone_needs_a_port_that_its_supernode_knows(site):
    with pytest.raises(UsageError, match="runtime_port"):
        serve(site.folder, stop=threading.Event(), parts=(Part.RUNNER,))


# --- what the parts are given -----------------------------------------------------------------------------------------


def test_the_secret_is_made_once_and_for_its_owner_only(site):
    prepare(site.folder, utc_now())
    file = site.folder / "superexec.secret"
    secret = file.read_bytes()
    assert len(secret) == 32
    assert file.stat().st_mode & 0o777 == 0o600
    prepare(site.folder, utc_now())
    assert file.read_bytes() == secret
    file.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        prepare(site.folder, utc_now())
    file.chmod(0o600)
    file.write_bytes(b"short")
    with pytest.raises(UsageError, match="shorter"):
        prepare(site.folder, utc_now())


def test_only_the_supernode_gets_node_key_authority_and_proxy(site, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://from.the.environment:1")
    monkeypatch.setenv("FLWR_HOME", "/somewhere")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    site.connect(proxy="http://proxy.example:3128")
    supernode, own = children(prepare(site.folder, utc_now()))
    assert supernode.env["HTTPS_PROXY"] == "http://proxy.example:3128"
    for child in (supernode, own):
        assert child.env["FLWR_TELEMETRY_ENABLED"] == "0"
        assert child.env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
        assert "from.the.environment" not in repr(child)
        assert "/somewhere" not in child.env.values()
    assert not [name for name in own.env if name.lower().endswith("_proxy")]
    assert "node.key" in repr(supernode)
    assert "node.key" not in repr(own)
    assert "proxy.example" not in repr(own)
    assert supernode.argv[supernode.argv.index("--isolation") + 1] == "process"
    assert "--allow-runtime-dependency-installation" not in supernode.argv


def test_without_a_proxy_in_the_settings_there_is_none(site, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://from.the.environment:1")
    for child in children(prepare(site.folder, utc_now())):
        assert not [name for name in child.env if name.lower().endswith("_proxy")]


def test_a_supernode_waits_longer_than_a_runner_before_it_is_back(site):
    site.connect(restart_after_s=15.0)
    supernode, own = children(prepare(site.folder, utc_now()))
    assert (supernode.restart_after_s, own.restart_after_s) == (15.0, 1.0)


# --- real processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def running(site: Joined) -> Iterator[subprocess.Popen[str]]:
    """`site serve` of a site whose gateway is not there, once its runner is healthy."""
    process = subprocess.Popen(
        [sys.executable, "-m", "common.cli", "site", "serve", str(site.folder)], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: (site.folder / "ports.json").exists() and healthy(site), 90)
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def wait_for(fact, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not fact():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def healthy(site: Joined, service: str = "") -> bool:
    ports = json.loads((site.folder / "ports.json").read_text())
    try:
        return is_healthy(f"127.0.0.1:{ports['health']}", service, timeout_s=1)
    except ConsiliumError:
        return False


@pytest.mark.slow
def test_a_site_without_a_gateway_stays_up_tries_and_says_so(site, running):
    wait_for(lambda: healthy(site, READINESS), 120)  # an order that came now would be worked on
    pids = recorded_pids(site.folder / "pids.json")
    assert set(pids) == {"supernode", "runner"}
    log = site.folder / "log" / "supernode.log"
    assert running.poll() is None
    with pytest.raises(UsageError, match="served by another process already"):
        serve(site.folder, stop=threading.Event())
    # One part that dies is started again, and the other stays.
    os.kill(pids["runner"], signal.SIGKILL)
    wait_for(lambda: recorded_pids(site.folder / "pids.json").get("runner", pids["runner"]) != pids["runner"], 30)
    assert recorded_pids(site.folder / "pids.json")["supernode"] == pids["supernode"]
    family = [found for pid in recorded_pids(site.folder / "pids.json").values() if (found := seen(pid))]
    running.terminate()
    _, told = running.communicate(timeout=60)
    assert running.returncode == 0
    assert "(Connection refused); the SuperNode goes on trying" in told
    assert "runner ended with -9; it is started again in 0.5 s" in told
    assert not [one for one in family if alive(one)]
    events = [(record.operation, record.outcome) for record in SecurityLog.of_folder(site.folder).verify()]
    assert [outcome for _, outcome in events] == ["gateway-unreachable", "started", "part-ended", "stopped"]
    assert "Traceback" not in log.read_text()


def test_a_runner_that_cannot_start_says_why_and_gives_the_code(site):
    prepare(site.folder, utc_now())
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = str(holder.getsockname()[1])
        command = [sys.executable, "-m", "client.runner", str(site.folder), "1", "0", taken]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == ExitCode.USAGE
    assert f"127.0.0.1:{taken}" in done.stderr
