"""A worker on a freshly migrated database."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.pack_site import PackSite


@pytest.fixture
def site(tmp_path: Path, migrated_database: Path) -> Iterator[PackSite]:
    path = tmp_path / "lorry.db"
    shutil.copy(migrated_database, path)
    site = PackSite(tmp_path / "data", path)
    yield site
    site.db.close()
