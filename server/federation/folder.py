"""Where the files of a federation lie. The layout is described in the coordinator's guide."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.errors import UsageError
from common.settings.federation import FEDERATION_FILE


@dataclass(frozen=True, kw_only=True)
class FederationFolder:
    """An existing federation folder; `consilium federation init` makes one, `open` finds one."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> FederationFolder:
        """The folder at `path`. Raises UsageError when no federation lies there."""
        folder = cls(path=path)
        if not folder.settings_file.is_file():
            raise UsageError(
                f"{path} is no federation folder: it has no {FEDERATION_FILE}; nothing was done. "
                "`consilium federation init` makes one."
            )
        return folder

    @property
    def settings_file(self) -> Path:
        """Name, address and ports."""
        return self.path / FEDERATION_FILE

    @property
    def authority_key(self) -> Path:
        """Private key of the authority; may be kept elsewhere between enrolments."""
        return self.path / "authority" / "ca.key"

    @property
    def authority_certificate(self) -> Path:
        """What every site trusts."""
        return self.path / "authority" / "ca.pem"

    @property
    def revocations(self) -> Path:
        """Certificate revocation list."""
        return self.path / "authority" / "crl.pem"

    @property
    def gateway_key(self) -> Path:
        """Private key of the public listener."""
        return self.path / "gateway" / "server.key"

    @property
    def gateway_certificate(self) -> Path:
        """Certificate of the public listener."""
        return self.path / "gateway" / "server.pem"

    @property
    def superlink_key(self) -> Path:
        """Private key of the SuperLink on loopback."""
        return self.path / "superlink" / "server.key"

    @property
    def superlink_certificate(self) -> Path:
        """Certificate of the SuperLink on loopback."""
        return self.path / "superlink" / "server.pem"

    @property
    def superexec_secret(self) -> Path:
        """What the SuperExec and the SuperLink share."""
        return self.path / "superlink" / "superexec.secret"

    @property
    def signing_key(self) -> Path:
        """Ed25519: countersigns ledger heads, signs outcomes and welcomes."""
        return self.path / "signing" / "coordinator.key"

    @property
    def signing_certificate(self) -> Path:
        """The authority's word that `signing_key` is the coordinator's."""
        return self.path / "signing" / "coordinator.pem"

    @property
    def registry(self) -> Path:
        """Every site that was ever enrolled."""
        return self.path / "sites.json"

    @property
    def registry_lock(self) -> Path:
        """Held while the registry is changed."""
        return self.path / ".sites.lock"

    @property
    def sites(self) -> Path:
        """The newest certificate of every enrolled site."""
        return self.path / "sites"

    def site_certificate(self, name: str) -> Path:
        """The newest certificate of a site."""
        return self.sites / f"{name}.pem"

    @property
    def runs(self) -> Path:
        """Run folders by name."""
        return self.path / "runs"

    @property
    def log(self) -> Path:
        """Logs of the services, and the security log."""
        return self.path / "log"

    @property
    def security_log(self) -> Path:
        """Who was enrolled, renewed and revoked, and when."""
        return self.log / "security.jsonl"

    @property
    def processes(self) -> Path:
        """What `consilium federation serve` started."""
        return self.path / "pids.json"
