"""Concurrent workers claim the same jobs that consecutive claims would take."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy.orm import Session

from catalog.history import queries
from catalog.queue import charging, claiming
from catalog.scheduling.scheduler import decide
from catalog.scheduling.snapshot import USUAL, WorkerService
from catalog.tables.jobs import Job
from catalog.tenancy import projects
from catalog.usage import quotas
from tests.catalog.scheduling.test_fairness_over_days import candidate
from tests.catalog.scheduling.test_scheduler import snapshot
from tests.catalog.world import WIDE, World

ONE = replace(WIDE, max_jobs=1)


def test_class_is_not_promoted_again_after_a_claim() -> None:
    now = 3 * USUAL.priority_aging_seconds
    queue = [candidate("old", 1, priority=2), candidate("new", now - 1)]
    whole = snapshot(*queue, now=now, max_jobs=1)
    served = WorkerService(at={(queue[0].project_id, 2): now}, memory_bytes=100)

    first, second = (decide(each, USUAL).action.choices[0] for each in (whole, replace(whole, served=(served,))))

    assert [choice.entry.candidate.job_id for choice in (first, second)] == ["old", "new"]


def flooded(world: World, number: int) -> None:
    """Queue `number` jobs of our project, and as many of another project with three times the weight."""
    projects.set_weight(world.db, caller=replace(world.caller, is_operator=True), project="theirs", weight=3)
    world.flood(world.queued(), number - 1)
    job = world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    world.prepare_all()
    world.flood(job, number - 1)


@pytest.mark.both_databases
@pytest.mark.parametrize("max_jobs", [1, 3])
def test_concurrent_claims_share_like_consecutive_ones(world: World, max_jobs: int) -> None:
    flooded(world, 40)
    start, capacity = Barrier(8), replace(WIDE, max_jobs=max_jobs)

    def work(number: int) -> list[list[Job]]:
        world.worker(f"w{number}")
        start.wait(60)
        each = (world.claim(f"w{number}", capacity, trainer_id=f"t{number}-{turn}") for turn in range(3))
        return [[claim.job for claim in some] for some in each]

    with ThreadPoolExecutor(8) as pool:
        packs = [pack for mine in pool.map(work, range(8)) for pack in mine]

    got = [job for pack in packs for job in pack]
    assert len({job.id for job in got}) == len(got)
    assert min(map(len, packs)) > 0
    if max_jobs == 1:
        of_strangers = sum(job.project_id == world.stranger.project_id for job in got)
        assert of_strangers == 18


@pytest.mark.both_databases
def test_decision_reads_one_state_of_the_database(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker claims a job after this worker has read the shares and before it reads the queue."""
    flooded(world, 2)
    world.worker("first")
    world.worker("second")
    claimed: list[Job] = []
    read_shares = charging.shares_of_waiting

    def read_shares_and_claim(*args: Any, **kwargs: Any) -> Any:
        shares = read_shares(*args, **kwargs)
        monkeypatch.setattr(charging, "shares_of_waiting", read_shares)
        claimed.extend(claim.job for claim in world.claim("first", ONE, trainer_id="t1"))
        return shares

    monkeypatch.setattr(charging, "shares_of_waiting", read_shares_and_claim)
    claimed += [claim.job for claim in world.claim("second", ONE, trainer_id="t2")]

    assert len({job.id for job in claimed}) == 2
    assert len({job.project_id for job in claimed}) == 2


def interrupt(world: World, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], Any]) -> None:
    """Call `meanwhile` after the next decision without locks."""
    decide: Any = claiming._decide  # pyright: ignore[reportPrivateUsage]

    def decide_first(*given: Any) -> Any:
        monkeypatch.setattr(claiming, "_decide", decide)
        found = decide(*given)
        meanwhile()
        return found

    monkeypatch.setattr(claiming, "_decide", decide_first)


@pytest.mark.parametrize("max_jobs", [1, 3])
def test_claim_after_a_race_takes_the_next_jobs(world: World, monkeypatch: pytest.MonkeyPatch, max_jobs: int) -> None:
    flooded(world, 20)
    world.worker()
    capacity = replace(WIDE, max_jobs=max_jobs)
    taken: list[str] = []
    interrupt(
        world,
        monkeypatch,
        lambda: taken.extend(c.job.id for n in range(5) for c in world.claim("quicker", ONE, trainer_id=f"t{n}")),
    )

    mine = world.claim(capacity=capacity)

    assert len({*taken, *(claim.job.id for claim in mine)}) == 5 + max_jobs
    (attempt,) = queries.attempts(world.db, project_id=mine[0].job.project_id, job_id=mine[0].job.id)
    why = attempt.why
    own = sum(world_job.startswith(_stem(mine[0].job.id)) for world_job in taken)
    assert (why["role"], why["position"], why["share"]["num_running"]) == ("anchor", 1, own)
    assert why["normalized_usage"] == why["share"]["normalized_usage"]


@pytest.mark.parametrize("max_jobs", [1, 3])
def test_job_that_a_user_pauses_during_a_decision_is_not_claimed(
    world: World, monkeypatch: pytest.MonkeyPatch, max_jobs: int
) -> None:
    """The decision under the lock has read the queue, and the user's transaction commits before the job is locked."""
    first, second = world.queued(), world.queued()
    world.worker()
    claim: Any = claiming._claim  # pyright: ignore[reportPrivateUsage]

    def pause_before(session: Session, *given: Any) -> Any:
        monkeypatch.setattr(claiming, "_claim", claim)
        session.get_one(Job, first.id).is_held = True
        session.flush()
        return claim(session, *given)

    monkeypatch.setattr(claiming, "_claim", pause_before)

    claims = world.claim(capacity=replace(WIDE, max_jobs=max_jobs))

    assert [each.job.id for each in claims] == [second.id]


def _stem(job_id: str) -> str:
    """Return the id prefix that a job and its copies share."""
    return "-".join(job_id.split("-")[:2])


def test_joining_worker_after_a_race_claims_the_remaining_jobs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.worker()
    held = world.running().job
    world.flood(world.queued(), 9)
    interrupt(world, monkeypatch, lambda: [world.claim("quicker", ONE, trainer_id=f"t{number}") for number in range(4)])

    mine = world.claim(capacity=replace(WIDE, max_jobs=2), pack_key=held.pack_key)

    assert len(mine) == 2


def test_limit_reached_meanwhile_by_others_is_respected(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    flooded(world, 4)
    quotas.limit(
        world.db, caller=replace(world.caller, is_operator=True), project="theirs", limits={"concurrent_jobs": 1}
    )
    interrupt(world, monkeypatch, lambda: [world.claim("quicker", ONE, trainer_id=f"t{n}") for n in range(2)])

    (claim,) = world.claim(capacity=ONE)

    assert claim.job.project_id == world.caller.project_id


def test_attempt_event_names_a_new_or_a_loaded_trainer(world: World) -> None:
    world.worker()
    first, second = world.queued(), world.queued()

    world.claim(capacity=ONE)
    world.claim(capacity=replace(ONE, resident_key=second.pack_key))

    for job, expected in ((first, "in a new trainer"), (second, "in a trainer that has the base model loaded")):
        messages = [event.message for event in world.events(job.id)]
        assert messages[-1] == f"Attempt 1 started on worker w1 {expected}"
