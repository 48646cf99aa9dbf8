"""The error that ended a coordinator, left for the process that watches it from outside."""

from __future__ import annotations

from typing import Final

from common import errors
from common.errors import ConsiliumError
from server.run_folder import RunFolder, read_json, write_json

_KINDS: Final = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ConsiliumError)
}


def record(run: RunFolder, error: ConsiliumError) -> None:
    """Write what ended the campaign: kind and text, both free of patient data by rule."""
    write_json(run.failure, {"kind": type(error).__name__, "text": str(error)})


def forget(run: RunFolder) -> None:
    """A new attempt begins."""
    run.failure.unlink(missing_ok=True)


def raise_recorded(run: RunFolder) -> None:
    """Raise the recorded error again, with its exit code; nothing when none was recorded."""
    if run.failure.is_file():
        body = read_json(run.failure)
        raise _KINDS.get(str(body.get("kind")), ConsiliumError)(str(body.get("text")))
