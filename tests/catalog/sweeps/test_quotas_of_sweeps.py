"""Trials of a sweep count toward the limits of its project and its key."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from catalog.errors import RateLimited
from catalog.spec.sweep import SweepRequest
from catalog.sweeps import controller, creation, queries
from catalog.tables.jobs import Sweep
from catalog.tenancy.authentication import Caller
from catalog.usage.ledger import DAY_SECONDS
from tests.catalog.usage.test_quotas import MIDNIGHT, files_of, limit
from tests.catalog.world import World, sha


@pytest.fixture
def world(world: World) -> World:
    world.clock.now = MIDNIGHT
    world.worker()
    return world


def test_sweep_of_a_project_at_its_limit_delays_its_next_trials(world: World) -> None:
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


def test_all_trials_of_a_sweep_count_toward_the_daily_jobs_of_its_key(world: World) -> None:
    parameters = {"lora.rank": {"values": [2, 4, 8]}}
    body = {"model": "smol", **files_of(world), "search": {"type": "grid"}, "parameters": parameters}
    request = SweepRequest.model_validate({**body, "max_concurrent": 1})
    caller = replace(world.caller, service_jobs_per_day=2)

    with pytest.raises(RateLimited) as refusal:
        creation.create(world.db, caller=caller, request=request, body_digest="d")

    assert refusal.value.retry_after_seconds == math.inf


def test_future_trials_of_a_sweep_count_from_its_creation(world: World) -> None:
    caller = replace(world.caller, service_jobs_per_day=5)
    sweep = _grid_of_three(world, caller)
    world.submit(caller=caller)
    world.submit(caller=caller)

    with pytest.raises(RateLimited, match="also counts 2 trials") as refusal:
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


@pytest.mark.both_databases
def test_future_trials_of_a_sweep_with_a_nul_character_count(world: World) -> None:
    caller = replace(world.caller, service_jobs_per_day=4)
    _grid_of_three(world, caller, metadata={"note": "a\0b"})

    world.submit(caller=caller)

    with pytest.raises(RateLimited, match="also counts 2 trials"):
        world.submit(caller=caller)


def test_trials_that_a_closed_sweep_will_not_create_do_not_count(world: World) -> None:
    caller = replace(world.caller, service_jobs_per_day=3)
    sweep = _grid_of_three(world, caller)
    with pytest.raises(RateLimited):
        world.submit(caller=caller)

    queries.close(world.db, project_id=caller.project_id, sweep_id=sweep.id)

    for _ in range(2):
        world.submit(caller=caller)
    with pytest.raises(RateLimited):
        world.submit(caller=caller)


def _grid_of_three(world: World, caller: Caller, **fields: Any) -> Sweep:
    """Create a sweep that creates one trial at a time."""
    grid = {"search": {"type": "grid"}, "parameters": {"lora.rank": {"values": [2, 4, 8]}}, "max_concurrent": 1}
    body = {"model": "smol", **files_of(world), **grid, **fields}
    request = SweepRequest.model_validate(body)
    return creation.create(world.db, caller=caller, request=request, body_digest=sha(str(body)))


def _sweep(world: World, sweep_id: str) -> Sweep:
    return queries.get(world.db, project_id=world.caller.project_id, sweep_id=sweep_id).sweep
