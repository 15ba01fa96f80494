"""Start, heartbeat and exit of a worker."""

from __future__ import annotations

import threading
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from catalog.db import revisions
from catalog.db.database import Database
from catalog.errors import Unavailable
from catalog.fleet import workers
from catalog.fleet.workers import GGUF_CONVERTER, WorkerOrders
from catalog.queue.claims import ClaimDirectives
from catalog.settings import Settings
from catalog.tables.fleet import Worker
from tests import next_migration
from tests.catalog.world import Clock, World
from tests.next_migration import UNRELEASED
from tests.worker.process.test_gguf_converter import install
from worker.context.context import UNFIT, open_worker
from worker.context.heartbeat import Heartbeat
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


def test_on_every_beat_is_called_during_a_database_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    def beat(*_: Any, **__: Any) -> WorkerOrders:
        raise Unavailable("database_unavailable")

    monkeypatch.setattr(workers, "worker_beat", beat)
    heartbeat, every_beat, guarded = (
        Heartbeat(Database("sqlite://"), "w1", lease_seconds=60, heartbeat_seconds=60),
        [],
        [],
    )
    heartbeat.on_every_beat = lambda: every_beat.append(1)
    heartbeat.guard(on_beat=guarded.append, on_lost=None)

    with pytest.raises(Unavailable):
        heartbeat.beat()

    assert (every_beat, guarded) == ([1], [])


def test_trainer_is_shown_the_time_before_the_leases_were_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the trainer of a worker that froze after a slow heartbeat would outlive its lease."""
    now = [100.0]

    def beat(*_: Any, **__: Any) -> WorkerOrders:
        now[0] += 30
        return WorkerOrders(drain=False)

    monkeypatch.setattr(workers, "worker_beat", beat)
    monkeypatch.setattr("worker.context.heartbeat.boot_seconds", lambda: now[0])
    heartbeat, shown = Heartbeat(Database("sqlite://"), "w1", lease_seconds=60, heartbeat_seconds=60), []
    heartbeat.guard(on_beat=shown.append, on_lost=None)

    heartbeat.beat()

    assert shown == [100.0]


def test_a_beat_with_an_unexpected_error_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    beats, continued = [], threading.Event()

    def beat(*_: Any, **__: Any) -> WorkerOrders:
        beats.append(1)
        if len(beats) == 1:
            raise RuntimeError("an unknown error of the driver")
        continued.set()
        return WorkerOrders(drain=False)

    monkeypatch.setattr(workers, "worker_beat", beat)
    heartbeat = Heartbeat(Database("sqlite://"), "w1", lease_seconds=60, heartbeat_seconds=0.01)

    heartbeat.start()

    assert continued.wait(20)
    heartbeat.close()


def test_a_claim_that_was_given_up_is_stale_only_for_its_holder() -> None:
    heartbeat, lost = Heartbeat(Database("sqlite://"), "w1", lease_seconds=60, heartbeat_seconds=60), []
    heartbeat.guard(on_beat=None, on_lost=lambda: lost.append("lost"))
    heartbeat.hold(["mine", "anothers"], since=-float("inf"))
    heartbeat.hold(["renewed"], since=float("inf"))

    heartbeat.abandon_overdue()
    heartbeat.abandon_overdue()
    heartbeat.guard(on_beat=None, on_lost=None)

    assert lost == ["lost"]
    assert heartbeat.take_directives(["mine", "renewed"]) == {"mine": ClaimDirectives(stale=True)}
    assert heartbeat.take_directives(["mine", "renewed"]) == {}
    assert heartbeat.take_directives(["anothers"]) == {"anothers": ClaimDirectives(stale=True)}


def test_a_trainer_that_cannot_be_killed_does_not_stop_later_lease_checks() -> None:
    heartbeat = Heartbeat(Database("sqlite://"), "w1", lease_seconds=60, heartbeat_seconds=60)
    continued = threading.Event()

    def fails() -> None:
        heartbeat.guard(on_beat=None, on_lost=continued.set)
        heartbeat.hold(["second"], since=-float("inf"))
        raise RuntimeError("an unknown error of the system")

    heartbeat.guard(on_beat=None, on_lost=fails)
    heartbeat.hold(["first"], since=-float("inf"))

    heartbeat.start()

    assert continued.wait(20)
    heartbeat.close()


@pytest.mark.parametrize("is_recorded", [True, False])
def test_file_for_health_checks_is_touched_only_by_recorded_heartbeats(
    is_recorded: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def beat(*_: Any, **__: Any) -> WorkerOrders:
        if not is_recorded:
            raise Unavailable("database_unavailable")
        return WorkerOrders(drain=False)

    monkeypatch.setattr(workers, "worker_beat", beat)
    touched = tmp_path / "heartbeat"
    heartbeat = Heartbeat(Database("sqlite://"), "w1", lease_seconds=60, heartbeat_seconds=60, touched=touched)

    with nullcontext() if is_recorded else pytest.raises(Unavailable):
        heartbeat.beat()

    assert touched.exists() == is_recorded
