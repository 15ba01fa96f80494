"""The demo reads everything that it reports about its jobs from the service's responses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from api.deps import Services
from lorry import Lorry
from tests.api.site import Site
from tests.api.trained import BASE, trained
from tests.catalog.world import World

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from demo_parts import report, training  # pyright: ignore[reportMissingImports]


def test_demo_report_is_complete(
    site: Site, services: Services, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained(services, world, tmp_path / "made")

    with Lorry(site.url, site.key) as lorry:
        (outcome,) = training.outcomes(lorry, [adapter.job_id])
        report.table([outcome], lorry.models.get(BASE))
        report.lineage(outcome.lineage)

    (attempt,) = outcome.attempts
    printed = capsys.readouterr().out
    assert f"docs trained in {attempt.trainer_id} together with no other job" in printed
    assert "base 2.0000, adapter 1.0000" in printed
    assert adapter.lineage_id in printed
