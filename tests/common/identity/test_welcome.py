"""A welcome is as good as its authority's fingerprint: whatever else is exchanged in it is found."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from common.errors import VerificationFailed
from common.evidence.canonical import canonical_json
from common.evidence.signing import Purpose, public_key_hex, seal_json
from common.identity.keys import fingerprint
from common.identity.request import SiteRequest
from common.identity.welcome import LARGEST_WELCOME, Welcome
from server.federation.authority import Authority

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
AUTHORITY = Authority.create(federation="demo", now=NOW)
COORDINATOR = Ed25519PrivateKey.generate()
SITE_KEY = generate_private_key(SECP384R1())
COORDINATOR_PEM = (
    AUTHORITY.issue_signing(COORDINATOR.public_key(), federation="demo", days=365, now=NOW)
    .public_bytes(Encoding.PEM)
    .decode()
)


def pem(certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def site_pem(authority: Authority = AUTHORITY, site: str = "site-a") -> str:
    request = SiteRequest(site=site, hospital="Hospital", public_key=SITE_KEY.public_key())
    return pem(authority.issue_site(request, days=365, now=NOW))


def welcome(**changes) -> Welcome:
    body = {
        "federation": "demo",
        "site": "site-a",
        "host": "consilium.example.org",
        "port": 443,
        "ca_pem": pem(AUTHORITY.certificate),
        "site_pem": site_pem(),
        "coordinator_key": public_key_hex(COORDINATOR.public_key()),
        "app_digest": "a" * 64,
        "flower_version": "1.41.0",
        "consilium_version": "0.1.0",
    }
    return Welcome(**{**body, **changes})


def sealed(body: Welcome, key: Ed25519PrivateKey = COORDINATOR, certificate_pem: str = COORDINATOR_PEM) -> str:
    return body.to_json(key=key, certificate_pem=certificate_pem)


def test_a_welcome_reads_back_as_it_was_written():
    read = Welcome.from_json(sealed(welcome()))
    assert read == welcome(site_pem=read.site_pem)
    assert read.ca_fingerprint == fingerprint(AUTHORITY.certificate.public_key())
    assert read.expires == NOW + timedelta(days=365)
    assert read.address == "consilium.example.org:443"
    assert read.coordinator.public_bytes_raw() == COORDINATOR.public_key().public_bytes_raw()
    assert Welcome.from_json(sealed(welcome()).encode() + b"\r\n").site == "site-a"  # as mail programs leave it


def test_an_ipv6_gateway_is_addressed_in_brackets():
    assert welcome(host="2001:db8::1").address == "[2001:db8::1]:443"


@pytest.mark.parametrize("field", ["federation", "site", "host", "port", "app_digest", "coordinator_key", "ca_pem"])
def test_no_field_can_be_changed_after_signing(field):
    other = {"port": 8443, "app_digest": "b" * 64, "coordinator_key": "b" * 64}.get(field, "other")
    file = json.loads(sealed(welcome()))
    before = Welcome.from_json(sealed(welcome())).model_dump(mode="json")
    envelope = json.loads(seal_json({**before, field: other}, Ed25519PrivateKey.generate(), Purpose.WELCOME))
    file["welcome"]["payload"] = envelope["payload"]
    with pytest.raises(VerificationFailed, match="changed after it was signed"):
        Welcome.from_json(canonical_json(file))


def test_a_thief_of_the_file_cannot_put_its_own_coordinator_key_under_the_same_authority():
    thief = Ed25519PrivateKey.generate()
    stolen = welcome(coordinator_key=public_key_hex(thief.public_key()))
    with pytest.raises(VerificationFailed, match="not by"):
        Welcome.from_json(sealed(stolen, key=thief))
    own_authority = Authority.create(federation="demo", now=NOW)
    own_certificate = pem(own_authority.issue_signing(thief.public_key(), federation="demo", days=365, now=NOW))
    with pytest.raises(VerificationFailed, match="coordinator's certificate was not issued by the authority"):
        Welcome.from_json(sealed(stolen, key=thief, certificate_pem=own_certificate))


def test_an_enrolled_site_cannot_sign_a_welcome_with_its_certificate():
    with pytest.raises(VerificationFailed, match="not of an Ed25519 key"):
        Welcome.from_json(sealed(welcome(), certificate_pem=site_pem()))


def test_the_key_that_signed_must_be_the_key_that_is_named():
    other = public_key_hex(Ed25519PrivateKey.generate().public_key())
    with pytest.raises(VerificationFailed, match="the coordinator key that it names"):
        Welcome.from_json(sealed(welcome(coordinator_key=other)))


def test_certificates_of_two_authorities_are_not_mixed():
    other = Authority.create(federation="demo", now=NOW)
    with pytest.raises(VerificationFailed, match="site's certificate was not issued by"):
        Welcome.from_json(sealed(welcome(site_pem=site_pem(other))))


def test_a_certificate_of_another_site_is_refused():
    with pytest.raises(VerificationFailed, match="not of site-a"):
        Welcome.from_json(sealed(welcome(site_pem=site_pem(site="site-b"))))


def test_a_site_certificate_is_no_authority():
    with pytest.raises(VerificationFailed, match="not a self-signed authority's"):
        Welcome.from_json(sealed(welcome(ca_pem=site_pem())))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"site": "Site A"}, "site"),
        ({"port": 0}, "port"),
        ({"host": "https://x"}, "host"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_fields_that_this_version_does_not_read_are_named(changes, field):
    body = {**Welcome.from_json(sealed(welcome())).model_dump(mode="json"), **changes}
    file = {"coordinator": COORDINATOR_PEM, "welcome": json.loads(seal_json(body, COORDINATOR, Purpose.WELCOME))}
    with pytest.raises(VerificationFailed, match=f"see {field}"):
        Welcome.from_json(canonical_json(file))


def test_what_the_coordinator_signed_for_another_purpose_is_no_welcome():
    body = welcome().model_dump(mode="json")
    file = {"coordinator": COORDINATOR_PEM, "welcome": json.loads(seal_json(body, COORDINATOR, Purpose.RELEASE))}
    with pytest.raises(VerificationFailed, match="was not signed as"):
        Welcome.from_json(canonical_json(file))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"coordinator":"","welcome":{}}',
        '{"a":' * 5000,
        "\x00",
        "{" + " " * LARGEST_WELCOME + "}",
    ],
    ids=["empty", "object", "list", "null", "hollow", "deep", "zero", "large"],
)
def test_garbage_is_no_welcome(text):
    with pytest.raises(VerificationFailed, match=r"mine\.json"):
        Welcome.from_json(text, "mine.json")
