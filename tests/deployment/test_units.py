"""The systemd units, as systemd reads them and as its own audit judges them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deploy_files import DEPLOY, check_command

from client.connection import ConnectionSettings
from common.settings.federation import FederationSettings

FOLDER = DEPLOY / "systemd"
SERVED = {
    "consilium-coordinator.service": ["federation", "serve", "/var/lib/consilium/federation"],
    "consilium-site.service": ["site", "serve", "/var/lib/consilium/site"],
    "consilium-site-supernode.service": ["site", "serve", "/var/lib/consilium/site", "--only", "supernode"],
    "consilium-site-runner.service": ["site", "serve", "/var/lib/consilium/site", "--only", "runner"],
}
WATCHED = {"consilium-site-watch.service", "consilium-coordinator-watch.service"}
MOST_EXPOSED = 2.5  # of systemd's own scale from 0 to 10; "OK" begins below 5
INSTALLED = "/opt/consilium/bin/consilium"
analyzed = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze: apt-get install systemd"
)


def settings(name):
    """Every `Key=value` of a unit, in order."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("=", 1)) for line in lines if "=" in line and not line.startswith("#")]


def value(name, key):
    (found,) = (text for known, text in settings(name) if known == key)
    return found


def test_these_are_all_the_units():
    assert {path.name for path in FOLDER.glob("*.service")} == set(SERVED) | WATCHED
    assert {path.name for path in FOLDER.glob("*.timer")} == {n.replace(".service", ".timer") for n in WATCHED}


@pytest.mark.parametrize("name", SERVED)
def test_a_unit_starts_a_command_of_ours_and_starts_it_again(name):
    program, *words = value(name, "ExecStart").split()
    assert (program, words) == (INSTALLED, SERVED[name])
    check_command(words)
    assert value(name, "Restart") == "always"
    assert value(name, "KillMode") == "mixed"  # the supervisor ends its own children, in order
    assert {"RestartSec", "StartLimitBurst", "StartLimitIntervalSec", "TimeoutStopSec", "MemoryMax"} <= {
        key for key, _ in settings(name)
    }


@pytest.mark.parametrize("name", sorted(WATCHED))
def test_a_watch_asks_for_liveness_and_starts_again_what_is_there(name):
    line = value(name, "ExecStart")
    probe = re.search(rf"{INSTALLED} (health [^&]*?) &&", line)[1].split()
    check_command(probe)
    port = (
        ConnectionSettings().health_port
        if "site" in name
        else FederationSettings.model_fields["coordinator_health_port"].default
    )
    assert probe == ["health", f"127.0.0.1:{port}", "--service", "liveness"]
    for unit in re.findall(r"consilium-[a-z-]+\.service", line):
        assert (FOLDER / unit).exists()


@analyzed
@pytest.mark.parametrize("name", sorted({*SERVED, *WATCHED, *(n.replace(".service", ".timer") for n in WATCHED)}))
def test_systemd_reads_a_unit_without_a_remark(name, tmp_path):
    # The program is not installed where the tests run; everything else stays as it is.
    for path in FOLDER.glob("consilium*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8").replace(INSTALLED, str(Path(sys.executable).parent / "consilium"))
            (tmp_path / path.name).write_text(text)
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / name], capture_output=True, text=True, check=False
    )
    ours = [line for line in found.stderr.splitlines() if "consilium" in line]
    assert (found.returncode, ours) == (0, [])


@analyzed
@pytest.mark.parametrize("name", SERVED)
def test_systemds_own_audit_finds_little_exposed(name):
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", FOLDER / name]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    told = re.search(r"exposure level for \S+ ([0-9.]+)", found.stdout)
    assert told, found.stdout + found.stderr
    assert float(told[1]) <= MOST_EXPOSED


def test_a_site_reaches_loopback_only_until_one_address_is_added():
    for name in ("consilium-site.service", "consilium-site-supernode.service", "consilium-site-runner.service"):
        assert value(name, "IPAddressDeny") == "any"
        assert value(name, "IPAddressAllow") == "localhost"
    added = [path.parent.name for path in FOLDER.rglob("*.example") if "IPAddressAllow=" in path.read_text()]
    assert sorted(added) == ["consilium-site-supernode.service.d", "consilium-site.service.d"]  # never the runner


def test_only_the_gateway_may_have_a_right_of_root():
    for name in SERVED:
        rights = "CAP_NET_BIND_SERVICE" if "coordinator" in name else ""
        assert value(name, "CapabilityBoundingSet") == rights
        assert value(name, "NoNewPrivileges") == "yes"
        assert value(name, "User").startswith("consilium-")


def test_users_are_those_that_are_made():
    made = set(re.findall(r"(?m)^u (\S+)", (FOLDER / "consilium.sysusers.conf").read_text()))
    assert {value(name, key) for name in SERVED for key in ("User", "Group")} == made
