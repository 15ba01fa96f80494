"""What projects use is charged while they train, and decides who trains next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from catalog import claims, jobs, projects, queue, recovery, usage
from catalog.errors import InvalidRequest, NotFound
from catalog.keys import Caller
from catalog.scheduling.picture import HALF_LIFE_SECONDS, PROMOTE_AFTER_SECONDS, USUAL, Room
from catalog.states import EndReason
from catalog.tables import Job
from tests.catalog.world import LEASE, World

ONE = Room(max_jobs=1, memory_bytes_free=10**12)


def theirs(world: World, **fields: Any) -> Job:
    job = world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger), **fields)
    world.prepare_all()
    return job


def used(world: World) -> dict[str, float]:
    """By project of this world, as it counts now."""
    names = {world.caller.project_id: "ours", world.stranger.project_id: "theirs"}
    with world.db.read() as session:
        found = usage.used(session, names, now=world.clock.now, policy=USUAL)
    return {name: round(found[project_id], 1) for project_id, name in names.items()}


def operator(world: World) -> Caller:
    return replace(world.caller, is_operator=True)


def train(world: World, seconds: float, claim: claims.Claim) -> None:
    world.clock.turn(seconds)
    world.beat(claim.claim_id)


def test_those_that_train_together_are_charged_their_parts_of_each_device(world: World) -> None:
    world.worker()
    world.queued()
    theirs(world)
    held = world.claim()

    world.clock.turn(20)
    world.beat(*(claim.claim_id for claim in held))
    world.complete(held[0].claim_id)
    world.clock.turn(20)
    world.beat(held[1].claim_id)

    assert used(world) == {"ours": 10, "theirs": 30}
    assert round(world.job(held[0].job.id).device_seconds) == 10


def test_the_last_seconds_are_charged_with_the_end(world: World) -> None:
    world.worker()
    claim = world.running()
    train(world, 20, claim)
    world.clock.turn(5)

    claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")
    world.clock.turn(50)
    (again,) = world.claim()
    train(world, 5, again)

    assert used(world)["ours"] == 30


def test_a_worker_that_is_lost_costs_nothing_after_its_last_heartbeat(world: World) -> None:
    world.worker()
    claim = world.running()
    train(world, 20, claim)

    world.pass_time(2 * LEASE)
    recovery.expire(world.db, grace_seconds=LEASE)

    assert world.job(claim.job.id).state == "queued"
    assert used(world)["ours"] == pytest.approx(20, abs=0.1)


def test_what_was_used_long_ago_counts_less(world: World) -> None:
    world.worker()
    train(world, 1000, world.running())

    world.clock.turn(HALF_LIFE_SECONDS)

    assert used(world)["ours"] == pytest.approx(500, abs=0.1)


def test_the_project_that_has_had_less_for_its_weight_goes_first(world: World) -> None:
    world.worker()
    claim = world.running()
    train(world, 50, claim)
    world.complete(claim.claim_id)
    ours, foreign = world.queued(), theirs(world)

    def first() -> str:
        with world.db.read() as session:
            return queue.turns(session, now=world.clock())[0].candidate.job_id

    assert first() == foreign.id
    (claim,) = world.claim(room=ONE)
    assert claim.job.id == foreign.id
    theirs(world)
    assert first() == ours.id, "the one that runs counts for 300 device-seconds"
    projects.weigh(world.db, caller=operator(world), project="theirs", weight=10)
    assert first() != ours.id


def test_a_weight_is_a_positive_number_of_a_project_that_exists(world: World) -> None:
    asked: dict[str, Any] = {"caller": operator(world), "project": "ours"}
    assert projects.weigh(world.db, **asked, weight=2.5).weight == 2.5
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest) as refusal:
            projects.weigh(world.db, **asked, weight=weight)
        assert (refusal.value.code, refusal.value.param) == ("invalid_weight", "weight")
    with pytest.raises(NotFound):
        projects.weigh(world.db, caller=world.caller, project="theirs", weight=1)


def test_batch_is_claimed_though_there_is_always_something_urgent(world: World) -> None:
    patient = world.queued(priority="batch")
    pressing = world.queued(priority="urgent")
    world.flood(pressing, 20)

    def claimed() -> str:
        (claim,) = world.claim(room=ONE)
        world.complete(claim.claim_id, claim.claim_id)
        return claim.job.id

    assert claimed() == pressing.id
    world.clock.turn(3 * PROMOTE_AFTER_SECONDS)
    first_two = [claimed(), claimed()]
    world.flood(world.queued(priority="batch"), 1)

    assert patient.id in first_two
    assert "urgent" in str([world.job(claimed()).requested for _ in range(3)])


def test_why_tells_the_shares_in_a_sentence_and_as_data_and_names_nobody(world: World) -> None:
    world.worker()
    claim = world.running()
    train(world, 75, claim)
    world.complete(claim.claim_id)
    mine = world.queued()
    foreign = theirs(world)

    why = jobs.explain(world.db, **world.of(mine.id))

    share = why["share"]
    assert (share["due"], share["part_of_use"], share["num_projects"], share["weight"]) == (0.5, 1.0, 2, 1)
    assert share["device_seconds"] == pytest.approx(75, abs=0.1)
    assert why["explanation"] == (
        "1 job is ahead of it. Of the 2 projects whose jobs wait, its own is due 50% by weight, and has had 100% of "
        "what they trained of late."
    )
    assert why["policy"]["promote_after_seconds"] == PROMOTE_AFTER_SECONDS
    for secret in (foreign.id, world.stranger.project_id, "theirs"):
        assert secret not in str(why)
    (claim,) = world.claim(room=ONE)
    assert claim.job.id == foreign.id
    (attempt,) = jobs.attempts(world.db, project_id=world.stranger.project_id, job_id=foreign.id)
    assert attempt.why is not None
    assert attempt.why["share"]["due"] == 0.5
