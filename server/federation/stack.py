"""What a coordinator runs: SuperLink, SuperExec and gateway, started, watched and started again by one process.

    SuperLink   127.0.0.1 only; SQLite; node keys; executes nothing itself and installs nothing
    SuperExec   starts a ServerApp for each submitted run; knows the secret without which nobody gets a task
    gateway     nginx, the only public listener, see `gateway.py`

`serve` also keeps the SuperLink's list of nodes equal to the registry, and looks after open runs (`network_run.py`):
whoever dies, the campaign goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from common.cli import ENVIRONMENT
from common.errors import ConsiliumError, Unreachable, UsageError
from common.processes import Child, Supervisor, end_all
from common.settings.federation import FederationSettings, load_federation
from server.federation.authority import load_certificate
from server.federation.control import LOOPBACK, Control, sync_nodes
from server.federation.folder import FederationFolder
from server.federation.gateway import gateway_command, write_gateway
from server.federation.network_run import FOLDER_VARIABLE, RunWatch

SUPERLINK: Final = "superlink"
SUPEREXEC: Final = "superexec"
GATEWAY: Final = "gateway"
_START_S: Final = 180.0
_LOOK_S: Final = 0.5
_RUNS_EVERY_S: Final = 2.0
_RESTART_S: Final = 1.0


def environment(folder: Path) -> dict[str, str]:
    """The environment of Flower's programs: ours, without any setting of Flower that somebody may have exported."""
    scripts = str(Path(sys.executable).parent)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    return {
        **inherited,
        **ENVIRONMENT,
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(folder / "superlink" / "home"),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        "PATH": f"{scripts}{os.pathsep}{inherited.get('PATH', '')}",
        # What is for this machine's ears only must not travel through a proxy.
        "NO_PROXY": f"{LOOPBACK},localhost",
        "no_proxy": f"{LOOPBACK},localhost",
        "PYTHONSAFEPATH": "1",
        FOLDER_VARIABLE: str(folder),
    }


def children(folder: FederationFolder, settings: FederationSettings) -> tuple[Child, ...]:
    """The programs in the order in which they start. folder: absolute."""
    path, scripts = folder.path, Path(sys.executable).parent
    env = environment(path)
    authority, secret = str(folder.authority_certificate), str(folder.superexec_secret)

    def child(name: str, argv: tuple[str, ...]) -> Child:
        return Child(
            name=name,
            argv=argv,
            env=env,
            log=folder.log / f"{name}.log",
            restart_after_s=_RESTART_S,
            cwd=path / "superlink" / "empty",
        )

    superlink = (
        *(str(scripts / "flower-superlink"), "--host", LOOPBACK, "--port", str(settings.superlink_port)),
        *("--ssl-ca-certfile", authority, "--ssl-certfile", str(folder.superlink_certificate)),
        *("--ssl-keyfile", str(folder.superlink_key), "--enable-supernode-auth"),
        *("--isolation", "process", "--superexec-auth-secret-file", secret),
        *("--database", str(path / "superlink" / "superlink.db"), "--disable-runtime-dependency-installation"),
        *("--health-server-address", f"{LOOPBACK}:{settings.superlink_health_port}"),
    )
    superexec = (
        *(str(scripts / "flower-superexec"), "--runtime-api-address", f"{LOOPBACK}:{settings.superlink_port}"),
        *("--root-certificates", authority, "--superexec-auth-secret-file", secret, "--executor", "subprocess"),
    )
    return (
        child(SUPERLINK, superlink),
        child(SUPEREXEC, superexec),
        child(GATEWAY, gateway_command(path, settings)),
    )


def serve(path: Path, *, stop: threading.Event, ready: Callable[[Mapping[str, int]], None]) -> None:
    """Run everything until `stop` is set. ready: told the process ids once hospitals can connect.

    Raises UsageError when another process serves the folder, or a certificate has expired; Unreachable when the
    SuperLink does not start. Whatever was started is ended then.
    """
    folder = FederationFolder.open(path.resolve())
    settings = load_federation(folder.path)
    check_certificates(folder, datetime.now(UTC))
    (folder.path / "superlink" / "empty").mkdir(parents=True, exist_ok=True)
    write_gateway(folder.path, settings)
    with Supervisor(children(folder, settings), record=folder.processes) as supervisor:
        supervisor.start(SUPERLINK)
        _wait_until_healthy(folder, supervisor, stop)
        sync_nodes(folder.path)
        supervisor.start()
        with _seen(folder, settings, supervisor):
            ready(supervisor.pids)
            _watch(folder, supervisor, stop)


def check_certificates(folder: FederationFolder, now: datetime) -> None:
    """Raise UsageError when a certificate of the coordinator has expired: no site could connect."""
    for what, file in (
        ("authority", folder.authority_certificate),
        ("gateway", folder.gateway_certificate),
        ("SuperLink", folder.superlink_certificate),
    ):
        end = load_certificate(file).not_valid_after_utc
        if end <= now:
            raise UsageError(
                f"the certificate of the {what} expired on {end:%Y-%m-%d}; nothing was started. "
                f"Run `consilium federation renew {folder.path}`."
            )


def _wait_until_healthy(folder: FederationFolder, supervisor: Supervisor, stop: threading.Event) -> None:
    control, end = Control(folder.path), time.monotonic() + _START_S
    while not control.healthy():
        if stop.is_set() or not supervisor.running(SUPERLINK) or time.monotonic() > end:
            raise Unreachable(
                f"the SuperLink did not start within {_START_S:.0f} s; nothing is served. "
                f"Its log is {folder.log / 'superlink.log'}."
            )
        stop.wait(0.2)


@contextmanager
def _seen(folder: FederationFolder, settings: FederationSettings, supervisor: Supervisor) -> Iterator[None]:
    """Metrics and health on loopback for as long as the block lasts."""
    # Here, because prometheus and grpc take a while to import and `--help` needs neither.
    from common.telemetry.serving import serve_health  # noqa: PLC0415
    from server.federation.exporter import serve_coordinator_metrics  # noqa: PLC0415

    def is_ready() -> bool:
        return all(supervisor.running(name) for name in (SUPERLINK, SUPEREXEC, GATEWAY))

    with ExitStack() as stack:
        health = serve_health(settings.coordinator_health_port, is_ready)
        stack.callback(health.stop)
        metrics = serve_coordinator_metrics(folder.path, settings.exporter_port)
        stack.callback(metrics.stop)
        yield


@dataclass(kw_only=True)
class _Files:
    """When the files that services keep in memory were last changed."""

    times: dict[Path, int]

    @classmethod
    def of(cls, *paths: Path) -> _Files:
        return cls(times={path: _changed_at(path) for path in paths})

    def changed(self, path: Path) -> bool:
        """Whether the file is another one than at the last look."""
        now = _changed_at(path)
        if now == self.times[path]:
            return False
        self.times[path] = now
        return True


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _watch(folder: FederationFolder, supervisor: Supervisor, stop: threading.Event) -> None:
    """Until `stop`: start again what ended, follow the registry and the certificates, look after open runs."""
    runs = RunWatch(folder.path)
    files = _Files.of(folder.registry, folder.gateway_certificate, folder.superlink_certificate)
    stale_nodes = False
    next_look = time.monotonic()
    while not stop.wait(_LOOK_S):
        for ended in supervisor.poll():
            note(folder, "service ended", "restarted", service=ended.name, code=ended.code)
            end_all(supervisor.orphans(ended.name))  # workers of a killed nginx hold its port
        _follow_certificates(folder, supervisor, files)
        stale_nodes |= files.changed(folder.registry)
        if time.monotonic() < next_look:
            continue
        next_look = time.monotonic() + _RUNS_EVERY_S
        try:
            if stale_nodes:
                synced = sync_nodes(folder.path)
                stale_nodes = False
                for name in synced.unregistered:
                    note(folder, "node unregistered", "done", site=name)
            for event in runs.look(datetime.now(UTC)):
                note(folder, event.what, event.outcome, run=event.run, reason=event.reason)
        except Unreachable:
            continue  # the SuperLink is being started again; the next look is soon
        except ConsiliumError as error:  # a damaged run must not take the services down
            note(folder, "look after runs", "failed", reason=type(error).__name__)


def _follow_certificates(folder: FederationFolder, supervisor: Supervisor, files: _Files) -> None:
    """A renewed certificate is used at once; the SuperLink has to be started again for it, which runs survive."""
    gateway, superlink = files.changed(folder.gateway_certificate), files.changed(folder.superlink_certificate)
    pids = supervisor.pids
    if gateway and GATEWAY in pids:
        os.kill(pids[GATEWAY], signal.SIGHUP)
    if superlink and SUPERLINK in pids:
        os.kill(pids[SUPERLINK], signal.SIGTERM)


def note(folder: FederationFolder, operation: str, outcome: str, **facts: str | int | None) -> None:
    """One line in the coordinator's security log."""
    from common.telemetry.security_log import SecurityLog  # noqa: PLC0415

    SecurityLog(folder.security_log).note(
        operation=operation, outcome=outcome, **{name: value for name, value in facts.items() if value is not None}
    )
