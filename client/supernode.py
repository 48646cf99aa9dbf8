"""Flower's SuperNode as a process that ends when a part of it has failed, so that it is started again.

Flower 1.41 retries a connection that is refused, and gives up at anything else, such as a proxy that answers 503 for a
while: the thread that fetches orders ends, one that serves the runner does not, and the process stays for ever, deaf.
Here the first thread that fails ends the process. Nothing is lost with it: orders are the coordinator's to repeat,
answers are the site's to give again.

A SuperNode that learns in the middle of fetching an order that its run has ended drops the order and keeps its task.
Whoever works on that task waits for pieces that never come; and once it is answered, each later reply is sent only when
the next order has come, because Flower counts one reply for one order: all rounds would end at their deadline. So a
SuperNode that drops an order ends, too, and begins anew with nothing in memory.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Final, NoReturn

from common.errors import ExitCode

# What Flower 1.41 logs when it drops an order; `tests/deployment/test_flower_private_names.py` tells when it changes.
DROPPED: Final = "Run ID %s is not in `RUNNING` status. Ignoring message %s."


class EndsWhenAnOrderIsDropped(logging.Handler):
    """Ends the process when Flower says that it dropped an order whose task it keeps."""

    def emit(self, record: logging.LogRecord) -> None:
        """Look at one line of Flower's log."""
        if record.msg == DROPPED:
            sys.stderr.write("the SuperNode dropped an order of a run that has ended, and begins anew\n")
            _leave(ExitCode.INTERNAL)


def main() -> NoReturn:
    """Entry point: the arguments of `flower-supernode`."""
    from flwr.common.logger import FLOWER_LOGGER  # noqa: PLC0415
    from flwr.supernode.cli import flower_supernode  # noqa: PLC0415  takes seconds

    FLOWER_LOGGER.addHandler(EndsWhenAnOrderIsDropped())
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
