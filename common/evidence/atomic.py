"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConsiliumError, UsageError


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` to `path` so that a crash or a full disk leaves the old file or the new one, never half of one.

    The temporary file lies in the same folder, which must exist: a rename is atomic only within one file system.
    mode: permission bits of the new file. Raises OSError when the disk is full or the folder cannot be written.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            # Before the bytes: a private key must never be readable by others, not even for a moment.
            os.fchmod(stream.fileno(), mode)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: without it a power cut may undo a rename that was already reported."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `target` when the block ends, with all its files on disk, or leaves no trace.

    It is filled beside `target`, under a hidden name that says `.part`; what a killed process left there is
    cleared by the next one. Raises UsageError when `target` holds anything or another process fills it,
    ConsiliumError when the disk does not take it.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target} already holds something; nothing was written. Choose another folder or remove it.")
    part = target.parent / f".{target.name}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _held(part, target):
            try:
                yield part
                _sync_tree(part)
                part.replace(target)
                sync_folder(target.parent)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    except OSError as error:
        raise ConsiliumError(
            f"{target} could not be written ({error.strerror or error}); nothing was left there. "
            "Remove the cause (a full disk, a missing permission) and repeat the command."
        ) from error


@contextmanager
def _held(part: Path, target: Path) -> Iterator[None]:
    """An empty folder `part` that only this process fills; the lock vanishes with the process."""
    part.mkdir(exist_ok=True)
    descriptor = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking another process may have finished and renamed this very folder.
            ours = part.exists() and part.stat().st_ino == os.fstat(descriptor).st_ino
        except BlockingIOError:
            ours = False
        if not ours:
            raise UsageError(f"another process is writing {target}; nothing was written. Wait until it ends.")
        for child in part.iterdir():
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        yield
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    """Every file and name below `folder` on disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(Path(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(parent))
