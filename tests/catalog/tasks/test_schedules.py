"""The task queue under concurrent transactions, compared with a sequential model.

A schedule consists of rounds. In each round, several processes call one operation each at the same time, with random
pauses between their statements. The results of a round must be those of some order of the same calls on the model, and
no task may be finished twice. A claim may skip tasks that another call of the round changes, because it does not wait
for their locks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import pytest
from sqlalchemy import delete, event, select

from catalog.db.database import Database
from catalog.errors import StaleClaim
from catalog.tables.tasks import Task, TaskTurn
from catalog.tasks import task_queue
from catalog.tasks.task_queue import MAX_ATTEMPTS, TaskClaim, TaskKind
from tests.catalog.world import LEASE, World

pytestmark = pytest.mark.both_databases
KIND = TaskKind.EXPORT
PROCESSES = 3
ROUNDS = 8
MAX_PAUSE_SECONDS = 0.0005


@dataclass(frozen=True)
class Call:
    """name: of an operation. subject: the task that it names, or the one of `claimed`."""

    name: str
    subject: str = ""
    claimed: TaskClaim | None = None


@dataclass
class ModelTask:
    project: str
    run_after: float
    num_attempts: int = 0
    holder: str | None = None
    """Claim id."""
    until: float = 0.0


@dataclass
class Model:
    """The queue without concurrency."""

    now: float
    tasks: dict[str, ModelTask] = field(default_factory=dict[str, ModelTask])
    turns: dict[str, float] = field(default_factory=dict[str, float])

    def copy(self) -> Model:
        tasks = {subject: ModelTask(**vars(task)) for subject, task in self.tasks.items()}
        return Model(self.now, tasks, dict(self.turns))

    def apply(self, call: Call) -> Any:
        """Apply any operation but a claim. Returns its result."""
        if call.name == "remove":
            self.tasks.pop(call.subject, None)
            return None
        task = self.tasks.get(call.subject)
        assert call.claimed is not None
        if task is None or task.holder != call.claimed.claim_id:
            return "stale"
        if call.name == "renew":
            task.until = self.now + LEASE
            return True
        if call.name == "finish":
            del self.tasks[call.subject]
            return None
        if call.name == "release":
            task.num_attempts, task.run_after, task.holder = task.num_attempts - 1, self.now, None
            return None
        if task.num_attempts >= MAX_ATTEMPTS[KIND]:
            del self.tasks[call.subject]
            return False
        task.run_after, task.holder = self.now + task_queue.retry_wait(task.num_attempts), None
        return True

    def claim(self, found: TaskClaim | None, locked: set[str]) -> bool:
        """Apply a claim with this result. Returns whether it is legal: the result is the next task, apart from skipped
        ones."""
        for subject in self._in_turn():
            task = self.tasks[subject]
            if found is not None and found.subject == subject:
                task.num_attempts += 1
                task.holder, task.until = found.claim_id, self.now + LEASE
                self.turns[task.project] = self.now
                return found.num_attempts == task.num_attempts
            if subject not in locked:
                return False
        return found is None

    def _in_turn(self) -> list[str]:
        due = [
            (self.turns.get(task.project, 0.0), task.run_after, subject)
            for subject, task in self.tasks.items()
            if task.run_after <= self.now and (task.holder is None or task.until <= self.now)
        ]
        return [subject for *_, subject in sorted(due)]


def act(db: Database, call: Call) -> Any:
    """Call the operation of the queue. Returns "stale" instead of raising StaleClaim."""
    claimed = call.claimed
    try:
        if call.name == "claim":
            return task_queue.claim(db, [KIND], lease_seconds=LEASE)
        if call.name == "renew":
            assert claimed is not None
            return task_queue.renew(db, claimed, lease_seconds=LEASE) or "stale"
        with db.write() as session:
            if call.name == "remove":
                return task_queue.remove(session, KIND, call.subject)
            assert claimed is not None
            operations = {"finish": task_queue.finish, "release": task_queue.release_in, "retry": task_queue.retry}
            return operations[call.name](session, claimed)
    except StaleClaim:
        return "stale"


def legal(model: Model, calls: list[Call], results: list[Any]) -> Model | None:
    """Return the model after an order of the calls that has these results; None if there is none."""
    for order in permutations(range(len(calls))):
        after = model.copy()
        if all(_is_legal(after, calls, results, number) for number in order):
            return after
    return None


def _is_legal(after: Model, calls: list[Call], results: list[Any], number: int) -> bool:
    call, result = calls[number], results[number]
    if call.name == "claim":
        return after.claim(result, {other.subject for other in calls if other is not call})
    return after.apply(call) == result


@contextmanager
def random_pauses(db: Database, seed: int) -> Iterator[None]:
    chance = random.Random(seed)

    def pause(*_: Any) -> None:
        time.sleep(chance.random() * MAX_PAUSE_SECONDS)

    event.listen(db.engine, "before_cursor_execute", pause)
    try:
        yield
    finally:
        event.remove(db.engine, "before_cursor_execute", pause)


def run_schedule(db: Database, now: list[float], projects: list[str], pool: ThreadPoolExecutor, seed: int) -> None:
    """now: the time that the database's clock shows."""
    chance = random.Random(seed)
    with db.write() as session:
        session.execute(delete(Task))
        session.execute(delete(TaskTurn))
    model = Model(now=now[0])
    claims: list[TaskClaim] = []
    finished: list[str] = []
    with random_pauses(db, seed):
        for number in range(ROUNDS):
            if chance.random() < 0.7:
                project, due = chance.choice(projects), model.now + chance.choice([0.0, 20.0])
                subject = f"t{number}"
                with db.write() as session:
                    task_queue.add(session, KIND, subject, project_id=project, run_after=due)
                model.tasks[subject] = ModelTask(project, due)
            calls = [random_call(chance, model, claims) for _ in range(PROCESSES)]
            results = list(pool.map(lambda call: act(db, call), calls))
            after = legal(model, calls, results)
            assert after is not None, f"seed {seed}, round {number}: no order of {calls} has the results {results}"
            model = after
            pairs = list(zip(calls, results, strict=True))
            claims += [result for call, result in pairs if call.name == "claim" and result is not None]
            finished += [call.subject for call, result in pairs if call.name == "finish" and result != "stale"]
            model.now = now[0] = now[0] + chance.choice([0.0, 5.0, LEASE, 40.0])
    assert len(finished) == len(set(finished))
    with db.read() as session:
        left = {row.subject: (row.num_attempts, row.run_after) for row in session.scalars(select(Task))}
    assert left == {subject: (task.num_attempts, task.run_after) for subject, task in model.tasks.items()}


def random_call(chance: random.Random, model: Model, claims: list[TaskClaim]) -> Call:
    """Return a claim, an operation on a recent or an old claim, or the removal of a task."""
    name = chance.choice(["claim", "claim", "renew", "finish", "release", "retry", "remove"])
    if name == "remove" and model.tasks and chance.random() < 0.3:
        return Call("remove", chance.choice(list(model.tasks)))
    if name in ("claim", "remove") or not claims:
        return Call("claim")
    claimed = chance.choice(claims[-3:])
    return Call(name, claimed.subject, claimed)


@pytest.mark.parametrize(
    "seeds",
    [
        range(200),
        *(pytest.param(range(first, first + 2_500), marks=pytest.mark.slow) for first in range(0, 20_000, 2_500)),
    ],
    ids=lambda seeds: f"{seeds.start}-{seeds.stop}",
)
def test_every_history_has_a_legal_order_and_nothing_is_finished_twice(
    world: World, database_url: str, seeds: range
) -> None:
    now = [world.clock()]
    db = Database(database_url, clock=lambda: now[0])
    projects = [world.caller.project_id, world.stranger.project_id]
    with ThreadPoolExecutor(PROCESSES) as pool:
        for seed in seeds:
            run_schedule(db, now, projects, pool, seed)
    db.close()
