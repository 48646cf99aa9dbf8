"""`--engine flower`: the same apps under Flower's simulation engine, in processes of their own.

The bundle that Flower carries holds a pyproject.toml and nothing else: the apps it names are imported from
the installed package, never from code that was sent. SuperLink, Ray and their children are started
for one run and stopped with it. Not for a hospital's machine: Ray listens on open ports without a password.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final, get_args

from common.errors import IntegrityError, Unreachable, UsageError
from common.processes import stop_process
from common.telemetry.events import Event, Observer
from server.failure import raise_recorded
from server.federation.bundle import manifest
from server.run_folder import RunFolder

_START_S: Final = 60.0
_LOOK_S: Final = 0.5
_COMPLETED: Final = "finished:completed"
_SUPERLINK: Final = "simulation"
_EVENTS: Final = {kind.__name__: kind for kind in get_args(Event)}

# Nothing is reported to anybody, and nothing is installed while running: what runs is what is installed here.
_QUIET: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True, kw_only=True)
class _Workplace:
    """Folders of Flower inside the run folder, and the port of its SuperLink."""

    folder: Path
    port: int

    @property
    def app(self) -> Path:
        return self.folder / "app"

    @property
    def empty(self) -> Path:
        """Working directory: Ray's workers import from here first, so it must hold nothing."""
        return self.folder / "empty"

    @property
    def log(self) -> Path:
        return self.folder / "flower.log"

    @property
    def environment(self) -> dict[str, str]:
        scripts = str(Path(sys.executable).parent)
        return {
            **os.environ,
            **_QUIET,
            "FLWR_HOME": str(self.folder / "home"),
            "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def command(self, name: str, *arguments: str) -> list[str]:
        """A Flower command of this very environment."""
        return [str(Path(sys.executable).parent / name), *arguments]


def run_under_flower(run: RunFolder, *, observer: Observer) -> None:
    """Run the campaign of `run` as a Flower simulation with one SuperNode for each site.

    Raises the error that ended the
    campaign there, or IntegrityError when Flower itself failed; the run can be resumed in either case.
    """
    if find_spec("ray") is None:
        raise UsageError(
            "Flower's simulation engine is not installed; nothing was done. "
            "Install it with: pip install 'consilium[simulation]', or leave --engine out."
        )
    place = _prepare(run)
    with _superlink(place):
        status = _run_app(place, run, observer)
    if status != _COMPLETED:
        raise_recorded(run)
        raise IntegrityError(
            f"Flower's simulation engine ended with {status!r}; rounds that were held are kept. "
            f"The logs are {run.log} and {place.log}. Repeat the command to resume."
        )


def _prepare(run: RunFolder) -> _Workplace:
    place = _Workplace(folder=run.path.resolve() / "flower", port=_free_port())
    for folder in (place.app, place.empty, place.folder / "home"):
        folder.mkdir(parents=True, exist_ok=True)
    (place.app / "pyproject.toml").write_text(manifest(), encoding="utf-8")
    (place.folder / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "{_SUPERLINK}"\n\n[superlink.{_SUPERLINK}]\n'
        f'address = "127.0.0.1:{place.port}"\ninsecure = true\n',
        encoding="utf-8",
    )
    return place


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _superlink(place: _Workplace) -> Iterator[None]:
    """A SuperLink in simulation mode, with its state in memory, for as long as the block lasts."""
    command = place.command(
        "flower-superlink",
        *("--insecure", "--simulation", "--isolation", "subprocess", "--disable-runtime-dependency-installation"),
        *("--host", "127.0.0.1", "--port", str(place.port)),
    )
    with place.log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603  # our own environment's command, no shell
            command, cwd=place.empty, env=place.environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_until_healthy(place, process)
        yield
    finally:
        stop_process(process)


def _wait_until_healthy(place: _Workplace, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{place.port}/health", timeout=1):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(_LOOK_S)
    raise Unreachable(
        f"Flower's SuperLink did not start within {_START_S:.0f} s; nothing was run. Its log is {place.log}."
    )


def _run_app(place: _Workplace, run: RunFolder, observer: Observer) -> str:
    """Submit the app, pass on its events until it ends; returns Flower's status of the run."""
    settings = f"run={json.dumps(str(run.path.resolve()))} sites={json.dumps(str(run.sites.resolve()))}"
    command = place.command(
        "flwr",
        *("run", str(place.app), _SUPERLINK, "--stream", "--run-config", settings),
        *("--federation-config", f"num-supernodes={len(run.facts.sites)} client-resources-num-cpus=1"),
    )
    events = Tail(run.events)
    with place.log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603  # our own environment's command, no shell
            command, cwd=place.empty, env=place.environment, stdout=log, stderr=log
        )
    try:
        while process.poll() is None:
            time.sleep(_LOOK_S)
            events.pass_on(observer)
    finally:
        stop_process(process)
    events.pass_on(observer)
    return _status(place)


class Tail:
    """What is appended to an events file from now on, or all of it with `from_start`."""

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() and not from_start else 0

    def pass_on(self, observer: Observer) -> None:
        """Tell the observer every whole line since the last look."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            body = json.loads(line)
            body.pop("time")
            observer(_EVENTS[body.pop("event")](**body))


def _status(place: _Workplace) -> str:
    """`flwr run` exits with 0 even when the run failed: only the list of runs tells."""
    answer = subprocess.run(  # noqa: S603  # our own environment's command, no shell
        place.command("flwr", "list", _SUPERLINK, "--format", "json"),
        cwd=place.empty,
        env=place.environment,
        capture_output=True,
        check=False,
        timeout=60,
    )
    try:
        runs = json.loads(answer.stdout)["runs"]
        return str(runs[0]["status"])
    except (ValueError, KeyError, IndexError, TypeError):
        return "not started"
