"""Logs and events as lines of JSON in a run's folder; nothing in them names a patient or a place on disk.

A library module writes `structlog.get_logger(__name__).info("round held", round=3)`. Until a command opens
a run's log, such lines go nowhere.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import structlog

from common.errors import ConsiliumError, SettingsError
from common.telemetry.events import Event, Observer, Progress
from common.telemetry.quiet import TALKATIVE, drop_logs

Clock = Callable[[], datetime]

_PATIENT_FIELD = re.compile(r"patient|subject|participant|scan|person|mrn|birth", re.IGNORECASE)
_PATH_FIELD = re.compile(r"path|file|folder|director", re.IGNORECASE)
_PATIENT_TEXT = re.compile(r"\bsub-[A-Za-z0-9]+|\bses-[A-Za-z0-9]+|\b[\w.-]+\.(?:nii(?:\.gz)?|dcm)\b")
_PATH_TEXT = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[\\/](?:[^\s\\/:'\"]+[\\/])*[^\s\\/:'\"]+|(?:[\w.-]+/){2,}[\w.-]*")


def fan_out(*observers: Observer) -> Observer:
    """One observer that tells each of `observers`, in order."""

    def tell(event: Event) -> None:
        for observer in observers:
            observer(event)

    return tell


def events_file(path: Path, now: Clock) -> Observer:
    """An observer that appends each event to `path` as one line of JSON with its UTC time.

    Progress is left out except for the end of a task. Raises OSError when the disk is full.
    """

    def write(event: Event) -> None:
        if isinstance(event, Progress) and event.done < event.total:
            return
        line = {"time": _utc(now), "event": type(event).__name__, **asdict(event)}
        with path.open("a", encoding="utf-8") as file:
            if file.tell() and not _ends_with_newline(path):
                file.write("\n")  # a crash left half a line; keep it apart from this one
            file.write(json.dumps(line, sort_keys=True) + "\n")

    return write


@contextmanager
def run_log(folder: Path, now: Clock, *, name: str = "log.jsonl") -> Iterator[Path]:
    """While open, everything logged goes to the file `name` in `folder`, redacted; yields its path.

    Warnings of Python and of talkative libraries go there too. An unexpected exception is written with its
    traceback and carries a note with the log's path when it leaves.
    """
    path = folder / name
    with path.open("a", encoding="utf-8") as file:
        structlog.configure(
            processors=[
                structlog.processors.add_log_level,
                _clock(now),
                describe_exception,
                redact,
                structlog.processors.JSONRenderer(),
            ],
            logger_factory=structlog.WriteLoggerFactory(file=file),
            cache_logger_on_first_use=False,
        )
        with _diverted(_Divert(file, now)):
            try:
                yield path
            except Exception as failure:
                structlog.get_logger(__name__).error("stopped by an exception", exc_info=failure)
                failure.add_note(f"log: {path}")
                raise
            finally:
                drop_logs()


@contextmanager
def _diverted(divert: logging.Filter) -> Iterator[None]:
    before = {name: list(logging.getLogger(name).filters) for name in TALKATIVE}
    for name in TALKATIVE:
        logging.getLogger(name).filters[:] = [divert]
    try:
        yield
    finally:
        for name, filters in before.items():
            logging.getLogger(name).filters[:] = filters


def redact(_logger: object, _method: str, fields: MutableMapping[str, object]) -> MutableMapping[str, object]:
    """Replace what could name a patient or a place on disk, by field name and by the look of the text."""
    return {key: _redacted(key, value) for key, value in fields.items()}


def _redacted(key: str, value: object) -> object:
    if isinstance(value, int | float | bool | None) and not (_PATIENT_FIELD.search(key) and not _is_count(key)):
        return value
    if _PATIENT_FIELD.search(key) and not _is_count(key):
        return "<patient>"
    if _PATH_FIELD.search(key) or isinstance(value, Path):
        return "<path>"
    if isinstance(value, dict):
        return {str(k): _redacted(str(k), v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(key, v) for v in value]
    return _PATH_TEXT.sub("<path>", _PATIENT_TEXT.sub("<patient>", str(value)))


def _is_count(key: str) -> bool:
    """`patients` and `scans` are numbers of them; `patient` is one."""
    return key.endswith(("s", "_count", "_total"))


class _Divert(logging.Filter):
    """Writes a library's line to the run's log and keeps it off the terminal."""

    def __init__(self, file: IO[str], now: Clock) -> None:
        super().__init__()
        self._file = file
        self._now = now

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            fields: MutableMapping[str, object] = {
                "event": record.getMessage(),
                "level": record.levelname.lower(),
                "library": record.name,
                "time": _utc(self._now),
            }
            self._file.write(json.dumps(redact(None, "", fields)) + "\n")
            self._file.flush()
        return False


def _clock(now: Clock) -> structlog.typing.Processor:
    def add_time(_logger: object, _method: str, fields: MutableMapping[str, object]) -> MutableMapping[str, object]:
        return {**fields, "time": _utc(now)}

    return add_time


def describe_exception(
    _logger: object, _method: str, fields: MutableMapping[str, object]
) -> MutableMapping[str, object]:
    """Type and code lines of an exception, never the values of variables; its text only when it is one of ours.

    A text of ours names no patient. A library's may: the key that was missing, the name of a file.
    """
    failure = fields.pop("exc_info", None)
    if failure is True:  # `logger.exception(...)`
        failure = sys.exception()
    if not isinstance(failure, BaseException):
        return fields
    frames = traceback.extract_tb(failure.__traceback__)
    calls = [f"{Path(frame.filename).stem}:{frame.lineno} {frame.name}" for frame in frames]
    return {**fields, "exception": type(failure).__name__, "text": reason_of(failure), "calls": calls}


def reason_of(failure: BaseException) -> str:
    """What may be logged of an exception: our own text, the system's word for its number, or nothing but the type."""
    if isinstance(failure, SettingsError):  # quotes what somebody wrote into a file, whatever it is
        return "a settings file is not valid; the command that checks it says where"
    if isinstance(failure, ConsiliumError):
        return _PATH_TEXT.sub("<path>", _PATIENT_TEXT.sub("<patient>", str(failure)))
    if isinstance(failure, OSError) and failure.errno is not None:
        return os.strerror(failure.errno)
    return type(failure).__name__


def _utc(now: Clock) -> str:
    return now().astimezone(UTC).isoformat(timespec="milliseconds")


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
