"""Keep libraries off the terminal: what they have to say goes to a run's log or nowhere."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping

# Loggers of libraries that write to the terminal on their own; `py.warnings` has Python's warnings.
TALKATIVE = ("flwr", "ray", "py.warnings", "opacus", "monai", "matplotlib", "torch", "weasyprint", "fontTools")


def silence(_record: logging.LogRecord) -> bool:
    """A logging filter that lets nothing through."""
    return False


def quieten_libraries() -> None:
    """Drop warnings and log lines of libraries. For a command's process only, before anything heavy is imported.

    `common.telemetry.logs.run_log` writes them to a file instead while it is open.
    """
    # Off first: whoever put `warnings.showwarning` back by hand leaves logging believing that it still captures.
    logging.captureWarnings(False)
    logging.captureWarnings(True)
    for name in TALKATIVE:
        logging.getLogger(name).addFilter(silence)


def drop_logs() -> None:
    """Make structured log lines go nowhere until a run's log is open; structlog would print them."""
    import structlog  # noqa: PLC0415  slow to import, and `--help` does without

    def drop(_logger: object, _method: str, _fields: MutableMapping[str, object]) -> MutableMapping[str, object]:
        raise structlog.DropEvent

    structlog.configure(processors=[drop])
