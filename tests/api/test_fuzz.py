"""Some hundred requests of the fuzzer, always the same ones. `make fuzz` sends tens of thousands."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from tests.fuzz.campaign import Campaign, run


@pytest.mark.timeout(600)
def test_nothing_breaks_the_document_holds_and_no_project_sees_another(tmp_path: Path, migrated_database: Path) -> None:
    told, path = io.StringIO(), tmp_path / "lorry.db"
    shutil.copy(migrated_database, path)
    campaign = Campaign(examples=1, phases="fuzzing,stateful", is_short=True)

    outcome = run(campaign, tmp_path, database_url=f"sqlite:///{path}", echo=told)

    assert outcome.is_well, told.getvalue()
    assert outcome.num_cases() > 100
