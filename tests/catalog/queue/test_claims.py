"""Claims: a job belongs to one claim at a time, and only that claim writes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from catalog.errors import StaleClaim
from catalog.fleet import cordons, workers
from catalog.history import queries
from catalog.jobs import commands, explanation
from catalog.lifecycle import preparation, recording, recovery
from catalog.queue import claiming, claims
from catalog.queue.claims import ClaimDirectives
from catalog.scheduling.scheduler import Decision, decide
from catalog.scheduling.snapshot import Capacity
from catalog.states import MAX_LOSSES, EndReason, JobState
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, Artifact
from tests.catalog.world import LEASE, WIDE, World, begin_preparation, manifest, sha

pytestmark = pytest.mark.both_databases


def test_job_goes_from_submission_to_its_adapter(world: World) -> None:
    job = world.submit(suffix="mine")
    world.worker()

    unprepared = begin_preparation(world.db, "w1")
    assert unprepared is not None
    preparation.finish(world.db, unprepared.task, num_steps=10)
    (claim,) = world.claim()
    claims.started(world.db, claim.claim_id, trainer_id="t1", resumed_from_step=None)
    adapter = world.complete(claim.claim_id)

    done = world.job(job.id)
    assert adapter.name == f"ft:smol:ours:mine:{job.id[-8:]}"
    assert (done.state, done.adapter_name, done.trained_tokens) == (JobState.SUCCEEDED, adapter.name, 5)
    assert (done.claim_id, done.lease_expires_at, done.trainer_id) == (None, None, "t1")
    assert world.transitions(job.id) == [
        (None, "validating_files"),
        ("validating_files", "queued"),
        ("queued", "running"),
        ("running", "succeeded"),
    ]


def test_eight_concurrent_workers_never_get_the_same_job(world: World) -> None:
    made = {world.submit().id for _ in range(24)}
    world.prepare_all()
    got: list[str] = []

    def work(worker_id: str) -> list[str]:
        mine: list[str] = []
        while claimed := world.claim(worker_id, Capacity(max_jobs=2, memory_bytes_free=10**12)):
            mine += [claim.job.id for claim in claimed]
            for claim in claimed:
                claims.started(world.db, claim.claim_id, trainer_id=worker_id, resumed_from_step=None)
                world.complete(claim.claim_id, claim.claim_id)
        return mine

    with ThreadPoolExecutor(8) as pool:
        for mine in pool.map(work, [f"w{i}" for i in range(8)]):
            got += mine
    while rest := world.claim():
        got += [claim.job.id for claim in rest]

    assert len(got) == len(set(got))
    assert set(got) == made


def test_every_write_of_a_stale_claim_is_rejected(world: World) -> None:
    stale = world.running()
    world.pass_time(LEASE + 1)
    recovery.expire(world.db, lease_seconds=LEASE)
    world.clock.advance(3)
    (fresh,) = world.claim("w2")
    before = world.job(stale.job.id)
    exported = recording.Exported(artifact=manifest("m"), lineage={}, lineage_id="l")

    writes: list[Callable[[], Any]] = [
        lambda: claims.started(world.db, stale.claim_id, trainer_id="t", resumed_from_step=None),
        lambda: recording.record_event(world.db, stale.claim_id, "info", "x"),
        lambda: recording.record_progress(world.db, stale.claim_id, {"step": 9}),
        lambda: recording.record_metrics(world.db, stale.claim_id, [{"kind": "train", "step": 1, "loss": 1.0}]),
        lambda: recording.record_checkpoint(world.db, stale.claim_id, step=1, artifact=manifest("c")),
        lambda: recording.record_checkpoint_model(world.db, stale.claim_id, step=1, exported=exported),
        lambda: recording.distrust_checkpoint(world.db, stale.claim_id, checkpoint_id="c", problem="x"),
        lambda: claims.end(world.db, stale.claim_id, reason=EndReason.USER_ERROR, detail=""),
        lambda: world.complete(stale.claim_id),
    ]
    for write in writes:
        with pytest.raises(StaleClaim):
            write()

    after = world.job(stale.job.id)
    assert fresh.job.id == stale.job.id
    assert (after.state, after.claim_id, after.progress) == (before.state, fresh.claim_id, None)
    assert world.beat(stale.claim_id)[stale.claim_id] == ClaimDirectives(stale=True)
    with world.db.read() as session:
        assert session.scalars(select(Artifact).where(Artifact.kind == "adapter")).all() == []


def test_job_completes_once(world: World) -> None:
    claim = world.running()
    world.complete(claim.claim_id)

    with pytest.raises(StaleClaim):
        world.complete(claim.claim_id)

    with world.db.read() as session:
        assert len(session.scalars(select(Adapter)).all()) == 1


def test_completion_wins_over_a_pending_cancel_request(world: World) -> None:
    claim = world.running()
    commands.cancel(world.db, **world.of(claim.job.id))

    world.complete(claim.claim_id)

    assert world.job(claim.job.id).state == JobState.SUCCEEDED
    assert not world.job(claim.job.id).cancel_requested


def test_exactly_one_of_concurrent_complete_cancel_and_end_wins(world: World) -> None:
    for round_number in range(6):
        claim = world.running()
        verb = world.of(claim.job.id)
        moves: list[Callable[[], Any]] = [
            lambda claim=claim: world.complete(claim.claim_id, claim.claim_id),
            lambda verb=verb: commands.cancel(world.db, **verb),
            lambda claim=claim: claims.end(world.db, claim.claim_id, reason=EndReason.CANCELLED_BY_USER, detail=""),
        ]
        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(move) for move in moves[round_number % 3 :] + moves[: round_number % 3]]
        refused = [future.exception() for future in futures if future.exception()]

        job = world.job(claim.job.id)
        finals = [after for _, after in world.transitions(job.id) if after in ("succeeded", "cancelled")]
        assert finals == [job.state]
        assert refused
        with world.db.read() as session:
            adapters = session.scalars(select(Adapter).where(Adapter.job_id == job.id)).all()
        assert len(adapters) == (job.state == JobState.SUCCEEDED)


def test_failure_of_the_job_itself_is_final_and_keeps_its_error(world: World) -> None:
    claim = world.running()
    error = {"code": "loss_not_finite", "message": "The loss became NaN at step 3.", "param": None}

    state = claims.end(world.db, claim.claim_id, reason=EndReason.DIVERGED, detail="NaN", error=error)

    job = world.job(claim.job.id)
    assert (state, job.reason, job.error) == (JobState.FAILED, EndReason.DIVERGED, error)


def test_crashed_attempts_are_retried_with_back_off(world: World) -> None:
    claim = world.running()
    waits = []

    for _ in range(2):
        claims.end(world.db, claim.claim_id, reason=EndReason.TRAINER_CRASHED, detail="signal 11")
        run_after = world.job(claim.job.id).run_after
        assert run_after is not None
        waits.append(round(run_after - world.clock.now))
        assert world.claim() == []
        world.clock.advance(waits[-1] + 1)
        (claim,) = world.claim()

    assert waits == [2, 8]


def test_three_failures_without_a_new_checkpoint_quarantine_the_job(world: World) -> None:
    claim = world.running()
    state, claimed = None, [claim]
    for attempt in range(3):
        state = claims.end(world.db, claim.claim_id, reason=EndReason.TRAINER_CRASHED, detail=f"signal {attempt}")
        world.clock.advance(31)
        claimed = world.claim()
        claim = claimed[0] if claimed else claim

    job = world.job(claim.job.id)
    assert (state, claimed) == (JobState.FAILED, [])
    assert job.error is not None
    assert job.error["code"] == "quarantined"
    assert [each["detail"] for each in job.error["evidence"]] == ["signal 2", "signal 1", "signal 0"]
    assert "Last failure: trainer crashed. signal 2 Check the job's logs" in job.error["message"]


def test_ends_before_the_job_started_do_not_count_until_the_limit(world: World) -> None:
    claim = world.running()
    states: list[JobState] = []
    counted = 1
    for _ in range(MAX_LOSSES):
        crash = EndReason.TRAINER_CRASHED
        states.append(claims.end(world.db, claim.claim_id, reason=crash, detail="signal 9", is_bystander=True))
        counted = world.job(claim.job.id).counted_attempts
        world.clock.advance(31)
        claimed = world.claim()
        claim = claimed[0] if claimed else claim

    assert states == [JobState.QUEUED] * (MAX_LOSSES - 1) + [JobState.FAILED]
    assert counted == 0
    assert (world.job(claim.job.id).error or {})["code"] == "quarantined"


def test_drained_attempt_does_not_count_and_is_claimable_at_once(world: World) -> None:
    claim = world.running()

    for _ in range(5):
        claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")
        (claim,) = world.claim()

    assert world.job(claim.job.id).counted_attempts == 0
    assert claim.attempt == 6


def test_attempt_stores_the_reason_of_its_claim(world: World) -> None:
    first, second = world.queued(), world.queued()
    anchor, mate = world.claim()

    why = [queries.attempts(world.db, **world.of(job.id))[0].why for job in (first, second)]
    assert [each["role"] for each in why] == ["anchor", "packmate"]
    assert why[0]["capacity"]["max_jobs"] == 16
    assert queries.packmates(world.db, **world.of(first.id)) == {anchor.claim_id: [mate.job.id]}


def test_projects_that_share_a_trainer_do_not_see_each_other(world: World) -> None:
    mine = world.queued()
    world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    world.prepare_all()

    together = world.claim()

    assert len(together) == 2
    (names,) = queries.packmates(world.db, **world.of(mine.id)).values()
    assert names == []
    for claim in together:
        (other,) = (each.job.id for each in together if each is not claim)
        of_job: dict[str, Any] = {"project_id": claim.job.project_id, "job_id": claim.job.id}
        reported = [attempt.why for attempt in queries.attempts(world.db, **of_job)]
        assert other not in str([reported, explanation.explain(world.db, **of_job)])


def test_project_with_a_running_job_yields_to_another(world: World) -> None:
    world.running()
    world.queued()
    theirs = world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    world.prepare_all()

    (next_one,) = world.claim(capacity=Capacity(max_jobs=1, memory_bytes_free=10**12))

    assert next_one.job.id == theirs.id


def test_only_jobs_with_the_same_pack_key_join_a_trainer(world: World) -> None:
    world.base("other")
    claim = world.running()
    world.queued(model="other")
    world.queued(precision="float32")
    mate = world.queued()

    joined = world.claim(trainer_id="trainer-w1", pack_key=claim.job.pack_key)

    assert [each.job.id for each in joined] == [mate.id]
    assert queries.attempts(world.db, **world.of(mate.id))[0].trainer_id == "trainer-w1"


def test_isolated_job_trains_alone(world: World) -> None:
    isolated = world.running()
    claims.end(world.db, isolated.claim_id, reason=EndReason.TRAINER_CRASHED, detail="")
    world.clock.advance(31)
    (isolated,) = world.claim()
    claims.end(world.db, isolated.claim_id, reason=EndReason.TRAINER_CRASHED, detail="")
    world.clock.advance(31)
    world.queued()

    (alone,) = world.claim()
    joiners = world.claim(trainer_id="trainer-w1", pack_key=alone.job.pack_key)

    assert alone.job.id == isolated.job.id
    assert joiners == []
    recording.record_checkpoint(world.db, alone.claim_id, step=1, artifact=manifest("c"))
    assert len(world.claim(trainer_id="trainer-w1", pack_key=alone.job.pack_key)) == 1


def test_draining_or_ended_worker_claims_nothing(world: World) -> None:
    world.queued()
    world.submit()
    world.worker("draining")
    world.worker("ended")
    cordons.drain(world.db, "draining")
    workers.end_worker(world.db, "ended")

    for worker_id in ("draining", "ended"):
        assert world.claim(worker_id) == []
        assert begin_preparation(world.db, worker_id) is None
        orders = workers.worker_beat(world.db, worker_id, resident_base=None, trainer_id=None, report=None)
        assert orders.drain


def test_worker_drained_during_its_decision_claims_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.queued()
    world.worker()

    def decide_then_drain(*given: Any) -> Decision:
        cordons.drain(world.db, "w1")
        return decide(*given)

    monkeypatch.setattr(claiming, "decide", decide_then_drain)

    assert world.claim() == []
    assert world.job(job.id).state == JobState.QUEUED


def test_leaving_worker_returns_its_jobs_without_a_counted_attempt(world: World) -> None:
    world.worker()
    running = world.running()

    workers.end_worker(world.db, "w1")

    assert world.job(running.job.id).state == JobState.QUEUED
    assert world.job(running.job.id).counted_attempts == 0


def test_adapters_may_share_bytes_but_not_names(world: World) -> None:
    first, second = world.queued(), world.queued()
    with world.db.write() as session:
        twin_id = f"ftjob-{'0' * 16}{first.id[-8:]}"
        session.add(_copy(session.get_one(Job, second.id), twin_id))

    names = {world.complete(claim.claim_id).name for claim in world.claim()}

    assert len(names) == 3
    with world.db.read() as session:
        assert len(session.scalars(select(Artifact).where(Artifact.kind == "adapter")).all()) == 1


def test_attempts_are_numbered_and_kept(world: World) -> None:
    claim = world.running()
    claims.started(world.db, claim.claim_id, trainer_id="t9", resumed_from_step=None)
    claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="asked to")
    (claim,) = world.claim("w2")
    claims.started(world.db, claim.claim_id, trainer_id="t10", resumed_from_step=4)

    attempts = queries.attempts(world.db, **world.of(claim.job.id))

    assert [(a.number, a.worker_id, a.trainer_id, a.reason, a.detail, a.resumed_from_step) for a in attempts] == [
        (1, "w1", "t9", "drained", "asked to", None),
        (2, "w2", "t10", None, None, 4),
    ]
    with world.db.read() as session:
        assert session.get_one(Attempt, claim.claim_id).ended_at is None


def test_job_too_large_for_the_free_memory_is_skipped(world: World) -> None:
    world.base("large", num_parameters=10**12)
    world.queued(model="large")
    small = world.queued()

    claimed = world.claim(capacity=Capacity(max_jobs=WIDE.max_jobs, memory_bytes_free=10**10))

    assert [claim.job.id for claim in claimed] == [small.id]
    assert claimed[0].job.base_digest == sha("smol")


def _copy(job: Job, job_id: str) -> Job:
    columns = {column.key: getattr(job, column.key) for column in Job.__table__.columns}
    return Job(**{**columns, "id": job_id})


def test_early_stopped_job_succeeds_and_reports_the_kept_step(world: World) -> None:
    claim = world.running()
    course = claims.Course(steps=40, kept_step=20, stopped_early="The validation loss has not fallen.")
    curve = [{"kind": "valid", "step": step, "loss": loss} for step, loss in ((0, 1.0), (20, 1.5), (40, 2.5))]
    recording.record_metrics(world.db, claim.claim_id, curve)

    world.complete(claim.claim_id, course=course)

    job = world.job(claim.job.id)
    assert job.state == "succeeded"
    reported = {"step": 40, "kept_step": 20, "stopped_early": "The validation loss has not fallen."}
    assert reported.items() <= (job.progress or {}).items()
    assert (job.progress or {})["kept_valid_loss"] == 1.5
    messages = "\n".join(event.message for event in world.events(claim.job.id))
    assert "Training stopped early, at step 40" in messages
    assert "The adapter has the weights of step 20" in messages
    (attempt,) = queries.attempts(world.db, **world.of(claim.job.id))
    assert attempt.detail == course.stopped_early
