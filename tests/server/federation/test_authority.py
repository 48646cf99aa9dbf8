"""Certificates as others see them: openssl, and a TLS handshake on loopback."""

import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding

from common.errors import IntegrityError, UsageError
from server.federation.authority import AUTHORITY_DAYS, Authority, expires, load_certificate
from server.federation.provisioning import Service, due, renew_services
from server.federation.registry import Registry
from tests.provisioned import NOW, files, make_federation, site_request


def openssl_verify(folder, certificate, *arguments: str, at: datetime = NOW) -> str:
    """What `openssl verify` says about a certificate, strictly and with the federation's revocation list."""
    chain = ["-CAfile", folder.authority_certificate, "-CRLfile", folder.revocations, "-crl_check", "-x509_strict"]
    when = ["-attime", str(int(at.timestamp()))]
    ended = subprocess.run(
        ["openssl", "verify", *chain, *when, *arguments, certificate], check=False, capture_output=True, text=True
    )
    return ended.stdout + ended.stderr


def handshake(folder, name: str, *, cafile=None) -> None:
    """One TLS connection to a server with the gateway's certificate, asked for under `name`. Raises ssl.SSLError."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder.gateway_certificate, folder.gateway_key)
    asking = ssl.create_default_context(cafile=str(cafile or folder.authority_certificate))
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def answer() -> None:
        try:
            serving.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        asking.wrap_socket(ours, server_hostname=name).close()
    finally:
        ours.close()
        thread.join()


def test_openssl_verifies_every_certificate_of_a_federation(tmp_path):
    folder = make_federation(tmp_path / "F")
    Registry(folder).enrol(site_request("site-a"), now=NOW, days=365)
    for certificate in (folder.gateway_certificate, folder.superlink_certificate):
        assert openssl_verify(folder, certificate, "-purpose", "sslserver").strip().endswith(": OK")
    assert openssl_verify(folder, folder.site_certificate("site-a"), "-purpose", "sslclient").strip().endswith(": OK")
    assert openssl_verify(folder, folder.signing_certificate).strip().endswith(": OK")


def test_a_site_certificate_is_no_server_and_no_authority(tmp_path):
    folder = make_federation(tmp_path / "F")
    Registry(folder).enrol(site_request("site-a"), now=NOW, days=365)
    assert "unsuitable certificate purpose" in openssl_verify(
        folder, folder.site_certificate("site-a"), "-purpose", "sslserver"
    )
    constraints = load_certificate(folder.site_certificate("site-a")).extensions.get_extension_for_class(
        x509.BasicConstraints
    )
    assert constraints.critical
    assert constraints.value.ca is False


def test_openssl_refuses_a_revoked_site_and_no_other(tmp_path):
    folder = make_federation(tmp_path / "F")
    registry = Registry(folder)
    for name in ("site-a", "site-b"):
        registry.enrol(site_request(name), now=NOW, days=365)
    first = tmp_path / "first.pem"
    first.write_bytes(folder.site_certificate("site-a").read_bytes())
    registry.renew("site-a", now=NOW, days=365)
    second = tmp_path / "second.pem"
    second.write_bytes(folder.site_certificate("site-a").read_bytes())
    registry.revoke("site-a", reason="key stolen", now=NOW)
    for revoked in (first, second):
        assert "certificate revoked" in openssl_verify(folder, revoked)
    assert openssl_verify(folder, folder.site_certificate("site-b")).strip().endswith(": OK")


def test_a_certificate_holds_from_an_hour_before_issue_until_its_last_day(tmp_path):
    folder = make_federation(tmp_path / "F", certificate_days=30)
    gateway, list_end = folder.gateway_certificate, NOW + timedelta(days=30)
    assert "not yet valid" in openssl_verify(folder, gateway, at=NOW - timedelta(minutes=61))
    assert "certificate has expired" in openssl_verify(folder, gateway, at=NOW + timedelta(days=30, seconds=1))
    assert load_certificate(gateway).not_valid_before_utc == NOW - timedelta(hours=1)
    assert expires(folder.path)["revocation-list"] == list_end


def test_a_site_trusts_the_gateway_under_its_name_only(tmp_path):
    folder = make_federation(tmp_path / "F", host="consilium.example.org", now=datetime.now(UTC))
    handshake(folder, "consilium.example.org")
    for other in ("example.org", "evil.example.org", "127.0.0.1", "localhost"):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(folder, other)


def test_the_gateway_answers_on_loopback_when_asked_to(tmp_path):
    folder = make_federation(tmp_path / "F", host="consilium.example.org", certify_loopback=True, now=datetime.now(UTC))
    for name in ("consilium.example.org", "127.0.0.1", "localhost"):
        handshake(folder, name)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_is_certified_as_an_address(tmp_path, host):
    folder = make_federation(tmp_path / "F", host=host, now=datetime.now(UTC))
    handshake(folder, host)


def test_a_site_refuses_the_gateway_of_another_authority(tmp_path):
    ours = make_federation(tmp_path / "F", now=datetime.now(UTC))
    theirs = make_federation(tmp_path / "G", now=datetime.now(UTC))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(theirs, "127.0.0.1", cafile=ours.authority_certificate)


def test_a_site_refuses_an_expired_gateway(tmp_path):
    folder = make_federation(tmp_path / "F", now=datetime.now(UTC) - timedelta(days=400))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(folder, "127.0.0.1")


def test_renewing_services_keeps_authority_and_keys_and_follows_the_host(tmp_path):
    folder = make_federation(tmp_path / "F", host="old.example.org", now=datetime.now(UTC) - timedelta(days=400))
    settings = folder.settings_file
    settings.write_text(settings.read_text().replace("old.example.org", "new.example.org"))
    before = files(folder.path)
    renewed = renew_services(folder, tuple(Service), now=datetime.now(UTC))
    after = files(folder.path)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"gateway/server.pem", "superlink/server.pem", "signing/coordinator.pem"}
    assert {entry.service for entry in renewed} == set(Service)
    handshake(folder, "new.example.org")


def test_what_ends_within_thirty_days_is_due(tmp_path):
    folder = make_federation(tmp_path / "F", certificate_days=100)
    assert due(folder, now=NOW + timedelta(days=69)) == ()
    assert due(folder, now=NOW + timedelta(days=71)) == tuple(Service)


def test_every_end_is_told_and_a_revoked_site_is_not_waited_for(tmp_path):
    folder = make_federation(tmp_path / "F", certificate_days=100)
    registry = Registry(folder)
    for name, days in (("site-a", 10), ("site-b", 20)):
        registry.enrol(site_request(name), now=NOW, days=days)
    registry.revoke("site-b", reason="left", now=NOW)
    assert expires(folder.path) == {
        "authority": NOW + timedelta(days=AUTHORITY_DAYS),
        "coordinator": NOW + timedelta(days=100),
        "gateway": NOW + timedelta(days=100),
        "superlink": NOW + timedelta(days=100),
        "site/site-a": NOW + timedelta(days=10),
        "revocation-list": NOW + timedelta(days=100),
    }


def test_nothing_outlives_the_authority():
    authority = Authority.create(federation="demo", now=NOW)
    late = NOW + timedelta(days=AUTHORITY_DAYS - 100)
    authority.issue_site(site_request("site-a"), days=100, now=late)
    with pytest.raises(UsageError, match="101 days would outlive the authority, which ends on 2051"):
        authority.issue_site(site_request("site-a"), days=101, now=late)


def test_the_authority_opens_only_whole_and_private(tmp_path):
    folder = make_federation(tmp_path / "F")
    other = make_federation(tmp_path / "G")
    assert Authority.open(folder).key.private_numbers() != Authority.open(other).key.private_numbers()
    key, whole = folder.authority_key, folder.authority_key.read_bytes()
    key.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        Authority.open(folder)
    key.chmod(0o600)
    key.write_bytes(whole[:50])
    with pytest.raises(IntegrityError, match="damaged"):
        Authority.open(folder)
    key.write_bytes(other.authority_key.read_bytes())
    with pytest.raises(IntegrityError, match="same backup"):
        Authority.open(folder)
    key.write_bytes(folder.signing_key.read_bytes())
    with pytest.raises(IntegrityError, match="not an elliptic-curve key"):
        Authority.open(folder)
    key.unlink()
    with pytest.raises(UsageError, match="Bring it back"):
        Authority.open(folder)


def test_a_missing_or_damaged_certificate_is_named(tmp_path):
    folder = make_federation(tmp_path / "F")
    folder.gateway_certificate.write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    with pytest.raises(IntegrityError, match=r"gateway/server\.pem is missing or damaged"):
        expires(folder.path)
    with pytest.raises(UsageError, match="no federation folder"):
        expires(tmp_path)


def test_secrets_are_for_their_owner_only_and_there_are_no_others(tmp_path):
    folder = make_federation(tmp_path / "F")
    private = {p for p in folder.path.rglob("*") if p.is_file() and b"PRIVATE" in p.read_bytes()}
    assert private == {folder.authority_key, folder.gateway_key, folder.superlink_key, folder.signing_key}
    for path in (*private, folder.superexec_secret):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_serial_numbers_are_random(tmp_path):
    authority = Authority.create(federation="demo", now=NOW)
    key = generate_private_key(SECP384R1())
    issued = [authority.issue_site(site_request("site-a", key), days=1, now=NOW) for _ in range(50)]
    assert len({certificate.serial_number for certificate in issued}) == 50
    assert len({certificate.public_bytes(Encoding.DER)[:8] for certificate in issued}) <= 50
