"""Records of a running job: checkpoints to resume from, and points of its curves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import select

from catalog.history import queries
from catalog.jobs import commands
from catalog.lifecycle import recording
from catalog.queue import claiming, claims
from catalog.states import EndReason, JobState
from catalog.tables.storage import Artifact
from tests.catalog.world import World, manifest


def test_only_a_new_checkpoint_resets_failed_attempts(world: World) -> None:
    claim = world.running()

    def crash_after_checkpoint(step: int) -> JobState:
        nonlocal claim
        recording.record_checkpoint(world.db, claim.claim_id, step=step, artifact=manifest(f"c{step}"))
        state = claims.end(world.db, claim.claim_id, reason=EndReason.HOST_OOM, detail="")
        world.clock.advance(31)
        claim = next(iter(world.claim()), claim)
        return state

    assert [crash_after_checkpoint(step) for step in (1, 2, 3, 4)] == [JobState.QUEUED] * 4
    assert [crash_after_checkpoint(step) for step in (4, 4)] == [JobState.QUEUED, JobState.FAILED]


def test_job_resumes_from_its_newest_checkpoint_or_the_one_before(world: World) -> None:
    claim = world.running()
    dropped = [
        recording.record_checkpoint(world.db, claim.claim_id, step=step, artifact=manifest(f"c{step}"))
        for step in (1, 2, 3)
    ]
    claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")

    (again,) = world.claim()
    assert [checkpoint.step for checkpoint in again.resume_candidates] == [3, 2]
    assert dropped == [[], [], [manifest("c1").digest]]

    bad = again.resume_candidates[0]
    recording.distrust_checkpoint(world.db, again.claim_id, checkpoint_id=bad.id, problem="a bit was flipped")
    claims.end(world.db, again.claim_id, reason=EndReason.DRAINED, detail="")
    assert [checkpoint.step for checkpoint in world.claim()[0].resume_candidates] == [2]


def test_files_shared_by_two_checkpoints_outlive_the_first(world: World) -> None:
    claim = world.running()

    dropped = [
        recording.record_checkpoint(world.db, claim.claim_id, step=step, artifact=manifest(name))
        for step, name in ((1, "a"), (2, "b"), (3, "a"))
    ]

    assert dropped == [[], [], []]
    page = queries.checkpoints_page(world.db, **world.of(claim.job.id))
    assert [(row.step, row.artifact is not None) for row in page.items] == [(3, True), (2, True), (1, False)]


def test_concurrent_jobs_with_identical_checkpoints_keep_shared_files(world: World) -> None:
    world.queued()
    world.queued()

    def train(claim: claiming.Claim) -> None:
        for step in range(1, 16):
            same = manifest(f"c{step}", "checkpoint")
            recording.record_checkpoint(world.db, claim.claim_id, step=step, artifact=same)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, world.claim()))

    with world.db.read() as session:
        left = session.scalars(select(Artifact.digest).where(Artifact.kind == "checkpoint")).all()
    assert set(left) == {manifest(f"c{step}", "checkpoint").digest for step in (14, 15)}


def test_metric_points_are_stored_once_and_reported_as_openai_events(world: World) -> None:
    claim = world.running()
    of_job = world.of(claim.job.id)
    point = {"kind": "train", "token_accuracy": 0.5, "learning_rate": 1e-4, "grad_norm": float("inf")}

    recording.record_metrics(
        world.db, claim.claim_id, [{**point, "step": 1, "loss": 3.0}, {**point, "step": 2, "loss": 2}]
    )
    recording.record_metrics(world.db, claim.claim_id, [{**point, "step": 2, "loss": 1.5}])
    recording.record_metrics(world.db, claim.claim_id, [{**point, "step": 3, "loss": float("nan")}])

    curve = queries.metrics(world.db, **of_job, kind="train")
    assert [(p.step, p.loss, p.grad_norm) for p in curve] == [(1, 3.0, None), (2, 1.5, None)]
    metrics_event = queries.events_page(world.db, **of_job).items[0]
    assert (metrics_event.type, metrics_event.message) == ("metrics", "Step 2/60: training loss=1.5000")
    assert metrics_event.data is not None
    assert metrics_event.data["train_loss"] == 1.5
    assert metrics_event.data["train_mean_token_accuracy"] == 0.5


def test_progress_keeps_evaluations_and_replayed_ones_replace_them(world: World) -> None:
    claim = world.running()
    recording.record_progress(world.db, claim.claim_id, {"step": 1, "loss": 3.0})

    def evaluated(step: int, loss: float) -> tuple[float, float]:
        recording.record_metrics(world.db, claim.claim_id, [{"kind": "valid", "step": step, "loss": loss}])
        recording.record_progress(world.db, claim.claim_id, {"step": step, "loss": 2.0})
        progress = world.job(claim.job.id).progress or {}
        assert (progress["step"], progress["loss"]) == (step, 2.0)
        return progress["valid_loss"], progress["best_valid_loss"]

    assert evaluated(2, 1.5) == (1.5, 1.5)
    assert evaluated(4, 1.0) == (1.0, 1.0)
    assert evaluated(6, 1.2) == (1.2, 1.0)
    assert evaluated(4, 1.1) == (1.1, 1.1)
    assert evaluated(8, float("nan")) == (1.1, 1.1)


def test_running_seconds_count_only_claimed_time(world: World) -> None:
    def seconds(job_id: str) -> float:
        return round(queries.seconds_running(world.db, [job_id]).get(job_id, 0.0))

    claim = world.running()
    world.clock.advance(10)
    assert seconds(claim.job.id) == 10

    commands.pause(world.db, **world.of(claim.job.id))
    claims.end(world.db, claim.claim_id, reason=EndReason.PAUSED_BY_USER, detail="")
    world.clock.advance(1000)
    assert seconds(claim.job.id) == 10

    commands.resume(world.db, **world.of(claim.job.id))
    world.clock.advance(1000)
    (again,) = world.claim()
    world.clock.advance(5)
    assert seconds(claim.job.id) == 15

    world.complete(again.claim_id)
    world.clock.advance(100)
    assert seconds(claim.job.id) == 15
    assert queries.seconds_running(world.db, []) == {}
