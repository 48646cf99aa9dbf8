"""What a site asks its coordinator for: a certificate request (PKCS 10) with its name, its hospital and its public key.

Only these three are taken from a request. Whatever extensions it carries are left out of the certificate, so that a
site cannot ask to be an authority or another host.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from common.errors import SettingsError, UsageError, VerificationFailed
from common.identity.keys import fingerprint, key_problem

SITE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
LONGEST_ATTRIBUTE: Final = 64  # characters; the upper bound of a common and an organisation name [RFC 5280, A.1]
LARGEST_REQUEST: Final = 64 * 1024  # bytes; a request with two names and one key has about 700
_BEGINNINGS: Final = (b"-----BEGIN CERTIFICATE REQUEST-----", b"-----BEGIN NEW CERTIFICATE REQUEST-----")
_HASHES: Final = (SHA256.name, SHA384.name, SHA512.name)


@dataclass(frozen=True, kw_only=True)
class SiteRequest:
    """A request that was checked. hospital: for people only; the site's name is what counts."""

    site: str
    hospital: str
    public_key: EllipticCurvePublicKey

    @property
    def fingerprint(self) -> str:
        """Of the node key, as both sides show it."""
        return fingerprint(self.public_key)


def build_request(key: EllipticCurvePrivateKey, *, site: str, hospital: str) -> bytes:
    """The request as PEM, signed by `key`. Raises SettingsError that lists what is wrong with the names."""
    if problems := name_problems(site, hospital):
        raise SettingsError("\n".join(problems))
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, hospital), x509.NameAttribute(NameOID.COMMON_NAME, site)]
    )
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA384()).public_bytes(Encoding.PEM)


def name_problems(site: str, hospital: str) -> list[str]:
    """What is wrong with the names of a site and its hospital, before a key is made; empty when nothing is."""
    return [*_site_problems([site]), *_hospital_problems([hospital])]


def check_request(data: bytes, name: str) -> SiteRequest:
    """Read a request that `build_request`, openssl or anything else made.

    name: the file, for the texts. Raises UsageError for what is no request at all, VerificationFailed when it is not
    signed by the key it names, SettingsError that lists everything else that is wrong.
    """
    request = _parse(data, name)
    try:
        signed = request.is_signature_valid
    except (UnsupportedAlgorithm, ValueError, TypeError):
        signed = False
    if not signed:
        raise VerificationFailed(
            f"{name}: is not signed by the key it names: it was changed on its way or made from two keys; nothing was "
            "signed. Have the site send it again, or make a new one there."
        )
    sites, hospitals = _attributes(request, NameOID.COMMON_NAME), _attributes(request, NameOID.ORGANIZATION_NAME)
    key = request.public_key()
    problems = [*_site_problems(sites), *_hospital_problems(hospitals), *_key_problems(request, key)]
    if problems:
        raise SettingsError("\n".join(f"{name}: {problem}" for problem in problems))
    assert isinstance(key, EllipticCurvePublicKey)  # noqa: S101  `_key_problems` names every other kind
    return SiteRequest(site=sites[0], hospital=hospitals[0], public_key=key)


def _parse(data: bytes, name: str) -> x509.CertificateSigningRequest:
    if len(data) > LARGEST_REQUEST:
        raise UsageError(
            f"{name}: has {len(data)} bytes, a request has at most {LARGEST_REQUEST}; nothing was signed. Give the "
            "request.pem that the site made."
        )
    if b"PRIVATE KEY-----" in data:
        raise UsageError(
            f"{name}: holds a private key, which must never leave the site; nothing was signed. Delete this copy, make "
            "a new key at the site and send request.pem only."
        )
    text = data.strip()
    if not text.startswith(_BEGINNINGS):
        what = "a certificate, not a request" if b"BEGIN CERTIFICATE-----" in data else "no request in PEM form"
        raise UsageError(f"{name}: is {what}; nothing was signed. Give the request.pem that the site made.")
    try:
        return x509.load_pem_x509_csr(text)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{name}: cannot be read; nothing was signed. Have the site send it again.") from error


def _attributes(request: x509.CertificateSigningRequest, oid: x509.ObjectIdentifier) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cryptography warns about a long name; `check_request` says it in words
        return [str(attribute.value) for attribute in request.subject.get_attributes_for_oid(oid)]


def _site_problems(names: list[str]) -> Iterator[str]:
    if len(names) != 1:
        yield f"CN: {len(names)} common names, exactly one is needed: the name of the site"
    for site in names:
        if not SITE_NAME.fullmatch(site):
            yield (
                f"CN: the name of the site, {_shown(site)}, has {len(site)} characters; 1 to 63 of a-z, 0-9 and '-' "
                "are needed, the first of them no '-'"
            )


def _hospital_problems(names: list[str]) -> Iterator[str]:
    if len(names) != 1:
        yield f"O: {len(names)} organisation names, exactly one is needed: the hospital"
    for hospital in names:
        if not 1 <= len(hospital) <= LONGEST_ATTRIBUTE:
            yield f"O: the hospital's name has {len(hospital)} characters; 1 to {LONGEST_ATTRIBUTE} are possible"
        elif not hospital.isprintable() or hospital != hospital.strip():
            yield f"O: the hospital's name {_shown(hospital)} has control characters, or spaces around it"


def _key_problems(request: x509.CertificateSigningRequest, key: object) -> Iterator[str]:
    if problem := key_problem(key):
        yield f"key: {problem}"
    elif (digest := request.signature_hash_algorithm) is None or digest.name not in _HASHES:
        yield f"signature: made with {digest.name if digest else 'no digest'}; SHA-256, SHA-384 or SHA-512 is needed"


def _shown(text: str) -> str:
    """What a stranger wrote, cut short and unable to steer a terminal."""
    return ascii(text if len(text) <= LONGEST_ATTRIBUTE else text[:LONGEST_ATTRIBUTE] + "...")
