"""A migration after the newest one, for tests of upgrades: a copy of migrations/ with one more revision.

`install` replaces the real scripts by the copy. A database at the earlier `revisions.newest()` is then outdated.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from string import Template

import pytest

from catalog.db import revisions

NEXT = "9998_next"
LATER = "9999_later"
"""A revision of a later version, which no script knows."""
UNRELEASED = "0055"
"""A revision of a build before the first release."""
SCRIPT = Template('''"""A migration of a test."""

import sqlalchemy as sa
from alembic import op

revision = "$revision"
down_revision = "$before"


def upgrade():
$upgrade


def downgrade():
$downgrade
''')
ADDS = """
    op.create_table(
        "job_notes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("note", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_job_notes"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_notes_job_id_jobs"),
    )
    op.create_index("ix_job_notes_job_id", "job_notes", ["job_id"])
    with op.batch_alter_table("projects") as batch:  # for the new type, SQLite creates the table again
        batch.alter_column("name", existing_type=sa.String(255), existing_nullable=False, type_=sa.Text())
        batch.add_column(sa.Column("color", sa.String(255), nullable=True))
        batch.add_column(sa.Column("num_notes", sa.Integer(), nullable=False, server_default="0"))
"""
"""Removes nothing that the previous version needs."""
UNDOES_ADDS = """
    with op.batch_alter_table("projects") as batch:
        batch.drop_column("num_notes")
        batch.drop_column("color")
        batch.alter_column("name", existing_type=sa.Text(), existing_nullable=False, type_=sa.String(255))
    op.drop_table("job_notes")
"""


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, upgrade: str = ADDS, downgrade: str = UNDOES_ADDS
) -> Path:
    """Use the scripts in `folder`, with NEXT as their newest revision, until the test ends."""
    shutil.copytree(revisions.SCRIPTS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    script = SCRIPT.substitute(revision=NEXT, before=revisions.newest(), upgrade=upgrade, downgrade=downgrade)
    (folder / "versions" / f"{NEXT}.py").write_text(script)
    monkeypatch.setattr(revisions, "SCRIPTS", folder)
    return folder
