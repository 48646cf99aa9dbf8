"""Spending apart from reserving, and rows bound to a site and to a cohort: two columns.

rule: how a row's hash is computed; rows that are there keep rule 1. fingerprint: of the site or of the cohort.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns. Old rows are not rewritten: their hashes are what earlier heads point to."""
    op.add_column("ledger", sa.Column("rule", sa.Integer, nullable=False, server_default="1"))
    op.add_column("ledger", sa.Column("fingerprint", sa.String, nullable=True))
