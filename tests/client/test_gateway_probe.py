"""What a hospital is told about the way to its federation's gateway."""

import socket
from datetime import timedelta
from pathlib import Path

import pytest
from gateway_server import GatewayServer
from joined_site import utc_now

from client.gateway_probe import Reach, probe_gateway
from server.federation.folder import FederationFolder
from tests.deployment.connect_proxy import ConnectProxy
from tests.provisioned import make_federation

HOST = "127.0.0.1"


@pytest.fixture
def federation(tmp_path: Path) -> FederationFolder:
    return make_federation(tmp_path / "f", now=utc_now(), host=HOST)


def gateway_of(federation: FederationFolder) -> GatewayServer:
    return GatewayServer(federation.gateway_certificate, federation.gateway_key)


def test_the_federations_gateway_is_reached(federation):
    with gateway_of(federation) as gateway:
        found = probe_gateway(HOST, gateway.port, authority=federation.authority_certificate)
    assert found.reach is Reach.REACHED
    assert gateway.requests[0].startswith(b"GET /health ")


def test_another_authoritys_gateway_is_not_trusted_and_hears_nothing(federation, tmp_path):
    other = make_federation(tmp_path / "other", now=utc_now(), host=HOST)
    with gateway_of(other) as gateway:
        found = probe_gateway(HOST, gateway.port, authority=federation.authority_certificate)
    assert found.reach is Reach.NOT_TRUSTED
    assert "not of this federation's authority" in found.reason
    assert gateway.requests == []


def test_an_expired_certificate_is_told_as_such(tmp_path):
    federation = make_federation(tmp_path / "f", now=utc_now() - timedelta(days=400), host=HOST)
    with gateway_of(federation) as gateway:
        found = probe_gateway(HOST, gateway.port, authority=federation.authority_certificate)
    assert (found.reach, "has expired" in found.reason) == (Reach.NOT_TRUSTED, True)


def test_a_certificate_that_begins_tomorrow_points_at_the_clocks(tmp_path):
    federation = make_federation(tmp_path / "f", now=utc_now() + timedelta(days=1), host=HOST)
    with gateway_of(federation) as gateway:
        found = probe_gateway(HOST, gateway.port, authority=federation.authority_certificate)
    assert (found.reach, "clocks" in found.reason) == (Reach.NOT_TRUSTED, True)


def test_a_gateway_under_another_name_is_told_as_such(tmp_path):
    federation = make_federation(tmp_path / "f", now=utc_now(), host="gateway.example.org")
    with gateway_of(federation) as gateway:
        found = probe_gateway(HOST, gateway.port, authority=federation.authority_certificate)
    assert (found.reach, "another host" in found.reason) == (Reach.NOT_TRUSTED, True)


def test_nobody_there_and_no_tls_are_unreachable(federation):
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        port = unused.getsockname()[1]
        found = probe_gateway(HOST, port, authority=federation.authority_certificate)
    assert found.reach is Reach.UNREACHABLE
    with GatewayServer(None, None) as plain:
        found = probe_gateway(HOST, plain.port, authority=federation.authority_certificate)
    assert (found.reach, "TLS" in found.reason) == (Reach.UNREACHABLE, True)


def test_a_missing_authority_is_unreachable_and_no_exception(tmp_path):
    found = probe_gateway(HOST, 1, authority=tmp_path / "ca.pem")
    assert found.reach is Reach.UNREACHABLE


def test_the_way_goes_through_the_proxy_when_there_is_one(federation):
    with gateway_of(federation) as gateway, ConnectProxy(f"{HOST}:{gateway.port}") as proxy:
        through = probe_gateway(HOST, gateway.port, authority=federation.authority_certificate, proxy=proxy.url)
        proxy.cut()
        cut = probe_gateway(HOST, gateway.port, authority=federation.authority_certificate, proxy=proxy.url)
    assert through.reach is Reach.REACHED
    assert len(proxy.tunnels) == 1
    assert cut.reach is Reach.UNREACHABLE
    assert "503" in cut.reason
