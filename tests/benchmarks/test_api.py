"""`make bench-api` runs end to end at toy sizes. The measured values are meaningless."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.api.__main__ import main
from benchmarks.api.plan import TITLES


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_every_api_measurement_is_reported(tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    main(["--quick", "--databases", database, "--folder", str(tmp_path), "--out", str(out)])

    reports = [json.loads(path.read_text("utf-8")) for path in out.iterdir()]
    assert {report["theme"] for report in reports} == {"api_rates", "api_size"}
    assert all(report["findings"] and report["repeats"] for report in reports)
    assert f"{TITLES[database]}: jobs created per second" in capsys.readouterr().out
