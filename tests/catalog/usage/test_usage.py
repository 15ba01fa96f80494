"""Usage is charged while jobs train, and decides which project goes next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from catalog.errors import InvalidRequest, NotFound
from catalog.fleet import gangs
from catalog.history import queries
from catalog.jobs import explanation
from catalog.lifecycle import recovery
from catalog.queue import charging, claiming, claims, listing
from catalog.scheduling.snapshot import HALF_LIFE_SECONDS, PROMOTE_AFTER_SECONDS, USUAL, Capacity
from catalog.states import EndReason
from catalog.tables.fleet import Worker
from catalog.tables.jobs import Job
from catalog.tenancy import projects
from catalog.tenancy.authentication import Caller
from tests.catalog.world import LEASE, World

ONE = Capacity(max_jobs=1, memory_bytes_free=10**12)


def theirs(world: World, **fields: Any) -> Job:
    job = world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger), **fields)
    world.prepare_all()
    return job


def used(world: World) -> dict[str, float]:
    """Return the decayed usage by project name."""
    names = {world.caller.project_id: "ours", world.stranger.project_id: "theirs"}
    with world.db.read() as session:
        found = charging.used(session, names, now=world.clock.now, policy=USUAL)
    return {name: round(found[project_id], 1) for project_id, name in names.items()}


def operator(world: World) -> Caller:
    return replace(world.caller, is_operator=True)


def train(world: World, seconds: float, claim: claiming.Claim) -> None:
    while seconds > 0:
        world.clock.advance(min(seconds, LEASE))
        world.beat(claim.claim_id)
        seconds -= LEASE


def test_packmates_split_the_charge_of_their_device(world: World) -> None:
    world.worker()
    world.queued()
    theirs(world)
    held = world.claim()

    world.clock.advance(20)
    world.beat(*(claim.claim_id for claim in held))
    world.complete(held[0].claim_id)
    world.clock.advance(20)
    world.beat(held[1].claim_id)

    assert used(world) == {"ours": 10, "theirs": 30}
    assert round(world.job(held[0].job.id).device_seconds) == 10


def test_urgent_device_seconds_count_twice_for_the_project(world: World) -> None:
    world.worker()
    claim = world.running(priority="urgent")
    train(world, 40, claim)
    world.clock.advance(10)
    world.complete(claim.claim_id)

    assert used(world)["ours"] == USUAL.urgent_multiple * 50 == 100
    assert round(world.job(claim.job.id).device_seconds) == 50


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ({"kind": "cuda", "indices": [2, 3], "num_processes": 2}, 2),
        ({"kind": "cuda", "indices": [2]}, 1),
        ({"kind": "cpu", "num_processes": 2}, 1),
    ],
)
def test_gpu_group_is_charged_per_gpu_and_a_cpu_once(world: World, device: dict[str, Any], expected: int) -> None:
    world.worker()
    with world.db.write() as session:
        session.get_one(Worker, "w1").devices = [device]
    world.queued()
    [held] = world.claim()
    with world.db.read() as session:
        shares = charging.shares_of_waiting(session, now=world.clock.now, policy=USUAL)
    assert shares == {}  # no share is read while no job is queued

    world.queued()
    with world.db.read() as session:
        shares = charging.shares_of_waiting(session, now=world.clock.now, policy=USUAL)
    assert shares[world.caller.project_id].devices_in_use == expected

    world.clock.advance(20)
    world.beat(held.claim_id)

    assert used(world)["ours"] == 20 * expected


def test_gang_job_is_charged_for_all_devices_of_the_gang(world: World) -> None:
    for worker_id in ("w1", "w2"):
        world.worker(worker_id)
        place = gangs.GangMember(db=world.db, worker_id=worker_id, gang="pair", silent_seconds=LEASE)
        gangs.enter(place, size=2, min_size=2, kind="cuda", num_processes=4, free_bytes=10**9)
    leader = gangs.GangMember(db=world.db, worker_id="w1", gang="pair", silent_seconds=LEASE)
    assert gangs.lead(leader)
    world.queued()
    [held] = world.claim(capacity=ONE)
    led = gangs.open_round(leader, members=["w1", "w2"], task={}, seconds=60)

    world.queued()
    with world.db.read() as session:
        shares = charging.shares_of_waiting(session, now=world.clock.now, policy=USUAL)
    assert shares[world.caller.project_id].devices_in_use == 8

    world.clock.advance(20)
    world.beat(held.claim_id)
    assert used(world)["ours"] == pytest.approx(160, abs=1)

    gangs.end_round(leader, led.round_id)
    world.clock.advance(20)
    world.beat(held.claim_id)
    assert used(world)["ours"] == pytest.approx(180, abs=1)


def test_last_seconds_are_charged_at_the_end(world: World) -> None:
    world.worker()
    claim = world.running()
    train(world, 20, claim)
    world.clock.advance(5)

    claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")
    world.clock.advance(50)
    (again,) = world.claim()
    train(world, 5, again)

    assert used(world)["ours"] == 30


def test_final_charge_does_not_decay_since_the_previous_charge(world: World) -> None:
    """The previous charge on the worker was long ago."""
    world.worker()
    claim = world.running()
    train(world, 40, claim)
    world.complete(claim.claim_id)
    world.clock.advance(HALF_LIFE_SECONDS)

    again = world.running()
    world.clock.advance(40)
    claims.end(world.db, again.claim_id, reason=EndReason.DRAINED, detail="")

    assert used(world)["ours"] == pytest.approx(40 / 2 + 40, abs=0.1)


def test_each_second_is_split_among_the_jobs_present(world: World) -> None:
    """One job joins and another leaves between two heartbeats."""
    world.worker()
    first = world.running()
    world.clock.advance(20)
    theirs(world)

    (joined,) = world.claim(pack_key=first.job.pack_key, trainer_id="trainer-w1")
    world.clock.advance(20)
    claims.end(world.db, first.claim_id, reason=EndReason.DRAINED, detail="")
    world.clock.advance(10)
    world.beat(joined.claim_id)

    assert used(world) == {"ours": 30, "theirs": 20}


def test_clock_jump_charges_at_most_one_lease(world: World) -> None:
    world.worker()
    claim = world.running()
    train(world, 10, claim)

    world.clock.advance(10 * HALF_LIFE_SECONDS)
    world.beat(claim.claim_id)

    assert used(world)["ours"] == pytest.approx(LEASE, abs=0.1)


def test_packmate_claims_do_not_delay_the_promotion_of_their_class(world: World) -> None:
    """Batch jobs join every trainer of a popular base model, but the one for a rare base model is still promoted."""
    world.base("rare")
    world.worker()
    patient = world.queued(model="rare", priority="batch")
    world.flood(world.queued(), 10)
    world.flood(world.queued(priority="batch"), 10)
    live = world.claim(capacity=ONE)[0].job.pack_key

    for _ in range(3):
        world.clock.advance(PROMOTE_AFTER_SECONDS)
        world.beat()
        world.claim(capacity=Capacity(max_jobs=4, memory_bytes_free=10**12), pack_key=live)
    (claim,) = world.claim("w2", capacity=ONE)

    assert claim.job.id == patient.id


def test_claims_on_too_small_workers_do_not_delay_a_large_job(world: World) -> None:
    world.base("large", num_parameters=10**10)
    world.worker("small", 10**9)
    world.worker("wide", 10**12)
    patient = world.queued(model="large", priority="batch")
    pressing, rides = world.queued(priority="urgent"), world.queued(priority="batch")
    world.flood(pressing, 10)
    world.flood(rides, 10)
    small = Capacity(max_jobs=1, memory_bytes_free=10**9)

    world.clock.advance(3 * PROMOTE_AFTER_SECONDS - 60)
    for worker_id in ("small", "wide"):
        world.beat(worker_id=worker_id)
    assert [claim.job.id for claim in world.claim("wide", capacity=ONE)] == [pressing.id]
    (first,) = world.claim("small", capacity=small)
    world.clock.advance(120)
    for worker_id in ("small", "wide"):
        world.beat(worker_id=worker_id)
    assert world.claim("small", capacity=small)[0].job.priority == 2, "its class is promoted there as well"
    (claim,) = world.claim("wide", capacity=ONE)

    assert (first.job.priority, claim.job.id) == (0, patient.id)


def test_lost_worker_charges_nothing_after_its_last_heartbeat(world: World) -> None:
    world.worker()
    claim = world.running()
    train(world, 20, claim)

    world.pass_time(2 * LEASE)
    recovery.expire(world.db, lease_seconds=LEASE)

    assert world.job(claim.job.id).state == "queued"
    assert used(world)["ours"] == pytest.approx(20, abs=0.1)


def test_old_usage_counts_less(world: World) -> None:
    world.worker()
    train(world, 50, world.running())

    world.clock.advance(HALF_LIFE_SECONDS)

    assert used(world)["ours"] == pytest.approx(25, abs=0.1)


def test_project_with_lower_usage_per_weight_goes_first(world: World) -> None:
    world.worker()
    claim = world.running()
    train(world, 50, claim)
    world.complete(claim.claim_id)
    ours, foreign = world.queued(), theirs(world)

    def first() -> str:
        with world.db.read() as session:
            return listing.queue_entries(session, now=world.clock())[0].candidate.job_id

    assert first() == foreign.id
    (claim,) = world.claim(capacity=ONE)
    assert claim.job.id == foreign.id
    theirs(world)
    assert first() == ours.id, "the running job counts for 300 device-seconds"
    projects.set_weight(world.db, caller=operator(world), project="theirs", weight=10)
    assert first() != ours.id


def test_weight_must_be_positive_and_of_an_existing_project(world: World) -> None:
    target: dict[str, Any] = {"caller": operator(world), "project": "ours"}
    assert projects.set_weight(world.db, **target, weight=2.5).weight == 2.5
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest) as refusal:
            projects.set_weight(world.db, **target, weight=weight)
        assert (refusal.value.code, refusal.value.param) == ("invalid_value", "weight")
    with pytest.raises(NotFound):
        projects.set_weight(world.db, caller=world.caller, project="theirs", weight=1)


def test_batch_job_is_claimed_despite_endless_urgent_jobs(world: World) -> None:
    world.worker()
    patient = world.queued(priority="batch")
    pressing = world.queued(priority="urgent")
    world.flood(pressing, 20)

    def claimed() -> str:
        (claim,) = world.claim(capacity=ONE)
        world.complete(claim.claim_id, claim.claim_id)
        return claim.job.id

    assert claimed() == pressing.id
    world.clock.advance(3 * PROMOTE_AFTER_SECONDS)
    world.beat()
    first_two = [claimed(), claimed()]
    world.flood(world.queued(priority="batch"), 1)

    assert patient.id in first_two
    assert "urgent" in str([world.job(claimed()).requested for _ in range(3)])


def test_explanation_contains_shares_without_other_projects(world: World) -> None:
    world.worker()
    claim = world.running()
    train(world, 75, claim)
    world.complete(claim.claim_id)
    mine = world.queued()
    foreign = theirs(world)

    why = explanation.explain(world.db, **world.of(mine.id))

    share = why["share"]
    assert (share["projects_ahead"], share["num_projects"], share["weight"]) == (1, 2, 1)
    assert share["device_seconds"] == pytest.approx(75, abs=0.1)
    assert why["explanation"] == (
        "1 job is ahead of it. 2 projects have queued jobs. 1 of them has less recent usage, relative to weight."
    )
    assert "shares" not in why
    seen = explanation.explain(world.db, **world.of(mine.id), sees_all=True)["shares"]
    assert [(row["project_id"], row["fair_share"]) for row in seen] == [
        (world.stranger.project_id, 0.5),
        (world.caller.project_id, 0.5),
    ]
    assert why["policy"]["priority_aging_seconds"] == PROMOTE_AFTER_SECONDS
    for secret in (foreign.id, world.stranger.project_id, "theirs"):
        assert secret not in str(why)
    (claim,) = world.claim(capacity=ONE)
    assert claim.job.id == foreign.id
    (attempt,) = queries.attempts(world.db, project_id=world.stranger.project_id, job_id=foreign.id)
    assert attempt.why["share"]["num_projects"] == 2
    assert world.caller.project_id not in str(attempt.why)
