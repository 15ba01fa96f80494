"""Start and exit of a worker."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import update

from catalog.db import revisions
from catalog.db.database import Database
from catalog.fleet.workers import GGUF_CONVERTER
from catalog.settings import Settings
from catalog.tables.fleet import Worker
from tests import next_migration
from tests.catalog.world import Clock, World
from tests.next_migration import UNRELEASED
from tests.worker.process.test_gguf_converter import install
from worker.context.context import UNFIT, open_worker
from worker.entrypoints import loop
from worker.node import devices, scratch_dirs
from worker.process import gguf_converter


def test_claims_of_a_dead_worker_on_the_same_data_folder_are_released(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    world = a_world(settings)
    world.worker("dead")
    world.queued()
    (claim,) = world.claim(worker_id="dead")
    workers_dir = settings.work_dir() / "workers"
    workers_dir.mkdir(parents=True)
    (workers_dir / "dead.lock").touch()  # a killed process leaves its lock file, but holds no lock

    with open_worker(settings, device=devices.choose_device("cpu")):
        job = world.job(claim.job.id)

    assert (job.state, job.claim_id, job.counted_attempts) == ("queued", None, 0)
    assert not (workers_dir / "dead.lock").exists()


def test_a_live_worker_keeps_its_claims_when_another_starts(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    world = a_world(settings)
    world.worker("alive.example")
    world.queued()
    (claim,) = world.claim(worker_id="alive.example")
    workers_dir = settings.work_dir() / "workers"
    workers_dir.mkdir(parents=True)

    with (
        scratch_dirs.owned(workers_dir / "alive.example"),
        open_worker(settings, device=devices.choose_device("cpu")) as newcomer,
    ):
        job = world.job(claim.job.id)

    assert (job.state, job.claim_id) == ("running", claim.claim_id)
    with world.db.read() as session:
        left = session.get_one(Worker, newcomer.worker_id)
    assert left.ended_at is not None


def test_worker_announces_a_converter_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_converter, "find_spec", lambda _module: True)
    settings = Settings(data_dir=tmp_path / "data", gguf_converter=install(tmp_path / "llama.cpp"))
    a_world(settings)

    with open_worker(settings, device=devices.choose_device("cpu")) as context, context.db.read() as session:
        assert GGUF_CONVERTER in session.get_one(Worker, context.worker_id).integrations


def test_worker_does_not_start_with_a_converter_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gguf_converter, "find_spec", lambda _module: True)
    a_world(Settings(data_dir=tmp_path))
    monkeypatch.setenv("LORRY_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("LORRY_GGUF_CONVERTER", str(tmp_path / "none.py"))

    assert loop.main(["--device", "cpu", "--once"]) == UNFIT

    assert "LORRY_GGUF_CONVERTER is" in capsys.readouterr().err


def test_a_worker_that_starts_before_its_database_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(data_dir=tmp_path)
    waited: list[float] = []

    def pass_time(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            a_world(settings)

    monkeypatch.setenv("LORRY_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(loop.time, "sleep", pass_time)

    with ExitStack() as stack:
        context = loop._opened(stack, devices.choose_device("cpu"))  # pyright: ignore[reportPrivateUsage]
        with context.db.read() as session:
            assert session.get_one(Worker, context.worker_id).ended_at is None

    assert len(waited) == 3
    assert [record.message for record in caplog.records if "retrying" in record.message] == [
        "The database lacks Lorry's table alembic_version. The worker keeps retrying."
    ]


@pytest.mark.parametrize(
    ("revision", "remedy"),
    [
        (revisions.newest(), "Run `python -m api bootstrap` from this version"),
        (UNRELEASED, "to an empty database"),
    ],
)
def test_an_incompatible_worker_exits_with_a_message_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, revision: str, remedy: str
) -> None:
    world = a_world(Settings(data_dir=tmp_path))
    with world.db.write() as session:
        session.execute(update(revisions.VERSIONS).values(version_num=revision))
    next_migration.install(tmp_path / "scripts", monkeypatch)
    monkeypatch.setenv("LORRY_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(loop.logs, "configure", lambda _: None)

    assert loop.main(["--device", "cpu"]) == UNFIT

    assert remedy in caplog.text
    assert f" {revision}" in caplog.text
    with world.db.read() as session:
        assert session.query(Worker).count() == 0


def a_world(settings: Settings) -> World:
    db = Database(settings.resolved_database_url())
    db.migrate()
    return World(db, Clock())
