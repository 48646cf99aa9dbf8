"""Reservations and commits in one hash chain: the ledger as first shipped, which carried no number."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table; a ledger of this schema is there already and stays as it is."""
    op.create_table(
        "ledger",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("time", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("study", sa.String, nullable=False),
        sa.Column("cohort", sa.String, nullable=False),
        sa.Column("key", sa.String, nullable=False),
        sa.Column("mechanism", sa.String, nullable=False),
        sa.Column("reserves", sa.Integer, nullable=True),
        sa.Column("prev_hash", sa.String, nullable=False),
        sa.Column("hash", sa.String, nullable=False),
        if_not_exists=True,
    )
