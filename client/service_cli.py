"""`consilium site serve`: keep a site connected to its federation."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from common.errors import UsageError


def serve(
    site: Annotated[Path, typer.Argument(help="The site's folder.", show_default=False)],
    only: Annotated[
        str | None,
        typer.Option(
            metavar="PART", help="Run one part, `supernode` or `runner`, where each has a service of its own."
        ),
    ] = None,
) -> None:
    """Connect the site to its federation and answer orders until it is stopped. Ends what it started."""
    from client import service  # noqa: PLC0415

    if only is not None and only not in list(service.Part):
        raise UsageError(f"--only {only!r} is neither `supernode` nor `runner`; nothing was started.")
    parts = tuple(service.Part) if only is None else (service.Part(only),)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    service.serve(site, stop=stop, parts=parts, tell=lambda line: typer.echo(line, err=True))
