"""Decisions on PostgreSQL while another transaction changes what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from sqlalchemy import event

from catalog.db.database import Database
from catalog.sweeps import commands as sweep_commands
from catalog.sweeps import controller
from tests.catalog.db.test_lock_order import after_the_first_call
from tests.catalog.sweeping import advance, finish, make, of, train
from tests.catalog.world import World

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
T = TypeVar("T")


@pytest.fixture(autouse=True)
def no_endless_wait(db: Database) -> None:
    """Limit lock waits to 20 s. PostgreSQL cannot detect a deadlock that includes a thread of the test itself."""
    event.listen(db.engine, "begin", lambda connection: connection.exec_driver_sql("set local lock_timeout = '20s'"))


def act_after(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, act: Callable[[], Any]) -> None:
    """Call `act` after the first call of this function."""
    monkeypatch.setattr(module, name, after_the_first_call(getattr(module, name), act))


def test_sweep_cancelled_during_a_controller_step_cancels_its_trials(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step has read that the sweep is not cancelled, and has not locked it yet."""
    sweep_id = make(world)
    claimed = train(world)
    finish(world, claimed[0], 1.0)
    act_after(monkeypatch, controller, "_cancel_some", lambda: sweep_commands.cancel(world.db, **of(world, sweep_id)))

    advance(world)

    assert [world.job(claimed[number].job.id).cancel_requested for number in (1, 2, 3)] == [True, True, True]
