"""Ed25519 keys and the signed envelope of a release.

Envelope: DSSE v1, exactly one signature, in canonical JSON; payload: an in-toto Statement v1.
[github.com/secure-systems-lab/dsse, protocol.md; github.com/in-toto/attestation, spec/v1]
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
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
from common.evidence.canonical import canonical_json, parse_canonical, sha256_hex

PAYLOAD_TYPE = "application/vnd.in-toto+json"


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A parsed envelope whose signature has not been checked yet. keyid: fingerprint the signer gave."""

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


def seal(payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """The envelope around `payload`, as the bytes of its file."""
    signature = key.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    return canonical_json(
        {
            "payloadType": PAYLOAD_TYPE,
            "payload": base64.b64encode(payload).decode(),
            "signatures": [{"keyid": fingerprint(key.public_key()), "sig": base64.b64encode(signature).decode()}],
        }
    )


def parse_envelope(data: bytes, name: str) -> Envelope:
    """The envelope in `data`. name: the file, for the VerificationFailed that is raised when it is malformed."""
    value = parse_canonical(data, name)
    if not isinstance(value, dict) or set(value) != {"payloadType", "payload", "signatures"}:
        raise VerificationFailed(f"{name}: is not a DSSE envelope")
    if value["payloadType"] != PAYLOAD_TYPE:
        raise VerificationFailed(f"{name}: its payload is not an in-toto statement")
    signatures = value["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise VerificationFailed(f"{name}: does not carry exactly one signature")
    signature = signatures[0]
    if not isinstance(signature, dict) or set(signature) != {"keyid", "sig"}:
        raise VerificationFailed(f"{name}: its signature is malformed")
    return Envelope(
        payload=_decode(value["payload"], name),
        keyid=str(signature["keyid"]),
        signature=_decode(signature["sig"], name),
    )


def signed_by(envelope: Envelope, key: Ed25519PublicKey) -> bool:
    """Whether `key` made the envelope's signature."""
    try:
        key.verify(envelope.signature, pre_authentication_encoding(PAYLOAD_TYPE, envelope.payload))
    except InvalidSignature:
        return False
    return True


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
