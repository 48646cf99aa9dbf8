"""The Flower ServerApp: find the run, put names on nodes, hold the campaign."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import ConsiliumError, UsageError
from common.telemetry.events import Observer
from common.telemetry.logs import events_file, fan_out, run_log
from common.telemetry.metrics import metrics_file
from server import failure
from server.campaign import run_campaign
from server.federation.control import valid_keys
from server.federation.folder import FederationFolder
from server.federation.network_run import FOLDER_VARIABLE, run_path
from server.run_folder import Engine, RunFolder
from server.sites import GridSites

_TRIES: Final = 20
_AGAIN_S: Final = 0.1

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
    name = str(context.run_config.get("run") or "")
    if not name:
        raise UsageError("the run configuration names no run folder; nothing was done. Start runs with `consilium`.")
    federation = os.environ.get(FOLDER_VARIABLE)
    run = RunFolder.open(Path(name) if federation is None else run_path(FederationFolder.open(Path(federation)), name))
    facts = run.facts
    if (facts.engine is Engine.NETWORK) is not (federation is not None):
        raise UsageError(f"a run of the engine {facts.engine.value!r} cannot be held here; nothing was done.")
    observers = [events_file(run.events, utc_now), metrics_file(run.metrics)]
    if isinstance(grid, WatchedGrid):
        observers.append(grid.observer)
    with ExitStack() as held:
        _hold(run, held)
        held.enter_context(run_log(run.path, utc_now))
        failure.forget(run)
        try:
            run_campaign(
                run.study,
                GridSites(
                    grid,
                    facts.sites,
                    unnamed_in_order=facts.engine is Engine.FLOWER,
                    keys=None if federation is None else lambda: valid_keys(Path(federation), utc_now()),
                ),
                run,
                seed=facts.seed,
                observer=fan_out(*observers),
                now=utc_now,
            )
        except ConsiliumError as error:
            failure.record(run, error)
            raise


def _hold(run: RunFolder, held: ExitStack) -> None:
    """Take the run folder's lock, more than once if need be: who looks at a run from outside holds it for an instant.

    Raises UsageError when another process works in the folder.
    """
    for _ in range(_TRIES - 1):
        try:
            held.enter_context(run.locked())
        except UsageError:
            time.sleep(_AGAIN_S)
        else:
            return
    held.enter_context(run.locked())
