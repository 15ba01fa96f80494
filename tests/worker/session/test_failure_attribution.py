"""Failures before a trainer has started a job are attributed to the node or the base model, never to the job."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from catalog.error_texts import ErrorText
from catalog.errors import LorryError, OutOfSpace
from catalog.fleet import cordons
from catalog.states import EndReason
from catalog.tables.fleet import Worker
from tests.catalog.lifecycle.test_load_failures import load
from tests.worker.pack_site import OUTAGE, PackSite, emit
from tests.worker.scripted_trainer import FakeTrainer, Script, load_forever, raising, reasons
from worker.background import base_models
from worker.background.child_task import AttemptFailed
from worker.session import staging
from worker.session.failures import launch_failure
from worker.session.session_job import End

REFUSAL = {"code": "invalid_config", "message": "CUDA is not available.", "remedy": "Choose another."}
FULL = OutOfSpace(ErrorText(code="out_of_space", message="The disk is full.", remedy="Free some space."))
Run = Callable[[Script], None]


@pytest.fixture
def run(site: PackSite, run: Callable[[Script], list[FakeTrainer]]) -> Run:
    """Return run(script), which supervises until no work is due, and then lets the longest retry delay pass."""

    def run_and_wait(script: Script) -> None:
        run(script)
        site.world.clock.advance(31)
        site.world.beat(worker_id="w1")

    return run_and_wait


def cordon_of(site: PackSite, worker_id: str = "w1") -> dict[str, Any] | None:
    with site.db.read() as session:
        return session.get_one(Worker, worker_id).cordon


def test_a_node_with_a_full_disk_fails_no_job_and_is_cordoned(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()
    monkeypatch.setattr(base_models, "ensure", raising(FULL))

    for _ in range(4):
        run(load_forever)

    now, cordon = site.world.job(job.id), cordon_of(site)
    assert (now.state, now.counted_attempts) == ("queued", 0)
    assert reasons(site, job.id) == [EndReason.NODE_FAILED] * 3
    assert cordon is not None
    assert (cordon["by"], cordon["reason"]) == ("service", cordons.BEFORE_ANY_JOB)


def refuses(trainer: FakeTrainer) -> Generator[None]:
    trainer.emit("load_refused", error=REFUSAL, ranks=[])
    yield


def test_a_base_that_the_only_worker_cannot_load_fails_its_job_with_a_reason(site: PackSite, run: Run) -> None:
    job = site.queued()

    for _ in range(3):
        run(refuses)

    failed = site.world.job(job.id)
    assert (failed.state, reasons(site, job.id)) == ("failed", [EndReason.TRAINER_CRASHED] * 3)
    assert failed.error is not None
    assert "CUDA is not available. Choose another." in failed.error["message"]


def test_a_node_that_cannot_load_a_working_base_fails_no_job_and_is_cordoned(site: PackSite, run: Run) -> None:
    site.world.worker("w2")
    site.queued()
    site.world.complete(load(site.world, "w2", "good", is_ready=True).claim_id)
    waiting = [site.queued() for _ in range(3)]

    for _ in range(6):
        site.world.beat(worker_id="w2")
        run(refuses)

    cordon, ended = cordon_of(site), [site.world.job(job.id) for job in waiting]
    assert [(job.state, job.counted_attempts) for job in ended] == [("queued", 0)] * 3
    assert cordon is not None
    assert (cordon["by"], cordon["evidence"][0]["detail"]) == ("service", "CUDA is not available. Choose another.")


def test_one_job_on_a_base_that_no_worker_has_loaded_cordons_no_node(site: PackSite, run: Run) -> None:
    """The base may be at fault: the other worker, which is busy, has not tried it."""
    site.world.worker("w2")
    job = site.queued()

    for _ in range(4):
        site.world.beat(worker_id="w2")
        run(refuses)

    assert cordon_of(site) is None
    assert (site.world.job(job.id).state, site.world.job(job.id).counted_attempts) == ("queued", 0)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("unsupported_model", EndReason.TRAINER_CRASHED),
        ("out_of_memory", EndReason.HOST_OOM),
        ("disk_error", EndReason.NODE_FAILED),
        ("device_unusable", EndReason.NODE_FAILED),
    ],
)
def test_a_rejected_base_is_the_end_reason_with_its_remedy(site: PackSite, code: str, reason: EndReason) -> None:
    session = site.loading_session(site.claim())
    emit(session, {"type": "load_refused", "error": REFUSAL | {"code": code}, "ranks": []})

    session.read_events()

    assert session.outcome == End(reason=reason, detail="CUDA is not available. Choose another.")


def test_the_ranks_that_rejected_a_base_are_named(site: PackSite) -> None:
    session = site.loading_session(site.claim())
    emit(session, {"type": "load_refused", "error": REFUSAL, "ranks": [0, 2]})

    session.read_events()

    assert session.outcome is not None
    assert session.outcome.detail == "Process 0 and 2: CUDA is not available. Choose another."


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_base_that_cannot_be_imported_is_handled_like_an_unloadable_one(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    waiting = [site.queued() for _ in range(num_workers)]
    unreachable = AttemptFailed(
        ErrorText(code="source_unreachable", message="The hub is far.", remedy="Look at the network.")
    )
    monkeypatch.setattr(base_models, "ensure", raising(unreachable))
    for number in range(1, num_workers):
        site.world.worker(f"w{number + 1}")

    for _ in range(4):
        site.world.beat(worker_id=f"w{num_workers}")
        run(load_forever)

    ended = [site.world.job(job.id) for job in waiting]
    assert {reason for job in waiting for reason in reasons(site, job.id)} == {EndReason.TRAINER_CRASHED}
    assert [job.state for job in ended] == (["failed"] if num_workers == 1 else ["queued", "queued"])
    assert cordon_of(site) is None, "the source of the base may be at fault"
    if num_workers == 1:
        assert "The hub is far. Look at the network." in (ended[0].error or {})["message"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OUTAGE, EndReason.INFRA_LOST),
        (FULL, EndReason.NODE_FAILED),
        (OSError("No such disk"), EndReason.NODE_FAILED),
        (
            AttemptFailed(ErrorText(code="model_changed", message="Other files.", remedy="Restore.")),
            EndReason.TRAINER_CRASHED,
        ),
    ],
)
def test_launch_failures_map_to_end_reasons(error: LorryError | OSError, reason: EndReason) -> None:
    assert launch_failure(error).reason is reason


def test_a_full_disk_at_the_hand_over_costs_the_job_no_attempt(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    session, late = site.session(), site.claim()
    session.admit(late)
    monkeypatch.setattr(staging, "stage_files", raising(FULL))

    session.hand_over()

    job = site.world.job(late.job.id)
    assert (job.state, job.counted_attempts, site.reason(late)) == ("queued", 0, EndReason.NODE_FAILED)
