"""Ed25519 keys and the envelopes that they sign.

Envelope: DSSE v1, exactly one signature, in canonical JSON. The payload's type is under the signature and says what
was signed for: nothing that a key signed for one purpose can be taken for another.
[github.com/secure-systems-lab/dsse, protocol.md; github.com/in-toto/attestation, spec/v1]
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from common.errors import IntegrityError, UsageError, VerificationFailed
from common.evidence.atomic import write_atomic
from common.evidence.canonical import Json, canonical_json, parse_canonical, sha256_hex

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_SIGNATURE_BYTES = 64


class Purpose(StrEnum):
    """What an envelope is signed for: the type of its payload."""

    RELEASE = "application/vnd.in-toto+json"  # the auditor's attestation of a bundle
    AUDIT_PLAN = "application/vnd.consilium.audit-plan+json"  # the auditor, before any score exists
    SITE_RECEIPT = "application/vnd.consilium.site-receipt+json"  # a site, about what it answered
    COUNTERSIGNATURE = "application/vnd.consilium.countersignature+json"  # a second reviewer of a bundle
    REVOCATIONS = "application/vnd.consilium.revocations+json"  # the auditor, about what must not be used any more
    WELCOME = "application/vnd.consilium.welcome+json"  # a coordinator, to a site that it enrolled


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A parsed envelope whose signature has not been checked yet. keyid: fingerprint the signer gave."""

    purpose: Purpose
    payload: bytes
    keyid: str
    signature: bytes


def create_signing_key(path: Path) -> Ed25519PrivateKey:
    """A new key, stored as PKCS 8 PEM that only its owner may read. Raises UsageError when `path` exists."""
    if path.exists():
        raise UsageError(f"a key already lies at {path}; it was not replaced. Choose another path.")
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_atomic(path, pem, mode=0o600)
    return key


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """The key in a PEM file.

    Raises UsageError when the file is missing or others may read it, IntegrityError when it is damaged.
    """
    try:
        mode = path.stat().st_mode
        pem = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the signing key {path} cannot be read ({error.strerror}); nothing was signed") from error
    if mode & 0o077:
        raise UsageError(f"others may read the signing key {path}; nothing was signed. Run: chmod 600 {path}")
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IntegrityError(f"the signing key {path} is damaged; nothing was signed. Restore it.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise IntegrityError(f"the signing key {path} is not an Ed25519 key; nothing was signed")
    return key


def public_pem(key: Ed25519PublicKey) -> bytes:
    """The public key as PEM, the only spelling that `read_public_pem` accepts."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def read_public_pem(pem: bytes, name: str) -> Ed25519PublicKey:
    """The public key in `pem`. name: the file, for the VerificationFailed that is raised when it is damaged."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise VerificationFailed(f"{name}: holds no readable public key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise VerificationFailed(f"{name}: is not an Ed25519 public key")
    if public_pem(key) != pem:
        # PEM readers forgive spaces, comments and stray base64 bits: the key would be right, the file changed.
        raise VerificationFailed(f"{name}: was changed after it was written")
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the key's DER form, 64 hexadecimal digits.

    The same as `openssl pkey -pubin -in auditor.pub.pem -outform DER | sha256sum`.
    """
    return sha256_hex(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """What is signed: type and payload with their lengths, so that neither can borrow bytes from the other."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def public_key_hex(key: Ed25519PublicKey) -> str:
    """The public key as 64 hexadecimal digits, as messages and the evidence chain carry it."""
    return key.public_bytes_raw().hex()


def read_public_key_hex(text: str, name: str) -> Ed25519PublicKey:
    """The public key that `public_key_hex` wrote. name: whose, for the VerificationFailed that is raised for others."""
    if not _FINGERPRINT.fullmatch(text):
        raise VerificationFailed(f"{name}: is not an Ed25519 public key")
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))


def seal_json(body: Mapping[str, Json], key: Ed25519PrivateKey, purpose: Purpose) -> bytes:
    """Sign a JSON object for one purpose: the envelope, as the bytes of its file; `open_json` is its counterpart."""
    return seal(canonical_json(body), key, purpose)


def open_json(data: bytes, name: str, *, key: Ed25519PublicKey, purpose: Purpose) -> dict[str, Json]:
    """The object that the owner of `key` signed for `purpose`.

    name: the file, for the VerificationFailed that is raised when it was changed, signed by another key or for
    another purpose.
    """
    envelope = parse_envelope(data, name, purpose)
    check_signature(envelope, key, name)
    value = parse_canonical(envelope.payload, name)
    if not isinstance(value, dict):
        raise VerificationFailed(f"{name}: does not hold a JSON object")
    return value


def seal(payload: bytes, key: Ed25519PrivateKey, purpose: Purpose) -> bytes:
    """The envelope around `payload`, as the bytes of its file."""
    signature = key.sign(pre_authentication_encoding(purpose.value, payload))
    return canonical_json(
        {
            "payloadType": purpose.value,
            "payload": base64.b64encode(payload).decode(),
            "signatures": [{"keyid": fingerprint(key.public_key()), "sig": base64.b64encode(signature).decode()}],
        }
    )


def parse_envelope(data: bytes, name: str, purpose: Purpose) -> Envelope:
    """The envelope in `data`, signed by whomever for `purpose`.

    name: the file, for the VerificationFailed that is raised when it is malformed or for another purpose.
    """
    value = parse_canonical(data, name)
    if not isinstance(value, dict) or set(value) != {"payloadType", "payload", "signatures"}:
        raise VerificationFailed(f"{name}: is not a DSSE envelope")
    if value["payloadType"] != purpose.value:
        raise VerificationFailed(f"{name}: was not signed as {purpose.value}")
    signatures = value["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise VerificationFailed(f"{name}: does not carry exactly one signature")
    signature = signatures[0]
    if not isinstance(signature, dict) or set(signature) != {"keyid", "sig"}:
        raise VerificationFailed(f"{name}: its signature is malformed")
    keyid, signed = signature["keyid"], _decode(signature["sig"], name)
    if not isinstance(keyid, str) or not _FINGERPRINT.fullmatch(keyid) or len(signed) != _SIGNATURE_BYTES:
        raise VerificationFailed(f"{name}: its signature is malformed")
    return Envelope(purpose=purpose, payload=_decode(value["payload"], name), keyid=keyid, signature=signed)


def signed_by(envelope: Envelope, key: Ed25519PublicKey) -> bool:
    """Whether `key` made the envelope's signature."""
    try:
        key.verify(envelope.signature, pre_authentication_encoding(envelope.purpose.value, envelope.payload))
    except InvalidSignature:
        return False
    return True


def check_signature(envelope: Envelope, key: Ed25519PublicKey, name: str) -> None:
    """Raise VerificationFailed, naming the file `name`, unless `key` made the signature and is the key it names."""
    if envelope.keyid != fingerprint(key):
        raise VerificationFailed(
            f"{name}: was signed by key {envelope.keyid[:16]}..., not by {fingerprint(key)[:16]}... as it should be"
        )
    if not signed_by(envelope, key):
        raise VerificationFailed(f"{name}: was changed after it was signed; its signature does not hold")


def _decode(text: object, name: str) -> bytes:
    """Base64, one spelling only: unused bits of the last character are not covered by any signature."""
    if not isinstance(text, str):
        raise VerificationFailed(f"{name}: is not a DSSE envelope")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise VerificationFailed(f"{name}: holds broken base64") from error
    if base64.b64encode(data).decode() != text:
        raise VerificationFailed(f"{name}: was changed after it was written")
    return data
