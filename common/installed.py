"""Which code a site runs: one digest over the installed sources of `client` and `common`."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from common.errors import IntegrityError

# By name only: their sources are read, not imported.
SITE_PACKAGES: Final = ("client", "common")


@cache
def code_digest() -> str:
    """Return the SHA-256 over name and content of every Python file of the two packages, in sorted order.

    Read once a process: a file that changes under a running process is not the code that runs in it.
    Raises IntegrityError when a package is not installed.
    """
    h = hashlib.sha256()
    for package in SITE_PACKAGES:
        root = _folder(package)
        for path in sorted(root.rglob("*.py")):
            content = path.read_bytes()
            h.update(f"{package}/{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            h.update(content)
    return h.hexdigest()


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise IntegrityError(f"the package `{package}` is not installed; nothing was done. Install consilium again.")
    return Path(spec.submodule_search_locations[0])
