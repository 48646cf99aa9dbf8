"""Which code runs at this site: one digest over the installed sources of `client` and `common`."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import client
import common


@cache
def code_digest() -> str:
    """Return the SHA-256 over name and content of every Python file of the two packages, in sorted order.

    Read once a process: a file that changes under a running process is not the code that runs in it.
    """
    h = hashlib.sha256()
    for package in (client, common):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            content = path.read_bytes()
            h.update(f"{root.name}/{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            h.update(content)
    return h.hexdigest()
