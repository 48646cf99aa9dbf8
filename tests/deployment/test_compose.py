"""The compose files as docker-compose itself reads them, in every combination of overlays."""

import itertools
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import compose
import pytest
from deploy_files import DEPLOY, DIGEST, check_command

from client.connection import ConnectionSettings
from common.settings.federation import FederationSettings

FOLDER = DEPLOY / "compose"
# The program itself: its Python wrapper swallows the exit code.
DOCKER_COMPOSE = Path(compose.__file__).with_name("docker-compose")
GIVEN = {
    "CONSILIUM_SITE_IMAGE": f"site@{DIGEST}",
    "CONSILIUM_COORDINATOR_IMAGE": f"coordinator@{DIGEST}",
    "CONSILIUM_RELAY_IMAGE": f"relay@{DIGEST}",
    "CONSILIUM_PROMETHEUS_IMAGE": f"prometheus@{DIGEST}",
    "CONSILIUM_ALERTMANAGER_IMAGE": f"alertmanager@{DIGEST}",
    "CONSILIUM_GRAFANA_IMAGE": f"grafana@{DIGEST}",
    "CONSILIUM_GRAFANA_PASSWORD_FILE": "/srv/consilium/grafana-password",
    "CONSILIUM_STATE": "/srv/consilium/state",
    "CONSILIUM_DATA": "/srv/consilium/scans",
    "CONSILIUM_PORT": "8443",
    "CONSILIUM_COORDINATOR_HOST": "coordinator.example",
    "CONSILIUM_COORDINATOR_PORT": "8443",
    "CONSILIUM_COORDINATOR_ADDRESS": "192.0.2.10",
    "CONSILIUM_PROXY": "192.0.2.20:3128",
}
OVERLAYS = ("gpu", "proxy", "monitoring")
COMBINATIONS = [
    ("coordinator",),
    ("coordinator", "coordinator.monitoring"),
    *(
        ("site", *(f"site.{name}" for name in chosen))
        for count in range(len(OVERLAYS) + 1)
        for chosen in itertools.combinations(OVERLAYS, count)
    ),
]
every = pytest.mark.parametrize("files", COMBINATIONS, ids="+".join)


def config(files, given=GIVEN):
    named = [word for name in files for word in ("-f", FOLDER / f"{name}.yml")]
    return subprocess.run(
        [DOCKER_COMPOSE, *named, "config", "--format", "json"],
        env=given, capture_output=True, text=True, check=False,
    )  # fmt: skip


@cache
def rendered(files):
    done = config(files)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@every
def test_every_combination_is_accepted_and_every_container_is_locked_down(files):
    for name, service in rendered(files)["services"].items():
        assert re.fullmatch(r"[a-z]+@sha256:[0-9a-f]{64}", service["image"]), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["user"].partition(":")[0]) > 0, name
        assert {"pids_limit", "mem_limit", "cpus", "healthcheck"} <= set(service), name
        assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & set(service), name
        assert service.get("network_mode", "service:").startswith("service:"), name
        for volume in service.get("volumes", ()):
            assert "docker.sock" not in volume["source"]
            writable = not volume.get("read_only", False)
            assert writable <= (
                volume["target"] in {"/var/lib/consilium", "/prometheus", "/alertmanager", "/var/lib/grafana"}
            )


@every
def test_compose_lint_has_nothing_to_say_about_what_is_rendered(files, tmp_path):
    path = tmp_path / "compose.yml"
    # On one address of the host; on all of them is what a gateway is for, and what this linter warns of.
    path.write_text(config(files, {**GIVEN, "CONSILIUM_LISTEN": "192.0.2.1"}).stdout)  # JSON is YAML
    found = subprocess.run(
        [Path(sys.executable).parent / "compose-lint", "check", "--fail-on", "medium", path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout


def test_a_site_has_one_way_out_and_no_way_in():
    for files in COMBINATIONS[2:]:
        stack = rendered(files)
        services, networks = stack["services"], stack["networks"]
        ways_out = {name for name, network in networks.items() if not network.get("internal")}
        assert not ways_out & set(services["site"]["networks"])
        assert "ports" not in services["site"]
        assert services["site"]["dns"] == ["127.0.0.1"]
        through = {name for name, service in services.items() if "outside" in service.get("networks", {})}
        assert through == {"egress"}
        for name, service in services.items():
            for port in service.get("ports", ()):
                assert port["host_ip"] == "127.0.0.1", name
        if "watch" in networks:  # Prometheus and what shows it: reachable from this host, reaching nobody
            assert networks["watch"]["driver_opts"] == {"com.docker.network.bridge.enable_ip_masquerade": "false"}
            assert set(services["prometheus"]["networks"]) == {"metrics", "watch"}
            assert networks["metrics"]["internal"] is True


def test_the_way_out_leads_to_the_coordinator_or_to_the_proxy():
    direct = rendered(("site",))["services"]["egress"]
    assert direct["environment"] == {"RELAY_PORT": "8443", "RELAY_TARGET": "192.0.2.10:8443"}
    assert direct["networks"]["inside"]["aliases"] == ["coordinator.example"]
    proxied = rendered(("site", "site.proxy"))["services"]["egress"]
    assert proxied["environment"] == {"RELAY_PORT": "3128", "RELAY_TARGET": "192.0.2.20:3128"}
    assert proxied["networks"]["inside"]["aliases"] == ["proxy.internal"]


def test_a_coordinator_publishes_its_gateway_and_reaches_nobody():
    for files in COMBINATIONS[:2]:
        stack = rendered(files)
        published = [
            (name, port["target"], port["host_ip"])
            for name, service in stack["services"].items()
            for port in service.get("ports", ())
            if port["host_ip"] != "127.0.0.1"
        ]
        assert published == [("coordinator", 8443, "0.0.0.0")]  # noqa: S104  the gateway is public
        for network in stack["networks"].values():
            masked = network.get("driver_opts", {}).get("com.docker.network.bridge.enable_ip_masquerade")
            assert network.get("internal") or masked == "false"


def test_containers_start_commands_of_ours_and_probe_the_ports_of_the_settings():
    site = rendered(("site", "site.monitoring"))["services"]
    coordinator = rendered(("coordinator", "coordinator.monitoring"))["services"]
    defaults = {name: field.default for name, field in FederationSettings.model_fields.items()}
    for service, port in (
        (site["site"], ConnectionSettings().health_port),
        (coordinator["coordinator"], defaults["coordinator_health_port"]),
    ):
        check_command(service["command"])
        kind, program, *probe = service["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "consilium")
        check_command(probe)
        assert probe == ["health", f"127.0.0.1:{port}", "--service", "readiness"]
    assert site["metrics"]["environment"]["RELAY_TARGET"] == f"127.0.0.1:{ConnectionSettings().metrics_port}"
    assert coordinator["metrics"]["environment"]["RELAY_TARGET"] == f"127.0.0.1:{defaults['exporter_port']}"


def test_files_that_are_mounted_exist_here():
    for files in (("site", "site.monitoring"), ("coordinator", "coordinator.monitoring")):
        for service in rendered(files)["services"].values():
            for volume in service.get("volumes", ()):
                if volume["type"] == "bind" and not volume["source"].startswith("/srv/"):
                    assert Path(volume["source"]).exists(), volume["source"]


@pytest.mark.parametrize(
    "missing", ["CONSILIUM_SITE_IMAGE", "CONSILIUM_STATE", "CONSILIUM_DATA", "CONSILIUM_COORDINATOR_ADDRESS"]
)
def test_what_has_no_default_must_be_given(missing):
    done = config(("site",), {name: value for name, value in GIVEN.items() if name != missing})
    assert done.returncode != 0
    assert missing in done.stderr


def test_every_variable_is_in_the_example_that_is_copied_and_the_other_way_round():
    for side in ("site", "coordinator"):
        files = [FOLDER / f"{side}.yml", *FOLDER.glob(f"{side}.*.yml"), FOLDER / "monitoring.common.yml"]
        used = {name for path in files for name in re.findall(r"\$\{(CONSILIUM_[A-Z_]+)", path.read_text())}
        shown = set(re.findall(r"^#?(CONSILIUM_[A-Z_]+)=", (FOLDER / f"{side}.env.example").read_text(), re.MULTILINE))
        assert used == shown
