"""Tables on a narrow terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, tzinfo
from typing import Any, Self

import pytest
from typer.testing import CliRunner, Result

from lorry.cli.main import app
from lorry.cli.render import output
from tests.lorry.scripted_server import Script

JOB = {
    "id": "ftjob-1c0ffee0a1b2c3d4e5f60718",
    "status": "validating_files",
    "model": "smollm2-135m-instruct",
    "progress": {"step": 1000, "num_steps": 1200, "loss": 1.5678, "valid_loss": 1.6789},
    "seconds_running": 40000,
    "created_at": 1790000000,
}
FILE = {
    "id": "file-3f2b8c9d0a1e4f5a6b7c8d9e",
    "filename": "a name of a file that continues\non a second line.jsonl",
    "bytes": 123456789,
    "purpose": "fine-tune",
    "created_at": 1790000000,
}
MODEL = {
    "id": "ft:smollm2-135m-instruct:default:suffix:1c0ffee0",
    "kind": "adapter",
    "state": "ready",
    "base": "smollm2-135m-instruct",
    "digest": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "created": 1790000000,
}
ADAPTER = {
    "name": MODEL["id"],
    "base_model": "smollm2-135m-instruct",
    "rank": 16,
    "bytes": 123456789,
    "evaluation": {"base_loss": 2.34567, "loss": 1.23456},
    "verification": {"passed": True},
}
WORKER = {
    "id": "a-rather-long-host-1c0ffee0a1b2",
    "state": "idle",
    "host": "a-rather-long-host.example.org",
    "devices": [{"name": "NVIDIA H100 80GB HBM3"}, {"name": "NVIDIA H100 80GB HBM3"}],
    "resident_base_names": ["smollm2-135m-instruct"],
    "trainer_id": "trainer-1c0ffee0a1b2c3d4e5f60718",
    "last_seen_at": 1790000000,
}
QUEUED = {
    "job_id": JOB["id"],
    "state": "queued",
    "base_model": "smollm2-135m-instruct",
    "priority": "normal",
    "position": 1,
    "reason": "This is the oldest job of the project with the lowest recent normalized usage.",
}
Run = Callable[..., Result]


@pytest.fixture
def run(service: Script, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LORRY_URL", service.url)
    monkeypatch.setenv("LORRY_API_KEY", "k")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("command", "path", "row", "id_field"),
    [
        ("jobs list", "/v1/fine_tuning/jobs", JOB, "id"),
        ("jobs list", "/v1/fine_tuning/jobs", {**JOB, "suffix": "a-suffix-that-is-rather-long"}, "id"),
        ("files list", "/v1/files", FILE, "id"),
        ("models list", "/v1/models", MODEL, "id"),
        ("adapters list", "/v1/adapters", ADAPTER, "name"),
        ("workers list", "/v1/workers", WORKER, "id"),
        ("queue", "/v1/queue", QUEUED, "job_id"),
    ],
)
def test_at_80_columns_each_row_is_one_line_with_its_full_id(
    service: Script,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    path: str,
    row: dict[str, Any],
    id_field: str,
) -> None:
    service.on("GET", path, {"jobs" if command == "queue" else "data": [row, row], "has_more": False})
    monkeypatch.setattr("lorry.cli.render.output._WIDTH_OF_A_PIPE", 80)

    head, *lines = run(*command.split()).stdout.splitlines()

    assert len(lines) == 2
    assert all(line.startswith(f"{row[id_field]}  ") for line in lines)
    assert all(len(line) <= 80 for line in (head, *lines))


def test_wide_table_shows_every_column_untruncated(service: Script, run: Run) -> None:
    service.on("GET", "/v1/workers", {"data": [WORKER], "has_more": False})

    head, line = run("workers", "list").stdout.splitlines()

    assert head.split() == ["ID", "STATE", "HOST", "DEVICES", "BASE", "TRAINER", "LAST", "SEEN"]
    assert "NVIDIA H100 80GB HBM3, NVIDIA H100 80GB HBM3  smollm2-135m-instruct" in line
    assert "…" not in line


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use UTC as the local time."""
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


class Evening(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(2026, 1, 2, 18, tzinfo=UTC).astimezone(tz)


@pytest.mark.usefixtures("utc")
def test_brief_time_of_an_old_event_is_its_date() -> None:
    assert output.briefly(86400 * 200) == "1970-07-20"
    assert output.briefly(None) is None


@pytest.mark.usefixtures("utc")
def test_recent_time_of_today_includes_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "datetime", Evening)
    noon = datetime(2026, 1, 2, 12, 5, 9, tzinfo=UTC)

    assert output.recent(int(noon.timestamp())) == "12:05:09"
    assert output.recent(86400 * 200) == "1970-07-20"
    assert output.recent(None) is None


@pytest.mark.parametrize(
    ("num_bytes", "printed"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (31_511, "31.5 kB"),
        (999_949, "1.00 MB"),
        (123_456_789, "123 MB"),
        (9_996_000_000, "10.0 GB"),
        (5_000_000_000_000_000, "5000 TB"),
    ],
)
def test_sizes_are_in_decimal_units(num_bytes: int, printed: str) -> None:
    assert output.size(num_bytes) == printed
