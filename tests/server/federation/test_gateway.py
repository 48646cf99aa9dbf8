"""The gateway's configuration as nginx reads it, and a real nginx with it in front of nothing."""

import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest

from common.errors import UsageError
from common.settings.federation import FederationSettings, load_federation
from server.federation.folder import FederationFolder
from server.federation.gateway import FLEET_PATHS, gateway_command, gateway_config, write_gateway
from tests.provisioned import make_federation

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
HEADERS = {"flwr-public-key": "AAAA", "flwr-signature": "AAAA", "flwr-package-version": version("flwr")}


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        return [held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def settings_of(**changes: object) -> FederationSettings:
    return FederationSettings.model_validate({"name": "demo", "host": "hospital.example", "port": 443, **changes})


def nginx_says(folder: Path) -> str:
    settings = load_federation(folder)
    config = write_gateway(folder, settings)
    argv = [*gateway_command(folder, settings), "-t"]
    assert str(config) in argv
    ended = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)
    return ended.stderr


def test_nginx_accepts_the_configuration(tmp_path):
    folder = make_federation(tmp_path / "F", now=datetime.now(UTC))
    assert "test is successful" in nginx_says(folder.path)


def test_a_folder_with_blanks_and_accents_is_fine_and_one_that_nginx_would_misread_is_refused(tmp_path):
    folder = make_federation(tmp_path / "Fédération of  three", now=datetime.now(UTC))
    assert "test is successful" in nginx_says(folder.path)
    for name in ('F"', "F$host", "F;", "F{", "F\\", "F\n"):
        with pytest.raises(UsageError, match="nothing was started"):
            gateway_config(tmp_path / name, settings_of(), as_root=False)


def test_what_federation_yaml_says_is_in_the_configuration(tmp_path):
    text = gateway_config(
        tmp_path,
        settings_of(listen="192.0.2.7", port=8443, body_cap_mib=7, requests_per_second=3, burst=10),
        as_root=True,
    )
    for line in (
        "listen 192.0.2.7:8443 ssl;",
        "client_max_body_size 7m;",
        "rate=3r/s;",
        "burst=10 delay=5;",
        "user root;",
        "ssl_protocols TLSv1.2 TLSv1.3;",
    ):
        assert line in text
    assert "user root;" not in gateway_config(tmp_path, settings_of(), as_root=False)
    assert "listen [::1]:443 ssl;" in gateway_config(tmp_path, settings_of(listen="::1"), as_root=False)


def test_every_path_that_a_supernode_calls_is_published_but_for_registering():
    """The list follows Flower's own client: a new call of a new version must not be found out in a hospital."""
    import flwr.supernode.fleet_http_client as client

    text = Path(client.__file__).read_text()
    called = {line.split("/v1/fleet/")[1].split('"')[0] for line in text.splitlines() if 'path="/v1/fleet/' in line}
    assert called == {*FLEET_PATHS, "register-node", "unregister-node"}


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[FederationFolder]:
    """nginx alone; the SuperLink behind it does not run, so what is let through ends with 502."""
    port, superlink = free_ports(2)
    folder = make_federation(
        tmp_path / "F", now=datetime.now(UTC), port=port, superlink_port=superlink, listen="127.0.0.1"
    )
    yield from running(folder)


def running(folder: FederationFolder) -> Iterator[FederationFolder]:
    settings = load_federation(folder.path)
    write_gateway(folder.path, settings)
    with (folder.path / "output.txt").open("wb") as output:
        process = subprocess.Popen(gateway_command(folder.path, settings), stdout=output, stderr=output)
    try:
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", settings.port), timeout=5).close()
                break
            except ConnectionError:
                assert process.poll() is None, (folder.path / "output.txt").read_text()
                assert time.monotonic() < end
                time.sleep(0.02)
        yield folder
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def status(folder: FederationFolder, method: str, path: str, headers: dict[str, str] | None = None) -> int:
    tls = ssl.create_default_context(cafile=str(folder.authority_certificate))
    connection = http.client.HTTPSConnection("127.0.0.1", load_federation(folder.path).port, context=tls, timeout=20)
    try:
        connection.request(method, path, headers=headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


def test_only_what_a_hospital_needs_would_reach_the_superlink(gateway):
    let_through = 502
    assert status(gateway, "GET", "/health") == let_through
    for path in FLEET_PATHS:
        assert status(gateway, "POST", f"/v1/fleet/{path}", HEADERS) == let_through
        assert status(gateway, "GET", f"/v1/fleet/{path}", HEADERS) == 403
        assert status(gateway, "POST", f"/v1/fleet/{path}") == 401
    for path in ("/", "/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/v1/fleet/register-node", "/x"):
        assert status(gateway, "POST", path, HEADERS) == 403
    old = HEADERS | {"flwr-package-version": "1.40.0"}
    assert status(gateway, "POST", "/v1/fleet/pull-messages", old) == 426


def test_the_log_tells_who_asked_what_and_how_much_and_nothing_of_a_body_or_a_key(gateway):
    status(gateway, "POST", "/v1/fleet/push-object", HEADERS)
    end = time.monotonic() + 10
    log = gateway.path / "log" / "gateway-access.log"
    while not log.read_text() and time.monotonic() < end:
        time.sleep(0.02)
    (line,) = log.read_text().splitlines()
    fields = json.loads(line)
    assert set(fields) == {"time", "address", "method", "path", "status", "bytes_in", "bytes_out", "seconds"}
    assert fields["path"] == "/v1/fleet/push-object"
    assert "AAAA" not in line


def test_an_expired_certificate_is_seen_by_whoever_connects(tmp_path):
    port, superlink = free_ports(2)
    then = datetime.now(UTC) - timedelta(days=400)
    folder = make_federation(tmp_path / "F", now=then, port=port, superlink_port=superlink, listen="127.0.0.1")
    for _ in running(folder):
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            status(folder, "GET", "/health")
