"""What the coordinator relies on inside Flower 1.41: paths, messages, words and settings that no page promises."""

import ssl
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import flwr
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from flwr.proto import control_pb2, node_pb2, run_pb2
from flwr.supercore.constant import NodeStatus
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from common.cli import ENVIRONMENT
from common.errors import IntegrityError, Unreachable
from common.identity.keys import public_pem
from common.settings.federation import load_federation
from server.federation.bundle import app_bundle, app_digest
from server.federation.control import Control, sync_nodes
from server.federation.folder import FederationFolder
from server.federation.registry import Registry
from server.federation.stack import children, environment
from tests.provisioned import NOW, make_federation, site_request

FLOWER = Path(flwr.__file__).parent


class FakeSuperLink:
    """Speaks as much of the Control API as `Control` asks for, over TLS, and remembers. nodes: by id."""

    def __init__(self, folder: FederationFolder) -> None:
        self.nodes: dict[int, node_pb2.NodeInfo] = {}
        self.runs: dict[int, run_pb2.Run] = {}
        self.asked: list[str] = []
        self.broken = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                name = self.path.removeprefix("/v1/control/")
                fake.asked.append(name)
                body = self.rfile.read(int(self.headers["content-length"]))
                answer = None if fake.broken else fake.answer(name, body)
                self.send_response(500 if answer is None else 200)
                self.end_headers()
                self.wfile.write(b"" if answer is None else answer.SerializeToString())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", load_federation(folder.path).superlink_port), Handler)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(folder.superlink_certificate, folder.superlink_key)
        self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = Thread(target=self._server.serve_forever)

    def answer(self, name: str, body: bytes):
        asked = PROTOBUF_REQUEST_TYPES["POST", f"/v1/control/{name}"].FromString(body)
        match name:
            case "list-nodes":
                return control_pb2.ListNodesResponse(nodes_info=self.nodes.values())
            case "register-node":
                number = len(self.nodes) + 1
                self.nodes[number] = node_pb2.NodeInfo(
                    node_id=number, name=asked.name, public_key=asked.public_key, status=NodeStatus.REGISTERED
                )
                return control_pb2.RegisterNodeResponse(node_id=number)
            case "unregister-node":
                self.nodes[asked.node_id].status = NodeStatus.UNREGISTERED
                return control_pb2.UnregisterNodeResponse()
            case "start-run":
                assert asked.fab.content == app_bundle()
                number = 71 + len(self.runs)
                self.runs[number] = run_pb2.Run(
                    run_id=number,
                    status=run_pb2.RunStatus(status="running"),
                    override_config={"run": asked.override_config["run"]},
                )
                return control_pb2.StartRunResponse(run_id=number)
            case "list-runs":
                return control_pb2.ListRunsResponse(run_dict=self.runs)
            case "stop-run":
                self.runs[asked.run_id].status.CopyFrom(run_pb2.RunStatus(status="finished", sub_status="stopped"))
                return control_pb2.StopRunResponse(success=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def folder(tmp_path) -> FederationFolder:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    from datetime import UTC, datetime

    return make_federation(tmp_path / "F", now=datetime.now(UTC), superlink_port=port)


@pytest.fixture
def superlink(folder) -> Iterator[FakeSuperLink]:
    with FakeSuperLink(folder) as fake:
        yield fake


def there(superlink: FakeSuperLink) -> dict[str, bytes]:
    return {n.name: n.public_key for n in superlink.nodes.values() if n.status != NodeStatus.UNREGISTERED}


def test_every_path_that_is_called_is_one_that_flower_serves():
    called = {
        line.split('"')[1]
        for line in Path("server/federation/control.py").read_text().splitlines()
        if "self._call(" in line and '"' in line
    }
    assert called == {"list-nodes", "register-node", "unregister-node", "start-run", "list-runs", "stop-run"}
    assert {("POST", f"/v1/control/{name}") for name in called} <= set(PROTOBUF_REQUEST_TYPES)


def test_the_superlink_lets_in_exactly_the_keys_of_the_registry(folder, superlink):
    registry = Registry(folder)
    for name in ("site-1", "site-2"):
        registry.enrol(site_request(name), now=NOW, days=30)
    assert set(sync_nodes(folder.path).registered) == {"site-1", "site-2"}
    assert there(superlink) == {site.name: site.public_pem for site in registry.enrolled()}
    # A stranger's key, and a known one under another name, have to go.
    control = Control(folder.path)
    control.register("site-1", public_pem(generate_private_key(SECP384R1()).public_key()))
    control.register("site-9", registry.enrolled()[0].public_pem)
    assert sync_nodes(folder.path).unregistered == ("site-1", "site-9")
    registry.revoke("site-2", reason="left", now=NOW)
    assert sync_nodes(folder.path).unregistered == ("site-2",)
    assert set(there(superlink)) == {"site-1"}
    superlink.asked.clear()
    assert sync_nodes(folder.path).registered == sync_nodes(folder.path).unregistered == ()
    assert set(superlink.asked) == {"list-nodes"}


def test_a_node_is_online_by_flowers_own_word(folder, superlink):
    control = Control(folder.path)
    control.register("site-1", b"key")
    superlink.nodes[1].status = NodeStatus.ONLINE
    assert [(node.name, node.online) for node in control.nodes()] == [("site-1", True)]
    superlink.nodes[1].status = NodeStatus.OFFLINE
    assert [(node.name, node.online) for node in control.nodes()] == [("site-1", False)]


def test_a_run_is_submitted_seen_and_stopped_once(folder, superlink):
    control = Control(folder.path)
    number = control.submit("tiny")
    assert superlink.runs[number].override_config["run"].string == "tiny"
    found = control.run(number)
    assert found is not None
    assert not found.finished
    control.stop(number)
    control.stop(number)
    assert control.run(number).finished
    assert superlink.asked.count("stop-run") == 1
    assert control.run(5) is None
    control.stop(5)


def test_a_refusal_is_told_from_silence_and_no_proxy_is_asked(folder, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    with FakeSuperLink(folder) as superlink:
        assert Control(folder.path).nodes() == ()
        superlink.broken = True
        with pytest.raises(IntegrityError, match=r"refused `list-nodes` \(500\)"):
            Control(folder.path).nodes()
    with pytest.raises(Unreachable, match="federation serve"):
        Control(folder.path).nodes()
    assert not Control(folder.path).healthy()


def test_a_superlink_of_another_authority_is_not_spoken_to(folder, superlink, tmp_path):
    other = make_federation(tmp_path / "G", superlink_port=load_federation(folder.path).superlink_port)
    with pytest.raises(Unreachable):
        Control(other.path).nodes()
    assert superlink.asked == []


def test_flower_reads_every_setting_that_is_given_to_it_by_the_environment(tmp_path):
    """A variable that Flower no longer reads would be ignored without a word."""
    source = "\n".join(path.read_text() for path in FLOWER.rglob("*.py"))
    given = {name for name in (*environment(tmp_path), *ENVIRONMENT) if name.startswith("FLWR_")}
    assert given >= {"FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "FLWR_HOME"}
    assert {name for name in given if f'"{name}"' not in source} == set()


def test_settings_of_flower_that_somebody_exported_do_not_reach_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_DATABASE", "/elsewhere")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    env = environment(tmp_path)
    assert "FLWR_DATABASE" not in env
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"


def test_the_services_hold_no_secret_on_a_command_line_and_stay_on_loopback(folder):
    for child in children(folder, load_federation(folder.path)):
        line = " ".join(child.argv)
        assert folder.superexec_secret.read_text(errors="replace") not in line
        assert "0.0.0.0" not in line  # noqa: S104
        assert "--insecure" not in line
    superlink, superexec, gateway = (child.argv for child in children(folder, load_federation(folder.path)))
    assert "--enable-supernode-auth" in superlink
    assert "--disable-runtime-dependency-installation" in superlink
    assert superlink[superlink.index("--isolation") + 1] == "process"
    assert superlink[superlink.index("--host") + 1] == "127.0.0.1"
    assert "--superexec-auth-secret-file" in superlink
    assert "--superexec-auth-secret-file" in superexec
    assert "nginx" in gateway[0]


def test_the_digest_that_policies_name_is_of_the_very_bytes_that_are_sent():
    import hashlib

    assert app_digest() == hashlib.sha256(app_bundle()).hexdigest()
    assert app_bundle() == app_bundle()
    assert b".py" not in app_bundle().replace(b"pyproject", b"")
