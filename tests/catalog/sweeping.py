"""Helpers that create, train, measure and read sweeps."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.caller import Caller
from catalog.lifecycle import recording
from catalog.lifecycle.recording import Course
from catalog.queue.claiming import Claim
from catalog.spec.sweep import SweepRequest
from catalog.sweeps import controller, creation, queries
from catalog.tables.jobs import Sweep
from tests.catalog.world import World, sha

ON_ONE_DATABASE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For tests whose result does not depend on the database."""
FOUR = {"lora.rank": {"values": [2, 4, 8, 16]}}


def sweep_request(world: World, **fields: Any) -> SweepRequest:
    usual = {"model": "smol", "training_file": world.file_id, "validation_file": world.file_id, "parameters": FOUR}
    return SweepRequest.model_validate({**usual, "search": {"type": "grid"}, **fields})


def make(world: World, **fields: Any) -> str:
    return send(world, sweep_request(world, **fields)).id


def send(world: World, request: SweepRequest, **given: Any) -> Sweep:
    return creation.create(
        world.db, caller=world.caller, request=request, **{"body_digest": sha(request.model_dump_json()), **given}
    )


def sweep_of(world: World, caller: Caller, **fields: Any) -> str:
    """Create a random search as this caller. Returns its id."""
    search = {"search": {"type": "random", "trials": 30, "seed": 0}, "parameters": {"lora.rank": {"min": 1, "max": 64}}}
    request = sweep_request(world, **{**search, **fields})
    return creation.create(world.db, caller=caller, request=request, body_digest=sha(caller.api_key_id)).id


def advance(world: World) -> int:
    """Advance the controller until nothing is left to do. Returns the number of steps."""
    steps = 0
    while controller.advance(world.db):
        steps += 1
        assert steps < 100
    return steps


def of(world: World, sweep_id: str) -> dict[str, Any]:
    return {"project_id": world.caller.project_id, "sweep_id": sweep_id}


def view(world: World, sweep_id: str) -> queries.SweepView:
    return queries.get(world.db, **of(world, sweep_id))


def board(world: World, sweep_id: str, **page: Any) -> list[queries.TrialView]:
    return queries.leaderboard(world.db, **of(world, sweep_id), **page).items


def train(world: World, num_steps: int = 10) -> dict[int, Claim]:
    """Claim all waiting trials. Returns the claims by trial number."""
    world.worker()
    world.prepare_all(num_steps=num_steps)
    claimed = world.claim()
    trials = queries.trials_by_job(world.db, [claim.job.id for claim in claimed])
    return {trials[claim.job.id].number: claim for claim in claimed}


def measure(world: World, claim: Claim, step: int, loss: float) -> bool:
    """Record an evaluation of a trial, and advance the controller. Returns whether the trial must stop."""
    point = {"kind": "valid", "step": step, "loss": loss}
    recording.record_metrics(world.db, claim.claim_id, [point])
    advance(world)
    return world.job(claim.job.id).cancel_requested


def finish(world: World, claim: Claim, loss: float, *, steps: int = 10) -> None:
    recording.record_metrics(world.db, claim.claim_id, [{"kind": "valid", "step": steps, "loss": loss}])
    course = Course(steps=steps, kept_step=steps, stopped_early=None)
    world.complete(claim.claim_id, f"adapter of {claim.job.id}", course=course)
