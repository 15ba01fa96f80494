"""Two nodes with separate data folders, on one database and one store."""

from __future__ import annotations

from pathlib import Path

import pytest

from catalog.registry import base_models
from catalog.states import JobState
from tests.worker_site import BASE, worker_site


@pytest.mark.slow
def test_a_node_without_the_base_imports_it_and_trains_the_same_adapter(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        rows = site.upload(20)
        here = site.submit(rows, max_steps=4)
        site.work_until_done()
        elsewhere = site.submit(rows, max_steps=4)
        shared = {
            "LORRY_DATABASE_URL": site.settings.resolved_database_url(),
            "LORRY_STORE_URL": site.settings.resolved_store_url(),
        }

        site.work_until_done(LORRY_DATA_DIR=str(tmp_path / "other"), **shared)

        assert site.job(elsewhere).state == JobState.SUCCEEDED, site.log()
        assert site.job(elsewhere).worker_id != site.job(here).worker_id
        assert [folder.name for folder in (tmp_path / "other" / "bases").iterdir()] == [
            base_models.get(site.db, BASE).digest
        ]
        assert site.weights_digest(elsewhere) == site.weights_digest(here)
