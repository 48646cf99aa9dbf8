"""Flower's SuperNode as a process that ends when a part of it has failed, so that it is started again.

Flower 1.41 retries a connection that is refused, and gives up at anything else, such as a proxy that answers 503 for a
while: the thread that fetches orders ends, one that serves the runner does not, and the process stays for ever, deaf.
Here the first thread that fails ends the process. Nothing is lost with it: orders are the coordinator's to repeat,
answers are the site's to give again.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import NoReturn

from common.errors import ExitCode


def main() -> NoReturn:
    """Entry point: the arguments of `flower-supernode`."""
    from flwr.supernode.cli import flower_supernode  # noqa: PLC0415  takes seconds

    threading.excepthook = lambda failed: _end(failed.exc_type)
    try:
        flower_supernode()
    except SystemExit as ended:  # Flower has told why and stopped its parts
        _leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    except BaseException as error:  # noqa: BLE001  whatever it was, what is left of the process is of no use
        _end(type(error))
    _leave(ExitCode.INTERNAL)  # it serves until it is told to end


def _end(kind: type[BaseException]) -> NoReturn:
    # The kind alone: a library's text may hold an address with a password in it.
    sys.stderr.write(f"the SuperNode failed: {kind.__name__}\n")
    _leave(ExitCode.INTERNAL)


def _leave(code: int) -> NoReturn:
    """End the process with all its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
