"""Where the way out of a hospital ends, and who has to do what about it."""

import socket
from datetime import timedelta
from urllib.parse import quote

import pytest
from health_gateway import LOOPBACK, gateway, password_proxy
from joined_site import utc_now

from client.way_out import Step, WayBlocked, ask_gateway
from tests.provisioned import make_federation

TIMEOUT_S = 5.0


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return make_federation(tmp_path_factory.mktemp("f") / "f", now=utc_now())


def ask(federation, port, **changes):
    facts = {"authority": federation.authority_certificate, "timeout_s": TIMEOUT_S, **changes}
    return ask_gateway(facts.pop("host", LOOPBACK), port, **facts)


def blocked(federation, port, **changes) -> WayBlocked:
    with pytest.raises(WayBlocked) as found:
        ask(federation, port, **changes)
    assert found.value.remedy
    return found.value


@pytest.fixture
def closed_port():
    with socket.socket() as unused:
        unused.bind((LOOPBACK, 0))
        yield unused.getsockname()[1]


def test_the_whole_way_tells_health_time_and_the_end_of_the_certificate(federation):
    with gateway(federation) as port:
        found = ask(federation, port)
    assert found.status == 200
    assert abs(found.ahead_s) <= 2
    assert timedelta(days=300) < found.certificate_ends - utc_now() < timedelta(days=400)


@pytest.mark.parametrize(("status", "offset", "ahead"), [(502, -3600, 3600), (200, 3600, -3600)])
def test_another_status_and_another_time_are_told_as_they_are(federation, status, offset, ahead):
    with gateway(federation, status=status, offset=timedelta(seconds=offset)) as port:
        found = ask(federation, port)
    assert found.status == status
    assert found.ahead_s == pytest.approx(ahead, abs=2)


def test_a_gateway_that_tells_no_time_is_no_error(federation):
    with gateway(federation, offset=None) as port:
        assert ask(federation, port).ahead_s is None


def test_a_name_that_nobody_knows(federation):
    found = blocked(federation, 443, host="gateway.invalid")
    assert (found.step, "gateway.invalid" in found.reason) == (Step.NAME, True)


def test_nobody_who_takes_a_connection(federation, closed_port):
    found = blocked(federation, closed_port)
    assert found.step is Step.CONNECTION
    assert f"port {closed_port}" in found.remedy


def test_a_gateway_of_another_authority(federation, tmp_path):
    other = make_federation(tmp_path / "other", now=utc_now())
    with gateway(other) as port:
        found = blocked(federation, port)
    assert (found.step, "not of this federation's authority" in found.reason) == (Step.TLS, True)


@pytest.mark.parametrize(
    ("days", "words"), [(-400, "has expired"), (1, "is not valid yet")], ids=["expired", "not yet valid"]
)
def test_a_certificate_out_of_its_time(tmp_path, days, words):
    late = make_federation(tmp_path / "f", now=utc_now() + timedelta(days=days))
    with gateway(late) as port:
        found = blocked(late, port)
    assert (found.step, words in found.reason) == (Step.TLS, True)


def test_a_certificate_of_another_host(tmp_path):
    moved = make_federation(tmp_path / "f", now=utc_now(), host="gateway.example.org")
    with gateway(moved) as port:
        found = blocked(moved, port)
    assert (found.step, "another host" in found.reason) == (Step.TLS, True)


def test_something_that_does_not_speak_tls(federation):
    with password_proxy("name", "word") as port:
        assert blocked(federation, port).step is Step.TLS


def test_an_authority_that_is_not_there(federation, tmp_path):
    with gateway(federation) as port:
        found = blocked(federation, port, authority=tmp_path / "ca.pem")
    assert (found.step, "site join" in found.remedy) == (Step.TLS, True)


def test_the_way_through_a_proxy_with_a_password(federation):
    with gateway(federation) as port, password_proxy("site 1", "p:w@rd") as proxy:
        url = f"http://{quote('site 1')}:{quote('p:w@rd')}@{LOOPBACK}:{proxy}"
        assert ask(federation, port, proxy=url).status == 200


def test_a_proxy_that_wants_a_password_is_said_to(federation):
    with gateway(federation) as port, password_proxy("site", "word") as proxy:
        found = blocked(federation, port, proxy=f"http://{LOOPBACK}:{proxy}")
    assert (found.step, "407" in found.reason, "PASSWORD" in found.remedy) == (Step.PROXY, True, True)


def test_a_proxy_that_is_not_known_or_not_there_is_the_proxys_name_not_the_gateways(federation, closed_port):
    found = blocked(federation, 443, proxy="http://proxy.invalid:3128", host="gateway.invalid")
    assert (found.step, "proxy.invalid" in found.reason) == (Step.NAME, True)
    found = blocked(federation, 443, proxy=f"http://{LOOPBACK}:{closed_port}", host="gateway.invalid")
    assert (found.step, "the proxy" in found.reason) == (Step.CONNECTION, True)
