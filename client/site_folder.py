"""The folder of a site as somebody typed it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from common.errors import UsageError

SITE_FILE: Final = "site.yaml"
POLICY_FILE: Final = "policy.yaml"
LEDGER_FILE: Final = "ledger.sqlite"
SECRET_FILE: Final = "superexec.secret"  # noqa: S105  a file name
PAUSE_FILE: Final = "paused"  # in the state folder


def site_folder(given: Path) -> Path:
    """The folder of the site whose folder, or whose site.yaml, is given. Raises UsageError when it is none."""
    folder = given.parent if given.name == SITE_FILE and not given.is_dir() else given
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; nothing was done. Give the site's own folder.")
    if not (folder / SITE_FILE).is_file():
        raise UsageError(
            f"{folder} is no site, for it holds no {SITE_FILE}; nothing was done. `consilium site init` makes one."
        )
    return folder.resolve()
