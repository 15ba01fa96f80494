"""What people are told of jobs that a gang of workers is to train, on both databases."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.fleet import gangs, workers
from catalog.fleet.gangs import GangMember
from catalog.jobs import explanation
from catalog.tables.jobs import Job
from tests.catalog.plan_data import ready
from tests.catalog.plans.test_plans import found
from tests.catalog.queue.test_sharded_claims import GB, queued_large
from tests.catalog.world import Clock, World

SILENT = 60.0


def enter(world: World, worker_id: str, *, gigabytes: float = 1000, size: int = 2, min_size: int = 2) -> GangMember:
    """A worker of the gang `pair`; its devices would divide bases if it were by itself."""
    devices = [{"kind": "cpu", "num_processes": 2, "strategy": "auto", "gang": "pair"}]
    about: dict[str, Any] = {"host": "here", "pid": 1, "devices": devices, "version": "1"}
    workers.register_worker(world.db, worker_id=worker_id, memory_bytes=int(gigabytes * GB), **about)
    place = GangMember(db=world.db, worker_id=worker_id, gang="pair", silent_seconds=SILENT)
    gangs.enter(place, size=size, min_size=min_size, kind="cpu", num_processes=2, free_bytes=GB)
    return place


def told(world: World, job: Job) -> str:
    return explanation.explain(world.db, project_id=job.project_id, job_id=job.id)["explanation"]


@pytest.mark.parametrize("has_leader", [True, False])
def test_a_job_that_is_too_large_for_the_smallest_worker_of_a_gang_is_told_so(world: World, has_leader: bool) -> None:
    leader = enter(world, "w1", gigabytes=100)
    enter(world, "w2", gigabytes=17)
    if has_leader:
        gangs.lead(leader)
    job = queued_large(world)

    assert told(world, job).startswith(
        "The job needs about 20.0 GB per device, but the smallest worker of gang pair, w2, has 17.0 GB. It would fit"
    )


def test_a_plan_reckons_with_the_smallest_worker_of_a_gang_and_divides_no_base_over_it(world: World) -> None:
    gangs.lead(enter(world, "w1", gigabytes=100))
    enter(world, "w2", gigabytes=17)
    world.worker("w3", 18 * GB)
    queued_large(world)

    refused = found(ready(world, model="large", precision="bfloat16"))
    enter(world, "w2", gigabytes=30)
    fits = found(ready(world, model="large", precision="bfloat16", lora={"rank": 4}))

    assert refused["devices"]["workers_that_fit"] == []
    (worker,) = fits["devices"]["workers_that_fit"]
    assert (worker["worker_id"], worker["memory_bytes"], worker["strategy"]) == ("w1", 30 * GB, "replicated")


def test_of_more_workers_than_a_gang_has_the_smaller_ones_may_stand_by(world: World) -> None:
    gangs.lead(enter(world, "w1", gigabytes=100))
    enter(world, "w2", gigabytes=17)
    enter(world, "w3", gigabytes=50)
    job = queued_large(world)

    assert "The job needs about" not in told(world, job)


def test_a_job_waits_for_room_and_for_no_others_where_fewer_of_a_gang_train(world: World, clock: Clock) -> None:
    gangs.lead(enter(world, "w1", min_size=1))
    job = world.queued()
    before = told(world, job)

    workers.worker_beat(world.db, "w1", resident_base=None, trainer_id="trainer-1", report=None)

    assert before.startswith("It waits for missing workers of a gang.")
    assert told(world, job).startswith("It is first in the queue and waits for a worker with free capacity.")
