"""Keys that only their owner reads, and envelopes that no byte of which can change unseen."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from common.errors import IntegrityError, UsageError, VerificationFailed
from common.evidence.canonical import canonical_json, parse_canonical, parse_json
from common.evidence.signing import (
    Purpose,
    create_signing_key,
    fingerprint,
    load_signing_key,
    open_json,
    parse_envelope,
    pre_authentication_encoding,
    public_key_hex,
    public_pem,
    read_public_key_hex,
    read_public_pem,
    seal,
    seal_json,
    signed_by,
)

RELEASE = Purpose.RELEASE


def test_the_encoding_under_the_signature_is_the_one_of_the_dsse_specification():
    encoded = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_a_stored_key_comes_back_and_only_its_owner_may_read_it(tmp_path: Path):
    path = tmp_path / "auditor.key"
    key = create_signing_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert fingerprint(load_signing_key(path).public_key()) == fingerprint(key.public_key())


def test_an_existing_key_is_never_replaced(tmp_path: Path):
    path = tmp_path / "auditor.key"
    create_signing_key(path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="already lies"):
        create_signing_key(path)
    assert path.read_bytes() == before


def test_a_key_that_others_may_read_is_refused(tmp_path: Path):
    path = tmp_path / "auditor.key"
    create_signing_key(path)
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        load_signing_key(path)


def test_a_missing_damaged_or_foreign_key_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "auditor.key"
    with pytest.raises(UsageError, match=r"auditor\.key cannot be read"):
        load_signing_key(path)
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n")
    path.chmod(0o600)
    with pytest.raises(IntegrityError, match="damaged"):
        load_signing_key(path)
    elliptic = generate_private_key(SECP256R1())
    path.write_bytes(elliptic.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(IntegrityError, match="not an Ed25519 key"):
        load_signing_key(path)


def test_a_foreign_public_key_is_refused():
    pem = generate_private_key(SECP256R1()).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(VerificationFailed, match="not an Ed25519"):
        read_public_pem(pem, "auditor.pub.pem")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl program is not installed")
def test_the_fingerprint_is_the_one_that_openssl_gives(tmp_path: Path):
    key = Ed25519PrivateKey.generate().public_key()
    path = tmp_path / "auditor.pub.pem"
    path.write_bytes(public_pem(key))
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", path, "-outform", "DER"], check=True, capture_output=True
    ).stdout
    digest = subprocess.run(["openssl", "dgst", "-sha256", "-r"], input=der, check=True, capture_output=True).stdout
    assert digest.split()[0].decode() == fingerprint(key)


def test_a_sealed_payload_is_signed_by_its_key_and_by_no_other():
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    envelope = parse_envelope(seal(b"statement", key, RELEASE), "attestation", RELEASE)
    assert envelope.payload == b"statement"
    assert signed_by(envelope, key.public_key())
    assert not signed_by(envelope, other.public_key())


def test_every_flipped_bit_of_an_envelope_is_seen():
    key = Ed25519PrivateKey.generate()
    good = seal(b'{"a":1}', key, RELEASE)
    unseen = []
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            try:
                envelope = parse_envelope(bytes(bad), "attestation", RELEASE)
            except VerificationFailed:
                continue
            if signed_by(envelope, key.public_key()) and envelope.keyid == fingerprint(key.public_key()):
                unseen.append((at, bit))
    assert unseen == []


def test_every_flipped_bit_of_a_public_key_is_seen():
    key = Ed25519PrivateKey.generate().public_key()
    good = public_pem(key)
    unseen = []
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            try:
                same = fingerprint(read_public_pem(bytes(bad), "auditor.pub.pem")) == fingerprint(key)
            except VerificationFailed:
                continue
            if same:
                unseen.append((at, bit))
    assert unseen == []


def test_stray_bits_behind_the_last_base64_character_are_refused():
    envelope = json.loads(seal(b"ab", Ed25519PrivateKey.generate(), RELEASE))
    assert envelope["payload"] == "YWI="
    envelope["payload"] = "YWJ="  # decodes to the same two bytes
    assert base64.b64decode("YWJ=") == b"ab"
    with pytest.raises(VerificationFailed, match="changed"):
        parse_envelope(canonical_json(envelope), "attestation", RELEASE)


@pytest.mark.parametrize("signatures", [[], "two"])
def test_an_envelope_carries_exactly_one_signature(signatures: list[object] | str):
    envelope = json.loads(seal(b"a", Ed25519PrivateKey.generate(), RELEASE))
    envelope["signatures"] = envelope["signatures"] * 2 if signatures == "two" else signatures
    with pytest.raises(VerificationFailed, match="exactly one signature"):
        parse_envelope(canonical_json(envelope), "attestation", RELEASE)


@pytest.mark.parametrize(
    "text", [b'{"a":1,"a":2}', b'{"a":NaN}', b"[" * 100_000, b"\xff\xfe", b'{"a":', b""], ids=lambda t: repr(t[:12])
)
def test_json_that_two_readers_could_read_differently_is_refused(text: bytes):
    with pytest.raises(VerificationFailed, match="card"):
        parse_json(text, "card")


@pytest.mark.parametrize("text", [b'{"b":1,"a":2}', b'{"a": 1}', b'{"a":1.0}', b'{"a":"\\u0041"}', b'{"a":1}\n'])
def test_another_spelling_of_the_same_value_is_refused(text: bytes):
    with pytest.raises(VerificationFailed, match="canonical form"):
        parse_canonical(text, "attestation")


def test_what_is_sealed_for_a_purpose_opens_for_that_purpose_and_key_only():
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    sealed = seal_json({"volumes": 10_000}, key, Purpose.AUDIT_PLAN)
    assert open_json(sealed, "plan", key=key.public_key(), purpose=Purpose.AUDIT_PLAN) == {"volumes": 10_000}
    with pytest.raises(VerificationFailed, match=r"plan: was signed by key [0-9a-f]{16}\.\.\., not by"):
        open_json(sealed, "plan", key=other.public_key(), purpose=Purpose.AUDIT_PLAN)
    with pytest.raises(VerificationFailed, match=r"plan: was not signed as application/vnd\.consilium\.site-receipt"):
        open_json(sealed, "plan", key=key.public_key(), purpose=Purpose.SITE_RECEIPT)


def test_a_signature_for_one_purpose_cannot_be_relabelled_for_another():
    key = Ed25519PrivateKey.generate()
    envelope = json.loads(seal_json({"a": 1}, key, Purpose.AUDIT_PLAN))
    envelope["payloadType"] = Purpose.REVOCATIONS.value
    with pytest.raises(VerificationFailed, match="its signature does not hold"):
        open_json(canonical_json(envelope), "list", key=key.public_key(), purpose=Purpose.REVOCATIONS)


@pytest.mark.parametrize("field", ["keyid", "sig"])
def test_a_key_id_or_signature_of_another_form_is_malformed(field: str):
    envelope = json.loads(seal(b"a", Ed25519PrivateKey.generate(), RELEASE))
    envelope["signatures"][0][field] = "\x1b[2J" if field == "keyid" else "YWE="
    with pytest.raises(VerificationFailed, match="malformed"):
        parse_envelope(canonical_json(envelope), "attestation", RELEASE)


def test_a_public_key_comes_back_from_its_hexadecimal_form_and_other_text_does_not():
    key = Ed25519PrivateKey.generate().public_key()
    assert fingerprint(read_public_key_hex(public_key_hex(key), "site-1")) == fingerprint(key)
    for text in ("", "a" * 63, "A" * 64, "a" * 64 + "\n"):
        with pytest.raises(VerificationFailed, match="site-1: is not an Ed25519 public key"):
            read_public_key_hex(text, "site-1")
