"""Runs in trackers: due while the job trains and at its end, and each point is written once across workers."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from catalog.errors import InvalidRequest
from catalog.history import tracker_runs
from catalog.history.tracker_runs import RunUpdate, TrackerRunClaim
from catalog.jobs import commands
from catalog.lifecycle import recording
from catalog.queue import claims
from catalog.states import EndReason
from catalog.tables.jobs import Job
from catalog.tasks.task_queue import MAX_ATTEMPTS, TaskKind
from tests.catalog.world import World, request

BOTH = [{"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}, {"type": "tensorboard"}]
ONE = [{"type": "tensorboard"}]
TYPES = ("wandb", "tensorboard")


def running(world: World, integrations: list[dict[str, Any]] | None = None) -> Job:
    world.worker(integrations=TYPES)
    return world.running(integrations=integrations or ONE).job


def points(world: World, job: Job, *steps: int, kind: str = "train") -> None:
    rows = [{"kind": kind, "step": step, "loss": 1.0 / (1 + step), "token_accuracy": 0.5} for step in steps]
    recording.record_metrics(world.db, world.job(job.id).claim_id or "", rows)


def claim(world: World, types: tuple[str, ...] = TYPES, limit: int = 9) -> list[TrackerRunClaim]:
    return tracker_runs.claim(world.db, types=types, limit=limit)


def recorded(world: World, run: TrackerRunClaim, written: RunUpdate) -> TrackerRunClaim:
    """Record the data, after which the run stays open."""
    found = tracker_runs.record(world.db, run, written, run_id="r")
    assert found is not None
    return found


def warnings(world: World, job: Job) -> list[str]:
    found = world.events(job.id)
    return [event.message for event in found if event.level == "warn"]


def test_run_is_due_once_its_job_trains(world: World) -> None:
    world.worker(integrations=TYPES)
    world.queued(integrations=BOTH)
    before = claim(world)

    world.claim()

    assert before == []
    assert claim(world, types=("mlflow",)) == []
    assert [one.row.type for one in claim(world, types=("wandb",))] == ["wandb"]
    assert [one.row.type for one in claim(world)] == ["tensorboard"]


def test_each_point_is_written_once_and_replayed_steps_are_not(world: World) -> None:
    job = running(world)
    points(world, job, 1, 2)
    points(world, job, 0, kind="valid")
    (run,) = claim(world)

    first = tracker_runs.poll(world.db, run)
    run = recorded(world, run, first)
    points(world, job, 2, 3)
    second = tracker_runs.poll(world.db, run)

    written = [(point["kind"], point["step"]) for point in first.points]
    assert written == [("valid", 0), ("train", 1), ("train", 2)]
    assert first.points[1]["values"] == {"train/loss": 0.5, "train/token_accuracy": 0.5}
    assert run.row.run_id == "r"
    assert [(point["kind"], point["step"]) for point in second.points] == [("train", 3)]
    assert second.run["config"]["lora.rank"] == 16
    assert second.run["options"] == {"name": None}


def test_next_worker_resumes_the_run_of_a_dead_worker(world: World) -> None:
    job = running(world)
    points(world, job, 1)
    (first,) = claim(world)
    tracker_runs.record(world.db, first, tracker_runs.poll(world.db, first), run_id="r")

    world.clock.advance(tracker_runs.TRACKER_LEASE_SECONDS + 1)
    (second,) = claim(world)
    late = tracker_runs.record(world.db, first, tracker_runs.poll(world.db, first), run_id="r")

    assert (second.row.run_id, second.row.train_step) == ("r", 1)
    assert late is None


def test_runs_of_a_paused_job_are_idle_until_it_trains_again(world: World) -> None:
    job = running(world)
    (run,) = claim(world)
    commands.pause(world.db, **world.of(job.id))
    claims.end(world.db, world.job(job.id).claim_id or "", reason=EndReason.PAUSED_BY_USER, detail="")

    still_open = tracker_runs.record(world.db, run, tracker_runs.poll(world.db, run), run_id="r")
    world.clock.advance(10 * tracker_runs.TRACKER_LEASE_SECONDS)
    asleep = claim(world)
    commands.resume(world.db, **world.of(job.id))
    world.claim()

    assert (still_open, asleep) == (None, [])
    assert [one.row.run_id for one in claim(world)] == ["r"]


@pytest.mark.parametrize("earlier", [(), (1,)])
def test_points_that_precede_a_pause_are_written_before_the_run_is_idle(world: World, earlier: tuple[int, ...]) -> None:
    job = running(world)
    points(world, job, *earlier)
    (run,) = claim(world)
    first = tracker_runs.poll(world.db, run)
    points(world, job, 2)
    commands.pause(world.db, **world.of(job.id))
    claims.end(world.db, world.job(job.id).claim_id or "", reason=EndReason.PAUSED_BY_USER, detail="")

    run = recorded(world, run, first)
    second = tracker_runs.poll(world.db, run)
    still_open = tracker_runs.record(world.db, run, second, run_id="r")

    assert still_open is None
    assert [point["step"] for point in second.points] == [2]


def test_end_is_written_after_the_last_point_with_final_metrics(world: World) -> None:
    job = running(world)
    (run,) = claim(world)
    points(world, job, *range(1, tracker_runs.MAX_POINTS + 11))
    adapter = world.complete(world.job(job.id).claim_id or "")

    first = tracker_runs.poll(world.db, run)
    run = recorded(world, run, first)
    last = tracker_runs.poll(world.db, run)
    still_open = tracker_runs.record(world.db, run, last, run_id="r")

    assert (len(first.points), first.end) == (tracker_runs.MAX_POINTS, None)
    assert len(last.points) == 10
    assert last.end is not None
    assert (last.end["status"], last.end["adapter"]) == ("succeeded", adapter.name)
    assert last.end["numbers"] == {"final.trained_tokens": 5}
    assert still_open is None
    world.clock.advance(10 * tracker_runs.TRACKER_LEASE_SECONDS)
    assert claim(world) == []


def test_job_that_ends_during_a_write_is_not_missed(world: World) -> None:
    job = running(world)
    (run,) = claim(world)
    news = tracker_runs.poll(world.db, run)

    commands.cancel(world.db, **world.of(job.id))
    claims.end(world.db, world.job(job.id).claim_id or "", reason=EndReason.CANCELLED_BY_USER, detail="")
    run = recorded(world, run, news)

    end = tracker_runs.poll(world.db, run).end
    assert end is not None
    assert end["status"] == "cancelled"


def test_failed_run_warns_once_backs_off_and_finally_stops(world: World) -> None:
    job = running(world)
    waits: list[float] = []
    for _ in range(MAX_ATTEMPTS[TaskKind.TRACK_TENSORBOARD]):
        (run,) = claim(world)
        tracker_runs.fail(world.db, run, "No such host.")
        failed_at = world.clock.now
        while not (found := claim(world)) and world.clock.now < failed_at + 3 * 3600:
            world.clock.advance(10)
        waits.append(world.clock.now - failed_at)
        for one in found:
            tracker_runs.release(world.db, one)

    first, last = warnings(world, job)
    assert "Writing to the integration tensorboard failed: No such host. Training continues" in first
    assert "It will not be retried." in last
    assert waits == sorted(waits)
    assert world.job(job.id).state == "running"


def test_unavailable_tracker_is_rejected_only_if_workers_are_running(world: World) -> None:
    awaited = world.submit(integrations=BOTH)
    world.worker(integrations=("tensorboard",))

    with pytest.raises(InvalidRequest, match="No running worker can write to wandb") as refused:
        world.submit(integrations=BOTH)

    assert (refused.value.code, refused.value.param) == ("integration_unavailable", "integrations.0.type")
    assert "lorry-server[integrations]" in refused.value.remedy
    assert "set WANDB_API_KEY or WANDB_MODE=offline" in refused.value.remedy
    assert refused.value.remedy.endswith("Then restart the worker. Or remove wandb from 'integrations'.")
    assert awaited.requested["integrations"] == BOTH
    assert world.submit(integrations=ONE).id


def test_job_cannot_choose_the_entity_of_the_service(world: World) -> None:
    world.worker(integrations=TYPES)

    with pytest.raises(InvalidRequest, match="entity") as refused:
        world.submit(integrations=[{"type": "wandb", "wandb": {"project": "p", "entity": "another-team"}}])

    assert refused.value.code == "integration_unavailable"
    assert refused.value.param == "integrations.0.wandb.entity"
    assert "WANDB_ENTITY" in refused.value.remedy


@pytest.mark.parametrize(
    "integrations",
    [
        [{"type": "wandb"}],
        [{"type": "wandb", "wandb": {"project": "a/b"}}],
        [{"type": "wandb", "wandb": {"project": "p", "key": "secret"}}],
        [{"type": "mlflow", "mlflow": {"tracking_uri": "http://10.0.0.1"}}],
        [{"type": "tensorboard", "tensorboard": {"name": "../up"}}],
        [{"type": "tensorboard", "wandb": {"project": "p"}}],
        [{"type": "tensorboard"}, {"type": "tensorboard"}],
        [{"type": "comet"}],
    ],
)
def test_invalid_tracker_settings_are_rejected(integrations: list[dict[str, Any]]) -> None:
    with pytest.raises(ValidationError):
        request(training_file="f", integrations=integrations)


def test_job_without_integrations_has_no_run(world: World) -> None:
    running(world)
    for one in claim(world):
        tracker_runs.release(world.db, one)
    plain = world.running()

    assert {one.row.job_id for one in claim(world)} != {plain.job.id}
