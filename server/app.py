"""The Flower ServerApp: find the run, put names on nodes, hold the campaign."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import ConsiliumError, UsageError
from common.telemetry.events import Observer
from common.telemetry.logs import events_file, fan_out, run_log
from common.telemetry.metrics import metrics_file
from server import failure
from server.campaign import run_campaign
from server.run_folder import Engine, RunFolder
from server.sites import GridSites

app = ServerApp()


@runtime_checkable
class WatchedGrid(Protocol):
    """A Grid in the same process as whoever watches the campaign."""

    observer: Observer


def utc_now() -> datetime:
    """The time, aware."""
    return datetime.now(UTC)


@app.main()  # type: ignore[untyped-decorator]  # mypy does not follow flwr, see pyproject.toml
def main(grid: Grid, context: Context) -> None:
    """Hold the campaign of the run folder that the run configuration names.

    Raises UsageError without one, and whatever ends the campaign; that is left in `failure.json` as well,
    because Flower's own engines report neither the kind of an error nor its exit code.
    """
    folder = str(context.run_config.get("run") or "")
    if not folder:
        raise UsageError("the run configuration names no run folder; nothing was done. Start runs with `consilium`.")
    run = RunFolder.open(Path(folder))
    facts = run.facts
    observers = [events_file(run.events, utc_now), metrics_file(run.metrics)]
    if isinstance(grid, WatchedGrid):
        observers.append(grid.observer)
    with run.locked(), run_log(run.path, utc_now):
        failure.forget(run)
        try:
            run_campaign(
                run.study,
                GridSites(grid, facts.sites, unnamed_in_order=facts.engine is Engine.FLOWER),
                run,
                seed=facts.seed,
                observer=fan_out(*observers),
                now=utc_now,
            )
        except ConsiliumError as error:
            failure.record(run, error)
            raise
