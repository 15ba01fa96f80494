"""Decisions on PostgreSQL while another transaction changes what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from catalog.fleet import cordons
from catalog.lifecycle import recording
from catalog.queue import claims, preemption
from catalog.scheduling.snapshot import USUAL
from catalog.states import EndReason
from catalog.sweeps import controller
from catalog.sweeps import queries as sweep_commands
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind
from tests.catalog.db.test_lock_order import after_the_first_call, wait_for_one_in_line
from tests.catalog.fleet.test_cordons import fail
from tests.catalog.queue.test_preemption import LATE, ONE, SPARED
from tests.catalog.sweeping import advance, finish, make, of, train
from tests.catalog.world import World, claim_task

pytestmark = [
    pytest.mark.usefixtures("no_endless_wait"),
    pytest.mark.parametrize("database_url", ["postgresql"], indirect=True),
]
T = TypeVar("T")


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


def both(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    first: Callable[[], T],
    second: Callable[[], T],
) -> tuple[T, T]:
    """Call `first`. After its call of the named function, `second` runs in a thread until it ends or waits for a lock.

    Returns both results.
    """
    with ThreadPoolExecutor(1) as pool:
        started: list[Future[T]] = []

        def start_second() -> None:
            started.append(pool.submit(second))
            wait_for_one_in_line(world.db, or_end_of=started[0])

        act_after(monkeypatch, module, name, start_second)
        return first(), started[0].result()


def test_workers_that_fail_at_the_same_time_respect_the_limit_of_cordons(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(cordons, "cordon_if_bad", lambda *_: False)
        for name in ("w1", "w2"):
            world.worker(name, host=name)
        for name in ("w1", "w2"):
            for number in range(3):
                fail(world, worker_id=name, trainer=f"{name}-{number}", caller=world.stranger if number else None)

    def cordon(name: str) -> bool:
        return cordons.cordon_if_bad(world.db, name)

    are_cordoned = both(world, monkeypatch, cordons, "_may_cordon_another", lambda: cordon("w1"), lambda: cordon("w2"))

    assert are_cordoned == (True, False)


def test_trial_that_reaches_a_rung_during_a_controller_step_is_judged_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"type": "asha", "trials": 2, "min_steps": 2, "reduction_factor": 2, "seed": 1}
    make(world, search=search, parameters={"lora.rank": {"min": 1, "max": 64}})
    claimed = train(world, num_steps=100)

    def reach_rung(number: int, loss: float) -> None:
        point = {"kind": "valid", "step": 2, "loss": loss}
        recording.record_metrics(world.db, claimed[number].claim_id, [point])

    reach_rung(0, 1.0)
    act_after(monkeypatch, controller, "_prune", lambda: reach_rung(1, 2.0))
    advance(world)

    assert [world.job(claimed[number].job.id).cancel_requested for number in (0, 1)] == [False, True]


def test_tasks_claimed_at_the_same_time_belong_to_different_projects(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks of a project are due before that of another. The second claim waits for the first."""
    with world.db.write() as session:
        for number, project in enumerate((world.caller, world.caller, world.stranger)):
            task_queue.add(session, TaskKind.EXPORT, f"e{number}", project_id=project.project_id, run_after=number)

    def take() -> str:
        return claim_task(world.db, TaskKind.EXPORT).subject

    assert both(world, monkeypatch, task_queue, "skip_locked", take, take) == ("e0", "e2")


def test_job_that_another_worker_has_claimed_since_the_decision_is_not_preempted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.worker()
    victim = world.running(priority="batch")
    world.pass_time(SPARED, victim.claim_id)
    world.beat(victim.claim_id)
    world.queued(model=world.base("another"), priority="urgent")
    world.clock.advance(LATE)
    world.worker("w2")
    request = preemption._request  # pyright: ignore[reportPrivateUsage]
    moved: list[str] = []

    def request_after_a_move(*given: Any, **more: Any) -> int:
        claims.end(world.db, victim.claim_id, reason=EndReason.DRAINED, detail="")
        joined = world.claim("w2", replace(ONE, num_jobs=1), pack_key=victim.job.pack_key)
        moved.extend(claim.job.id for claim in joined)
        return request(*given, **more)

    monkeypatch.setattr(preemption, "_request", request_after_a_move)

    assert preemption.request_preemptions(world.db, policy=USUAL) == 0
    assert moved == [victim.job.id]
    assert world.job(victim.job.id).preempted_for is None
