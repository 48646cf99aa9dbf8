"""A list of revocations is the auditor's, only grows, and is held against a release by its bundle and its decision."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import UsageError, VerificationFailed
from common.evidence.canonical import sha256_hex
from common.evidence.revocation import check_revocations, read_list, revoke

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
RELEASE, DECISION, OTHER = "a" * 64, "b" * 64, "c" * 64
REASON = "a new attack finds three patients"


def listed(path: Path, release: str = RELEASE, decision: str = DECISION, reason: str = REASON) -> bytes:
    revoke(path, release_digest=release, decision_id=decision, reason=reason, key=KEY, now=NOW)
    return path.read_bytes()


def check(given: bytes | None, beside: bytes | None = None, release: str = RELEASE, decision: str = DECISION):
    return check_revocations(
        given, beside, name="list", key=KEY.public_key(), release_digest=release, decision_id=decision
    )


def test_a_revoked_release_is_refused_with_date_and_reason(tmp_path: Path):
    with pytest.raises(VerificationFailed, match=rf"list: this release was revoked on 2026-11-20 12:00 UTC.*{REASON}"):
        check(listed(tmp_path / "l"))


def test_the_same_release_copied_or_signed_again_is_refused_as_well(tmp_path: Path):
    data = listed(tmp_path / "l")
    with pytest.raises(VerificationFailed, match="revoked"):
        check(data, release=OTHER)  # the same decision in another bundle
    with pytest.raises(VerificationFailed, match="revoked"):
        check(data, decision=OTHER)


def test_another_release_passes_and_the_list_is_named(tmp_path: Path):
    found = check(listed(tmp_path / "l"), release=OTHER, decision=OTHER)
    assert found is not None
    assert found.number == 1
    assert check(None) is None


def test_a_list_grows_and_each_names_the_one_before(tmp_path: Path):
    first = listed(tmp_path / "l")
    second = read_list(listed(tmp_path / "l", OTHER, OTHER), "l", KEY.public_key())
    assert (second.number, second.previous) == (2, sha256_hex(first))
    assert [r.release_digest for r in second.revoked] == [RELEASE, OTHER]


def test_a_list_older_than_the_one_in_the_bundle_is_refused(tmp_path: Path):
    old = listed(tmp_path / "l", OTHER, OTHER)
    new = listed(tmp_path / "l", "d" * 64, "e" * 64)
    with pytest.raises(VerificationFailed, match="list: is list 1, older than list 2 in the bundle"):
        check(old, new)
    newest = check(new, old)
    assert newest is not None
    assert newest.number == 2


def test_a_newer_list_that_forgot_a_revocation_does_not_undo_it(tmp_path: Path):
    beside = listed(tmp_path / "one")
    listed(tmp_path / "two", OTHER, OTHER)
    forgetful = listed(tmp_path / "two", "d" * 64, "e" * 64)
    with pytest.raises(VerificationFailed, match=r"revocations\.dsse\.json: this release was revoked"):
        check(forgetful, beside)


def test_a_list_of_another_key_or_with_a_changed_byte_is_refused(tmp_path: Path):
    data = listed(tmp_path / "l")
    with pytest.raises(VerificationFailed, match="l: was signed by key"):
        read_list(data, "l", Ed25519PrivateKey.generate().public_key())
    for at in range(0, len(data), 7):
        bad = bytearray(data)
        bad[at] ^= 1
        with pytest.raises(VerificationFailed, match="l: "):
            read_list(bytes(bad), "l", KEY.public_key())


def test_nothing_is_added_to_a_list_that_somebody_else_signed(tmp_path: Path):
    data = listed(tmp_path / "l")
    thief = Ed25519PrivateKey.generate()
    with pytest.raises(VerificationFailed, match="was signed by key"):
        revoke(tmp_path / "l", release_digest=OTHER, decision_id=OTHER, reason=REASON, key=thief, now=NOW)
    assert (tmp_path / "l").read_bytes() == data


def test_a_release_is_revoked_once(tmp_path: Path):
    data = listed(tmp_path / "l")
    with pytest.raises(UsageError, match="names this release already"):
        listed(tmp_path / "l")
    assert (tmp_path / "l").read_bytes() == data


@pytest.mark.parametrize("reason", ["", "short", "two\nlines of text", "\x1b[2J clears the screen", "x" * 501])
def test_a_reason_is_one_printable_sentence(tmp_path: Path, reason: str):
    with pytest.raises(UsageError, match="nothing was revoked"):
        listed(tmp_path / "l", reason=reason)
    assert not (tmp_path / "l").exists()
