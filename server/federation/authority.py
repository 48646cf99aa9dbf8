"""The federation's certificate authority: one P-384 key, made once, that outlives every upgrade.

It certifies four things and nothing else: the gateway, the SuperLink, the coordinator's signing key, and sites. A new
version of the software, a moved gateway or a renewed certificate never needs a new authority, so no hospital has to
compare fingerprints twice. The private key is used by enrol, renew and revoke only; it may lie offline in between.

Validity begins an hour before issue: hospitals' clocks are rarely exact, and a certificate that is not valid yet looks
to its reader like an attack.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import IntegrityError, UsageError
from common.evidence.atomic import write_atomic
from common.identity.keys import fingerprint
from common.identity.request import SiteRequest
from server.federation.folder import FederationFolder

AUTHORITY_DAYS: Final = 20 * 365  # longer than any study and its retention; it can't be renewed without every hospital
BACKDATED: Final = timedelta(hours=1)
LOOPBACK: Final = ("localhost", "127.0.0.1")
_ORGANISATION: Final = "Consilium federation"

Issuable = EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True, kw_only=True)
class Authority:
    """The authority with its private key in memory."""

    key: EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def fingerprint(self) -> str:
        """What hospitals compare before they trust it."""
        return fingerprint(self.certificate.public_key())

    @classmethod
    def create(cls, *, federation: str, now: datetime) -> Authority:
        """A new authority. now: aware. Only `federation init` calls this; nothing replaces an authority."""
        key = generate_private_key(SECP384R1())
        name = _name(federation, "authority")
        builder = _builder(name, name, key.public_key(), now, AUTHORITY_DAYS)
        usage = x509.KeyUsage(**{**_NO_USAGE, "key_cert_sign": True, "crl_sign": True})
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, SHA384())
        )
        return cls(key=key, certificate=certificate)

    @classmethod
    def open(cls, folder: FederationFolder) -> Authority:
        """The authority of a federation.

        Raises UsageError when its key is not there or others may read it, IntegrityError when it is damaged or is
        not the key of the certificate beside it.
        """
        certificate = load_certificate(folder.authority_certificate)
        path = folder.authority_key
        if not path.exists():
            raise UsageError(
                f"the authority's key {path} is not there; nothing was issued or revoked. Bring it back from where it "
                "is kept, and repeat the command."
            )
        key = load_private_key(path)
        if key.public_key() != certificate.public_key():
            raise IntegrityError(
                f"the authority's key {path} is not the key of {folder.authority_certificate.name}; nothing was "
                "issued or revoked. Restore both from the same backup."
            )
        return cls(key=key, certificate=certificate)

    def write(self, folder: FederationFolder) -> None:
        """Store key and certificate. Only `federation init` calls this, in a folder of its own."""
        write_atomic(folder.authority_key, private_pem(self.key), mode=0o600)
        write_atomic(folder.authority_certificate, self.certificate.public_bytes(Encoding.PEM))

    def issue_server(
        self, key: EllipticCurvePublicKey, *, name: str, addresses: Iterable[str], days: int, now: datetime
    ) -> x509.Certificate:
        """For a TLS listener. addresses: host names and IP addresses that clients may connect to."""
        alternatives = x509.SubjectAlternativeName([_general_name(address) for address in dict.fromkeys(addresses)])
        extensions = (alternatives, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]))
        return self._issue(_name(name, "service"), key, days, now, extensions)

    def issue_site(self, request: SiteRequest, *, days: int, now: datetime) -> x509.Certificate:
        """For a site: its name, hospital and key, and nothing else that its request said."""
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, request.hospital),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "site"),
                x509.NameAttribute(NameOID.COMMON_NAME, request.site),
            ]
        )
        extensions = (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]),)
        return self._issue(subject, request.public_key, days, now, extensions)

    def issue_signing(self, key: Ed25519PublicKey, *, federation: str, days: int, now: datetime) -> x509.Certificate:
        """For the coordinator's signing key. Nothing else ever gets an Ed25519 certificate."""
        return self._issue(_name(federation, "coordinator"), key, days, now, ())

    def revocation_list(
        self, revoked: Mapping[int, datetime], *, days: int, now: datetime
    ) -> x509.CertificateRevocationList:
        """Serial numbers that must not be trusted any more, with the time of each."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now)
            .next_update(now + timedelta(days=days))
            # Grows with every list and needs no counter that a restored backup could turn back.
            .add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
            .add_extension(self._key_identifier(), critical=False)
        )
        for serial, when in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, SHA384())

    def _issue(
        self, subject: x509.Name, key: Issuable, days: int, now: datetime, extensions: Iterable[x509.ExtensionType]
    ) -> x509.Certificate:
        """Raises UsageError for a certificate that would outlive the authority."""
        if now + timedelta(days=days) > self.certificate.not_valid_after_utc:
            raise UsageError(
                f"a certificate of {days} days would outlive the authority, which ends on "
                f"{self.certificate.not_valid_after_utc:%Y-%m-%d}; nothing was issued. Take fewer days."
            )
        builder = (
            _builder(subject, self.certificate.subject, key, now, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**{**_NO_USAGE, "digital_signature": True}), critical=True)
            .add_extension(self._key_identifier(), critical=False)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self.key, SHA384())

    def _key_identifier(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())


def create_server_key(path: Path) -> EllipticCurvePrivateKey:
    """A new P-384 key as PKCS 8 PEM that only its owner may read."""
    key = generate_private_key(SECP384R1())
    write_atomic(path, private_pem(key), mode=0o600)
    return key


def load_private_key(path: Path) -> EllipticCurvePrivateKey:
    """A key that `create_server_key` or `Authority.write` stored.

    Raises UsageError when the file cannot be read or others may read it, IntegrityError when it is damaged.
    """
    try:
        mode, pem = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise UsageError(f"the key {path} cannot be read ({error.strerror}); nothing was issued or revoked.") from error
    if mode & 0o077:
        raise UsageError(f"others may read the key {path}; nothing was issued or revoked. Run: chmod 600 {path}")
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IntegrityError(f"the key {path} is damaged; nothing was issued or revoked. Restore it.") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise IntegrityError(f"the key {path} is not an elliptic-curve key; nothing was issued or revoked. Restore it.")
    return key


def private_pem(key: EllipticCurvePrivateKey) -> bytes:
    """PKCS 8 PEM without a password: services start unattended."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_certificate(path: Path) -> x509.Certificate:
    """The certificate in a file of our own. Raises IntegrityError when it is missing or damaged."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"the certificate {path} is missing or damaged; nothing was done. Restore it.") from error


def load_revocations(path: Path) -> x509.CertificateRevocationList:
    """The list of revoked certificates. Raises IntegrityError when it is missing or damaged."""
    try:
        return x509.load_pem_x509_crl(path.read_bytes())
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"the revocation list {path} is missing or damaged; nothing was done. "
            "`consilium federation renew` writes it again."
        ) from error


def expires(folder: Path) -> dict[str, datetime]:
    """When each certificate of a federation folder ends, aware: its name, or `site/NAME`; for metrics and alarms.

    `revocation-list` is when the list should have been written anew. Raises UsageError when no federation lies at
    `folder`, IntegrityError when a file is missing or damaged.
    """
    found = FederationFolder.open(folder)
    ours = {
        "authority": found.authority_certificate,
        "coordinator": found.signing_certificate,
        "gateway": found.gateway_certificate,
        "superlink": found.superlink_certificate,
    }
    sites = {f"site/{path.stem}": path for path in sorted(found.sites.glob("*.pem"))}
    ends = {name: load_certificate(path).not_valid_after_utc for name, path in {**ours, **sites}.items()}
    next_list = load_revocations(found.revocations).next_update_utc
    return ends if next_list is None else {**ends, "revocation-list": next_list}


def site_serial(certificate: x509.Certificate) -> str:
    """Serial number as openssl shows it: whole bytes in upper-case hexadecimal."""
    number = certificate.serial_number
    return number.to_bytes((number.bit_length() + 7) // 8).hex().upper()


_NO_USAGE: Final = dict.fromkeys(
    (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ),
    False,
)


def _builder(subject: x509.Name, issuer: x509.Name, key: Issuable, now: datetime, days: int) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common: str, unit: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANISATION),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)
