"""Progress on a terminal: rounds with epsilon spent and time left, and a bar for the task at hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO, assert_never

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from common.telemetry.events import (
    CampaignStarted,
    Event,
    Observer,
    Progress,
    RoundFinished,
    SiteExcluded,
    StageFinished,
    ignore,
)


@contextmanager
def showing(*, quiet: bool = False, stream: TextIO | None = None) -> Iterator[Observer]:
    """An observer that shows events on `stream` (standard error) while open.

    Does nothing when the stream is not a terminal or `quiet` (a command that answers in JSON).
    """
    stream = sys.stderr if stream is None else stream
    if quiet or not stream.isatty():
        yield ignore
        return
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=stream, highlight=False, markup=False),
        transient=True,
    )
    with bars:
        yield _Shown(bars)


class _Shown:
    """Turns events into bars; a finished task's bar gives way to one line."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case Progress():
                self._move(event)
            case CampaignStarted():
                what = "simulated campaign" if event.simulated else "campaign"
                self._bars.console.print(f"{what} {event.study}: {event.sites} sites, {event.rounds} rounds")
                self._tasks["rounds"] = self._bars.add_task(
                    "rounds", total=event.rounds, completed=max(event.first_round - 1, 0), note=""
                )
            case RoundFinished():
                note = "no privacy" if event.epsilon_spent is None else f"epsilon {event.epsilon_spent:.2f}"
                if "rounds" in self._tasks:
                    self._bars.update(self._tasks["rounds"], completed=event.round, note=note)
            case SiteExcluded():
                self._bars.console.print(f"round {event.round}: {event.site} left out: {event.reason}")
            case StageFinished():
                self._bars.console.print(f"{event.stage}: {event.outcome} ({event.seconds:.1f} s)")
            case _:
                assert_never(event)

    def _move(self, event: Progress) -> None:
        if event.done >= event.total:
            if event.task in self._tasks:
                self._bars.remove_task(self._tasks.pop(event.task))
            return
        if event.task not in self._tasks:
            self._tasks[event.task] = self._bars.add_task(event.task, total=event.total, note="")
        self._bars.update(self._tasks[event.task], completed=event.done, total=event.total)
