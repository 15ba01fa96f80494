"""Stored-byte counters equal a recount of the rows after any sequence of actions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, multiple, rule, run_state_machine_as_test
from sqlalchemy import select

from catalog.history import job_logs
from catalog.lifecycle import recording
from catalog.lifecycle.recording import Exported
from catalog.maintenance import garbage_collection
from catalog.plans import claims as plan_claims
from catalog.plans import plans
from catalog.registry import adapters
from catalog.storage import files, token_cache
from catalog.storage.store import Blob
from catalog.tables.history import Attempt, Checkpoint
from catalog.tables.jobs import Plan
from catalog.tables.storage import Adapter, File, Prepared
from catalog.tables.tenancy import StoredBytes
from catalog.usage import ledger, quotas
from tests.catalog.lifecycle.test_state_machine import Service
from tests.catalog.plan_data import SETTINGS
from tests.catalog.prepared_data import REPORT
from tests.catalog.usage.test_quotas import upload
from tests.catalog.world import begin_plan, manifest, request, sha

PICK = st.integers(0, 7)
SIZES = st.sampled_from([1, 10, 100])


class StoredService(Service):
    """The state machine of jobs, extended by everything that jobs and plans store."""

    def __init__(self) -> None:
        super().__init__()
        ledger.reconcile(self.db)  # counts the world's first file, which is inserted without accounting

    def pick(self, column: Any, number: int, *where: Any) -> Any:
        """Return one of the existing values, or None."""
        with self.db.read() as session:
            found = list(session.scalars(select(column).where(*where).order_by(column)))
        return found[number % len(found)] if found else None

    @rule(target=Service.made, priority=st.sampled_from(["normal", "batch"]))
    def submit(self, priority: str) -> Any:
        """Submit a job. It is rejected if its tokens would exceed the storage limit."""
        job = self.attempted(lambda _: self.world.submit(priority=priority))
        return job.id if job is not None else multiple()

    @rule(size=SIZES, content=st.sampled_from("abc"))
    def upload(self, size: int, content: str) -> None:
        self.attempted(lambda _: upload(self.world, size, content=content))

    @rule(number=PICK)
    def delete_file(self, number: int) -> None:
        file_id = self.pick(File.id, number, File.deleted_at.is_(None))
        if file_id is not None and file_id != self.world.file_id:
            self.attempted(files.delete, project_id=self.world.caller.project_id, file_id=file_id)

    @rule(number=PICK)
    def delete_adapter_or_checkpoint(self, number: int) -> None:
        name = self.pick(Adapter.id, number) if number % 2 else self.pick(Checkpoint.id, number)
        if name is not None:
            self.attempted(adapters.delete, project_id=self.world.caller.project_id, name=name)

    @rule(max_length=st.integers(8, 16))
    def plan(self, max_length: int) -> None:
        body = request(training_file=self.world.file_id, max_length=max_length)
        self.attempted(plans.create, caller=self.world.caller, request=body, settings=SETTINGS)

    @rule(number=PICK, size=SIZES)
    def compute_plan(self, number: int, size: int) -> None:
        """Compute a plan as a worker does. One time in eight the plan is left unconcluded."""
        claim = begin_plan(self.db, "w1")
        if claim is not None:
            self.put_cache(claim.files.train_key, claim.files.training.digest, size)
            if number:
                self.attempted(plan_claims.conclude, claim.task, settings=SETTINGS)

    @rule(number=PICK, size=SIZES)
    def put_again(self, number: int, size: int) -> None:
        key = self.pick(Prepared.key, number)
        if key is not None:
            row = token_cache.get(self.db, key)
            assert row is not None
            self.put_cache(key, row.file_digest, size)

    @rule(number=PICK)
    def forget(self, number: int) -> None:
        key = self.pick(Prepared.key, number)
        if key is not None:
            token_cache.forget(self.db, key)

    @rule(number=PICK, rank=st.integers(0, 1), size=SIZES)
    def print_output(self, number: int, rank: int, size: int) -> None:
        claim_id = self.pick(Attempt.claim_id, number)
        if claim_id is not None:
            with self.db.read() as session:
                worker_id = session.get_one(Attempt, claim_id).worker_id
            content = Blob(digest=sha(f"{claim_id} {rank} {size}"), num_bytes=size)
            job_logs.record(self.db, claim_id, worker_id=worker_id, rank=rank, content=content)

    @rule(number=PICK, size=SIZES)
    def checkpoint_with_a_model(self, number: int, size: int) -> None:
        """Record a checkpoint of a new step, or of an existing step with other bytes."""
        claim_id = self.pick(Attempt.claim_id, number, Attempt.ended_at.is_(None))
        if claim_id is None:
            return
        self.steps += 1
        step = max(1, self.steps - number % 3)
        exported = Exported(artifact=manifest("m" * size), lineage={"outputs": {"num_parameters": 1}}, lineage_id="l")
        content = manifest("c" * size, "checkpoint")
        self.attempted(recording.record_checkpoint, claim_id, step=step, artifact=content, exported=exported)

    @rule(number=PICK)
    def distrust(self, number: int) -> None:
        claim_id = self.pick(Attempt.claim_id, number, Attempt.ended_at.is_(None))
        checkpoint_id = self.pick(Checkpoint.id, number)
        if claim_id is not None and checkpoint_id is not None:
            fields = {"checkpoint_id": checkpoint_id, "problem": "It is damaged."}
            self.attempted(recording.distrust_checkpoint, claim_id, **fields)

    @rule(stored=st.sampled_from([None, 50, 500]))
    def limit(self, stored: int | None) -> None:
        """Set the storage limit. Uploads then evict token caches, or are rejected."""
        self.attempted(
            quotas.limit, caller=self.world.caller, project="ours", limits={"stored_bytes": stored, "plans_per_day": 9}
        )

    @rule(seconds=st.sampled_from([0.0, 8 * 86_400.0, 31 * 86_400.0]))
    def clean(self, seconds: float) -> None:
        self.clock.advance(seconds)
        garbage_collection.drop_references(self.db)

    @invariant()
    def the_counters_equal_a_recount(self) -> None:
        with self.db.read() as session:
            counted = {owner: number for owner, number in ledger.recount(session).items() if number}
            kept = {row.project_id: row.num_bytes for row in session.scalars(select(StoredBytes)) if row.num_bytes}
        assert kept == counted

    @invariant()
    def no_computing_plan_lost_its_cache(self) -> None:
        """A computing plan keeps the cache that a worker has stored for it."""
        with self.db.read() as session:
            lost = select(Plan.id).join(Prepared, Prepared.key == Plan.train_prepared)
            lost = lost.where(Plan.state == "computing", Prepared.evicted_at > Plan.created_at)
            assert list(session.scalars(lost)) == []

    def put_cache(self, key: str, file_digest: str, size: int) -> None:
        tokens = manifest("t" * size, "tokens")
        self.world.put_tokens(key, file_digest=file_digest, artifact=tokens, report=REPORT)


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("num_examples", [5, 40])
def test_counters_equal_a_recount_after_any_sequence_of_actions(num_examples: int) -> None:
    bounded = settings(max_examples=num_examples, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])
    run_state_machine_as_test(StoredService, settings=bounded)
