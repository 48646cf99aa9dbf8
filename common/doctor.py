"""`consilium doctor`: whether this machine can run Consilium, and what to do where it cannot."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement

from common.errors import ExitCode

GIB = 2**30
MEMORY_WANTED_GIB = 4.0
DISK_WANTED_GIB = 2.0
DISK_NEEDED_GIB = 0.2
TELEMETRY_OFF = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


class State(StrEnum):
    """Weight of a finding."""

    OK = "ok"
    WARNING = "warning"  # works, but slower or with less
    PROBLEM = "problem"  # must be put right first


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at. remedy: what to do; empty when all is well."""

    name: str
    state: State
    value: str
    remedy: str = ""


def doctor(
    folder: Annotated[Path, typer.Option("--folder", help="Where runs shall be written.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look whether this machine can run Consilium, and say what to do where it cannot. Exit code 2 on a problem."""
    if show(list(examine(folder)), as_json=as_json) is State.PROBLEM:
        raise typer.Exit(ExitCode.USAGE)


def show(findings: Sequence[Finding], *, as_json: bool) -> State:
    """Print the findings, as a table or one JSON object; returns the worst state."""
    worst = max((f.state for f in findings), key=list(State).index)
    if as_json:
        typer.echo(json.dumps({"state": worst, "findings": [asdict(f) for f in findings]}, indent=2))
        return worst
    for finding in findings:
        colour = {State.OK: "green", State.WARNING: "yellow", State.PROBLEM: "red"}[finding.state]
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        typer.echo(f"{typer.style(f'{finding.state:<8}', fg=colour)} {finding.name:<15} {finding.value}{remedy}")
    return worst


def examine(folder: Path) -> Iterator[Finding]:
    """Every finding about this machine and about writing to `folder`."""
    yield from software()
    yield from machine()
    yield from disk(folder)
    yield telemetry(dict(os.environ))
    yield from optional_tools()


def software() -> Iterator[Finding]:
    """Python and the libraries, against what Consilium requires and was tested with."""
    yield python_version(sys.version_info[:2])
    yield from library_versions()
    constraints = Path(__file__).parents[1] / "constraints.txt"
    if constraints.is_file():  # a checkout; an installed wheel has none
        yield pinned_versions(constraints)


def python_version(found: tuple[int, ...]) -> Finding:
    """Whether this Python is one that Consilium is tested with."""
    value = ".".join(map(str, found))
    if (3, 11) <= found < (3, 13):
        return Finding(name="python", state=State.OK, value=value)
    return Finding(name="python", state=State.PROBLEM, value=value, remedy="install Python 3.11 or 3.12")


def library_versions() -> Iterator[Finding]:
    """Installed libraries against what Consilium requires; one finding for all that fit."""
    fitting = 0
    for text in requires("consilium") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        if found != "missing" and requirement.specifier.contains(found, prereleases=True):
            fitting += 1
            continue
        remedy = f"pip install '{requirement}'"
        yield Finding(name=requirement.name, state=State.PROBLEM, value=found, remedy=remedy)
    yield Finding(name="libraries", state=State.OK, value=f"{fitting} as required; flwr {version('flwr')}")


def pinned_versions(constraints: Path) -> Finding:
    """Installed libraries against the versions that the tests of this release ran with."""
    lines = [line.partition("#")[0].partition(";")[0].strip() for line in constraints.read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if "==" in line)
    installed = {d.metadata["Name"].lower(): d.version for d in distributions()}
    other = [
        f"{name} {installed[name.lower()]} (tested {pin})"
        for name, pin in pins.items()
        if installed.get(name.lower(), pin).partition("+")[0] != pin.partition("+")[0]
    ]
    if other:
        remedy = f"pip install -c {constraints.name} consilium"
        return Finding(name="constraints", state=State.WARNING, value=", ".join(other), remedy=remedy)
    return Finding(name="constraints", state=State.OK, value=f"{len(pins)} versions as tested")


def machine() -> Iterator[Finding]:
    """Cores, memory and the device that torch would use."""
    import torch  # noqa: PLC0415  seconds to import; other commands that import this module need none of it

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(
        name="cores",
        state=State.OK if cores >= 2 else State.WARNING,
        value=str(cores),
        remedy="" if cores >= 2 else "a simulation takes several times longer on one core",
    )
    memory = _memory_gib()
    yield Finding(
        name="memory",
        state=State.OK if memory >= MEMORY_WANTED_GIB else State.WARNING,
        value=f"{memory:.1f} GiB",
        remedy="" if memory >= MEMORY_WANTED_GIB else f"a simulation needs up to {MEMORY_WANTED_GIB:.0f} GiB",
    )
    device = f"cuda ({torch.cuda.get_device_name(0)})" if torch.cuda.is_available() else "cpu"
    yield Finding(name="torch", state=State.OK, value=f"{torch.__version__} on {device}")


def disk(folder: Path, *, elsewhere: str = "choose another folder with --out") -> Iterator[Finding]:
    """Free space, and whether files and a ledger can be written durably to `folder`. elsewhere: where to, if not."""
    existing = next(f for f in (folder.resolve(), *folder.resolve().parents) if f.is_dir())
    free = shutil.disk_usage(existing).free / GIB
    state = State.OK if free >= DISK_WANTED_GIB else State.WARNING if free >= DISK_NEEDED_GIB else State.PROBLEM
    remedy = "" if state is State.OK else f"free at least {DISK_WANTED_GIB:.0f} GiB in {existing}"
    yield Finding(name="disk", state=state, value=f"{free:.1f} GiB free", remedy=remedy)
    try:
        with tempfile.TemporaryDirectory(prefix=".consilium-doctor-", dir=existing) as inside:
            _write_ledger_like(Path(inside))
    except (OSError, sqlite3.Error) as failure:
        remedy = f"{elsewhere}; {existing} refuses: {failure}"
        yield Finding(name="writing", state=State.PROBLEM, value="failed", remedy=remedy)
    else:
        yield Finding(name="writing", state=State.OK, value=str(existing))


def _write_ledger_like(folder: Path) -> None:
    """Network file systems often take plain files but not the locks of a write-ahead log."""
    connection = sqlite3.connect(folder / "ledger.sqlite")
    try:
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        connection.execute("CREATE TABLE probe (x)")
        connection.commit()
    finally:
        connection.close()
    if mode != "wal":
        raise sqlite3.OperationalError(f"a ledger cannot keep its write-ahead log there (journal mode {mode})")


def telemetry(environment: dict[str, str]) -> Finding:
    """Whether libraries are told to report nothing to their makers."""
    on = [name for name, off in TELEMETRY_OFF.items() if environment.get(name) != off]
    if on:
        remedy = "set " + ", ".join(f"{name}={TELEMETRY_OFF[name]}" for name in on)
        return Finding(name="telemetry", state=State.PROBLEM, value="on", remedy=remedy)
    return Finding(name="telemetry", state=State.OK, value="off")


def optional_tools() -> Iterator[Finding]:
    """Tools that some tasks use when they are there."""
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for name, programs, remedy in (
        ("bids-validator", ("bids-validator-deno", "bids-validator"), "pip install 'consilium[bids]'"),
        ("chromium", ("chromium", "chromium-browser", "google-chrome"), "apt install chromium, for browser tests"),
        ("flower engine", ("flwr-simulation",), "pip install 'consilium[simulation]', for --engine flower"),
    ):
        found = next((path for program in programs if (path := shutil.which(program, path=here))), None)
        if name == "flower engine" and find_spec("ray") is None:
            found = None
        state = State.OK if found else State.WARNING
        yield Finding(name=name, state=state, value=found or "not found", remedy="" if found else f"optional: {remedy}")


def _memory_gib() -> float:
    """Memory of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total / GIB
