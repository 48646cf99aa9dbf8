"""Schemas of the ledger, one after the other, and the way from any of them to the newest (Alembic)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sqlalchemy import Connection, inspect, text

NEWEST: Final = "0002"  # the last revision in versions/


def bring_up_to_date(connection: Connection) -> None:
    """Create or upgrade the ledger's tables inside the transaction that is open; the caller commits.

    A kill before that commit leaves the schema that was there. No stored row is changed by an upgrade.
    Raises LookupError, naming it, for a schema that this version does not know.
    """
    found = _revision(connection)
    if found == NEWEST:
        return
    if found is not None and found > NEWEST:
        raise LookupError(f"schema {found}, this version knows {NEWEST}")
    from alembic.command import upgrade  # noqa: PLC0415  slow to import, and needed once in a ledger's life
    from alembic.config import Config  # noqa: PLC0415

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    """The schema in the file; None for a new file, and for the first schema, which had no number yet."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
