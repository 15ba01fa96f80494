"""Users' commands on sweeps: stopping a trial, closing and cancelling; errors that name the reason."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from catalog.errors import Conflict, NotFound
from catalog.queue import claims
from catalog.registry import adapters
from catalog.states import EndReason, JobState
from catalog.sweeps import queries
from catalog.tables.tenancy import AuditEvent
from tests.catalog.sweeping import ON_ONE_DATABASE, advance, board, finish, make, of, train, view
from tests.catalog.world import World

ONE = {"lora.rank": {"values": [4]}}


def test_running_trial_is_stopped_by_its_worker(world: World) -> None:
    sweep_id = make(world)
    claimed = train(world)

    queries.stop_trial(world.db, **of(world, sweep_id), number=1)

    assert world.job(claimed[1].job.id).cancel_requested
    claims.end(world.db, claimed[1].claim_id, reason=EndReason.CANCELLED_BY_USER, detail="Cancelled.")
    assert world.job(claimed[1].job.id).reason == EndReason.PRUNED


@ON_ONE_DATABASE
def test_waiting_trial_is_stopped_at_once(world: World) -> None:
    sweep_id = make(world, parameters=ONE)

    queries.stop_trial(world.db, **of(world, sweep_id), number=0)

    (trial,) = board(world, sweep_id)
    assert (trial.job.state, trial.job.reason) == (JobState.CANCELLED, EndReason.PRUNED)
    with pytest.raises(Conflict):
        queries.stop_trial(world.db, **of(world, sweep_id), number=0)
    queries.stop_trial(world.db, **of(world, sweep_id), number=0, is_client_retry=True)
    advance(world)
    assert view(world, sweep_id).sweep.state == "failed"


@ON_ONE_DATABASE
def test_trial_that_a_sweep_has_yet_to_create_is_awaited(world: World) -> None:
    ranks = {"lora.rank": {"min": 1, "max": 64}}
    sweep_id = make(world, search={"type": "random", "trials": 30, "seed": 0}, parameters=ranks)

    def refusal(number: int) -> NotFound:
        with pytest.raises(NotFound) as refused:
            queries.stop_trial(world.db, **of(world, sweep_id), number=number)
        return refused.value

    assert refusal(29).message == f"Trial 29 of sweep {sweep_id} has not been created yet."
    assert refusal(29).remedy == f"Send the request again once GET /v1/sweeps/{sweep_id}/trials lists the trial."
    assert refusal(30).message == f"Sweep {sweep_id} has no trial 30."
    queries.close(world.db, **of(world, sweep_id))
    assert refusal(29).message == f"Sweep {sweep_id} has no trial 29."


@ON_ONE_DATABASE
def test_missing_best_adapter_of_a_sweep_is_explained(world: World) -> None:
    def remedy(name: str) -> str:
        with pytest.raises(NotFound) as refused:
            adapters.get(world.db, project_id=world.caller.project_id, name=name)
        assert refused.value.code == "adapter_not_found"
        assert refused.value.param == "adapter"
        return refused.value.sentence()

    sweep_id = make(world, parameters=ONE)
    assert "Check the sweep's ID" in remedy("sweep-unknown")
    assert "Wait until the sweep finishes" in remedy(sweep_id)

    finish(world, train(world)[0], 1.0)
    advance(world)
    best = adapters.get(world.db, project_id=world.caller.project_id, name=sweep_id).adapter.name
    adapters.delete(world.db, project_id=world.caller.project_id, name=best)
    assert "was deleted" in remedy(sweep_id)

    failed = make(world, parameters=ONE, seed=1)
    queries.stop_trial(world.db, **of(world, failed), number=0)
    advance(world)
    assert "without a successful trial" in remedy(failed)


@ON_ONE_DATABASE
def test_user_actions_on_a_sweep_are_audited_once(world: World) -> None:
    sweep_id = make(world, max_concurrent=1)
    for _ in range(2):
        queries.close(world.db, **of(world, sweep_id))
    queries.stop_trial(world.db, **of(world, sweep_id), number=0)
    for _ in range(2):
        queries.cancel(world.db, **of(world, sweep_id))

    with world.db.read() as session:
        types = session.scalars(select(AuditEvent.type)).all()

    about_it = [each for each in types if each.startswith(("sweep", "trial", "job"))]
    assert sorted(about_it) == ["job.created", "sweep.cancelled", "sweep.closed", "sweep.created", "trial.stopped"]
