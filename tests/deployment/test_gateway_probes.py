"""What a stranger meets at the coordinator's one public port, and what a hospital's key does not open."""

import base64
import concurrent.futures
import contextlib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP384R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.node_pb2 import Node
from network import HOST, Network

from common.identity.keys import load_node_key, public_pem
from common.processes import below
from common.settings.federation import load_federation
from server.federation.gateway import FLEET_PATHS
from server.federation.stack import SUPERLINK
from tests.provisioned import make_federation

pytestmark = pytest.mark.slow
MIB = 2**20
PUBLIC = {f"/v1/fleet/{path}" for path in FLEET_PATHS}
DOCUMENTATION = {"/docs", "/docs/oauth2-redirect", "/openapi.json", "/redoc"}
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # as the kernel writes 127.0.0.1, also within IPv6
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")


@pytest.fixture(scope="module")
def net(network) -> Network:
    return network[0]


@pytest.fixture
def unharmed(net: Network) -> Iterator[None]:
    """Whatever the test sends: the same processes serve on, and the hospitals stay connected."""
    before = net.federation.pids
    yield
    assert net.federation.pids == before
    assert net.asked("GET", "/health") == 200
    assert net.online() == set(net.sites)


def trusting(net: Network) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(net.folder.authority_certificate))


@contextmanager
def connected(net: Network, *, address: str = "127.0.0.3") -> Iterator[http.client.HTTPSConnection]:
    """One connection to the gateway, from an address of its own so that no hospital shares its rate."""
    connection = http.client.HTTPSConnection(
        *net.address, context=trusting(net), timeout=30, source_address=(address, 0)
    )
    try:
        yield connection
    finally:
        connection.close()


def status(connection: http.client.HTTPSConnection, method: str, path: str, body: bytes = b"", **headers: str) -> int:
    connection.request(method, path, body=body or None, headers={k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    response.read()
    return response.status


def raw(net: Network, data: bytes) -> bytes:
    """The first line that the gateway answers to these bytes; empty when it hangs up, with or without a word of TLS."""
    with (
        socket.create_connection(net.address, timeout=30, source_address=("127.0.0.3", 0)) as plain,
        trusting(net).wrap_socket(plain, server_hostname=HOST) as stream,
    ):
        try:
            stream.sendall(data)
            return stream.recv(4096).split(b"\r\n")[0]
        except (ConnectionError, ssl.SSLEOFError):
            return b""


def signed(key: EllipticCurvePrivateKey, *, when: datetime | None = None, flower: str | None = None) -> dict[str, str]:
    """The headers of a SuperNode with this key."""
    stamp = (when or datetime.now(UTC)).isoformat()
    return {
        "flwr-public-key": base64.b64encode(public_pem(key.public_key())).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": base64.b64encode(key.sign(stamp.encode(), ECDSA(SHA256()))).decode(),
        "flwr-package-name": "flwr",
        "flwr-package-version": flower or version("flwr"),
        "flwr-component-name": "SuperNode",
        "content-type": "application/protobuf",
        "accept": "application/protobuf",
    }


def served_paths(net: Network) -> set[str]:
    """Every path that this very SuperLink serves, as it describes itself on loopback."""
    port = load_federation(net.federation.folder).superlink_port
    connection = http.client.HTTPSConnection(HOST, port, context=trusting(net), timeout=30)
    try:
        connection.request("GET", "/openapi.json")
        described = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return set(described["paths"]) | DOCUMENTATION


# --- strangers --------------------------------------------------------------------------------------------------------


def test_every_path_that_the_superlink_serves_is_closed_but_the_fleet_and_health(net: Network, unharmed: None):
    served = served_paths(net)
    groups = {name: {path for path in served if path.startswith(f"/v1/{name}/")} for name in ("control", "runtime")}
    assert len(groups["control"]) > 20
    assert len(groups["runtime"]) > 10
    assert served >= PUBLIC | {"/health"}
    closed = served - PUBLIC - {"/health"}
    assert closed >= {"/v1/fleet/register-node", "/v1/fleet/unregister-node", *groups["control"], *groups["runtime"]}
    with connected(net) as connection:
        answers = {(method, path): status(connection, method, path) for path in closed for method in ("GET", "POST")}
    assert set(answers.values()) == {403}


def test_health_is_open_to_read_and_to_nothing_else(net: Network, unharmed: None):
    with connected(net) as connection:
        assert {status(connection, m, "/health") for m in METHODS if m not in {"HEAD", "GET"}} <= {403, 405}
        assert status(connection, "GET", "/health") == 200


def test_a_fleet_path_wants_a_post_a_key_and_our_flower(net: Network, unharmed: None):
    with connected(net) as connection:
        for path in PUBLIC:
            assert {status(connection, m, path) for m in METHODS if m != "POST"} <= {403, 405}
            assert status(connection, "POST", path) == 401


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/pull-messages/../../control/list-runs",
        "/v1/fleet/pull-messages/..%2f..%2fcontrol/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "//v1/control/list-runs",
        "/v1//control/list-runs",
        "/./v1/control/list-runs",
        "/%76%31/control/list-runs",
        "/V1/CONTROL/LIST-RUNS",
        "/v1/control/list-runs/",
        "/v1/control/list-runs?x=/v1/fleet/pull-messages",
        "/v1/control/list-runs;/v1/fleet/pull-messages",
        "/v1/control/list-runs%00/v1/fleet/pull-messages",
        "/v1/control/list-runs#/v1/fleet/pull-messages",
        "https://127.0.0.1/v1/control/list-runs",
        "/health/../v1/control/list-runs",
        "/health?/v1/control/list-runs",
        "*",
    ],
)
def test_no_other_spelling_opens_the_control_api(net: Network, path: str, unharmed: None):
    """An open one would answer 200 with a list of runs, or 415 for want of a media type."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/protobuf\r\n"
    line = raw(net, f"{head}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
    assert line.split(b" ")[1] in {b"400", b"403", b"404", b"405"}, line


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 4096,
        b"\x16\x03\x01" + bytes(range(256)) * 16,
        b"GET\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(net: Network, garbage: bytes, unharmed: None):
    line = raw(net, garbage)
    assert line == b"" or line.split(b" ")[1].startswith(b"4") or line.startswith(b"HTTP/1.1 505"), line


def test_what_is_not_tls_is_refused(net: Network, unharmed: None):
    for garbage in (
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 1000,
        b"\x16\x03\x03\xff\xff" + b"\x41" * 5000,
    ):
        with socket.create_connection(net.address, timeout=30, source_address=("127.0.0.3", 0)) as plain:
            plain.sendall(garbage)
            try:
                answer = plain.recv(4096)
            except ConnectionError:
                answer = b""
        assert b" 200 " not in answer


def test_an_unencrypted_or_old_protocol_is_not_spoken(net: Network, unharmed: None):
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(net.folder.authority_certificate)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(net.address, timeout=30) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(plain, server_hostname=HOST)


def test_a_hospital_does_not_trust_the_gateway_of_another_authority(net: Network, tmp_path: Path):
    other = make_federation(tmp_path / "F", now=datetime.now(UTC))
    theirs = ssl.create_default_context(cafile=str(other.authority_certificate))
    with (
        socket.create_connection(net.address, timeout=30) as plain,
        pytest.raises(ssl.SSLCertVerificationError, match="verify failed"),
    ):
        theirs.wrap_socket(plain, server_hostname=HOST)


# --- too much ---------------------------------------------------------------------------------------------------------


def peak_rss(pid: int) -> int:
    """The most memory that a process has ever had, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_a_body_of_600_mb_is_refused_and_the_superlink_does_not_grow(net: Network, announced: bool, unharmed: None):
    key = load_node_key(net.sites["site-1"].folder / "identity" / "node.key")
    pid = net.federation.pids[SUPERLINK]
    before = peak_rss(pid)
    part, parts = b"\x00" * MIB, 600

    def body() -> Iterator[bytes]:
        for _ in range(parts):
            yield part

    headers = signed(key) | ({"content-length": str(parts * MIB)} if announced else {})
    with connected(net) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):  # it was told no
            connection.request("POST", "/v1/fleet/push-object", body=body(), headers=headers)
        try:
            answered = connection.getresponse().status
        except (http.client.HTTPException, OSError):
            answered = None
    assert answered in {413, None}
    time.sleep(0.5)
    assert peak_rss(pid) - before < 32 * MIB
    rest = list((net.folder.path / "gateway" / "tmp").rglob("*"))
    assert sum(path.stat().st_size for path in rest if path.is_file()) < 32 * MIB


def test_one_address_that_asks_too_fast_is_told_to_wait_and_the_others_are_served(net: Network, unharmed: None):
    def ask_on(_: int) -> list[int]:
        with connected(net, address="127.0.0.4") as connection:
            return [status(connection, "GET", "/health") for _ in range(4)]

    with concurrent.futures.ThreadPoolExecutor(120) as pool:
        asked = [pool.submit(ask_on, number) for number in range(120)]
        with connected(net, address="127.0.0.5") as connection:
            others = [status(connection, "GET", "/health") for _ in range(20)]
        codes = [code for answer in asked for code in answer.result()]
    assert set(others) == {200}
    assert set(codes) == {200, 503}


# --- keys -------------------------------------------------------------------------------------------------------------


def test_an_enrolled_key_is_let_in_now_and_not_with_a_clock_that_is_an_hour_off(net: Network, unharmed: None):
    key = load_node_key(net.sites["site-1"].folder / "identity" / "node.key")
    (node,) = (node for node in net.control.nodes() if node.name == "site-1")
    asks = PullMessagesRequest(node=Node(node_id=node.node_id)).SerializeToString()
    with connected(net) as connection:
        post = lambda **how: status(connection, "POST", "/v1/fleet/pull-messages", asks, **signed(key, **how))  # noqa: E731
        assert post() == 200
        for off in (timedelta(hours=1), timedelta(hours=-1)):
            assert post(when=datetime.now(UTC) + off) == 401


@pytest.mark.parametrize("other", ["1.40.0", "1.42.0", "2.41.0", "11.41.0", "", "1.41"])
def test_another_version_of_flower_is_refused_with_every_key(net: Network, other: str, unharmed: None):
    key = load_node_key(net.sites["site-1"].folder / "identity" / "node.key")
    with connected(net) as connection:
        headers = signed(key) | {"flwr-package-version": other}
        assert {status(connection, "POST", path, **headers) for path in PUBLIC} == {426}


def test_nobody_enrols_himself(net: Network, unharmed: None):
    key = generate_private_key(SECP384R1())
    asks = RegisterNodeFleetRequest(public_key=public_pem(key.public_key())).SerializeToString()
    wants_in = ActivateNodeRequest(public_key=public_pem(key.public_key()), heartbeat_interval=30).SerializeToString()
    with connected(net) as connection:
        assert status(connection, "POST", "/v1/fleet/register-node", asks, **signed(key)) == 403
        assert status(connection, "POST", "/v1/fleet/unregister-node", asks, **signed(key)) == 403
        assert 400 <= status(connection, "POST", "/v1/fleet/activate-node", wants_in, **signed(key)) < 500
    assert {node.name for node in net.control.nodes()} == set(net.sites)


def test_a_hospitals_key_does_not_speak_for_another_hospital(net: Network, unharmed: None):
    key = load_node_key(net.sites["site-1"].folder / "identity" / "node.key")
    (other,) = (node for node in net.control.nodes() if node.name == "site-2")
    asks = PullMessagesRequest(node=Node(node_id=other.node_id)).SerializeToString()
    with connected(net) as connection:
        assert status(connection, "POST", "/v1/fleet/pull-messages", asks, **signed(key)) == 401


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 1000, bytes(range(256)) * 64, b"{}", b"\x0a" + b"\xff" * 20])
def test_garbage_under_an_enrolled_key_is_refused_on_every_public_path(net: Network, garbage: bytes, unharmed: None):
    key = load_node_key(net.sites["site-1"].folder / "identity" / "node.key")
    with connected(net) as connection:
        for path in sorted(PUBLIC):
            for changed in ({}, {"content-type": "text/html"}, {"flwr-signature": "AAAA"}, {"flwr-public-key": "%"}):
                code = status(connection, "POST", path, garbage, **(signed(key) | changed))
                assert 400 <= code < 500, (path, changed, code)


# --- where it listens -------------------------------------------------------------------------------------------------


def listens(pid: int) -> set[tuple[str, int]]:
    """Addresses and ports on which a process listens, IPv4 and IPv6.  [proc(5): net/tcp, state 0A]"""
    held = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            held.add(str(descriptor.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = fields = line.split()
            if state == "0A" and f"socket:[{fields[9]}]" in held:
                address, port = local.split(":")
                found.add((address, int(port, 16)))
    return found


def test_everything_but_the_gateway_listens_on_loopback_only(net: Network):
    everybody = [pid for served in (net.federation, *net.sites.values()) for pid in served.pids.values()]
    processes = {pid for parent in everybody for pid in (parent, *(one.pid for one in below(parent)))}
    found = {listener for pid in processes for listener in listens(pid)}
    settings = load_federation(net.federation.folder)
    own = {settings.port, settings.superlink_port, settings.superlink_health_port}
    assert own <= {port for _, port in found}
    assert {address for address, port in found if port != settings.port} <= LOOPBACK
