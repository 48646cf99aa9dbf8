"""A hospital that has joined a federation, by the functions behind the commands."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from small_site import policy

from client.joining import NODE_KEY, WELCOME, init_site, join_site, read_welcome
from common.evidence.signing import load_signing_key
from common.identity.keys import fingerprint
from common.identity.request import check_request
from common.settings.load import settings_yaml
from common.settings.site import SitePolicy
from server.federation.authority import load_certificate
from server.federation.bundle import app_digest
from server.federation.folder import FederationFolder
from server.federation.provisioning import seal_welcome
from server.federation.registry import Registry
from tests.provisioned import make_federation

HOST = "127.0.0.1"


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Joined:
    """folder: of the site; federation: its coordinator's."""

    folder: Path
    federation: FederationFolder

    def allow(self, **changes: object) -> SitePolicy:
        """Write a policy that names the federation's app."""
        facts = {"app_digests": (app_digest(),), "expires": date(2100, 1, 1), **changes}
        made = policy(**facts)
        (self.folder / "policy.yaml").write_text(settings_yaml(made))
        return made

    def connect(self, **settings: object) -> None:
        """Write connection.yaml; ports are chosen by the operating system unless they are given."""
        facts = {"runtime_port": 0, "health_port": 0, "metrics_port": 0, "restart_after_s": 0.5, **settings}
        text = "".join(f"{name}: {value}\n" for name, value in facts.items())
        (self.folder / "connection.yaml").write_text(text)

    def rewrite_welcome(self, **changes: object) -> None:
        """Exchange the stored welcome for one that says something else, signed by the same coordinator."""

        changed = read_welcome(self.folder).model_copy(update=changes)
        text = changed.to_json(
            key=load_signing_key(self.federation.signing_key),
            certificate_pem=self.federation.signing_certificate.read_text(),
        )
        (self.folder / WELCOME).write_text(text)

    @property
    def node_key(self) -> Path:
        return self.folder / NODE_KEY


def join(
    root: Path, *, now: datetime | None = None, port: int = 8443, name: str = "site-1", host: str = HOST
) -> Joined:
    """A federation at host:port and a site that joined it at `now`, with a policy that allows the tiny study."""
    now = now or utc_now()
    federation = make_federation(root / "federation", now=now, host=host, port=port, listen=HOST)
    folder = root / name
    (root / "data").mkdir(exist_ok=True)
    made = init_site(folder, name=name, hospital="Hospital", data=root / "data", key=None, now=now)
    asked = check_request(made.request_file.read_bytes(), "request.pem")
    site = Registry(federation).enrol(asked, now=now, days=30, expect_fingerprint=None)

    authority = fingerprint(load_certificate(federation.authority_certificate).public_key())
    welcome = seal_welcome(federation, site, app_digest=app_digest()).encode()
    join_site(folder, welcome, "welcome.json", ca_fingerprint=authority, now=now)
    joined = Joined(folder, federation)
    joined.allow()
    joined.connect()
    return joined
