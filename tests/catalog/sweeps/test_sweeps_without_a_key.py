"""A sweep creates no trials for a key that is no longer valid, nor for an archived project."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from catalog import revocation
from catalog.audit import log
from catalog.caller import Caller
from catalog.sweeps import creation
from catalog.tables.jobs import Sweep
from catalog.tenancy import api_keys, authentication, projects
from tests.catalog.sweeping import advance, finish, sweep_of, train
from tests.catalog.world import PEPPER, World

HOUR = 3600.0


def holder(world: World, project: str = "ours", **given: Any) -> Caller:
    """Return the caller of a new key."""
    project_id = projects.ensure(world.db, project).id
    _, secret = authentication.create(world.db, project_id=project_id, name="k", pepper=PEPPER, **given)
    return authentication.authenticate(world.db, secret=secret, pepper=PEPPER)


def found(world: World, sweep_id: str) -> Sweep:
    with world.db.read() as session:
        return session.get_one(Sweep, sweep_id)


def error_code(sweep: Sweep) -> str | None:
    return None if sweep.error is None else sweep.error["code"]


def test_sweep_of_a_revoked_key_is_closed_before_its_next_trials(world: World) -> None:
    caller = holder(world)
    sweep_id = sweep_of(world, caller)
    revocation.revoke(world.db, caller=world.caller, api_key_id=caller.api_key_id)

    advance(world)

    sweep = found(world, sweep_id)
    assert (sweep.num_created, sweep.is_closed, sweep.state) == (creation.AT_ONCE, True, "running")
    assert error_code(sweep) == "api_key_revoked"
    assert caller.api_key_id in (sweep.error or {})["message"]
    operator = replace(world.caller, is_operator=True)
    events = log.list_page(world.db, caller=operator, filters=log.Filters(types=["sweep.closed"])).items
    assert [(event.object_id, event.actor_type, event.details) for event in events] == [
        (sweep_id, "server", {"reason": "api_key_revoked"})
    ]


def test_sweep_of_an_expired_key_is_closed(world: World) -> None:
    caller = holder(world, expires_at=world.clock.now + HOUR)
    sweep_id = sweep_of(world, caller)
    world.clock.advance(HOUR)

    advance(world)

    sweep = found(world, sweep_id)
    assert (sweep.num_created, error_code(sweep)) == (creation.AT_ONCE, "api_key_revoked")


def test_sweep_of_an_archived_project_is_closed(world: World) -> None:
    operator = holder(world, "office", is_operator=True)
    caller = holder(world)
    sweep_id = sweep_of(world, caller)
    projects.archive(world.db, caller=operator, project="ours")

    advance(world)

    sweep = found(world, sweep_id)
    assert (sweep.num_created, error_code(sweep)) == (creation.AT_ONCE, "project_archived")
    assert "ask an operator to run `lorry projects restore ours`" in (sweep.error or {})["message"]


@pytest.mark.parametrize("num_rotations", [1, 2])
def test_sweeps_continue_after_a_rotation_of_their_key(world: World, num_rotations: int) -> None:
    caller = holder(world)
    sweep_id, key_id = sweep_of(world, caller), caller.api_key_id
    for _ in range(num_rotations):
        given: dict[str, Any] = {"overlap_seconds": HOUR, "pepper": PEPPER}
        key_id = api_keys.rotate(world.db, caller=world.caller, api_key_id=key_id, **given)[0].id
        world.clock.advance(HOUR)

    advance(world)

    sweep = found(world, sweep_id)
    assert (sweep.num_created, error_code(sweep)) == (30, None)


@pytest.mark.parametrize("revoked", ["the rotated key", "its successor"])
def test_revoking_a_rotated_key_or_its_successor_ends_its_sweeps(world: World, revoked: str) -> None:
    caller = holder(world)
    sweep_id = sweep_of(world, caller)
    given: dict[str, Any] = {"overlap_seconds": 0, "pepper": PEPPER}
    new, _ = api_keys.rotate(world.db, caller=world.caller, api_key_id=caller.api_key_id, **given)
    key_id = new.id if revoked == "its successor" else caller.api_key_id
    revocation.revoke(world.db, caller=world.caller, api_key_id=key_id)

    advance(world)

    sweep = found(world, sweep_id)
    assert (sweep.num_created, error_code(sweep)) == (creation.AT_ONCE, "api_key_revoked")


def test_closed_sweep_finishes_with_its_existing_trials(world: World) -> None:
    caller = holder(world)
    sweep_id = sweep_of(world, caller, max_concurrent=1)
    revocation.revoke(world.db, caller=world.caller, api_key_id=caller.api_key_id)

    finish(world, train(world)[0], 1.0)
    advance(world)

    sweep = found(world, sweep_id)
    assert (sweep.num_created, sweep.state, error_code(sweep)) == (1, "succeeded", "api_key_revoked")
