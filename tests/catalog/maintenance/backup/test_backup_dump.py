"""Errors that report a damaged database."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import make_url

from catalog.db.database import Database
from catalog.maintenance.backup import integrity


@pytest.mark.parametrize(
    ("url", "problem", "remedy"),
    [
        ("sqlite:////srv/lorry.db", "Tree 7\npage 3: bad.", "Stop the service and move /srv/lorry.db, with its -wal"),
        ("sqlite:////srv/lorry.db", "file is not a database", "If /srv/lorry.db is the wrong file, correct LORRY"),
        ("postgresql://lorry:canary-7@db/lorry", "invalid page", "drop the database lorry, and create it again"),
    ],
)
def test_damaged_database_is_named_with_the_steps_for_its_kind(url: str, problem: str, remedy: str) -> None:
    refused = integrity.refusal(problem, make_url(url))

    assert f"{url.replace('canary-7', '***')} is damaged: {' '.join(problem.split()).rstrip('.')}." in refused.message
    assert remedy in refused.remedy


def test_reported_damage_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "_sqlite_damage", lambda _: ["*** in database main ***\nTree 7 page 3: bad."])
    db = Database(f"sqlite:///{tmp_path / 'lorry.db'}")

    found = integrity.damage(db)

    db.close()
    assert found == ["The database is damaged: *** in database main *** Tree 7 page 3: bad."]
