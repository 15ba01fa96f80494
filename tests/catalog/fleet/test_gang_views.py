"""Explanations and plans of jobs that a gang of workers is to train."""

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
    """Add a worker to the gang `pair`. Alone, its devices would shard base models."""
    devices = [{"kind": "cpu", "num_processes": 2, "strategy": "auto", "gang": "pair"}]
    about: dict[str, Any] = {"host": "here", "pid": 1, "devices": devices, "version": "1"}
    workers.register_worker(world.db, worker_id=worker_id, memory_bytes=int(gigabytes * GB), **about)
    place = GangMember(db=world.db, worker_id=worker_id, gang="pair", silent_seconds=SILENT)
    gangs.enter(place, size=size, min_size=min_size, kind="cpu", num_processes=2, free_bytes=GB)
    return place


def explanation_of(world: World, job: Job) -> str:
    return explanation.explain(world.db, project_id=job.project_id, job_id=job.id)["explanation"]


@pytest.mark.parametrize("has_leader", [True, False])
def test_explanation_names_the_smallest_gang_worker_for_a_large_job(world: World, has_leader: bool) -> None:
    leader = enter(world, "w1", gigabytes=100)
    enter(world, "w2", gigabytes=17)
    if has_leader:
        gangs.lead(leader)
    job = queued_large(world)

    assert explanation_of(world, job).startswith(
        "The job needs about 20.0 GB per device, but the smallest worker of gang pair, w2, has 17.0 GB. It would fit"
    )


def test_plan_uses_the_smallest_gang_worker_and_does_not_shard(world: World) -> None:
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


def test_smaller_workers_beyond_the_gang_size_do_not_limit_a_job(world: World) -> None:
    gangs.lead(enter(world, "w1", gigabytes=100))
    enter(world, "w2", gigabytes=17)
    enter(world, "w3", gigabytes=50)
    job = queued_large(world)

    assert "The job needs about" not in explanation_of(world, job)


def test_gang_that_trains_with_fewer_workers_waits_for_capacity_only(world: World, clock: Clock) -> None:
    gangs.lead(enter(world, "w1", min_size=1))
    job = world.queued()
    before = explanation_of(world, job)

    workers.worker_beat(world.db, "w1", resident_base=None, trainer_id="trainer-1", report=None)

    assert before.startswith("It waits for missing workers of a gang (")
    assert explanation_of(world, job).startswith("It is first in the queue and waits for a worker with free capacity.")
