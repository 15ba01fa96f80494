"""A base model that no worker can load counts against its jobs; one that others load points to a faulty node."""

from __future__ import annotations

import pytest

from catalog.fleet import workers
from catalog.queue import claiming, claims
from catalog.scheduling.snapshot import Capacity
from catalog.states import MAX_COUNTED_ATTEMPTS, EndReason, JobState
from catalog.tables.fleet import Worker
from catalog.tables.jobs import Job
from tests.catalog.world import World

ALONE = Capacity(max_jobs=1, memory_bytes_free=10**12)


def load(
    world: World, worker_id: str, name: str, *, is_ready: bool = False, capacity: Capacity = ALONE
) -> claiming.Claim:
    """Claim the next job for a trainer of that name, which becomes ready if `is_ready`."""
    (claim,) = world.claim(worker_id, capacity, trainer_id=name)
    key, digest = claim.job.pack_key, claim.job.base_digest
    report = {"group": {}, **({"memory": {"base_bytes": 1}} if is_ready else {})}
    named = {"trainer_id": name, "worker_id": worker_id, "base_digest": digest, "pack_key": key}
    workers.register_trainer(world.db, **named, report=report)
    return claim


def fail_to_load(
    world: World, worker_id: str, name: str, reason: EndReason = EndReason.HOST_OOM, *, rest_seconds: float = 31
) -> Job:
    claim = load(world, worker_id, name)
    world.pass_time(20, claim.claim_id)
    claims.end(world.db, claim.claim_id, reason=reason, detail="", is_bystander=True)
    workers.end_trainer(world.db, name, report={"exit_status": -9})
    world.pass_time(rest_seconds)
    for other in {"w1", "w2", worker_id}:
        world.beat(worker_id=other)
    return world.job(claim.job.id)


def is_cordoned(world: World, worker_id: str) -> bool:
    with world.db.read() as session:
        return session.get_one(Worker, worker_id).cordon is not None


def test_failed_load_counts_against_the_job_after_two_workers_failed(world: World) -> None:
    world.worker("w1")
    world.worker("w2")
    world.queued()

    counted = [
        fail_to_load(world, worker_id, f"t{number}").counted_attempts
        for number, worker_id in enumerate(("w1", "w1", "w2", "w1"))
    ]
    ended = fail_to_load(world, "w2", "last", EndReason.TIMEOUT)

    assert counted == [0, 0, 1, 2]
    assert (ended.state, (ended.error or {})["code"]) == (JobState.FAILED, "quarantined")
    next_one = world.queued()
    assert fail_to_load(world, "w1", "of the next").id == next_one.id
    assert world.job(next_one.id).counted_attempts == 1, "the known failure of the base model counts at once"


def test_workers_that_share_a_base_copy_count_as_one_witness(world: World) -> None:
    for worker_id, host in (("w1", "here"), ("w2", "here"), ("w3", "elsewhere")):
        world.worker(worker_id, host=host)
    world.queued()

    counted: list[int] = []
    for number, worker_id in enumerate(("w1", "w2", "w1", "w3")):
        world.beat(worker_id="w3")
        counted.append(fail_to_load(world, worker_id, f"t{number}").counted_attempts)

    assert counted == [0, 0, 0, 1]


def test_worker_too_small_for_the_base_is_not_waited_for(world: World) -> None:
    world.worker("w1")
    world.worker("small", memory_bytes=1000)
    world.queued()

    states: list[str] = []
    for number in range(MAX_COUNTED_ATTEMPTS):
        world.beat(worker_id="small")
        states.append(fail_to_load(world, "w1", f"t{number}").state)

    assert states == ["queued", "queued", "failed"]


def test_one_job_does_not_cordon_a_worker_for_an_unproven_base(world: World) -> None:
    """Either the worker or the base model may be at fault, and another worker could try."""
    world.worker("w1")
    world.worker("w2")
    world.queued()

    counted = [fail_to_load(world, "w1", f"t{number}").counted_attempts for number in range(5)]

    assert counted == [0] * 5
    assert not is_cordoned(world, "w1")


def test_one_job_cordons_a_worker_for_a_base_that_others_loaded(world: World) -> None:
    world.worker("w1")
    world.worker("w2")
    world.queued()
    world.complete(load(world, "w2", "good", is_ready=True).claim_id)
    world.queued()

    for number in range(3):
        assert not is_cordoned(world, "w1")
        fail_to_load(world, "w1", f"t{number}")

    assert is_cordoned(world, "w1")


def test_failed_load_on_the_only_worker_counts_at_once(world: World) -> None:
    world.worker("w1")
    world.queued()

    states = [fail_to_load(world, "w1", f"t{number}").state for number in range(MAX_COUNTED_ATTEMPTS)]

    assert states == ["queued", "queued", "failed"]


def test_base_that_was_loaded_elsewhere_is_not_at_fault(world: World) -> None:
    world.worker("w1")
    world.worker("w2")
    world.queued()
    done = load(world, "w2", "good", is_ready=True)
    world.complete(done.claim_id)
    world.queued()

    counted = [fail_to_load(world, f"w{number % 2 + 1}", f"t{number}").counted_attempts for number in range(5)]

    assert counted == [0] * 5


def test_base_that_fails_everywhere_cordons_at_most_one_worker(world: World) -> None:
    """The first worker is cordoned, because the fault may still be its own."""
    world.worker("w1")
    world.worker("w2")
    for _ in range(4):
        world.queued()

    first = {fail_to_load(world, "w1", f"t{number}", rest_seconds=1).id for number in range(3)}
    is_first_cordoned = is_cordoned(world, "w1")
    second = {fail_to_load(world, "w2", f"u{number}", rest_seconds=1).id for number in range(5)}

    assert (len(first), is_first_cordoned) == (3, True)
    assert len(second) >= 3
    assert not is_cordoned(world, "w2")


def test_three_bases_that_fail_to_load_cordon_their_worker(world: World) -> None:
    world.worker("w1")
    for name in ("one", "two", "three"):
        world.base(name)
        world.queued(model=name)

    for number in range(3):
        assert not is_cordoned(world, "w1")
        fail_to_load(world, "w1", f"t{number}", rest_seconds=1)

    assert is_cordoned(world, "w1")


def test_node_that_fails_a_proven_base_is_cordoned_after_three_jobs(world: World) -> None:
    world.worker("w1")
    world.worker("w2")
    world.queued()
    world.complete(load(world, "w2", "good", is_ready=True).claim_id)
    for _ in range(3):
        world.queued()

    for number in range(9):
        if not is_cordoned(world, "w1"):
            fail_to_load(world, "w1", f"t{number}", rest_seconds=1)

    assert is_cordoned(world, "w1")


@pytest.mark.parametrize("has_loaded_another", [True, False])
def test_failing_base_is_at_fault_if_the_only_worker_loaded_another(world: World, has_loaded_another: bool) -> None:
    world.worker("w1")
    world.base("another")
    world.queued(model="another")
    other = load(world, "w1", "of another", is_ready=has_loaded_another)
    claims.end(world.db, other.claim_id, reason=EndReason.CANCELLED_BY_USER, detail="")
    waiting = [world.queued() for _ in range(3)]

    for number in range(3):
        fail_to_load(world, "w1", f"t{number}", rest_seconds=1)

    assert {world.job(job.id).counted_attempts for job in waiting} == {1}
    assert is_cordoned(world, "w1") is not has_loaded_another
