"""A whole deployment on one machine: a coordinator with its gateway and two hospitals, as processes of their own.

    python deploy/demo/run.py --out runs/deploy-demo [--patients 1200] [--study deploy/studies/two-hospitals.yaml]

Everything goes by the commands of the guides, which are printed as they are run; what a person would do with an editor
is printed too. Phantom patients, loopback, ports that the operating system chooses. In the middle of the training the
coordinator is killed with everything it runs, as by a power cut, and served again; in the end everything is killed, and
resuming shows that nothing is done or paid for twice. Whatever happens, Ctrl-C included, all processes are ended.

Exit code 0 for a verified release, 1 for a verified refusal, which is as honest an end: with few patients the audit
cannot tell, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from common.errors import ConsiliumError, ExitCode, IntegrityError, Unreachable, UsageError
from common.processes import below, end_all, recorded_pids, seen, stop_process

ROOT: Final = Path(__file__).resolve().parents[2]
HOST: Final = "127.0.0.1"
SITES: Final = ("north", "south")
START_S: Final = 120.0
CAMPAIGN_S: Final = 3600.0
_LOOK_S: Final = 3.0  # a look is a command of its own, which takes a core for a second or two
# What these hospitals allow; each would set its own figures in its policy.yaml.
LIMITS: Final = {
    "epsilon_cap": "16.0",
    "delta_cap": "1.0e-4",
    "minimum_noise": "0.3",
    "maximum_rounds": "20",
    "maximum_steps": "1000",
    "minimum_patients": "20",
}


Status = dict[str, Any]  # what `consilium federation status F --json` says


@dataclass(frozen=True, kw_only=True)
class Service:
    """A `serve` command that runs in the background. folder: that it serves."""

    words: tuple[str, ...]
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def pids(self) -> dict[str, int]:
        """What it has started, by name."""
        return recorded_pids(self.folder / "pids.json")

    def kill(self) -> None:
        """SIGKILL to it and to everything it runs, as by a power cut."""
        everything = [seen(self.process.pid), *below(self.process.pid)]
        # Parents first: nginx would start another worker for one that it sees end.
        pids = sorted(process.pid for process in everything if process is not None)
        say(f"  kill -9 {' '.join(map(str, pids))}    # {' '.join(self.words)}: {', '.join(self.pids)} and below")
        for pid in pids:
            with suppress(ProcessLookupError):  # ended with its parent
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run a whole deployment on this machine.")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "deploy-demo", help="folder to make")
    parser.add_argument("--patients", type=int, default=1200, help="phantom patients of each hospital")
    parser.add_argument(
        "--study", type=Path, default=ROOT / "deploy" / "studies" / "two-hospitals.yaml", help="the study"
    )
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return demo(given.out.resolve(), study=given.study.resolve(), patients=given.patients)
    except ConsiliumError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("stopped; every process was ended")
        return 130


def demo(out: Path, *, study: Path, patients: int) -> int:
    """The whole of it. Raises UsageError when `out` exists, Unreachable for what takes too long."""
    if out.exists():
        raise UsageError(f"{out} exists already; nothing was done. Remove it, or choose another folder with --out.")
    out.mkdir(parents=True)
    coordinator, hospitals = out / "coordinator", {name: out / name for name in SITES}
    say("\n(1) phantom patients, a folder of scans for each hospital")
    data = _draw(out, patients)
    say("\n(2) the coordinator founds the federation; each hospital makes its key; both compare fingerprints")
    _provision(coordinator, hospitals, data)
    say("\n(3) each hospital sets its limits and approves the study")
    for folder in hospitals.values():
        _edit(folder / "policy.yaml", LIMITS)
        consilium("site", "approve", folder, study, "--by", "Dr. Demo", "--yes")
    with ExitStack() as running:
        say("\n(4) everybody serves")
        served = {folder: _serve(running, "site", folder) for folder in hospitals.values()}
        served[coordinator] = _serve(running, "federation", coordinator)
        _wait("both hospitals are connected", coordinator, _all_online, START_S)
        say("\n(5) the campaign")
        consilium("federation", "start", coordinator, study, "--name", "demo")
        _wait("two rounds are held", coordinator, lambda status: _run(status)["rounds"] >= 2, CAMPAIGN_S)
        say("\n(6) a power cut at the coordinator, in the middle of a round; it is served again and goes on by itself")
        served[coordinator].kill()
        served[coordinator] = _serve(running, "federation", coordinator)
        _wait("the outcome is signed", coordinator, lambda status: _run(status)["outcome"], CAMPAIGN_S)
        say("\n(7) what anybody can check, offline")
        release = coordinator / "runs" / "demo" / "release"
        code = consilium("verify", release, may_fail=True)
        heads = {name: _head(folder) for name, folder in hospitals.items()}
        say("\n(8) everything is killed, served again, and resumed twice: nothing is done and nothing paid for again")
        for service in served.values():
            service.kill()
        for folder in hospitals.values():
            _serve(running, "site", folder)
        _serve(running, "federation", coordinator)
        _wait("both hospitals are connected", coordinator, _all_online, START_S)
        for _ in range(2):
            consilium("federation", "resume", coordinator, "demo")
        for name, folder in hospitals.items():
            consilium("site", "ledger", folder, "--verify", "--head", heads[name], quiet=True)
            if _head(folder) != heads[name]:
                raise IntegrityError(f"the ledger of {name} has grown although nothing was left to do.")
            say(f"  {name}: the ledger stands where it stood, at {heads[name][:24]}")
        say("\n(9) everything ends")
    if consilium("verify", release, may_fail=True, quiet=True) != code:
        raise IntegrityError(f"{release} does not verify as it did before.")
    say(f"\nreport      {coordinator / 'runs' / 'demo' / 'report.html'}\nrelease     {release}")
    if code == ExitCode.DONE:
        say("the outcome is a RELEASE, and it verifies")
    else:
        say("the outcome is a signed REFUSAL, and it verifies as one: the reasons are above. More patients show more.")
    return code


# --- steps ------------------------------------------------------------------------------------------------------------


def _draw(out: Path, patients: int) -> Path:
    data = out / "scans"
    shape = ("--shape", "24", "32", "24", "--spacing", "1.5", "1.5", "1.5")
    consilium("phantom", "hippocampus", data, "--sites", len(SITES), "--patients", patients, *shape)
    return data


def _provision(coordinator: Path, hospitals: dict[str, Path], data: Path) -> None:
    port, loopback = _free_ports()
    where = ("--host", HOST, "--port", port, "--loopback-port", loopback)
    consilium("federation", "init", coordinator, "--name", "demo", *where)
    _edit(coordinator / "federation.yaml", {"listen": HOST})
    authority = facts("federation", "sites", coordinator)["authority"]
    for number, (name, folder) in enumerate(hospitals.items(), start=1):
        hospital = ("--name", name, "--hospital", f"{name.capitalize()} Hospital")
        consilium("site", "init", folder, *hospital, "--data", data / f"site-{number}")
        request, welcome = folder / "identity" / "request.pem", coordinator.parent / f"{name}.welcome.json"
        consilium("federation", "enrol", coordinator, request, "--out", welcome)
        consilium("site", "join", folder, welcome, "--ca-fingerprint", authority)
        # Several hospitals on one machine: nobody has a fixed port.
        ports = "runtime_port: 0\nhealth_port: 0\nmetrics_port: 0\n"
        (folder / "connection.yaml").write_text(ports, encoding="utf-8")
        say(f"  # {folder / 'connection.yaml'}: {ports.strip().replace(chr(10), ', ')}")


def _serve(running: ExitStack, side: str, folder: Path) -> Service:
    """Start a `serve` command; it is ended with `running` unless it was killed before."""
    words = (side, "serve")
    say(f"  $ consilium {side} serve {folder} &")
    (folder / "log").mkdir(exist_ok=True)
    with (folder / "log" / "serve.log").open("ab") as output:
        process = subprocess.Popen(  # noqa: S603  our own command, no shell
            [*_command(), *words, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
    service = Service(words=words, folder=folder, process=process)
    running.enter_context(_ended(service))
    return service


@contextmanager
def _ended(service: Service) -> Iterator[None]:
    """End a service with everything that it runs, also what it left when it was killed."""
    try:
        yield
    finally:
        stop_process(service.process)
        end_all(process for pid in service.pids.values() if (process := seen(pid)) is not None)


def _wait(what: str, coordinator: Path, done: Callable[[Status], object], limit_s: float) -> None:
    """Look until it is done, saying how a run gets on. Raises Unreachable after `limit_s` seconds."""
    end, told = time.monotonic() + limit_s, ""
    while not done(status := facts("federation", "status", coordinator)):
        if time.monotonic() > end:
            raise Unreachable(f"waited {limit_s:.0f} s in vain until {what}. The logs lie in each folder's log/.")
        if (words := _words(status)) != told:
            say(f"  {words}")
            told = words
        time.sleep(_LOOK_S)
    say(f"  {what}")


def _edit(path: Path, values: dict[str, str]) -> None:
    """Change settings of a YAML file in place, as a person would. Raises IntegrityError for one that is not there."""
    text = path.read_text(encoding="utf-8")
    for name, value in values.items():
        text, found = re.subn(rf"(?m)^{name}:.*$", f"{name}: {value}", text)
        if found != 1:
            raise IntegrityError(f"{path} has no line `{name}:`; nothing was changed.")
    path.write_text(text, encoding="utf-8")
    say(f"  # {path}: {', '.join(f'{name}: {value}' for name, value in values.items())}")


# --- looking ----------------------------------------------------------------------------------------------------------


def _all_online(status: Status) -> bool:
    return {site["name"] for site in status.get("sites", ()) if site["online"]} == set(SITES)


def _run(status: Status) -> dict[str, Any]:
    runs: list[dict[str, Any]] = status.get("runs", [])
    if runs and runs[0]["activity"] in {"failed", "given up", "stopped"}:
        raise IntegrityError(f"the run {runs[0]['activity']}: {runs[0]['failure']}")
    return runs[0] if runs else {"rounds": 0, "of_rounds": 0, "outcome": None, "activity": "unknown"}


def _words(status: Status) -> str:
    run = _run(status)
    return f"{run['activity']}, {run['rounds']} of {run['of_rounds']} rounds" if status.get("runs") else ""


def _head(site: Path) -> str:
    """Where a ledger stands, as `site ledger --head` takes it."""
    head = facts("site", "ledger", site)["head"]
    return f"{head['rows']}:{head['hash']}"


# --- commands ---------------------------------------------------------------------------------------------------------


def consilium(*words: object, may_fail: bool = False, quiet: bool = False) -> int:
    """Run a command and show it with what it says; returns its exit code.

    may_fail: its refusal is a result. Raises IntegrityError when it ends otherwise than with 0.
    """
    texts = [str(word) for word in words]
    ended = subprocess.run(  # noqa: S603  our own command, no shell
        [*_command(), *texts], check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not quiet:
        say(f"  $ consilium {shlex.join(texts)}")
        for line in ended.stdout.splitlines():
            say(f"    {line}")
    if ended.returncode not in ({ExitCode.DONE, ExitCode.REFUSED} if may_fail else {ExitCode.DONE}):
        raise IntegrityError(f"`consilium {shlex.join(texts)}` ended with {ended.returncode}:\n{ended.stdout}")
    return ended.returncode


def facts(*words: object) -> dict[str, Any]:
    """What a command says with --json; nothing while services do not answer."""
    ended = subprocess.run(  # noqa: S603  our own command, no shell
        [*_command(), *map(str, words), "--json"], check=False, capture_output=True, text=True
    )
    if ended.returncode not in {ExitCode.DONE, ExitCode.UNREACHABLE}:
        raise IntegrityError(f"`consilium {' '.join(map(str, words))}` ended with {ended.returncode}: {ended.stderr}")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)  # noqa: T201  a script


def _command() -> tuple[str, ...]:
    return (sys.executable, "-m", "common.cli")


def _free_ports() -> tuple[int, int]:
    """A free port, and the first of four in a row."""
    while True:
        with ExitStack() as held:
            gateway, first = (held.enter_context(socket.create_server((HOST, 0))).getsockname()[1] for _ in range(2))
            try:
                for port in range(first + 1, first + 4):
                    held.enter_context(socket.create_server((HOST, port)))
            except (OSError, OverflowError):
                continue
            return gateway, first


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
