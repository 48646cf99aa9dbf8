"""A coordinator's federation over a network: its sites, its services and its runs."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ExitCode
from common.evidence.predicate import Outcome

if TYPE_CHECKING:
    from server.run_folder import RunFolder

FolderArgument = Annotated[Path, typer.Argument(help="Federation folder.", show_default=False)]
NameArgument = Annotated[str, typer.Argument(help="Name of the run.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_LOOK_S = 0.5


def serve(federation: FolderArgument) -> None:
    """Run SuperLink, SuperExec and gateway until stopped, starting again whatever ends. Keep it under systemd."""
    from server.federation.bundle import app_digest  # noqa: PLC0415
    from server.federation.stack import serve as serve_stack  # noqa: PLC0415

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def ready(pids: Mapping[str, int]) -> None:
        for name, pid in pids.items():
            typer.echo(f"{name:<10} process {pid}")
        typer.echo(f"app digest {app_digest()}")
        typer.echo("serving; Ctrl-C ends it")

    serve_stack(federation, stop=stop, ready=ready)


def start(
    federation: FolderArgument,
    study: Annotated[Path, typer.Argument(help="The study, a YAML file.", show_default=False)],
    *,
    sites: Annotated[
        str | None, typer.Option(help="Sites by name, with commas between.", show_default="all enrolled")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.", show_default="the study's")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of what is public.", show_default="random")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Begin a study's campaign with enrolled sites. With --wait, exit code 1 for a refusal."""
    from server.federation.network_run import start as start_run  # noqa: PLC0415

    chosen = None if sites is None else tuple(part.strip() for part in sites.split(","))
    run = start_run(federation, study, sites=chosen, name=name, seed=seed, now=datetime.now(UTC))
    facts = {"run": run.path.name, "folder": str(run.path), "sites": list(run.facts.sites)}
    if not wait:
        _tell(facts, f"started    {run.path.name} with {', '.join(run.facts.sites)}\nfolder     {run.path}", as_json)
        return
    _follow(run, quiet=as_json)
    _show_outcome(run, as_json=as_json)


def status(federation: FolderArgument, *, as_json: AsJson = False) -> None:
    """Say which sites are connected and how far each run is. Exit code 3 when nothing is served."""
    from server.federation.status import status_of  # noqa: PLC0415

    facts = status_of(federation, datetime.now(UTC))
    _tell(facts, "\n".join(_status_lines(facts)), as_json)
    if not facts["serving"]:
        raise typer.Exit(code=ExitCode.UNREACHABLE)


def stop(federation: FolderArgument, run: NameArgument, *, as_json: AsJson = False) -> None:
    """End a run's coordinator until `resume`. What the sites have answered stays and is not paid for again."""
    from server.federation.network_run import Activity  # noqa: PLC0415
    from server.federation.network_run import stop as stop_run  # noqa: PLC0415

    found = stop_run(federation, run, now=datetime.now(UTC))
    done = "was finished already" if found is Activity.FINISHED else "stopped; `consilium federation resume` goes on"
    _tell({"run": run, "was": found.value}, f"{run} {done}", as_json)


def resume(federation: FolderArgument, run: NameArgument, *, as_json: AsJson = False) -> None:
    """Let a run go on where it stopped. A finished one says so, one in progress is left alone."""
    from server.federation.network_run import Activity  # noqa: PLC0415
    from server.federation.network_run import resume as resume_run  # noqa: PLC0415

    found = resume_run(federation, run, now=datetime.now(UTC))
    words = {Activity.FINISHED: "is finished; nothing was done", Activity.WORKING: "is in progress; left alone"}
    _tell({"run": run, "was": found.value}, f"{run} {words.get(found, f'was {found.value}; it goes on')}", as_json)


def _follow(run: RunFolder, *, quiet: bool) -> None:
    """Show a run's events until it ends, whoever has to be started again meanwhile."""
    from common.telemetry.show import showing  # noqa: PLC0415
    from server.failure import raise_recorded  # noqa: PLC0415
    from server.federation.network_run import Activity, activity, look_at  # noqa: PLC0415
    from server.flower_engine import Tail  # noqa: PLC0415

    events = Tail(run.events, from_start=True)
    with showing(quiet=quiet) as observer:
        while True:
            # Without the SuperLink: that it is away for a moment must not end the waiting.
            found = activity(look_at(run, None), datetime.now(UTC))
            events.pass_on(observer)
            if found is Activity.FINISHED:
                return
            if found in {Activity.FAILED, Activity.GIVEN_UP, Activity.STOPPED}:
                raise_recorded(run)
                raise typer.Exit(code=ExitCode.INTERNAL)
            time.sleep(_LOOK_S)


def _show_outcome(run: RunFolder, *, as_json: bool) -> None:
    from server.run_folder import read_decision  # noqa: PLC0415

    decision = read_decision(run.release)
    facts = {
        "run": run.path.name,
        "outcome": decision.outcome.value,
        "reasons": list(decision.reasons),
        "release": str(run.release),
        "report": str(run.report),
    }
    lines = [f"{decision.outcome.value}: {decision.study}", *(f"  - {reason}" for reason in decision.reasons)]
    _tell(facts, "\n".join([*lines, f"report   {run.report}", f"check    consilium verify {run.release}"]), as_json)
    if decision.outcome is not Outcome.RELEASE:
        raise typer.Exit(code=ExitCode.REFUSED)


def _status_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    served = ", ".join(f"{name} {pid}" for name, pid in facts["processes"].items())
    yield f"federation {facts['federation']} at {facts['address']}: {'serving' if facts['serving'] else 'not serving'}"
    yield f"processes  {served or 'none'}"
    for site in facts["sites"]:
        online = {True: "connected", False: "not connected", None: "unknown"}[site["online"]]
        yield f"site       {site['name']}: {site['state']}, {online}, certificate until {site['not_after'][:10]}"
    for run in facts["runs"]:
        end = f", {run['outcome']}" if run["outcome"] else ""
        why = f" ({run['failure']})" if run["failure"] else ""
        yield f"run        {run['name']}: {run['activity']}{end}, {run['rounds']} of {run['of_rounds']} rounds{why}"


def _tell(facts: Mapping[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(facts, indent=2, sort_keys=True) if as_json else text)
