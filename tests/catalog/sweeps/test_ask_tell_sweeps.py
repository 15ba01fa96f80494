"""Ask-tell sweeps, whose trials the client chooses: adding, stopping and closing."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from catalog.errors import Conflict, LorryError, NotFound
from catalog.queue import claims
from catalog.registry import adapters
from catalog.states import EndReason, JobState
from catalog.sweeps import commands, creation
from catalog.tables.audit import AuditEvent
from catalog.tables.sweeps import Sweep
from tests.catalog.sweeping import ON_ONE_DATABASE, add, advance, finish, make, of, train, view
from tests.catalog.world import World


def test_client_adds_trials_and_stops_those_it_no_longer_needs(world: World) -> None:
    sweep_id = make(world, search={"type": "ask_tell", "trials": 3}, parameters={})
    assert add(world, sweep_id, 4) == 0
    assert add(world, sweep_id, 8) == 1
    assert add(world, sweep_id, 8, is_client_retry=True) == 1
    claimed = train(world)

    _, job = commands.stop_trial(world.db, **of(world, sweep_id), number=1)

    assert job.cancel_requested
    claims.end(world.db, claimed[1].claim_id, reason=EndReason.CANCELLED_BY_USER, detail="Cancelled.")
    assert world.job(claimed[1].job.id).reason == EndReason.PRUNED
    finish(world, claimed[0], 1.0)
    advance(world)
    assert view(world, sweep_id).sweep.state == "running"  # the client may add another trial
    commands.close(world.db, **of(world, sweep_id))
    advance(world)
    assert view(world, sweep_id).sweep.state == "succeeded"
    with pytest.raises(Conflict, match="because it has finished"):
        add(world, sweep_id, 2)


@ON_ONE_DATABASE
def test_waiting_trial_is_stopped_at_once(world: World) -> None:
    sweep_id = make(world, search={"type": "ask_tell", "trials": 1}, parameters={})
    add(world, sweep_id, 4)

    _, job = commands.stop_trial(world.db, **of(world, sweep_id), number=0)

    assert (job.state, job.reason) == (JobState.CANCELLED, EndReason.PRUNED)
    with pytest.raises(Conflict):
        commands.stop_trial(world.db, **of(world, sweep_id), number=0)
    commands.stop_trial(world.db, **of(world, sweep_id), number=0, is_client_retry=True)
    advance(world)
    assert view(world, sweep_id).sweep.state == "failed"


@ON_ONE_DATABASE
@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"lora.rank": 1000}, "invalid_value"),
        ({"lora.rnak": 4}, "unknown_parameter"),
        ({"model": "x"}, "fixed_in_a_sweep"),
    ],
)
def test_client_parameters_are_validated_like_those_of_a_sweep(world: World, parameters: Any, code: str) -> None:
    sweep_id = make(world, search={"type": "ask_tell", "trials": 3}, parameters={})

    with pytest.raises(LorryError) as refused:
        creation.add_trial(world.db, caller=world.caller, sweep_id=sweep_id, parameters=parameters)

    assert refused.value.code == code
    assert view(world, sweep_id).sweep.num_created == 0


@ON_ONE_DATABASE
def test_sweep_that_chooses_its_own_trials_rejects_added_ones(world: World) -> None:
    sweep_id = make(world)

    with pytest.raises(Conflict) as refused:
        add(world, sweep_id, 4)

    assert refused.value.code == "not_an_ask_tell_sweep"


@ON_ONE_DATABASE
def test_rejected_trial_names_the_reason(world: World) -> None:
    def ask_tell(trials: int) -> str:
        return make(world, search={"type": "ask_tell", "trials": trials}, parameters={})

    full, closed, cancelled, failed = ask_tell(1), ask_tell(2), ask_tell(2), ask_tell(2)
    add(world, full, 4)
    add(world, closed, 4)
    commands.close(world.db, **of(world, closed))
    commands.cancel(world.db, **of(world, cancelled))

    with world.db.write() as session:
        failing = session.get_one(Sweep, failed)
        failing.is_closed, failing.error = True, {"code": "api_key_revoked", "message": "Revoked.", "param": None}

    reasons = {
        full: "as search.trials allows \\(1\\)",
        closed: "because it was closed",
        cancelled: "because it was cancelled",
    }
    reasons |= {failed: "because it was closed with the error api_key_revoked"}
    for sweep_id, reason in reasons.items():
        with pytest.raises(Conflict, match=reason):
            add(world, sweep_id, 8)


@ON_ONE_DATABASE
def test_unknown_trial_is_named_with_the_existing_numbers(world: World) -> None:
    sweep_id = make(world, search={"type": "ask_tell", "trials": 3}, parameters={})

    def remedy(number: int) -> str:
        with pytest.raises(NotFound, match=f"^Sweep {sweep_id} has no trial {number}") as refused:
            commands.stop_trial(world.db, **of(world, sweep_id), number=number)
        assert refused.value.code == "trial_not_found"
        return refused.value.remedy

    assert remedy(0) == f"Create the first trial with POST /v1/sweeps/{sweep_id}/trials."
    add(world, sweep_id, 4)
    assert remedy(1) == "Use 0, the only trial."
    add(world, sweep_id, 8)
    assert remedy(2).startswith("Use a number from 0 to 1: ")

    empty = sweep_id = make(world, search={"type": "ask_tell", "trials": 3}, parameters={}, seed=1)
    commands.close(world.db, **of(world, empty))
    assert remedy(0) == "Create a new sweep."


@ON_ONE_DATABASE
def test_trial_that_a_sweep_has_yet_to_create_is_awaited(world: World) -> None:
    ranks = {"lora.rank": {"min": 1, "max": 64}}
    sweep_id = make(world, search={"type": "random", "trials": 30, "seed": 0}, parameters=ranks)

    def refusal(number: int) -> NotFound:
        with pytest.raises(NotFound) as refused:
            commands.stop_trial(world.db, **of(world, sweep_id), number=number)
        return refused.value

    assert refusal(29).message == f"Trial 29 of sweep {sweep_id} has not been created yet."
    assert refusal(29).remedy == f"Send the request again once GET /v1/sweeps/{sweep_id}/trials lists the trial."
    assert refusal(30).message == f"Sweep {sweep_id} has no trial 30."
    commands.close(world.db, **of(world, sweep_id))
    assert refusal(29).message == f"Sweep {sweep_id} has no trial 29."


@ON_ONE_DATABASE
def test_missing_best_adapter_of_a_sweep_is_explained(world: World) -> None:
    def remedy(name: str) -> str:
        with pytest.raises(NotFound) as refused:
            adapters.get(world.db, project_id=world.caller.project_id, name=name)
        assert refused.value.code == "adapter_not_found"
        assert refused.value.param == "adapter"
        return refused.value.sentence()

    sweep_id = make(world, search={"type": "ask_tell", "trials": 1}, parameters={})
    assert "Check the sweep's ID" in remedy("sweep-unknown")
    assert f"`lorry sweeps close {sweep_id}`" in remedy(sweep_id)
    add(world, sweep_id, 4)
    assert "Wait until the sweep finishes" in remedy(sweep_id)

    finish(world, train(world)[0], 1.0)
    advance(world)
    best = adapters.get(world.db, project_id=world.caller.project_id, name=sweep_id).adapter.name
    adapters.delete(world.db, project_id=world.caller.project_id, name=best)
    assert "was deleted" in remedy(sweep_id)

    failed = make(world, search={"type": "ask_tell", "trials": 1}, parameters={})
    add(world, failed, 4)
    commands.stop_trial(world.db, **of(world, failed), number=0)
    advance(world)
    assert "without a successful trial" in remedy(failed)


@ON_ONE_DATABASE
def test_user_actions_on_a_sweep_are_audited_once(world: World) -> None:
    sweep_id = make(world, search={"type": "ask_tell", "trials": 3}, parameters={})
    add(world, sweep_id, 4)
    for _ in range(2):
        commands.close(world.db, **of(world, sweep_id))
    commands.stop_trial(world.db, **of(world, sweep_id), number=0)
    for _ in range(2):
        commands.cancel(world.db, **of(world, sweep_id))

    with world.db.read() as session:
        types = session.scalars(select(AuditEvent.type).order_by(AuditEvent.effective_at)).all()

    about_it = [each for each in types if each.startswith(("sweep", "trial", "job"))]
    assert about_it == ["sweep.created", "job.created", "sweep.closed", "trial.stopped", "sweep.cancelled"]
