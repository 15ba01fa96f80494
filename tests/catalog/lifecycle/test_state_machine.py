"""State invariants under random sequences of verbs, lost workers, outages, late writes and clock changes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import func, select

from catalog.db.database import Database
from catalog.error_texts import ErrorText
from catalog.errors import LorryError, StaleClaim
from catalog.fleet import workers
from catalog.jobs import commands
from catalog.lifecycle import preparation, recording, recovery
from catalog.queue import claims
from catalog.scheduling.snapshot import Capacity
from catalog.states import FINAL_STATES, MAX_COUNTED_ATTEMPTS, EndReason, JobState, Verb, next_state
from catalog.tables.history import Attempt, JobEvent
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter
from catalog.tables.tasks import Task
from catalog.tasks import outcomes
from catalog.tasks.task_queue import TaskClaim, TaskKind
from tests.catalog.world import LEASE, Clock, World, begin_preparation, manifest

_template: list[Path] = []
WORKERS = st.sampled_from(["w1", "w2", "w3"])
REASONS = st.sampled_from([reason for reason in EndReason if reason is not EndReason.COMPLETED])


def migrated_copy(folder: str) -> str:
    """Copy a migrated database. A migration takes most of a second, so it runs once for all examples."""
    if not _template:
        path = Path(tempfile.mkdtemp()) / "lorry.db"
        database = Database(f"sqlite:///{path}")
        database.migrate()
        with database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
        _template.append(path)
    return f"sqlite:///{shutil.copy(_template[0], folder)}"


class Service(RuleBasedStateMachine):
    made = Bundle("jobs")
    held = Bundle("claims")
    preparing = Bundle("tasks")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.clock = Clock()
        self.world = World(Database(migrated_copy(self.folder), clock=self.clock), self.clock)
        self.steps = 0
        self.set_back = 0
        """Seconds by which the clock was set back."""

    def teardown(self) -> None:
        self.every_job_can_still_end()
        self.world.db.close()
        shutil.rmtree(self.folder)

    @property
    def db(self) -> Database:
        return self.world.db

    def attempted(self, verb: Any, *given: Any, **more: Any) -> Any:
        """Return None if the verb was rejected. The invariants check that a rejection changed nothing."""
        try:
            return verb(self.db, *given, **more)
        except (StaleClaim, LorryError):
            return None

    @rule(target=made, priority=st.sampled_from(["urgent", "normal", "batch"]))
    def submit(self, priority: str) -> str:
        return self.world.submit(priority=priority).id

    @rule(job_id=made, verb=st.sampled_from([commands.cancel, commands.pause, commands.resume]))
    def ask(self, job_id: str, verb: Any) -> None:
        self.attempted(verb, **self.world.of(job_id))

    @rule(target=preparing, worker_id=WORKERS)
    def begin_to_prepare(self, worker_id: str) -> Any:
        found = begin_preparation(self.db, worker_id)
        return found.task if found else multiple()

    @rule(task=preparing)
    def prepared(self, task: TaskClaim) -> None:
        self.attempted(preparation.finish, task, num_steps=9)

    @rule(task=preparing)
    def refused(self, task: TaskClaim) -> None:
        self.attempted(outcomes.fail, task, preparation.PREPARATION, ErrorText(code="bad", message="Bad.", remedy=""))

    @rule(target=held, worker_id=WORKERS, max_jobs=st.integers(1, 3))
    def claim(self, worker_id: str, max_jobs: int) -> Any:
        capacity = Capacity(max_jobs=max_jobs, memory_bytes_free=10**12)
        return multiple(*(claim.claim_id for claim in self.world.claim(worker_id, capacity)))

    @rule(claim_id=held, worker_id=WORKERS)
    def beat(self, claim_id: str, worker_id: str) -> None:
        self.world.beat(claim_id, worker_id=worker_id)

    @rule(claim_id=held)
    def checkpoint(self, claim_id: str) -> None:
        self.steps += 1
        content = manifest(f"c{self.steps}", "checkpoint")
        self.attempted(recording.record_checkpoint, claim_id, step=self.steps, artifact=content)

    @rule(claim_id=held, reason=REASONS)
    def end(self, claim_id: str, reason: EndReason) -> None:
        self.attempted(claims.end, claim_id, reason=reason, detail="reported")

    @rule(claim_id=consumes(held))
    def complete(self, claim_id: str) -> None:
        """Check that completion creates an adapter if and only if the claim was valid."""
        with self.db.read() as session:
            was_mine = session.scalar(select(Job.state).where(Job.claim_id == claim_id)) == JobState.RUNNING
        adapter = self.attempted(lambda _: self.world.complete(claim_id, claim_id))
        assert (adapter is not None) is was_mine

    @rule(seconds=st.sampled_from([1, 9, 35, 70, 3600, -3600]))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.set_back -= min(0, seconds)

    @rule()
    def recover(self) -> None:
        recovery.expire(self.db, lease_seconds=LEASE)

    @rule(worker_id=WORKERS, verb=st.sampled_from([workers.end_worker, workers.declare_lost, None]))
    def worker_comes_or_goes(self, worker_id: str, verb: Any) -> None:
        if verb is None:
            self.world.worker(worker_id)
        else:
            verb(self.db, worker_id)

    @invariant()
    def only_succeeded_jobs_have_an_adapter(self) -> None:
        with self.db.read() as session:
            adapters = list(session.scalars(select(Adapter.job_id)))
            succeeded = list(session.scalars(select(Job.id).where(Job.state == JobState.SUCCEEDED)))
        assert sorted(adapters) == sorted(succeeded)

    @invariant()
    def only_running_jobs_have_a_live_attempt(self) -> None:
        with self.db.read() as session:
            live = sorted(session.scalars(select(Attempt.claim_id).where(Attempt.ended_at.is_(None))))
            running = session.scalars(select(Job.claim_id).where(Job.state == JobState.RUNNING))
            assert live == sorted(claim_id or "" for claim_id in running)

    @invariant()
    def each_job_in_validation_has_a_task(self) -> None:
        with self.db.read() as session:
            tasks = select(Task.subject).where(Task.kind == TaskKind.PREPARATION)
            validating = session.scalars(select(Job.id).where(Job.state == JobState.VALIDATING_FILES))
            assert set(session.scalars(tasks)) == set(validating)

    @invariant()
    def unclaimed_jobs_have_no_lease_and_no_request(self) -> None:
        with self.db.read() as session:
            for job in session.scalars(select(Job)):
                assert (job.claim_id is None) == (job.lease_expires_at is None)
                if job.state != JobState.RUNNING:
                    assert job.claim_id is None
                    assert not job.cancel_requested
                    assert not job.pause_requested
                    assert job.preempted_for is None
                assert (job.finished_at is not None) == (job.state in FINAL_STATES)
                if job.state == JobState.QUEUED:
                    assert job.counted_attempts < MAX_COUNTED_ATTEMPTS

    @invariant()
    def transition_events_describe_every_state_change(self) -> None:
        with self.db.read() as session:
            rows = session.scalars(select(JobEvent).where(JobEvent.type == "transition").order_by(JobEvent.seq))
            at: dict[str, str | None] = {}
            for event in rows:
                assert event.data is not None
                before, after = event.data["from"], event.data["to"]
                assert at.get(event.job_id) == before
                assert next_state(JobState(before) if before else None, Verb(event.data["verb"])) == after
                at[event.job_id] = after
            assert at == {row[0]: row[1] for row in session.execute(select(Job.id, Job.state))}

    def every_job_can_still_end(self) -> None:
        """Check that every job can end: the clock is corrected, a healthy worker remains, and users resume jobs."""
        self.clock.advance(self.set_back)
        self.world.worker("last")
        for _ in range(40):
            self.clock.advance(LEASE * 3)
            recovery.expire(self.db, lease_seconds=LEASE)
            with self.db.read() as session:
                paused = list(session.scalars(select(Job.id).where(Job.state == JobState.PAUSED)))
            for job_id in paused:
                commands.resume(self.db, **self.world.of(job_id))
            self.world.prepare_all()
            for claim in self.world.claim("last"):
                self.world.complete(claim.claim_id, claim.claim_id)
            with self.db.read() as session:
                unfinished = select(func.count()).select_from(Job).where(Job.state.not_in(FINAL_STATES))
                if not session.scalar(unfinished):
                    return
        raise AssertionError("a job never reaches a final state")


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("num_examples", [8, 50])
def test_random_verb_sequences_keep_invariants_and_end_every_job(num_examples: int) -> None:
    bounded = settings(max_examples=num_examples, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])
    run_state_machine_as_test(Service, settings=bounded)
