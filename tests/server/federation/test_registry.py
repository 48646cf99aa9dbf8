import json
import multiprocessing
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from common.errors import IntegrityError, Refusal, UsageError
from common.identity.keys import grouped, public_pem
from server.federation.authority import load_certificate, load_revocations
from server.federation.folder import FederationFolder
from server.federation.provisioning import revocations_due, seal_welcome
from server.federation.registry import Registry, SiteState
from tests.provisioned import NOW, files, make_federation, site_request


@pytest.fixture
def folder(tmp_path) -> FederationFolder:
    return make_federation(tmp_path / "F")


@pytest.fixture
def registry(folder) -> Registry:
    return Registry(folder)


def enrol_one(path, name: str) -> None:
    Registry(path).enrol(site_request(name), now=NOW, days=365)


def test_an_enrolled_site_reads_back_with_its_key(folder, registry):
    asked = site_request("site-a")
    site = registry.enrol(asked, now=NOW, days=365)
    assert Registry(folder.path).enrolled() == (site,)
    assert site.public_pem == public_pem(asked.public_key)
    assert site.not_after == NOW + timedelta(days=365)
    assert int(site.serial, 16) == load_certificate(folder.site_certificate("site-a")).serial_number
    assert site.valid(NOW)
    assert site.valid(NOW + timedelta(days=365, seconds=-1))
    assert not site.valid(NOW + timedelta(days=365))


def test_adding_renewing_or_revoking_a_site_touches_no_other_file(folder, registry):
    for name in ("site-a", "site-b"):
        registry.enrol(site_request(name), now=NOW, days=365)
    before = files(folder.path)
    registry.enrol(site_request("site-c"), now=NOW, days=365)
    registry.renew("site-c", now=NOW, days=365)
    registry.revoke("site-c", reason="left", now=NOW)
    after = files(folder.path)
    assert {name for name in before if before[name] != after[name]} == {"sites.json", "authority/crl.pem"}
    assert set(after) == set(before)
    assert [site for site in registry.all() if site.name != "site-c"] == list(registry.enrolled())


def test_the_same_request_twice_changes_nothing(folder, registry):
    asked = site_request("site-a")
    first = registry.enrol(asked, now=NOW, days=365)
    before = files(folder.path)
    assert registry.enrol(asked, now=NOW + timedelta(days=9), days=1) == first
    assert files(folder.path) == before


def test_a_site_whose_certificate_has_ended_is_renewed_not_enrolled_again(registry):
    asked = site_request("site-a")
    registry.enrol(asked, now=NOW, days=10)
    later = NOW + timedelta(days=11)
    with pytest.raises(Refusal, match="ended on 2031-05-16; nothing was issued"):
        registry.enrol(asked, now=later, days=365)
    renewed = registry.renew("site-a", now=later, days=365)
    assert renewed.valid(later)
    assert len(renewed.serials) == 2


def test_a_name_that_is_taken_is_refused(registry):
    registry.enrol(site_request("site-a"), now=NOW, days=365)
    with pytest.raises(Refusal, match="enrolled with another key"):
        registry.enrol(site_request("site-a"), now=NOW, days=365)


def test_a_key_belongs_to_one_name(registry):
    key = generate_private_key(SECP256R1())
    registry.enrol(site_request("site-a", key), now=NOW, days=365)
    with pytest.raises(Refusal, match="enrolled as site-a, not as site-b"):
        registry.enrol(site_request("site-b", key), now=NOW, days=365)


def test_a_revoked_key_never_comes_back_but_its_hospital_may(registry):
    key = generate_private_key(SECP256R1())
    registry.enrol(site_request("site-a", key), now=NOW, days=365)
    registry.revoke("site-a", reason="key stolen", now=NOW)
    for name in ("site-a", "site-b"):
        with pytest.raises(Refusal, match="was revoked on 2031-05-06 as site-a"):
            registry.enrol(site_request(name, key), now=NOW, days=365)
    again = registry.enrol(site_request("site-a"), now=NOW, days=365)
    assert registry.enrolled() == (again,)
    assert [site.state for site in registry.all()] == [SiteState.REVOKED, SiteState.ENROLLED]
    with pytest.raises(Refusal, match="was revoked"):  # also once the name is in use again
        registry.enrol(site_request("site-a", key), now=NOW, days=365)


def test_a_key_other_than_the_one_that_was_read_out_is_refused(folder, registry):
    asked, told = site_request("site-a"), site_request("site-a")
    before = files(folder.path)
    with pytest.raises(Refusal, match="not the key that was expected; nobody was enrolled"):
        registry.enrol(asked, now=NOW, days=365, expect_fingerprint=told.fingerprint)
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        registry.enrol(asked, now=NOW, days=365, expect_fingerprint=asked.fingerprint[:20])
    assert files(folder.path) == before
    registry.enrol(asked, now=NOW, days=365, expect_fingerprint=grouped(asked.fingerprint).upper())


@pytest.mark.parametrize("change", ["renew", "revoke", "find"])
def test_a_site_that_is_not_enrolled_is_named_beside_those_that_are(registry, change):
    registry.enrol(site_request("site-a"), now=NOW, days=365)
    arguments = {"renew": {"now": NOW, "days": 1}, "revoke": {"now": NOW, "reason": "left"}, "find": {}}[change]
    with pytest.raises(UsageError, match=r"'site-b'; nothing was done\. Enrolled: site-a"):
        getattr(registry, change)("site-b", **arguments)


@pytest.mark.parametrize("reason", ["", "  ", "a\x1b[2J"])
def test_a_revocation_needs_a_reason(registry, reason):
    registry.enrol(site_request("site-a"), now=NOW, days=365)
    with pytest.raises(UsageError, match="nobody was revoked"):
        registry.revoke("site-a", reason=reason, now=NOW)
    assert registry.enrolled()


def test_a_stolen_key_is_revoked_while_the_authority_is_offline(folder, registry):
    site = registry.enrol(site_request("site-a"), now=NOW, days=365)
    kept = folder.authority_key.read_bytes()
    folder.authority_key.unlink()
    registry.revoke("site-a", reason="key stolen", now=NOW)
    assert registry.enrolled() == ()
    assert not registry.listed()
    assert revocations_due(folder, now=NOW)
    folder.authority_key.write_bytes(kept)
    folder.authority_key.chmod(0o600)
    registry.write_revocations(now=NOW)
    assert registry.listed()
    assert [entry.serial_number for entry in load_revocations(folder.revocations)] == [int(site.serial, 16)]


def test_a_lost_or_old_revocation_list_is_due(folder, registry):
    assert not revocations_due(folder, now=NOW)
    assert revocations_due(folder, now=NOW + timedelta(days=336))
    folder.revocations.unlink()
    assert revocations_due(folder, now=NOW)


def test_a_crash_between_certificate_and_registry_is_seen_before_a_welcome_is_sealed(folder, registry):
    site = registry.enrol(site_request("site-a"), now=NOW, days=365)
    registry.renew("site-a", now=NOW, days=365)
    with pytest.raises(IntegrityError, match=r"renew .* --site site-a"):
        seal_welcome(folder, site, app_digest="a" * 64)  # the registry as it was before the renewal
    seal_welcome(folder, registry.renew("site-a", now=NOW, days=365), app_digest="a" * 64)


def test_processes_that_enrol_at_the_same_time_lose_nobody(folder):
    names = [f"site-{number}" for number in range(6)]
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=enrol_one, args=(folder.path, name)) for name in names]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 6
    assert sorted(site.name for site in Registry(folder).enrolled()) == names


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"enrolled"', '"honoured"'),
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"hospital"', '"surprise"'),
    ],
)
def test_a_damaged_registry_lets_nobody_in(folder, registry, damage):
    registry.enrol(site_request("site-a"), now=NOW, days=365)
    folder.registry.write_text(damage(folder.registry.read_text()))
    with pytest.raises(IntegrityError, match="an older one would take revoked sites in again"):
        registry.enrolled()


def test_the_registry_is_readable_and_holds_no_secret(folder, registry):
    registry.enrol(site_request("site-a"), now=NOW, days=365)
    body = json.loads(folder.registry.read_text())
    assert body["version"] == 1
    assert body["sites"][0]["state"] == "enrolled"
    assert body["sites"][0]["public_key"].startswith("ecdsa-sha2-nistp384 ")
