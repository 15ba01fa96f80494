"""Failed gang trainers cordon the member at fault, regardless of the leader."""

from __future__ import annotations

import pytest

from catalog.fleet import workers
from catalog.queue import claims
from catalog.states import EndReason
from tests.catalog.fleet.test_cordons import row
from tests.catalog.world import World

OF_GANG = {"gang": {"name": "pair", "workers": ["w1", "w2"]}}


def fail_of_gang(world: World, trainer: str, *, at_fault: str | None, worker_id: str = "w1") -> None:
    """Run one more job alone in a trainer of the gang, which this worker leads, and let it fail."""
    workers.register_trainer(
        world.db, trainer_id=trainer, worker_id=worker_id, base_digest="", pack_key="", report=OF_GANG
    )
    job = world.queued(seed=len(trainer))
    (claim,) = [one for one in world.claim(worker_id, trainer_id=trainer) if one.job.id == job.id]
    crashed = EndReason.TRAINER_CRASHED
    claims.end(world.db, claim.claim_id, reason=crashed, detail="", blamed_worker_id=at_fault)


@pytest.mark.parametrize(("at_fault", "cordoned"), [("w2", {"w2"}), ("w1", {"w1"}), (None, {"w1"}), ("", set[str]())])
def test_gang_member_at_fault_is_cordoned(world: World, at_fault: str | None, cordoned: set[str]) -> None:
    world.worker("w1")
    world.worker("w2")

    for number in range(3):
        fail_of_gang(world, f"trainer-{number}", at_fault=at_fault)

    assert {worker_id for worker_id in ("w1", "w2") if row(world, worker_id).cordon} == cordoned


def test_success_with_a_gang_member_clears_its_failures(world: World) -> None:
    world.worker("w1")
    world.worker("w2")
    for number in range(2):
        fail_of_gang(world, f"trainer-{number}", at_fault="w2")
    workers.register_trainer(world.db, trainer_id="good", worker_id="w1", base_digest="", pack_key="", report=OF_GANG)
    world.clock.advance(3600)
    for claim in world.claim("w1", trainer_id="good"):
        world.complete(claim.claim_id)

    fail_of_gang(world, "trainer-2", at_fault="w2")
    after_one = row(world, "w2").cordon
    for number in (3, 4):
        fail_of_gang(world, f"trainer-{number}", at_fault="w2")

    assert after_one is None
    assert row(world, "w2").cordon is not None
