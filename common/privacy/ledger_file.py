"""The SQLite file of a ledger: created whole, one writer at a time, durable before a transaction returns."""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from sqlalchemy import URL, Connection, NullPool, create_engine, event
from sqlalchemy.exc import DBAPIError

from common.errors import LedgerError
from common.evidence.atomic import sync_folder
from common.privacy.migrations import bring_up_to_date


class LedgerFile:
    """A file in WAL mode with synchronous=FULL, readable by its owner only. Safe for several processes and threads.

    path: created when missing; an older schema is upgraded. busy_s: how long to wait for another process.
    Every method raises LedgerError, saying what an operator can do, when SQLite or the disk refuses.
    """

    def __init__(self, path: Path, busy_s: float) -> None:
        self.path = path
        self._held = threading.local()
        # One connection per transaction or per `held` block: nothing is shared between threads, nothing stays open.
        self._engine = create_engine(
            URL.create("sqlite", database=str(path)), poolclass=NullPool, connect_args={"timeout": busy_s}
        )
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin_immediate)
        try:
            if not path.exists():
                _create(path)
            # Never by opening it: closing any descriptor of the file would drop the locks that SQLite holds on it.
            if not os.access(path, os.R_OK | os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except (OSError, sqlite3.Error) as failure:
            reason = failure.strerror if isinstance(failure, OSError) else _reason(failure)
            raise LedgerError(
                f"the ledger {path} cannot be opened: {reason}; nothing was spent. "
                "Free or mount the disk and start again."
            ) from failure

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Hold the file's only write lock; what the block wrote is durable when it ends, or nothing of it."""
        try:
            with ExitStack() as here:
                connection = self._connection(here)
                with connection.begin():
                    yield connection
        except (DBAPIError, sqlite3.Error) as failure:
            self._held.connection = None  # in doubt; the next transaction opens another one
            cause = failure.orig if isinstance(failure, DBAPIError) else failure
            raise LedgerError(
                f"the ledger {self.path} cannot be used: {_reason(cause)}; "
                "nothing was computed and nothing counts as free."
            ) from failure

    def upgrade(self, connection: Connection) -> None:
        """Bring the schema up to date within the open transaction."""
        try:
            bring_up_to_date(connection)
        except LookupError as newer:
            raise LedgerError(
                f"the ledger {self.path} was written by a newer version ({newer}); nothing was spent. "
                "Install that version again: this one cannot count what it does not know."
            ) from newer

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep one connection for what this thread does in the block: opening and closing cost more than writing."""
        with ExitStack() as stack:
            self._held.stack = stack
            try:
                yield
            finally:
                self._held.__dict__.clear()

    def _connection(self, here: ExitStack) -> Connection:
        """A connection that is closed with `here`, or the one of the `held` block, as long as the file is the same."""
        stack: ExitStack | None = getattr(self._held, "stack", None)
        kept: Connection | None = getattr(self._held, "connection", None)
        if stack is None:
            return here.enter_context(self._engine.connect())
        file = self.path.stat().st_ino if self.path.exists() else None
        # Somebody may put back another copy while a round is trained: what is written then must go into that one.
        if kept is None or self._held.file != file:
            kept = stack.enter_context(self._engine.connect())
            self._held.connection, self._held.file = kept, self.path.stat().st_ino
        return kept


def _create(path: Path) -> None:
    """An empty database that appears at once, in WAL mode, and readable by its owner only.

    SQLite refuses, without waiting, to switch a file to WAL that another process has just opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")  # mode 0600
    os.close(descriptor)
    temporary = Path(name)
    try:
        with closing(sqlite3.connect(temporary)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        with suppress(FileExistsError):  # another process was faster; its ledger is as good
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _configure(connection: object, _record: object) -> None:
    # The driver must not open transactions of its own: it would begin too late for a reservation.
    connection.isolation_level = None  # type: ignore[attr-defined]
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _reason(cause: BaseException | None) -> str:
    """What an operator can do about an error of SQLite, by the start of its name."""
    name = str(getattr(cause, "sqlite_errorname", type(cause).__name__))
    match name.split("_")[1:2]:
        case ["FULL"]:
            return "the disk is full. Free some space and start again"
        case ["IOERR"]:
            return f"the disk does not take it, it is full or failing ({name}). Check the disk and start again"
        case ["BUSY" | "LOCKED"]:
            return "another process holds it. Wait for that process or end it"
        case ["READONLY" | "CANTOPEN" | "PERM"]:
            return f"it cannot be written ({name}). Check its folder, owner and mount"
        case ["NOTADB" | "CORRUPT" | "ERROR"]:
            return f"the file is damaged ({name}). Restore the newest copy"
        case _:
            return name
