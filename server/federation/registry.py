"""Who may take part: every site that was ever enrolled, under one name and one key each.

A key belongs to one name for ever and, once revoked, to nobody. A name whose site was revoked may be enrolled again
with a new key: that is what a hospital does whose key was stolen. Changing one site writes sites.json, that site's own
certificate and, on revocation, the revocation list; no other site has anything to renew.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import AwareDatetime, Field, ValidationError

from common.errors import IntegrityError, Refusal, UsageError
from common.evidence.atomic import write_atomic
from common.identity.keys import grouped, openssh_text, public_pem, read_fingerprint, read_openssh_text
from common.identity.request import SITE_NAME, SiteRequest
from common.settings.federation import load_federation
from common.settings.study import Settings
from server.federation.authority import Authority, load_revocations, site_serial
from server.federation.folder import FederationFolder

_PATIENCE_S: Final = 10.0
_POLL_S: Final = 0.05


class SiteState(StrEnum):
    """Whether a site may take part."""

    ENROLLED = "enrolled"
    REVOKED = "revoked"


class EnrolledSite(Settings):
    """One site and its key. Times are aware, serials upper-case hexadecimal, the newest last.

    public_key: in OpenSSH form, one line. reason: why it was revoked.
    """

    name: Annotated[str, Field(pattern=f"^{SITE_NAME.pattern}$")]
    hospital: str
    state: SiteState = Field(strict=False)
    fingerprint: Annotated[str, Field(pattern=r"^SHA256:[0-9a-f]{64}$")]
    public_key: str
    serials: tuple[Annotated[str, Field(pattern=r"^[0-9A-F]+$")], ...] = Field(min_length=1, strict=False)
    not_after: AwareDatetime = Field(strict=False)
    enrolled_at: AwareDatetime = Field(strict=False)
    revoked_at: AwareDatetime | None = Field(default=None, strict=False)
    reason: str | None = None

    @property
    def serial(self) -> str:
        """Of the newest certificate."""
        return self.serials[-1]

    @property
    def public_pem(self) -> bytes:
        """The key as the SuperLink vouches for it."""
        return public_pem(read_openssh_text(self.public_key, self.name))

    def valid(self, now: datetime) -> bool:
        """Whether the site may take part at `now`, aware: enrolled, and its certificate not expired."""
        return self.state is SiteState.ENROLLED and now < self.not_after

    def as_request(self) -> SiteRequest:
        """What the site once asked for."""
        return SiteRequest(
            site=self.name, hospital=self.hospital, public_key=read_openssh_text(self.public_key, self.name)
        )


class _File(Settings):
    version: Literal[1] = 1
    sites: tuple[EnrolledSite, ...] = Field(default=(), strict=False)


class Registry:
    """The sites of one federation folder. Reads see the file as it is now; changes hold a lock and are atomic."""

    def __init__(self, folder: Path | FederationFolder) -> None:
        self._folder = folder if isinstance(folder, FederationFolder) else FederationFolder.open(folder)

    @classmethod
    def create(cls, folder: FederationFolder, authority: Authority, *, now: datetime) -> Registry:
        """An empty registry and an empty revocation list. Only `federation init` calls this."""
        registry = cls(folder)
        registry._write(())
        registry._write_revocations(authority, now)
        return registry

    def all(self) -> tuple[EnrolledSite, ...]:
        """Every site that was ever enrolled, in the order of enrolment. Raises IntegrityError when damaged."""
        return _read(self._folder.registry).sites

    def enrolled(self) -> tuple[EnrolledSite, ...]:
        """Sites that were not revoked. Those whose certificate has expired are among them: ask `valid`."""
        return tuple(site for site in self.all() if site.state is SiteState.ENROLLED)

    def find(self, name: str) -> EnrolledSite:
        """The enrolled site called `name`. Raises UsageError when there is none."""
        found = [site for site in self.enrolled() if site.name == name]
        if found:
            return found[0]
        names = ", ".join(site.name for site in self.enrolled()) or "none yet"
        raise UsageError(f"no enrolled site is called {name!r}; nothing was done. Enrolled: {names}.")

    def enrol(
        self, request: SiteRequest, *, now: datetime, days: int, expect_fingerprint: str | None = None
    ) -> EnrolledSite:
        """Issue a certificate and take the site in; repeated for the same key it changes nothing.

        expect_fingerprint: what the site told over another channel, as somebody typed it. Raises Refusal when the key
        is another, is someone else's or was revoked, or when the name is taken.
        """
        if expect_fingerprint is not None and read_fingerprint(expect_fingerprint) != request.fingerprint:
            raise Refusal(
                f"the request of {request.site} holds the key {grouped(request.fingerprint)}, not the key that was "
                "expected; nobody was enrolled. Ask the site for its fingerprint again, over another channel than the "
                "file came by."
            )
        with self._locked():
            if (known := self._known(request)) is not None:
                if not known.valid(now):
                    raise Refusal(
                        f"{known.name} is enrolled with this key, but its certificate ended on "
                        f"{known.not_after:%Y-%m-%d}; nothing was issued. Use `consilium federation renew --site`."
                    )
                return known
            certificate = Authority.open(self._folder).issue_site(request, days=days, now=now)
            site = EnrolledSite(
                name=request.site,
                hospital=request.hospital,
                state=SiteState.ENROLLED,
                fingerprint=request.fingerprint,
                public_key=openssh_text(request.public_key),
                serials=(site_serial(certificate),),
                not_after=certificate.not_valid_after_utc,
                enrolled_at=now.replace(microsecond=0),
            )
            self._write_certificate(site, certificate)
            self._write((*self.all(), site))
        return site

    def renew(self, name: str, *, now: datetime, days: int) -> EnrolledSite:
        """Issue a new certificate for the same key. Raises UsageError when the site is not enrolled."""
        with self._locked():
            old = self.find(name)
            certificate = Authority.open(self._folder).issue_site(old.as_request(), days=days, now=now)
            new = old.model_copy(
                update={
                    "serials": (*old.serials, site_serial(certificate)),
                    "not_after": certificate.not_valid_after_utc,
                }
            )
            self._write_certificate(new, certificate)
            self._replace(old, new)
        return new

    def revoke(self, name: str, *, reason: str, now: datetime) -> EnrolledSite:
        """Take a site out, with every certificate it ever had. Raises UsageError when it is not enrolled.

        An authority's key that lies offline must not keep a stolen node key enrolled: the registry changes at once,
        and the revocation list when `write_revocations` finds the key (`listed` says whether it has).
        """
        if not reason.strip() or not reason.isprintable():
            raise UsageError("a revocation needs a reason of printable characters; nobody was revoked. Give --reason.")
        with self._locked():
            old = self.find(name)
            changes = {"state": SiteState.REVOKED, "revoked_at": now.replace(microsecond=0), "reason": reason.strip()}
            new = old.model_copy(update=changes)
            self._replace(old, new)
            self._folder.site_certificate(name).unlink(missing_ok=True)
            with suppress(UsageError, IntegrityError):
                self._write_revocations(Authority.open(self._folder), now)
        return new

    def listed(self) -> bool:
        """Whether the revocation list names every certificate of every revoked site."""
        try:
            named = {entry.serial_number for entry in load_revocations(self._folder.revocations)}
        except IntegrityError:
            return False
        return named >= set(self._revoked())

    def write_revocations(self, *, now: datetime) -> datetime:
        """Write the revocation list anew, for its date or after a crash; returns when it is due again."""
        with self._locked():
            return self._write_revocations(Authority.open(self._folder), now)

    def _known(self, request: SiteRequest) -> EnrolledSite | None:
        """The site when it is enrolled with this very key. Raises Refusal for what stands against enrolling it."""
        for site in self.all():
            same_key, same_name = site.fingerprint == request.fingerprint, site.name == request.site
            if same_key and site.state is SiteState.REVOKED:
                raise Refusal(
                    f"the key {grouped(request.fingerprint)} was revoked on {site.revoked_at:%Y-%m-%d} as {site.name}; "
                    "nobody was enrolled. The site must make a new key: `consilium site init` in a new folder."
                )
            if same_key and not same_name:
                raise Refusal(
                    f"the key {grouped(request.fingerprint)} is enrolled as {site.name}, not as {request.site}; nobody "
                    "was enrolled. Each site needs a key of its own."
                )
            if same_key:
                return site
            if same_name and site.state is SiteState.ENROLLED:
                raise Refusal(
                    f"{site.name} is enrolled with another key, {grouped(site.fingerprint)}; nobody was enrolled. If "
                    "that key is lost or stolen, revoke the site first; otherwise the new site needs another name."
                )
        return None

    def _replace(self, old: EnrolledSite, new: EnrolledSite) -> None:
        self._write(tuple(new if site == old else site for site in self.all()))

    def _write(self, sites: tuple[EnrolledSite, ...]) -> None:
        text = json.dumps(_File(sites=sites).model_dump(mode="json"), indent=2, sort_keys=True)
        write_atomic(self._folder.registry, f"{text}\n".encode())

    def _write_certificate(self, site: EnrolledSite, certificate: x509.Certificate) -> None:
        path = self._folder.site_certificate(site.name)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, certificate.public_bytes(Encoding.PEM))

    def _revoked(self) -> dict[int, datetime]:
        """Serial numbers of every certificate that a revoked site ever had, with the time of each."""
        return {int(serial, 16): site.revoked_at for site in self.all() if site.revoked_at for serial in site.serials}

    def _write_revocations(self, authority: Authority, now: datetime) -> datetime:
        days = load_federation(self._folder.path).certificate_days
        written = authority.revocation_list(self._revoked(), days=days, now=now)
        write_atomic(self._folder.revocations, written.public_bytes(Encoding.PEM))
        return now + timedelta(days=days)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the registry for this process; the lock vanishes with the process, however that ends."""
        end = time.monotonic() + _PATIENCE_S
        with self._folder.registry_lock.open("a") as stream:
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= end:
                        raise UsageError(
                            f"another process has been changing {self._folder.registry} for {_PATIENCE_S:.0f} s; "
                            "nothing was done. Wait until it ends."
                        ) from error
                    time.sleep(_POLL_S)
            yield


def _read(path: Path) -> _File:
    try:
        return _File.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise IntegrityError(
            f"the registry {path} is missing or damaged; nothing was done. Restore it from the newest backup: an older "
            "one would take revoked sites in again."
        ) from error
