"""Whom of a gang the ends of its trainers cordon: the node whose doing they were, whoever led."""

from __future__ import annotations

import pytest

from catalog.fleet import workers
from catalog.queue import claims
from catalog.states import EndReason
from tests.catalog.fleet.test_cordons import row
from tests.catalog.world import World

OF_GANG = {"gang": {"name": "pair", "workers": ["w1", "w2"]}}


def fail_of_gang(world: World, trainer: str, *, blamed: str | None, worker_id: str = "w1") -> None:
    """One more job, which ends badly alone in a trainer that this worker leads and w2 lends to."""
    workers.register_trainer(
        world.db, trainer_id=trainer, worker_id=worker_id, base_digest="", pack_key="", report=OF_GANG
    )
    job = world.queued(seed=len(trainer))
    (claim,) = [one for one in world.claim(worker_id, trainer_id=trainer) if one.job.id == job.id]
    crashed = EndReason.TRAINER_CRASHED
    claims.end(world.db, claim.claim_id, reason=crashed, detail="", blamed_worker_id=blamed)


@pytest.mark.parametrize(("blamed", "cordoned"), [("w2", {"w2"}), ("w1", {"w1"}), (None, {"w1"}), ("", set[str]())])
def test_of_a_gang_the_node_is_cordoned_that_is_to_blame(world: World, blamed: str | None, cordoned: set[str]) -> None:
    world.worker("w1")
    world.worker("w2")

    for number in range(3):
        fail_of_gang(world, f"trainer-{number}", blamed=blamed)

    assert {worker_id for worker_id in ("w1", "w2") if row(world, worker_id).cordon} == cordoned


def test_what_succeeded_with_a_member_clears_it(world: World) -> None:
    world.worker("w1")
    world.worker("w2")
    for number in range(2):
        fail_of_gang(world, f"trainer-{number}", blamed="w2")
    workers.register_trainer(world.db, trainer_id="good", worker_id="w1", base_digest="", pack_key="", report=OF_GANG)
    world.clock.advance(3600)
    for claim in world.claim("w1", trainer_id="good"):
        world.complete(claim.claim_id)

    fail_of_gang(world, "trainer-2", blamed="w2")
    after_one = row(world, "w2").cordon
    for number in (3, 4):
        fail_of_gang(world, f"trainer-{number}", blamed="w2")

    assert after_one is None
    assert row(world, "w2").cordon is not None
