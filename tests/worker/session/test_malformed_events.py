"""A trainer whose events have missing or wrong values is killed. Its worker continues, and its jobs are requeued."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from catalog.history.queries import attempts
from catalog.resources.throughput import Speeds
from catalog.states import EndReason
from tests.worker.inference_requests import Asked, TrainerEnd, is_fault_noticed
from tests.worker.pack_site import PASSED, READY, PackSite, emit, emit_for, step
from tests.worker.scripted_trainer import FakeTrainer, Script
from tests.worker_site import wait_until
from worker.session.trainer_session import TrainerSession

ERROR = {"code": "bad", "message": "It failed.", "remedy": "None."}
SAVED = {"step": 5, "folder": "jobs/own/saved", "adapter": None}
OF_TRAINER: dict[str, dict[str, Any]] = {
    "claim_id is a list": {"type": "stepped", "claim_id": []},
    "claim_id is an object": {"type": "stepped", "claim_id": {}},
    "memory is text": {"type": "memory", "base_bytes": "1"},
    "memory is null": {"type": "memory", "peak_bytes": None},
    "memory is a list": {"type": "memory", "cached_bytes": []},
    "memory is a fraction": {"type": "memory", "base_bytes": 1.5},
    "speed is infinite": {"type": "memory", "tokens_per_second": float("inf")},
    "speeds are a list": {"type": "memory", "tick_speeds": [1]},
    "speeds are no pairs": {"type": "memory", "tick_speeds": {"alone": [[1]]}},
    "ready without memory": {"type": "ready", "versions": {}},
    "ready with a list": {"type": "ready", "memory": []},
    "ready without the bytes of the base model": {"type": "ready", "memory": {}},
    "ready with unknown kernels": {**READY, "elementwise_kernels": "mine"},
    "ready with NUL": {**READY, "invariance": "\0"},
    "load_refused without error": {"type": "load_refused", "ranks": []},
    "load_refused without remedy": {"type": "load_refused", "error": {"code": "a", "message": "b"}, "ranks": []},
    "load_refused by a rank with a name": {"type": "load_refused", "error": ERROR, "ranks": ["first"]},
}
OF_JOB: dict[str, dict[str, Any]] = {
    "admitted without step": {"type": "admitted", "steps_per_epoch": 1.0},
    "stepped without loss": {"type": "stepped", "step": 1, "num_tokens": 1},
    "stepped without tokens": {"type": "stepped", "step": 1, "loss": 1.0},
    "stepped to no number": {"type": "stepped", **step(1), "step": "1"},
    "stepped too far": {"type": "stepped", **step(1), "step": 10**30},
    "evaluated without loss": {"type": "evaluated", "step": 1},
    "rewards are a list": {"type": "evaluated", "step": 1, "rewards": []},
    "sampled without answers": {"type": "sampled", "step": 1},
    "sampled with a text": {"type": "sampled", "step": 1, "samples": "a"},
    "unsampled without error": {"type": "unsampled", "step": 1},
    "checkpointed without step": {"type": "checkpointed", "folder": "a", "adapter": None},
    "checkpointed without folder": {"type": "checkpointed", "step": 1, "adapter": None},
    "checkpointed at a number": {"type": "checkpointed", **SAVED, "folder": 7},
    "checkpoint_failed without error": {"type": "checkpoint_failed", "step": 1},
    "paused without step": {"type": "paused", "adapter": None},
    "diverged without good step": {"type": "diverged", "step": 1, "message": "It diverged."},
    "refused without kind": {"type": "refused", "error": ERROR},
    "refused with a text": {"type": "refused", "error": "a", "is_checkpoint": False},
    "finished without kept step": {"type": "finished", "step": 1, "stopped_early": None},
    "exported without report": {"type": "exported", "step": 1},
    "exported with an empty report": {"type": "exported", "step": 1, "report": {}},
    "exported without tokens": {"type": "exported", **SAVED, "kept_step": 5, "stopped_early": None, "report": PASSED},
    "spans without times": {"type": "checkpointed", **SAVED, "spans": [{"name": "a"}]},
    "spans are numbers": {"type": "checkpointed", **SAVED, "spans": [1]},
}


def assert_killed(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], event: dict[str, Any], *, is_of_job: bool
) -> None:
    """Check that a trainer which trains a job and sends this event is killed, and its job requeued."""
    job = site.queued()

    def sends(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        claim_id = (yield from trainer.listen("admit")).body["claim_id"]
        trainer.emit("admitted", claim_id=claim_id, step=0, num_steps=10, num_parameters=1, steps_per_epoch=1.0)
        yield
        fields = {name: value for name, value in event.items() if name != "type"}
        trainer.emit(event["type"], **fields, **({"claim_id": claim_id} if is_of_job else {}))
        for _ in range(20):
            yield

    (trainer, *_) = run(sends)

    found: list[Any] = attempts(site.db, **site.world.of(job.id))
    assert trainer.is_killed
    assert found[0].reason == EndReason.TRAINER_CRASHED
    assert f"Trainer {found[0].trainer_id} on worker" in found[0].detail


@pytest.mark.parametrize("event", OF_TRAINER.values(), ids=OF_TRAINER)
def test_a_trainer_that_sends_a_malformed_event_is_killed(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], event: dict[str, Any]
) -> None:
    assert_killed(site, run, event, is_of_job=False)


@pytest.mark.parametrize("event", OF_JOB.values(), ids=OF_JOB)
def test_a_trainer_that_sends_a_malformed_event_about_a_job_is_killed(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], event: dict[str, Any]
) -> None:
    assert_killed(site, run, event, is_of_job=True)


@pytest.mark.parametrize("deltas", [1, None, ["a"], [{}], [{"index": []}], [{"index": {}}], [{"index": "0"}]], ids=str)
def test_a_malformed_answer_is_a_fault_of_the_trainer(site: PackSite, session: TrainerSession, deltas: Any) -> None:
    Asked(site, session.inference).wait_until_accepted()
    trainer = TrainerEnd(session.directory)
    (message,) = trainer.take()

    trainer.write("generated", message, deltas=deltas)

    wait_until(lambda: is_fault_noticed(session))
    assert session.fault is not None
    assert session.fault.reason is EndReason.TRAINER_CRASHED


def test_an_event_about_a_job_before_the_trainer_is_ready_is_a_fault(site: PackSite) -> None:
    claim = site.claim()
    session = site.loading_session(claim)

    emit_for(session, claim, "checkpointed", **SAVED)
    session.read_events()

    assert session.fault is not None
    assert "before the trainer was ready" in session.fault.detail
    assert site.reason(claim) == EndReason.TRAINER_CRASHED


def test_an_event_adds_no_unknown_fields_to_records_and_heartbeats(site: PackSite) -> None:
    """Other processes calculate with these records."""
    session = site.session()

    emit(session, {"type": "memory", "base_bytes": 1, "capacity": "mine", "saturation": []})
    session.read_events()

    assert session.fault is None
    assert site.context.heartbeat.status["report"] == {"base_bytes": 1}


def test_speeds_of_nothing_are_ignored() -> None:
    assert Speeds.of_report({"alone": [[128, 0.0], [0, 1.0], [64, 2.0]]}).alone == ((64.0, 2.0),)
