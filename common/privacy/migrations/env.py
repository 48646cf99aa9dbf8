"""What Alembic runs to upgrade: on the caller's connection, inside the caller's transaction."""

from __future__ import annotations

from alembic import context

# SQLite's DDL is transactional once the driver opens no transactions of its own; see `common.privacy.ledger`.
context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
context.run_migrations()
