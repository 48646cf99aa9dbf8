"""A site in operation: one SuperNode, which holds the only connection to the outside, and our runner beside it.

Both are processes of their own, started, watched, started again and ended here. The SuperNode gets the node key, the
federation's authority and the proxy; the runner gets neither. What they share is a secret and a port on loopback.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Final

from client.connection import ConnectionSettings, load_connection
from client.joining import AUTHORITY, NODE_KEY, read_welcome, validity_problem
from common.cli import ENVIRONMENT
from common.errors import PolicyRefusal, SettingsError, UsageError
from common.evidence.atomic import write_atomic
from common.identity.keys import load_node_key
from common.identity.welcome import Welcome
from common.processes import Child, Ended, Supervisor
from common.settings.site import load_policy, load_site
from common.telemetry.security_log import SecurityLog

SITE_FILE: Final = "site.yaml"
POLICY_FILE: Final = "policy.yaml"
SECRET_FILE: Final = "superexec.secret"  # noqa: S105  a file name
PORTS_FILE: Final = "ports.json"
SECRET_BYTES: Final = 32
_LOOK_S: Final = 0.5


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
    """A site that may be started: everything that was checked. folder: absolute."""

    folder: Path
    site: str
    welcome: Welcome
    settings: ConnectionSettings
    ports: Ports


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
    return SiteService(folder=folder, site=site.site, welcome=welcome, settings=settings, ports=ports)


def children(service: SiteService, parts: tuple[Part, ...] = tuple(Part)) -> tuple[Child, ...]:
    """Return what has to run, in the order it is started."""
    made = {Part.SUPERNODE: _supernode, Part.RUNNER: _runner}
    return tuple(made[part](service) for part in parts)


def serve(
    folder: Path,
    *,
    parts: tuple[Part, ...] = tuple(Part),
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Run the site until SIGTERM or SIGINT, then end what was started. tell: gets a line for whoever watches.

    Raises as `prepare` does, and UsageError when this folder is being served already.
    """
    service = prepare(folder, now())
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    record = service.folder / ("pids.json" if len(parts) == len(Part) else f"pids-{parts[0]}.json")
    security = SecurityLog.of_folder(service.folder)
    with Supervisor(children(service, parts), record=record) as supervisor:
        write_atomic(service.folder / PORTS_FILE, json.dumps(asdict(service.ports)).encode())
        supervisor.start()
        security.note(operation="service", outcome="started", site=service.site, federation=service.welcome.federation)
        tell(
            f"{service.site} serves {service.welcome.federation} at {service.welcome.address}; "
            f"health on port {service.ports.health}, metrics on port {service.ports.metrics}"
        )
        while not stopped.wait(_LOOK_S):
            for ended in supervisor.poll():
                _note_end(security, ended, service.settings.restart_after_s, tell)
    security.note(operation="service", outcome="stopped", site=service.site)


def free_port() -> int:
    """Return a port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _note_end(security: SecurityLog, ended: Ended, restart_after_s: float, tell: Callable[[str], None]) -> None:
    security.note(operation="service", outcome="part-ended", part=ended.name, code=ended.code)
    tell(f"{ended.name} ended with {ended.code}; it is started again in {restart_after_s:g} s")


def _supernode(service: SiteService) -> Child:
    folder = service.folder
    home = folder / "state" / "flower"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    proxy = {"HTTPS_PROXY": service.settings.proxy, "https_proxy": service.settings.proxy}
    return Child(
        name=Part.SUPERNODE,
        argv=(
            str(Path(sys.executable).parent / "flower-supernode"),
            *("--superlink", service.welcome.address),
            *("--root-certificates", str(folder / AUTHORITY)),
            *("--auth-supernode-private-key", str(folder / NODE_KEY)),
            *("--isolation", "process"),
            *("--superexec-auth-secret-file", str(folder / SECRET_FILE)),
            *("--host", "127.0.0.1", "--port", str(service.ports.runtime)),
        ),
        env={
            **_environment(),
            **{name: value for name, value in proxy.items() if value},
            "FLWR_HOME": str(home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        },
        log=folder / "log" / "supernode.log",
        restart_after_s=service.settings.restart_after_s,
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
        restart_after_s=min(1.0, service.settings.restart_after_s),  # an order that it held expires within a minute
    )


def _environment() -> dict[str, str]:
    """Return our environment without proxies, which are the site's setting, and with every report to others off."""
    scripts = str(Path(sys.executable).parent)
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**kept, **ENVIRONMENT, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}


def _keep_secret(path: Path) -> None:
    """Make the secret of SuperNode and runner unless there is one. Raises UsageError when others may read it."""
    if not path.exists():
        write_atomic(path, secrets.token_bytes(SECRET_BYTES), mode=0o600)
    if path.stat().st_mode & 0o077:
        raise UsageError(f"others may read {path}; nothing was started. Run: chmod 600 {path}")
    if path.stat().st_size < SECRET_BYTES:
        raise UsageError(f"{path} is shorter than {SECRET_BYTES} bytes; nothing was started. Remove it to get another.")
