"""Figures that both sides read from their own folder: what runs, certificates, the security log, the disk."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

from common.errors import VerificationFailed
from common.telemetry import metrics as page
from common.telemetry.metrics import Sample
from common.telemetry.security_log import SecurityRecord, read_security_log

FULL_CHECK_S: Final = 3600.0  # how often lines that were checked before are checked again


def build(side: str) -> Sample:
    """What runs here. side: `site` or `coordinator`."""
    return page.BUILD.at(1, side=side, version=version("consilium"))


def disk(folder: Path) -> Iterator[Sample]:
    """Free space and size of the file system that holds `folder`."""
    usage = shutil.disk_usage(folder)
    yield page.DISK_FREE.at(usage.free)
    yield page.DISK_SIZE.at(usage.total)


def certificates(ends: Mapping[str, datetime]) -> Iterator[Sample]:
    """When each certificate ends. ends: aware times by the name that alerts show."""
    for name, end in sorted(ends.items()):
        yield page.CERTIFICATE_EXPIRY.at(end.timestamp(), certificate=name)


def guarded(source: str, read: Callable[[], Iterator[Sample]]) -> list[Sample]:
    """What `read` yields, and whether it could; nothing of it when it failed half-way.

    A scrape must say which part is missing instead of failing as a whole.
    """
    try:
        found = list(read())
    except Exception:  # noqa: BLE001  whatever is wrong with one file must not hide all other figures
        return [page.READ_FAILED.at(1, source=source)]
    return [page.READ_FAILED.at(0, source=source), *found]


class SecurityLogFigures:
    """Counts the lines of a security log and checks them as they come. For one thread at a time. Final."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._begin_again()

    def read(self) -> Iterator[Sample]:
        """The figures of now. Raises OSError when the file cannot be read."""
        self._look()
        yield page.SECURITY_LOG_VERIFIED.at(int(self._holds))
        yield page.SECURITY_LOG_RECORDS.at(sum(self._counts.values()))
        for (operation, outcome), count in sorted(self._counts.items()):
            yield page.SECURITY_EVENTS.at(count, operation=operation, outcome=outcome)

    def _begin_again(self) -> None:
        self._offset, self._file = 0, -1
        self._last: SecurityRecord | None = None
        self._counts: Counter[tuple[str, str]] = Counter()
        self._holds = True
        self._began = self._clock()

    def _look(self) -> None:
        if not self._path.exists():
            self._begin_again()
            return
        found = self._path.stat()
        if found.st_ino != self._file or found.st_size < self._offset or self._clock() - self._began > FULL_CHECK_S:
            self._begin_again()
            self._file = found.st_ino
        if not self._holds or found.st_size == self._offset:
            return
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            records = read_security_log(whole, self._path.name, after=self._last)
        except VerificationFailed:
            self._holds = False
            return
        self._offset += len(whole)
        self._counts.update((record.operation, record.outcome) for record in records)
        self._last = records[-1] if records else self._last
