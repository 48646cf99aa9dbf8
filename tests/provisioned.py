"""A federation folder and requests of sites for it, as the commands make them."""

from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key

from common.identity.request import SiteRequest
from common.settings.federation import FederationSettings
from server.federation.folder import FederationFolder
from server.federation.provisioning import create_federation

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)


def make_federation(path: Path, *, now: datetime = NOW, **changes: object) -> FederationFolder:
    given = {"name": "demo", "host": "127.0.0.1", "port": 8443, **changes}
    return create_federation(path, FederationSettings.model_validate(given), now=now)


def site_request(name: str, key: EllipticCurvePrivateKey | None = None) -> SiteRequest:
    public = (key or generate_private_key(SECP384R1())).public_key()
    return SiteRequest(site=name, hospital=f"Hospital of {name}", public_key=public)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, to see what a command changed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
