"""The heartbeat goes on, whatever one beat met."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from catalog.db.database import Database
from catalog.errors import Unavailable
from catalog.fleet import workers
from catalog.fleet.workers import WorkerOrders
from catalog.queue.claims import ClaimDirectives
from worker.context.heartbeat import Heartbeat


def test_whoever_holds_no_claim_hears_each_beat_also_where_the_database_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def beat(*_: Any, **__: Any) -> WorkerOrders:
        raise Unavailable("The database does not answer.", code="database_unavailable", remedy="Wait.")

    monkeypatch.setattr(workers, "worker_beat", beat)
    heartbeat, heard, guarded = Heartbeat(Database("sqlite://"), "w1", lease_seconds=60, heartbeat_seconds=60), [], []
    heartbeat.on_every_beat = lambda: heard.append(1)
    heartbeat.guard(on_beat=lambda: guarded.append(1), on_lost=None)

    with pytest.raises(Unavailable):
        heartbeat.beat()

    assert (heard, guarded) == ([1], [])


def test_a_beat_that_fails_in_a_way_nobody_foresaw_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    beats, went_on = [], threading.Event()

    def beat(*_: Any, **__: Any) -> WorkerOrders:
        beats.append(1)
        if len(beats) == 1:
            raise RuntimeError("the driver said something new")
        went_on.set()
        return WorkerOrders(drain=False)

    monkeypatch.setattr(workers, "worker_beat", beat)
    heartbeat = Heartbeat(Database("sqlite://"), "w1", lease_seconds=60, heartbeat_seconds=0.01)

    heartbeat.start()

    assert went_on.wait(20)
    heartbeat.close()


def test_a_claim_that_was_given_up_is_stale_for_whoever_holds_it_and_for_nobody_else() -> None:
    heartbeat, told = Heartbeat(Database("sqlite://"), "w1", lease_seconds=60, heartbeat_seconds=60), []
    heartbeat.guard(on_beat=None, on_lost=lambda: told.append("lost"))
    heartbeat.hold(["mine", "anothers"], since=-float("inf"))
    heartbeat.hold(["renewed"], since=float("inf"))

    heartbeat.give_up_overdue()
    heartbeat.give_up_overdue()
    heartbeat.guard(on_beat=None, on_lost=None)

    assert told == ["lost"]
    assert heartbeat.take_directives(["mine", "renewed"]) == {"mine": ClaimDirectives(stale=True)}
    assert heartbeat.take_directives(["mine", "renewed"]) == {}
    assert heartbeat.take_directives(["anothers"]) == {"anothers": ClaimDirectives(stale=True)}


def test_a_trainer_that_could_not_be_ended_costs_no_look_at_the_claims_after_it() -> None:
    heartbeat = Heartbeat(Database("sqlite://"), "w1", lease_seconds=60, heartbeat_seconds=60)
    went_on = threading.Event()

    def fails() -> None:
        heartbeat.guard(on_beat=None, on_lost=went_on.set)
        heartbeat.hold(["second"], since=-float("inf"))
        raise RuntimeError("the system said something new")

    heartbeat.guard(on_beat=None, on_lost=fails)
    heartbeat.hold(["first"], since=-float("inf"))

    heartbeat.start()

    assert went_on.wait(20)
    heartbeat.close()
