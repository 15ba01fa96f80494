"""Claim decisions read the first jobs of each project and class, and still find every eligible job."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest

from catalog.db.database import Database
from catalog.jobs import commands, explanation
from catalog.queue import claims, listing
from catalog.scheduling.snapshot import PATIENCE_SECONDS, PROMOTE_AFTER_SECONDS, Capacity
from catalog.states import EndReason
from catalog.tables.jobs import Job
from tests.catalog.read_costs import rows_read, rows_scanned
from tests.catalog.world import Clock, World, begin_preparation

ONE = Capacity(max_jobs=1, memory_bytes_free=10**12)


def theirs(world: World, **fields: Any) -> Job:
    """Submit, prepare and queue a job of another project."""
    job = world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger), **fields)
    world.prepare_all()
    return job


def test_claim_reads_a_fraction_of_the_queue(world: World) -> None:
    world.worker()
    held, first, submitted = world.running().job, world.queued(), world.submit()
    queries_by_name = {
        "a new trainer": lambda: world.claim(capacity=ONE),
        "a trainer that is loaded": lambda: world.claim(capacity=replace(ONE, resident_key=held.pack_key)),
        "jobs that join": lambda: world.claim(pack_key=held.pack_key, capacity=ONE),
        "files to prepare": lambda: begin_preparation(world.db, "w1"),
    }

    for job in (first, submitted):
        world.flood(job, 4000)
    found = {name: rows_read(world.db, query) for name, query in queries_by_name.items()}

    assert {name: number for name, number in found.items() if not 0 < number < 2000} == {}


@pytest.mark.parametrize("empty_url", ["postgresql"], indirect=True)
def test_claim_reads_each_job_few_times_without_table_statistics(empty_url: str) -> None:
    """Without statistics, PostgreSQL estimates rows longer than a page and takes the table for empty."""
    db = Database(empty_url, clock=(clock := Clock()))
    db.migrate()
    world = World(db, clock)
    world.flood(world.queued(), 300)

    number = rows_scanned(db, lambda: world.claim(capacity=ONE))
    db.close()

    assert 0 < number < 20 * 300


def test_long_queue_of_one_project_hides_no_other_project(world: World) -> None:
    world.flood(world.queued(), listing.MAX_SHOWN + 10)
    world.claim(capacity=ONE)
    other = theirs(world)

    shown = listing.snapshot(world.db, project_id=world.stranger.project_id)["jobs"]
    (claim,) = world.claim("w2", capacity=ONE)

    assert [(entry["job_id"], entry["position"]) for entry in shown] == [(other.id, 1)]
    assert claim.job.id == other.id


def test_oversized_jobs_do_not_hide_a_smaller_one_behind_them(world: World) -> None:
    world.base("large", num_parameters=10**11)
    world.flood(world.queued(model="large"), 40)
    small = world.queued()

    claimed = world.claim(capacity=Capacity(max_jobs=2, memory_bytes_free=10**10))

    assert [claim.job.id for claim in claimed] == [small.id]


def test_full_worker_reads_little_of_a_long_queue(world: World) -> None:
    world.worker()
    held, first = world.running().job, world.queued()
    world.flood(first, 2000)
    full = Capacity(max_jobs=4, memory_bytes_free=1)
    queries_by_name = {
        "a new trainer": lambda: world.claim("w2", full),
        "a trainer that is loaded": lambda: world.claim("w2", replace(full, resident_key=held.pack_key)),
        "jobs that join": lambda: world.claim(
            pack_key=held.pack_key, capacity=replace(full, memory_bytes_when_empty=1)
        ),
    }

    found = {name: rows_read(world.db, query) for name, query in queries_by_name.items()}

    assert {name: number for name, number in found.items() if number >= 1000} == {}
    assert world.job(first.id).state == "queued"


def test_smaller_packmates_are_found_behind_many_oversized_ones(world: World) -> None:
    first = world.queued()
    world.flood(world.queued(lora={"rank": 32}), 20)
    small = world.queued()
    capacity = Capacity(
        max_jobs=3, memory_bytes_free=alone(world, first) + alone(world, small) - (first.trainer_bytes or 0)
    )

    claimed = world.claim(capacity=capacity)
    more = world.claim("w2", pack_key=first.pack_key, capacity=replace(capacity, memory_bytes_free=own(world, first)))

    assert [claim.job.id for claim in claimed] == [first.id, small.id]
    assert more == []


def alone(world: World, job: Job) -> int:
    return own(world, job) + (world.job(job.id).trainer_bytes or 0)


def own(world: World, job: Job) -> int:
    return world.job(job.id).own_bytes or 0


def test_trainer_is_not_drained_for_a_job_that_would_not_fit_anyway(world: World) -> None:
    world.worker()
    world.base("large", num_parameters=10**10)
    live = world.running().job.pack_key
    world.queued(model="large")
    mate = world.queued()
    world.clock.advance(2 * PATIENCE_SECONDS)

    stopped = world.claim(pack_key=live, capacity=ONE)
    joined = world.claim(pack_key=live, capacity=replace(ONE, memory_bytes_when_empty=10**9))

    assert (stopped, [claim.job.id for claim in joined]) == ([], [mate.id])


def test_packmates_are_found_deep_in_the_queue(world: World) -> None:
    world.base("other")
    first = world.queued()
    world.flood(world.queued(model="other"), 60)
    mate = world.queued()

    claimed = world.claim(capacity=Capacity(max_jobs=4, memory_bytes_free=10**12))

    assert [claim.job.id for claim in claimed] == [first.id, mate.id]


def test_fifty_concurrent_workers_each_get_a_different_job(world: World) -> None:
    world.flood(world.queued(), 49)
    start = Barrier(50)

    def work(number: int) -> list[str]:
        start.wait(60)
        return [claim.job.id for claim in world.claim(f"w{number}", ONE)]

    with ThreadPoolExecutor(50) as pool:
        got = list(pool.map(work, range(50)))

    assert [len(mine) for mine in got] == [1] * 50
    assert len({job_id for mine in got for job_id in mine}) == 50


def test_waiting_time_counts_from_the_last_queue_entry(world: World) -> None:
    job = world.submit()
    world.pass_time(100)
    world.prepare_all()
    world.pass_time(20)
    assert round(explanation.explain(world.db, **world.of(job.id))["waited_seconds"]) == 20

    (claim,) = world.claim()
    world.pass_time(100, claim.claim_id)
    commands.pause(world.db, **world.of(job.id))
    claims.end(world.db, claim.claim_id, reason=EndReason.PAUSED_BY_USER, detail="")
    world.pass_time(100)
    commands.resume(world.db, **world.of(job.id))
    world.pass_time(30)

    why = explanation.explain(world.db, **world.of(job.id))
    assert (round(why["waited_seconds"]), why["state"]) == (30, "queued")
    (entry,) = listing.snapshot(world.db, project_id=None)["jobs"]
    assert round(entry["waited_seconds"]) == 30


def test_job_that_lost_its_worker_keeps_its_queue_position(world: World) -> None:
    drained = world.running()
    world.queued()
    world.pass_time(30, drained.claim_id)

    claims.end(world.db, drained.claim_id, reason=EndReason.DRAINED, detail="")

    (again,) = world.claim(capacity=ONE)
    assert again.job.id == drained.job.id


def test_projects_alternate_in_file_preparation(world: World) -> None:
    world.worker()
    ours = [world.submit() for _ in range(3)]
    their_file = world.file(caller=world.stranger)
    foreign = [world.submit(caller=world.stranger, training_file=their_file) for _ in range(2)]
    pressing = world.submit(priority="urgent")

    order: list[str] = []
    while (found := begin_preparation(world.db)) is not None:
        order.append(found.task.subject)
        world.clock.advance(1)

    own, others = [pressing, *ours], [job.id for job in foreign]
    assert [each for each in order if each not in others] == [job.id for job in own]
    assert sorted(order.index(each) // 2 for each in others) == [0, 1]


def test_unprepared_jobs_are_promoted_by_priority_aging(world: World) -> None:
    world.worker()
    patient = world.submit(priority="batch")
    world.clock.advance(PROMOTE_AFTER_SECONDS + 100)
    pressing, normal = world.submit(priority="urgent"), world.submit()
    world.clock.advance(PROMOTE_AFTER_SECONDS - 50)
    late = world.submit(priority="urgent")

    found = [begin_preparation(world.db) for _ in range(4)]

    assert [each.task.subject for each in found if each] == [pressing.id, patient.id, late.id, normal.id]


def test_explanation_of_an_unprepared_job_mentions_alternation(world: World) -> None:
    world.worker()
    world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    job = world.submit()

    assert explanation.explain(world.db, **world.of(job.id))["explanation"] == (
        "Its files wait for tokenization. No job is ahead of it in its project. Files of other projects are tokenized "
        "in between."
    )
