"""What a coordinator sends back to a site that it enrolled: whom the site trusts, where it connects, what it runs.

One file, welcome.json, with three signatures that hold one another up

    authority  signs  the site's certificate, and the certificate of the coordinator's Ed25519 key
    that key   signs  the welcome itself: address, certificates, app digest, versions

so that the fingerprint of the authority, told to the hospital over another channel than the file, is all it takes to
trust every byte. Without that comparison a welcome proves only that somebody made it in one piece. The authority gives
Ed25519 certificates to coordinators only (a request with such a key is refused), so no site can sign a welcome.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import VerificationFailed
from common.evidence.canonical import canonical_json, parse_canonical
from common.evidence.signing import Purpose, open_json, public_key_hex, read_public_key_hex, seal_json
from common.identity.keys import fingerprint, grouped
from common.identity.request import SITE_NAME
from common.settings.federation import FederationName, Host, Port

LARGEST_WELCOME = 64 * 1024  # bytes; one has about 4000
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SoftwareVersion = Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+!-]{0,63}$")]


class Welcome(BaseModel):
    """All a site needs to join. `from_json` reads only what holds together; compare `ca_fingerprint` before use.

    host, port: of the gateway. ca_pem, site_pem: certificates of the authority and of this site. coordinator_key: the
    Ed25519 key that countersigns ledger heads and signs outcomes. app_digest: SHA-256 of the one app that this
    federation sends. flower_version, consilium_version: the coordinator's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    federation: FederationName
    site: Annotated[str, Field(pattern=f"^{SITE_NAME.pattern}$")]
    host: Host
    port: Port
    ca_pem: str
    site_pem: str
    coordinator_key: Hex64
    app_digest: Hex64
    flower_version: SoftwareVersion
    consilium_version: SoftwareVersion

    @property
    def ca_fingerprint(self) -> str:
        """Of the authority: what the hospital compares with what the coordinator tells it."""
        return fingerprint(self.authority.public_key())

    @property
    def address(self) -> str:
        """`host:port` as a SuperNode is told."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def authority(self) -> x509.Certificate:
        """The federation's authority."""
        return read_certificate(self.ca_pem, "the authority's certificate")

    @property
    def certificate(self) -> x509.Certificate:
        """This site's certificate."""
        return read_certificate(self.site_pem, "the site's certificate")

    @property
    def expires(self) -> datetime:
        """When the site's enrolment ends unless it is renewed, aware."""
        return self.certificate.not_valid_after_utc

    def to_json(self, *, key: Ed25519PrivateKey, certificate_pem: str) -> str:
        """The file. key: the coordinator's; certificate_pem: what the authority issued for it."""
        envelope = parse_canonical(seal_json(self.model_dump(mode="json"), key, Purpose.WELCOME), "welcome")
        return canonical_json({"coordinator": certificate_pem, "welcome": envelope}).decode()

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "welcome.json") -> Self:
        """Read what `to_json` wrote and check every signature in it.

        name: the file, for the VerificationFailed that is raised when anything was changed or does not belong
        together. Says nothing about time (`expires`) and nothing about whose federation it is (`ca_fingerprint`).
        """
        data = text.encode() if isinstance(text, str) else text
        if len(data) > LARGEST_WELCOME:
            raise VerificationFailed(f"{name}: has {len(data)} bytes, a welcome has at most {LARGEST_WELCOME}")
        file = parse_canonical(data.strip(), name)  # an editor's or a mail program's last line break is no change
        if not isinstance(file, dict) or set(file) != {"coordinator", "welcome"}:
            raise VerificationFailed(f"{name}: is not a welcome of a Consilium federation")
        coordinator = read_certificate(str(file["coordinator"]), f"{name}: the coordinator's certificate")
        key = coordinator.public_key()
        if not isinstance(key, Ed25519PublicKey):
            raise VerificationFailed(f"{name}: the coordinator's certificate is not of an Ed25519 key")
        body = open_json(canonical_json(file["welcome"]), name, key=key, purpose=Purpose.WELCOME)
        try:
            welcome = cls.model_validate(body)
        except ValidationError as error:
            fields = ", ".join(sorted({str(problem["loc"][0]) for problem in error.errors() if problem["loc"]}))
            raise VerificationFailed(f"{name}: is not a welcome that this version reads (see {fields})") from error
        welcome._check(coordinator, key, name)
        return welcome

    def _check(self, coordinator: x509.Certificate, key: Ed25519PublicKey, name: str) -> None:
        """Raise VerificationFailed unless authority, coordinator and site belong together."""
        authority, site = self.authority, self.certificate
        if not _is_authority(authority):
            raise VerificationFailed(f"{name}: the authority's certificate is not a self-signed authority's")
        for certificate, whose in ((coordinator, "coordinator"), (site, "site")):
            if not issued_by(certificate, authority):
                raise VerificationFailed(f"{name}: the {whose}'s certificate was not issued by the authority in it")
        if public_key_hex(key) != self.coordinator_key:
            raise VerificationFailed(f"{name}: was not signed by the coordinator key that it names")
        if common_name(site) != self.site or not isinstance(site.public_key(), EllipticCurvePublicKey):
            raise VerificationFailed(f"{name}: the site's certificate is not of {self.site}")

    @property
    def coordinator(self) -> Ed25519PublicKey:
        """The coordinator's key."""
        return read_public_key_hex(self.coordinator_key, "coordinator key")

    def describe(self) -> str:
        """One line for a person: federation, address, authority."""
        return f"federation {self.federation} at {self.address}, authority {grouped(self.ca_fingerprint)}"


def read_certificate(pem: str | bytes, name: str) -> x509.Certificate:
    """The one certificate in `pem`. name: whose, for the VerificationFailed that is raised when it is damaged."""
    try:
        return x509.load_pem_x509_certificate(pem.encode() if isinstance(pem, str) else pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise VerificationFailed(f"{name} cannot be read") from error


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether `authority` signed `certificate`; says nothing about dates or revocation."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def common_name(certificate: x509.Certificate) -> str:
    """The certificate's common name; empty when it has none or several."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, ValueError):
        return False
    return constraints.ca and issued_by(certificate, certificate)
