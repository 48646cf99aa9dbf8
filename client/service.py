"""A site in operation: one SuperNode, which holds the only connection to the outside, and our runner beside it.

Both are processes of their own, started, watched, started again and ended here. The SuperNode gets the node key, the
federation's authority and the proxy; the runner gets neither. What they share is a secret and a port on loopback.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Final

from client.connection import ConnectionSettings, load_connection
from client.joining import AUTHORITY, NODE_KEY, read_welcome, validity_problem
from client.site_folder import PAUSE_FILE, POLICY_FILE, SECRET_FILE, SITE_FILE
from client.way_out import GatewayNotTrusted, WayBlocked, ask_gateway
from common.cli import ENVIRONMENT
from common.errors import PolicyRefusal, SettingsError, UsageError, VerificationFailed
from common.evidence.atomic import write_atomic
from common.identity.keys import load_node_key
from common.identity.welcome import Welcome
from common.processes import Child, Ended, Supervisor
from common.settings.site import SitePolicy, load_policy, load_site
from common.telemetry.security_log import SecurityLog

PORTS_FILE: Final = "ports.json"
SECRET_BYTES: Final = 32
LOOPBACK: Final = "127.0.0.1"
_LOOK_S: Final = 0.5
_ASK_AGAIN_S: Final = 60.0
_TRY_AGAIN_S: Final = 5.0  # while the gateway does not answer
_ANSWER_S: Final = 5.0  # for each step of the way to it
_RUNNER_AGAIN_S: Final = 1.0
_KEPT_OUT: Final = (
    "the coordinator did not let it in, or takes it for connected still: is the site enrolled, its key not revoked, "
    "and the clock right to a few minutes? log/supernode.log has Flower's own words"
)


class Part(StrEnum):
    """What runs at a site."""

    SUPERNODE = "supernode"
    RUNNER = "runner"


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Where the parts listen on loopback."""

    runtime: int
    health: int
    metrics: int


@dataclass(frozen=True, kw_only=True)
class SiteService:
    """A site that may be started: everything that was checked. folder: absolute. notes: what a person should know."""

    folder: Path
    site: str
    welcome: Welcome
    settings: ConnectionSettings
    ports: Ports
    notes: tuple[str, ...]


def prepare(folder: Path, now: datetime) -> SiteService:
    """Check that a site may be started, and make its secret when it has none.

    Raises UsageError or SettingsError for what is missing or damaged, PolicyRefusal for what has expired. Nothing is
    started then.
    """
    folder = folder.resolve()
    site = load_site(folder / SITE_FILE)
    policy = load_policy(folder / POLICY_FILE)
    if now.astimezone(UTC).date() > policy.expires:
        raise PolicyRefusal(
            f"{folder / POLICY_FILE} expired on {policy.expires.isoformat()}; nothing was started. "
            "Look it through, and set `expires` to a later day."
        )
    welcome = read_welcome(folder)
    load_node_key(folder / NODE_KEY)
    if problem := validity_problem(welcome, now):
        raise PolicyRefusal(f"{problem}; nothing was started. Ask the coordinator for a renewed welcome.json.")
    if welcome.flower_version != version("flwr"):
        raise UsageError(
            f"the federation runs Flower {welcome.flower_version}, here Flower {version('flwr')} is installed; nothing "
            "was started. Install the release of Consilium that the coordinator names."
        )
    if not (folder / AUTHORITY).exists():
        raise SettingsError(f"{folder / AUTHORITY} is missing; nothing was started. Run `consilium site join` again.")
    settings = load_connection(folder)
    _keep_secret(folder / SECRET_FILE)
    ports = Ports(
        runtime=settings.runtime_port or free_port(),
        health=settings.health_port or free_port(),
        metrics=settings.metrics_port or free_port(),
    )
    return SiteService(
        folder=folder,
        site=site.site,
        welcome=welcome,
        settings=settings,
        ports=ports,
        notes=tuple(_notes(policy, welcome, Path(site.state))),
    )


def _notes(policy: SitePolicy, welcome: Welcome, state: Path) -> Iterator[str]:
    if welcome.app_digest not in policy.app_digests:
        yield (
            f"`app_digests` of the policy does not name this federation's app {welcome.app_digest}: "
            "every order is refused until it does"
        )
    if (state / PAUSE_FILE).exists():
        yield f"the site is paused: every order is refused until {state / PAUSE_FILE} is removed"


def children(service: SiteService, parts: tuple[Part, ...] = tuple(Part)) -> tuple[Child, ...]:
    """Return what has to run, in the order it is started."""
    made = {Part.SUPERNODE: _supernode, Part.RUNNER: _runner}
    return tuple(made[part](service) for part in parts)


def serve(
    folder: Path,
    *,
    stop: threading.Event,
    parts: tuple[Part, ...] = tuple(Part),
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Run the site until `stop` is set, then end what was started. tell: gets a line for whoever watches.

    Raises as `prepare` does; VerificationFailed when the gateway is not the federation's; UsageError when this folder
    is being served already, or a port is taken.
    """
    service = prepare(folder, now())
    watch = _Watch(service, tell)
    record = service.folder / ("pids.json" if len(parts) == len(Part) else f"pids-{parts[0]}.json")
    with Supervisor(children(service, parts), record=record) as supervisor:
        _check_ports(service, parts)
        watch.look_outside(first=True)
        write_atomic(service.folder / PORTS_FILE, json.dumps(asdict(service.ports)).encode())
        supervisor.start()
        watch.note("started", site=service.site, federation=service.welcome.federation)
        tell(
            f"{service.site} serves {service.welcome.federation} at {service.welcome.address}; "
            f"health on port {service.ports.health}, metrics on port {service.ports.metrics}"
        )
        for line in service.notes:
            tell(f"note: {line}")
        while not stop.wait(_LOOK_S):
            for ended in supervisor.poll():
                watch.part_ended(ended)
            watch.look_outside()
    watch.note("stopped", site=service.site)


class _Watch:
    """Tells the operator, and the security log, what changes while a site runs. Final."""

    def __init__(self, service: SiteService, tell: Callable[[str], None]) -> None:
        self._service = service
        self._tell = tell
        self._security = SecurityLog.of_folder(service.folder)
        self._found: str | None = None
        self._next_look = 0.0

    def note(self, outcome: str, **facts: str | int) -> None:
        """One line in the security log. A full disk does not end a site."""
        try:
            self._security.note(operation="service", outcome=outcome, **facts)
        except OSError as error:
            self._tell(f"the security log cannot be written: {error.strerror}")

    def part_ended(self, ended: Ended) -> None:
        """Say that a part ended, and when it is back."""
        again_s = _restart_after_s(self._service.settings, Part(ended.name))
        self.note("part-ended", part=ended.name, code=ended.code)
        why = f" ({_KEPT_OUT})" if ended.name == Part.SUPERNODE and ended.code == 1 else ""
        self._tell(f"{ended.name} ended with {ended.code}{why}; it is started again in {again_s:g} s")

    def look_outside(self, *, first: bool = False) -> None:
        """Ask the gateway now and then, and tell what has changed.

        first: before anything is started. Raises VerificationFailed then when the gateway is not the federation's.
        """
        if time.monotonic() < self._next_look:
            return
        service, welcome = self._service, self._service.welcome
        authority, proxy = service.folder / AUTHORITY, service.settings.proxy
        blocked: WayBlocked | None = None
        try:
            ask_gateway(welcome.host, welcome.port, authority=authority, proxy=proxy, timeout_s=_ANSWER_S)
        except WayBlocked as error:
            blocked = error
        self._next_look = time.monotonic() + (_ASK_AGAIN_S if blocked is None else _TRY_AGAIN_S)
        found = _outcome(blocked)
        if found == self._found:
            return
        self._found = found
        self.note(found, reason="it answers" if blocked is None else blocked.reason)
        if blocked is None:
            if not first:
                self._tell(f"gateway {welcome.address}: it answers")
            return
        if first and isinstance(blocked, GatewayNotTrusted):
            raise VerificationFailed(
                f"{welcome.address} is not trusted: {blocked.reason}; nothing was started. "
                f"What to do: {blocked.remedy}. `consilium site doctor` tries the way step by step."
            )
        self._tell(f"gateway {welcome.address}: {blocked.reason}; the SuperNode goes on trying")


def _outcome(blocked: WayBlocked | None) -> str:
    """As the security log calls it."""
    if blocked is None:
        return "gateway reached"
    return "gateway not-trusted" if isinstance(blocked, GatewayNotTrusted) else "gateway unreachable"


def _check_ports(service: SiteService, parts: tuple[Part, ...]) -> None:
    """Raise UsageError unless what is about to be started can listen."""
    if parts == (Part.RUNNER,) and service.settings.runtime_port == 0:
        raise UsageError(
            "a runner on its own cannot know the SuperNode's port; nothing was started. Set `runtime_port` in "
            "connection.yaml."
        )
    listening = {Part.SUPERNODE: ("runtime",), Part.RUNNER: ("health", "metrics")}
    for name in (name for part in parts for name in listening[part]):
        port = getattr(service.ports, name)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the parts themselves do
            try:
                probe.bind((LOOPBACK, port))
            except OSError as error:
                raise UsageError(
                    f"port {port} is taken ({error.strerror}); nothing was started. End what listens there, or set "
                    f"`{name}_port` in connection.yaml."
                ) from error


def free_port() -> int:
    """Return a port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _supernode(service: SiteService) -> Child:
    folder = service.folder
    home = folder / "state" / "flower"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    proxy = {"HTTPS_PROXY": service.settings.proxy, "https_proxy": service.settings.proxy}
    return Child(
        name=Part.SUPERNODE,
        argv=(
            *(sys.executable, "-P", "-m", "client.supernode"),
            *("--superlink", service.welcome.address),
            *("--root-certificates", str(folder / AUTHORITY)),
            *("--auth-supernode-private-key", str(folder / NODE_KEY)),
            *("--isolation", "process"),
            *("--superexec-auth-secret-file", str(folder / SECRET_FILE)),
            *("--host", LOOPBACK, "--port", str(service.ports.runtime)),
        ),
        env={
            **_environment(),
            **{name: value for name, value in proxy.items() if value},
            "FLWR_HOME": str(home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        },
        log=folder / "log" / "supernode.log",
        restart_after_s=_restart_after_s(service.settings, Part.SUPERNODE),
        cwd=home,
    )


def _runner(service: SiteService) -> Child:
    ports = service.ports
    return Child(
        name=Part.RUNNER,
        argv=(
            *(sys.executable, "-P", "-m", "client.runner", str(service.folder)),
            *(str(ports.runtime), str(ports.health), str(ports.metrics)),
        ),
        env=_environment(),
        log=service.folder / "log" / "runner.log",
        restart_after_s=_restart_after_s(service.settings, Part.RUNNER),
    )


def _restart_after_s(settings: ConnectionSettings, part: Part) -> float:
    # A coordinator turns a SuperNode away that comes back at once; a runner's order expires within a minute.
    return settings.restart_after_s if part is Part.SUPERNODE else min(_RUNNER_AGAIN_S, settings.restart_after_s)


def _environment() -> dict[str, str]:
    """Return our environment without settings of proxies and of Flower, which are ours to make; no report to others."""
    scripts = str(Path(sys.executable).parent)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith("FLWR_")
    }
    return {**kept, **ENVIRONMENT, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}


def _keep_secret(path: Path) -> None:
    """Make the secret of SuperNode and runner unless there is one. Raises UsageError when others may read it."""
    if not path.exists():
        write_atomic(path, secrets.token_bytes(SECRET_BYTES), mode=0o600)
    if path.stat().st_mode & 0o077:
        raise UsageError(f"others may read {path}; nothing was started. Run: chmod 600 {path}")
    if path.stat().st_size < SECRET_BYTES:
        raise UsageError(f"{path} is shorter than {SECRET_BYTES} bytes; nothing was started. Remove it to get another.")
