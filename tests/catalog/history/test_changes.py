"""Polls over many jobs lose no change and return none twice, whatever the order of commits."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy.orm import Session

from catalog.db.database import Database
from catalog.history import changes, events
from catalog.history.changes import WatchedJob
from catalog.history.metric_points import Point
from catalog.jobs import commands
from catalog.lifecycle import recording
from catalog.queue import claiming
from catalog.tables.history import JobEvent
from catalog.tables.jobs import Job
from tests.catalog.db.test_query_plans import listening
from tests.catalog.world import World

Keys = dict[tuple[str, str], WatchedJob]


class Watcher:
    """A client that follows some jobs and keeps the items that it receives for each."""

    def __init__(self, world: World, jobs_watched: list[Job]) -> None:
        self.world = world
        self.seen: Keys = {(job.project_id, job.id): WatchedJob(seq=0) for job in jobs_watched}
        self.jobs = {job.id: job for job in jobs_watched}
        self.received: dict[str, list[JobEvent | Point]] = {job.id: [] for job in jobs_watched}

    def poll(self) -> set[str]:
        """Poll once. Returns the jobs that have changed."""
        found = changes.poll_many(self.world.db, self.seen)
        for key, change in found.items():
            assert change is not None
            self.seen[key] = change.seen
            self.jobs[key[1]] = change.job
            self.received[key[1]] += change.items
        return {job_id for _, job_id in found}

    def numbers(self, job_id: str) -> list[int]:
        return [item.seq for item in self.received[job_id] if isinstance(item, JobEvent)]

    def steps(self, job_id: str) -> list[int]:
        return [item.step for item in self.received[job_id] if isinstance(item, Point)]


def all_numbers(world: World, job_id: str) -> list[int]:
    return [event.seq for event in world.events(job_id)]


def test_concurrent_writes_are_neither_lost_nor_repeated(world: World) -> None:
    world.worker()
    for seed in range(3):
        world.queued(seed=seed)
    held = world.claim()
    watcher = Watcher(world, [claim.job for claim in held])

    def write(claim: claiming.Claim) -> None:
        for step in range(1, 11):
            recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": step, "loss": 1.0}])
            recording.record_progress(world.db, claim.claim_id, {"step": step})

    with ThreadPoolExecutor(3) as pool:
        writing = [pool.submit(write, claim) for claim in held]
        while not all(one.done() for one in writing):
            watcher.poll()
        for one in writing:
            one.result()
    watcher.poll()

    assert len(held) == 3
    for claim in held:
        assert watcher.numbers(claim.job.id) == all_numbers(world, claim.job.id)
        assert watcher.steps(claim.job.id) == list(range(1, 11))


def test_event_committed_after_a_later_event_of_another_job_is_returned(world: World) -> None:
    if world.db.is_sqlite:  # SQLite has one writer, so events are committed in order
        return
    first, second = world.queued(), world.queued(seed=2)
    watcher = Watcher(world, [first, second])
    watcher.poll()

    with world.db.write() as session:
        late = events.add(session, first.id, now=1.0, message="took its number first, and is committed last")
        session.flush()
        with world.db.write() as other:
            events.add(other, second.id, now=1.0, message="took its number last, and is committed first")
        assert watcher.poll() == {second.id}
        assert watcher.numbers(second.id)[-1] > late.seq
    assert watcher.poll() == {first.id}

    assert watcher.numbers(first.id)[-1] == late.seq
    assert watcher.numbers(first.id) == all_numbers(world, first.id)


def test_changes_beyond_the_row_limit_arrive_in_several_polls(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MAX_ROWS", 7)
    world.worker()
    claim = world.running()
    other = world.submit()
    for step in range(1, 20):
        recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": step, "loss": 1.0}])
    watcher = Watcher(world, [claim.job, other])

    while watcher.poll():
        pass

    assert watcher.numbers(claim.job.id) == all_numbers(world, claim.job.id)
    assert watcher.numbers(other.id) == all_numbers(world, other.id)
    assert watcher.steps(claim.job.id) == list(range(1, 20))


def test_unchanged_jobs_cost_no_extra_query(world: World) -> None:
    watched = [world.submit(seed=seed) for seed in range(12)]
    watcher = Watcher(world, watched)
    watcher.poll()

    with listening(world.db) as quiet:
        assert watcher.poll() == set()
    commands.cancel(world.db, **world.of(watched[3].id))
    with listening(world.db) as busy:
        assert watcher.poll() == {watched[3].id}

    assert sum("SELECT" in statement for statement, _ in quiet) == 1
    # the poll itself, then the job, its events and its points
    assert sum("SELECT" in statement for statement, _ in busy) == 4


def test_job_that_ends_during_a_poll_is_returned_with_its_last_events(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.worker()
    claim = world.running()
    watcher = Watcher(world, [claim.job])
    watcher.poll()
    with world.db.write() as session:
        session.get_one(Job, claim.job.id).place = 0.5  # a change without an event
    rows = changes._rows  # pyright: ignore[reportPrivateUsage]

    def rows_and_then_the_end(session: Session, job_ids: Sequence[str]) -> Any:
        found = rows(session, job_ids)
        if not world.db.is_sqlite:  # on SQLite the whole poll reads one snapshot
            world.complete(claim.claim_id)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(changes, "_rows", rows_and_then_the_end)
        watcher.poll()
    if world.db.is_sqlite:
        world.complete(claim.claim_id)
        watcher.poll()

    assert watcher.jobs[claim.job.id].state == "succeeded"
    assert watcher.numbers(claim.job.id) == all_numbers(world, claim.job.id)


def test_changes_are_visible_to_the_project_of_the_job_only(world: World) -> None:
    job = world.submit()
    requested = {
        (world.stranger.project_id, job.id): WatchedJob(seq=0),
        (world.caller.project_id, "ftjob-none"): WatchedJob(seq=0),
    }

    assert changes.poll_many(world.db, requested) == dict.fromkeys(requested)


def test_watcher_resumes_after_any_event(world: World) -> None:
    world.worker()
    claim = world.running()
    for step in range(1, 6):
        recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": step, "loss": 1.0}])
    numbers = all_numbers(world, claim.job.id)
    whole = _after(world.db, world, claim.job.id, numbers[0])

    for seen in numbers:
        behind = whole.index(seen) + 1 if seen in whole else 0
        assert _after(world.db, world, claim.job.id, seen) == whole[behind:]


def _after(db: Database, world: World, job_id: str, seen: int) -> list[int | str]:
    mark = changes.start(db, **world.of(job_id), last_seen=seen)
    items = changes.poll(db, mark).items
    return [item.seq if isinstance(item, JobEvent) else f"step {item.step}" for item in items]
