"""What a sweep's trials count against: its project's limits and its key's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from catalog.errors import RateLimited
from catalog.search.spec import SweepRequest
from catalog.sweeps import commands, controller, creation, queries
from catalog.tables.sweeps import Sweep
from catalog.tenancy.authentication import Caller
from catalog.usage.ledger import DAY_SECONDS
from tests.catalog.usage.test_quotas import MIDNIGHT, files_of, limit
from tests.catalog.world import World, sha


@pytest.fixture
def world(world: World) -> World:
    world.clock.now = MIDNIGHT
    world.worker()
    return world


def test_a_sweep_whose_project_has_reached_a_limit_waits_with_its_next_trials(world: World) -> None:
    parameters = {"lora.rank": {"values": [2, 4, 8]}}
    body = {"model": "smol", **files_of(world), "search": {"type": "grid"}, "parameters": parameters}
    request = SweepRequest.model_validate({**body, "max_concurrent": 1})
    sweep = creation.create(world.db, caller=world.caller, request=request, body_digest="d")
    limit(world, jobs_per_day=2)

    def train() -> None:
        world.prepare_all()
        for claim in world.claim():
            world.complete(claim.claim_id, claim.claim_id)
        while controller.advance(world.db):
            pass

    train()
    train()
    held = queries.get(world.db, project_id=world.caller.project_id, sweep_id=sweep.id).sweep
    world.clock.now = MIDNIGHT + DAY_SECONDS
    train()
    done = queries.get(world.db, project_id=world.caller.project_id, sweep_id=sweep.id).sweep

    assert (held.num_created, held.is_closed, held.error) == (2, False, None)
    assert (done.num_created, done.error) == (3, None)


def test_a_sweep_counts_whole_against_its_keys_jobs_of_a_day(world: World) -> None:
    parameters = {"lora.rank": {"values": [2, 4, 8]}}
    body = {"model": "smol", **files_of(world), "search": {"type": "grid"}, "parameters": parameters}
    request = SweepRequest.model_validate({**body, "max_concurrent": 1})
    caller = replace(world.caller, service_jobs_per_day=2)

    with pytest.raises(RateLimited) as refusal:
        creation.create(world.db, caller=caller, request=request, body_digest="d")

    assert refusal.value.retry_after_seconds == math.inf


def test_trials_that_a_sweep_is_still_to_make_are_counted_from_the_start(world: World) -> None:
    caller = replace(world.caller, service_jobs_per_day=5)
    sweep = _grid_of_three(world, caller)
    world.submit(caller=caller)
    _grid_of_three(world, world.caller, search={"type": "ask_tell", "trials": 9}, parameters={})  # it may make none
    world.submit(caller=caller)

    with pytest.raises(RateLimited, match="includes 2 trials") as refusal:
        world.submit(caller=caller)
    for _ in range(2):
        world.prepare_all()
        for claim in world.claim():
            world.complete(claim.claim_id, claim.claim_id)
        while controller.advance(world.db):
            pass
    with pytest.raises(RateLimited) as later:
        world.submit(caller=caller)

    assert sweep.num_created == 1
    assert _sweep(world, sweep.id).num_created == 3
    assert math.isfinite(refusal.value.retry_after_seconds)
    assert math.isfinite(later.value.retry_after_seconds)


def test_what_a_closed_sweep_will_not_make_is_not_counted(world: World) -> None:
    caller = replace(world.caller, service_jobs_per_day=3)
    sweep = _grid_of_three(world, caller)
    with pytest.raises(RateLimited):
        world.submit(caller=caller)

    commands.close(world.db, project_id=caller.project_id, sweep_id=sweep.id)

    for _ in range(2):
        world.submit(caller=caller)
    with pytest.raises(RateLimited):
        world.submit(caller=caller)


def _grid_of_three(world: World, caller: Caller, **fields: Any) -> Sweep:
    """A sweep of which one trial is made at a time."""
    grid = {"search": {"type": "grid"}, "parameters": {"lora.rank": {"values": [2, 4, 8]}}, "max_concurrent": 1}
    body = {"model": "smol", **files_of(world), **grid, **fields}
    if body["search"]["type"] == "ask_tell":
        del body["max_concurrent"]
    request = SweepRequest.model_validate(body)
    return creation.create(world.db, caller=caller, request=request, body_digest=sha(str(body)))


def _sweep(world: World, sweep_id: str) -> Sweep:
    return queries.get(world.db, project_id=world.caller.project_id, sweep_id=sweep_id).sweep
