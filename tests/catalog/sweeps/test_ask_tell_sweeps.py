"""Sweeps whose trials are of the client's own choice: added, stopped and closed by whoever asked for them."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from catalog.errors import Conflict, LorryError
from catalog.queue import claims
from catalog.states import EndReason, JobState
from catalog.sweeps import commands, creation
from catalog.tables.audit import AuditEvent
from tests.catalog.sweeping import ON_ONE_DATABASE, add, advance, finish, make, of, train, view
from tests.catalog.world import World


def test_a_client_gives_each_trial_its_parameters_and_stops_those_it_is_done_with(world: World) -> None:
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
    assert view(world, sweep_id).sweep.state == "running"  # its client may ask for another
    commands.close(world.db, **of(world, sweep_id))
    advance(world)
    assert view(world, sweep_id).sweep.state == "succeeded"
    with pytest.raises(Conflict, match="no more trials"):
        add(world, sweep_id, 2)


@ON_ONE_DATABASE
def test_a_trial_that_waits_is_stopped_at_once(world: World) -> None:
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
def test_a_clients_parameters_are_checked_as_a_sweeps_are(world: World, parameters: Any, code: str) -> None:
    sweep_id = make(world, search={"type": "ask_tell", "trials": 3}, parameters={})

    with pytest.raises(LorryError) as refused:
        creation.add_trial(world.db, caller=world.caller, sweep_id=sweep_id, parameters=parameters)

    assert refused.value.code == code
    assert view(world, sweep_id).sweep.num_created == 0


@ON_ONE_DATABASE
def test_a_sweep_that_chooses_for_itself_takes_no_trials_of_others(world: World) -> None:
    sweep_id = make(world)

    with pytest.raises(Conflict) as refused:
        add(world, sweep_id, 4)

    assert refused.value.code == "not_an_ask_tell_sweep"


@ON_ONE_DATABASE
def test_what_a_person_asks_of_a_sweep_is_in_the_audit_log_once(world: World) -> None:
    sweep_id = make(world, search={"type": "ask_tell", "trials": 3}, parameters={})
    add(world, sweep_id, 4)
    for _ in range(2):
        commands.close(world.db, **of(world, sweep_id))
    commands.stop_trial(world.db, **of(world, sweep_id), number=0)
    for _ in range(2):
        commands.cancel(world.db, **of(world, sweep_id))

    with world.db.read() as session:
        told = session.scalars(select(AuditEvent.type).order_by(AuditEvent.effective_at)).all()

    about_it = [each for each in told if each.startswith(("sweep", "trial", "job"))]
    assert about_it == ["sweep.created", "job.created", "sweep.closed", "trial.stopped", "sweep.cancelled"]
