"""Node keys of sites: elliptic-curve keys as Flower's SuperNode reads them, and fingerprints that people compare.

A fingerprint is the SHA-256 of a public key's SubjectPublicKeyInfo (DER) and is the same for a key in every file it is
in: a private key, a request, a certificate. Whoever trusts only openssl gets the same digits from

    openssl req -in request.pem -noout -pubkey | openssl pkey -pubin -outform DER | sha256sum
    openssl x509 -in ca.pem    -noout -pubkey | openssl pkey -pubin -outform DER | sha256sum

and not from `ssh-keygen -l`, which digests another encoding.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from common.errors import IntegrityError, UsageError
from common.evidence.atomic import write_atomic
from common.evidence.canonical import sha256_hex

CURVES: Final = (SECP256R1.name, SECP384R1.name)
_OPENSSH: Final = b"-----BEGIN OPENSSH PRIVATE KEY-----"
_PREFIX: Final = "SHA256:"
_GROUP: Final = 4  # digits that two people on the telephone read out in one breath
_SEPARATORS: Final = re.compile(r"[\s:-]")


def create_node_key(path: Path) -> EllipticCurvePrivateKey:
    """A new P-384 key in OpenSSH format that only its owner may read. Raises UsageError when `path` exists."""
    key = generate_private_key(SECP384R1())
    _store(path, key)
    return key


def adopt_node_key(source: Path, path: Path) -> EllipticCurvePrivateKey:
    """Store at `path` a key that the site has already: P-256 or P-384, PEM or OpenSSH, without a password.

    Raises UsageError when `source` cannot be used or `path` exists; `source` stays as it is.
    """
    try:
        key = _parse(source.read_bytes())
    except OSError as error:
        raise UsageError(f"the key {source} cannot be read ({error.strerror}); nothing was written.") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{source} holds no private key that can be read without a password; nothing was written. Give a PEM or "
            "OpenSSH file; `openssl pkey -in KEY -out PLAIN` takes a password away."
        ) from error
    if problem := key_problem(key.public_key() if isinstance(key, EllipticCurvePrivateKey) else key):
        raise UsageError(f"{source}: {problem}; nothing was written.")
    assert isinstance(key, EllipticCurvePrivateKey)  # noqa: S101  `key_problem` names every other kind
    _store(path, key)
    return key


def load_node_key(path: Path) -> EllipticCurvePrivateKey:
    """The node key of a site.

    Raises UsageError when the file is missing or others may read it, IntegrityError when it is damaged.
    """
    try:
        mode, data = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"the node key {path} cannot be read ({error.strerror}); nothing was done. `consilium site init` makes one."
        ) from error
    if mode & 0o077:
        raise UsageError(f"others may read the node key {path}; nothing was done. Run: chmod 600 {path}")
    try:
        key = _parse(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IntegrityError(
            f"the node key {path} is damaged; nothing was done. Restore it, or have this site revoked and start anew."
        ) from error
    if not data.startswith(_OPENSSH) or not isinstance(key, EllipticCurvePrivateKey):
        raise IntegrityError(f"the node key {path} is not an elliptic-curve key in OpenSSH format; nothing was done.")
    return key


def key_problem(key: object) -> str | None:
    """Why a key cannot be a node key: of another kind, or on another curve. None when it can.

    Flower takes NIST curves only; P-521 is left out because hardware tokens and older libraries often lack it.
    """
    if not isinstance(key, EllipticCurvePublicKey):
        kind = re.sub(r"^_|(Public|Private)Key$", "", type(key).__name__)
        return f"the key is of kind {kind}; an elliptic-curve key on P-256 or P-384 is needed"
    if key.curve.name not in CURVES:
        return f"the key is on the curve {key.curve.name}; P-256 (secp256r1) or P-384 (secp384r1) is needed"
    return None


def openssh_text(key: EllipticCurvePublicKey) -> str:
    """The public key in one line, as `flwr supernode register` reads it, without a comment."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def read_openssh_text(text: str, name: str) -> EllipticCurvePublicKey:
    """The public key that `openssh_text` wrote. name: whose, for the IntegrityError that is raised for others."""
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IntegrityError(f"{name}: is not a public key in OpenSSH format") from error
    if not isinstance(key, EllipticCurvePublicKey) or key_problem(key):
        raise IntegrityError(f"{name}: is not a public key on P-256 or P-384")
    return key


def public_pem(key: EllipticCurvePublicKey) -> bytes:
    """The public key as PEM: the bytes by which Flower's SuperLink vouches for a node."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(key: PublicKeyTypes) -> str:
    """`SHA256:` and 64 hexadecimal digits; the form that is stored and compared. Shown to people by `grouped`."""
    return _PREFIX + sha256_hex(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def grouped(text: str) -> str:
    """A fingerprint to read out: digits in groups of four, still one word for a shell."""
    digits = text.removeprefix(_PREFIX)
    return _PREFIX + "-".join(digits[start : start + _GROUP] for start in range(0, len(digits), _GROUP))


def read_fingerprint(text: str) -> str:
    """The fingerprint that somebody typed, in its stored form: case, spaces, colons and hyphens do not matter.

    Raises UsageError for anything but 64 hexadecimal digits: a part of a fingerprint proves little.
    """
    digits = _SEPARATORS.sub("", re.sub(r"^\s*sha-?256\s*:?", "", text, flags=re.IGNORECASE)).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise UsageError(
            f"{text!r} is no fingerprint: 64 hexadecimal digits are needed, {len(digits)} characters were given; "
            "nothing was done. Copy the whole line that begins with SHA256:."
        )
    return _PREFIX + digits


def _parse(data: bytes) -> object:
    return load_ssh_private_key(data, None) if data.startswith(_OPENSSH) else load_pem_private_key(data, None)


def _store(path: Path, key: EllipticCurvePrivateKey) -> None:
    if path.exists():
        raise UsageError(f"a key already lies at {path}; it was not replaced. Choose another folder.")
    write_atomic(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), mode=0o600)
