"""Looks at many jobs at once: nothing is lost or told twice, whatever order transactions end in."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy.orm import Session

from catalog.db.database import Database
from catalog.history import changes as watching
from catalog.history import events, queries
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
    """Goes with some jobs, and keeps what it was told of each."""

    def __init__(self, world: World, jobs_watched: list[Job]) -> None:
        self.world = world
        self.seen: Keys = {(job.project_id, job.id): WatchedJob(seq=0) for job in jobs_watched}
        self.jobs = {job.id: job for job in jobs_watched}
        self.told: dict[str, list[JobEvent | Point]] = {job.id: [] for job in jobs_watched}

    def look(self) -> set[str]:
        """The jobs of which something was new."""
        changes = watching.look_at_many(self.world.db, self.seen)
        for key, change in changes.items():
            assert change is not None
            self.seen[key] = change.seen
            self.jobs[key[1]] = change.job
            self.told[key[1]] += change.items
        return {job_id for _, job_id in changes}

    def numbers(self, job_id: str) -> list[int]:
        return [item.seq for item in self.told[job_id] if isinstance(item, JobEvent)]

    def steps(self, job_id: str) -> list[int]:
        return [item.step for item in self.told[job_id] if isinstance(item, Point)]


def all_numbers(world: World, job_id: str) -> list[int]:
    return [event.seq for event in queries.events_since(world.db, **world.of(job_id), seq=0, limit=10_000)]


def test_nothing_is_lost_or_told_twice_while_several_write(world: World) -> None:
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
            watcher.look()
        for one in writing:
            one.result()
    watcher.look()

    assert len(held) == 3
    for claim in held:
        assert watcher.numbers(claim.job.id) == all_numbers(world, claim.job.id)
        assert watcher.steps(claim.job.id) == list(range(1, 11))


def test_an_event_that_is_committed_after_a_later_number_of_another_job_is_told(world: World) -> None:
    if world.db.is_sqlite:  # it has one writer: numbers are committed in their order
        return
    first, second = world.queued(), world.queued(seed=2)
    watcher = Watcher(world, [first, second])
    watcher.look()

    with world.db.write() as session:
        late = events.add(session, first.id, now=1.0, message="took its number first, and is committed last")
        session.flush()
        with world.db.write() as other:
            events.add(other, second.id, now=1.0, message="took its number last, and is committed first")
        assert watcher.look() == {second.id}
        assert watcher.numbers(second.id)[-1] > late.seq
    assert watcher.look() == {first.id}

    assert watcher.numbers(first.id)[-1] == late.seq
    assert watcher.numbers(first.id) == all_numbers(world, first.id)


def test_more_than_one_question_holds_is_told_in_several_looks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MAX_ROWS", 7)
    world.worker()
    claim = world.running()
    other = world.submit()
    for step in range(1, 20):
        recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": step, "loss": 1.0}])
    watcher = Watcher(world, [claim.job, other])

    while watcher.look():
        pass

    assert watcher.numbers(claim.job.id) == all_numbers(world, claim.job.id)
    assert watcher.numbers(other.id) == all_numbers(world, other.id)
    assert watcher.steps(claim.job.id) == list(range(1, 20))


def test_a_job_about_which_nothing_is_new_costs_no_question(world: World) -> None:
    watched = [world.submit(seed=seed) for seed in range(12)]
    watcher = Watcher(world, watched)
    watcher.look()

    with listening(world.db) as quiet:
        assert watcher.look() == set()
    commands.cancel(world.db, **world.of(watched[3].id))
    with listening(world.db) as busy:
        assert watcher.look() == {watched[3].id}

    assert sum("SELECT" in statement for statement, _ in quiet) == 1
    assert sum("SELECT" in statement for statement, _ in busy) == 4  # how they look; the one, its events, its points


def test_the_events_of_an_end_that_comes_in_the_middle_of_a_look_are_told_with_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.worker()
    claim = world.running()
    watcher = Watcher(world, [claim.job])
    watcher.look()
    with world.db.write() as session:
        session.get_one(Job, claim.job.id).place = 0.5  # a change without an event
    rows = watching._rows  # pyright: ignore[reportPrivateUsage]

    def rows_and_then_the_end(session: Session, job_ids: Sequence[str]) -> Any:
        found = rows(session, job_ids)
        if not world.db.is_sqlite:  # there all of a look sees one moment
            world.complete(claim.claim_id)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(watching, "_rows", rows_and_then_the_end)
        watcher.look()
    if world.db.is_sqlite:
        world.complete(claim.claim_id)
        watcher.look()

    assert watcher.jobs[claim.job.id].state == "succeeded"
    assert watcher.numbers(claim.job.id) == all_numbers(world, claim.job.id)


def test_what_is_told_of_a_job_is_its_projects(world: World) -> None:
    job = world.submit()
    asked = {
        (world.stranger.project_id, job.id): WatchedJob(seq=0),
        (world.caller.project_id, "ftjob-none"): WatchedJob(seq=0),
    }

    assert watching.look_at_many(world.db, asked) == dict.fromkeys(asked)


def test_a_watcher_goes_on_after_any_event_with_what_came_after_it(world: World) -> None:
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
    mark = watching.start(db, **world.of(job_id), last_seen=seen)
    items = watching.look(db, mark).items
    return [item.seq if isinstance(item, JobEvent) else f"step {item.step}" for item in items]
