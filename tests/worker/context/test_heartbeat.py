"""The heartbeat continues after any error of one beat."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from catalog.db.database import Database
from catalog.errors import Unavailable
from catalog.fleet import workers
from catalog.fleet.workers import WorkerOrders
from catalog.queue.claims import ClaimDirectives
from worker.context.heartbeat import Heartbeat


def test_on_every_beat_is_called_during_a_database_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
