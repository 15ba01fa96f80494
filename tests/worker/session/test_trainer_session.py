"""How a session handles its trainer's events and users' requests during outages of the database or the store."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from catalog.error_texts import ErrorText
from catalog.errors import OutOfSpace, StaleClaim, Unavailable
from catalog.history import queries
from catalog.jobs import commands
from catalog.lifecycle import recording
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.resources.memory import BaseModelMemory
from catalog.states import EndReason
from catalog.storage import token_cache
from catalog.storage.store import blob_key
from catalog.tables.storage import File
from tests.catalog.world import DESCRIPTION
from tests.worker.pack_site import (
    OUTAGE,
    PASSED,
    READY,
    PackSite,
    directives_for,
    emit,
    emit_for,
    own_bytes,
    received_verbs,
    step,
)
from worker.background import tokenization
from worker.protocol import mailbox
from worker.session.session_job import End
from worker.session.trainer_session import TrainerSession

FULL = OutOfSpace(
    ErrorText(code="out_of_space", message="The disk that holds the database is full.", remedy="Free some space.")
)


def fails(first: int, error: Exception, act: Callable[..., Any]) -> Callable[..., Any]:
    """Return `act` with its first calls replaced by errors."""
    left = [error] * first

    def flaky(*arguments: Any, **named: Any) -> Any:
        if left:
            raise left.pop()
        return act(*arguments, **named)

    return flaky


@pytest.mark.parametrize("error", [OUTAGE, FULL])
def test_a_pause_during_an_outage_keeps_its_stored_checkpoint(
    site: PackSite, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    claim = site.claim()
    session = site.session(claim)
    commands.pause(site.db, **site.world.of(claim.job.id))
    session.apply_directives(directives_for(claim, pause=True))
    emit_for(session, claim, "checkpointed", step=5, folder=site.checkpoint(session, claim, 5))
    emit_for(session, claim, "paused", step=5, adapter=None)
    monkeypatch.setattr(claims, "end", fails(1, error, claims.end))
    with pytest.raises(type(error)):
        session.read_events()

    session.read_events()

    assert (site.world.job(claim.job.id).state, site.reason(claim)) == ("paused", EndReason.PAUSED_BY_USER)
    (kept,) = site.checkpoints(claim)
    assert kept.artifact is not None
    assert [file.path for file in site.store.get_manifest(kept.artifact).files] == ["row"]
    events = site.world.events(claim.job.id)
    assert [event.message for event in events].count("Checkpoint created at step 5") == 1


def test_a_rejected_checkpoint_alone_is_dropped_despite_repeated_outages(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim_with_checkpoints(10, 20)
    session = site.session(claim)
    refused = {"error": {"code": "bad_checkpoint", "message": "It is torn.", "remedy": "None."}, "is_checkpoint": True}
    emit_for(session, claim, "refused", **refused)
    monkeypatch.setattr(recording, "record_event", fails(2, OUTAGE, recording.record_event))
    for _ in range(2):
        with pytest.raises(Unavailable):
            session.read_events()

    session.read_events()
    session.hand_over()

    assert [row.artifact is not None for row in site.checkpoints(claim)] == [True, False]
    (message,) = mailbox.InboxReader(session.directory).take()
    assert message.verb == "admit"
    assert Path(message.body["resume"]).name == "step-10"


def test_a_pause_is_sent_again_after_the_trainer_has_rejected_the_job(site: PackSite) -> None:
    claim = site.claim_with_checkpoints(10, 20)
    session = site.session(claim)
    session.apply_directives(directives_for(claim, pause=True))
    refused = {"error": {"code": "bad_checkpoint", "message": "It is torn.", "remedy": "None."}, "is_checkpoint": True}
    emit_for(session, claim, "refused", **refused)
    session.read_events()
    session.hand_over()

    session.apply_directives(directives_for(claim, pause=True))

    assert received_verbs(session) == ["pause", "admit", "pause"]


def test_a_job_whose_files_cannot_be_stored_does_not_block_the_others(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.queued(suffix="stuck")
    site.queued(suffix="free")
    stuck, free = site.claim_all()
    session = site.session(stuck, free)
    emit_for(session, stuck, "checkpointed", step=5, folder=site.checkpoint(session, stuck, 5))
    emit(session, {"type": "stepped", "claim_id": free.claim_id, **step(1)})
    monkeypatch.setattr(site.store, "put_folder", fails(99, OUTAGE, site.store.put_folder))

    for _ in range(2):
        with pytest.raises(Unavailable):
            session.read_events()

    points = queries.metrics(site.db, **site.world.of(free.job.id), kind="train")
    assert [point.step for point in points] == [1]
    assert site.checkpoints(stuck) == []


def test_only_the_newest_two_checkpoints_wait_for_the_store(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = site.claim()
    session = site.session(claim)
    folders = [site.checkpoint(session, claim, number) for number in (1, 2, 3, 4)]
    monkeypatch.setattr(site.store, "put_folder", fails(1, OUTAGE, site.store.put_folder))
    for number, folder in enumerate(folders, start=1):
        emit_for(session, claim, "checkpointed", step=number, folder=folder)
    with pytest.raises(Unavailable):
        session.read_events()
    assert [(session.directory.path / folder).is_dir() for folder in folders] == [False, False, True, True]

    session.read_events()

    assert [row.step for row in site.checkpoints(claim)] == [3, 4]


def test_unread_events_count_as_a_sign_of_life(site: PackSite) -> None:
    session = site.session(site.claim())
    session.last_event_at -= 1000
    emit(session, {"type": "memory", "base_bytes": 1})

    assert session.silent_seconds() < 1000


def test_a_directive_is_kept_on_a_full_disk_until_it_can_be_sent(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim()
    session = site.session(claim)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(mailbox, "write_json", fails(1, full, mailbox.write_json))
    with pytest.raises(OutOfSpace):
        session.apply_directives(directives_for(claim, cancel=True))

    session.apply_directives(directives_for(claim, cancel=True))

    assert received_verbs(session) == ["cancel"]
    assert len(session) == 1


def test_events_wait_until_the_database_has_disk_space(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = site.claim()
    session = site.session(claim)
    emit_for(session, claim, "cancelled")
    monkeypatch.setattr(claims, "end", fails(2, FULL, claims.end))
    for _ in range(2):
        with pytest.raises(OutOfSpace):
            session.read_events()
    assert len(session) == 1

    commands.cancel(site.db, **site.world.of(claim.job.id))
    session.read_events()

    assert site.world.job(claim.job.id).state == "cancelled"


def test_a_claim_that_is_stale_when_its_failure_is_recorded_is_dropped(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim()
    session = site.session(claim)
    emit_for(
        session, claim, "checkpointed", step=5, folder=f"jobs/{claim.claim_id}/none"
    )  # a missing folder is a failure of the job
    monkeypatch.setattr(claims, "end", fails(1, StaleClaim(), claims.end))

    session.read_events()

    assert len(session) == 0
    assert "cancel" in received_verbs(session)


def test_a_preempted_job_saves_a_checkpoint_and_is_requeued(site: PackSite) -> None:
    claim = site.claim(priority="batch")
    session = site.session(claim)

    for _ in range(2):
        session.apply_directives(directives_for(claim, preempt=True))
    messages = received_verbs(session)
    emit_for(session, claim, "checkpointed", step=5, folder=site.checkpoint(session, claim, 5))
    emit_for(session, claim, "paused", step=5, adapter=None)
    session.read_events()

    assert messages == ["preempt"]
    job = site.world.job(claim.job.id)
    assert (job.state, job.num_preemptions, site.reason(claim)) == ("queued", 1, EndReason.PREEMPTED)
    assert [row.step for row in site.checkpoints(claim)] == [5]
    assert site.held() == set()


@pytest.mark.parametrize(("directive", "state"), [("cancel", "cancelled"), ("pause", "paused"), ("preempt", "queued")])
def test_a_directive_is_applied_immediately_while_the_base_loads(site: PackSite, directive: str, state: str) -> None:
    claim = site.claim()
    session = site.loading_session(claim)
    verbs: dict[str, Any] = {"cancel": commands.cancel, "pause": commands.pause}
    if directive in verbs:
        verbs[directive](site.db, **site.world.of(claim.job.id))

    session.apply_directives(directives_for(claim, **{directive: True}))

    assert site.world.job(claim.job.id).state == state
    assert received_verbs(session) == ["admit", "cancel"]
    assert len(session) == 0
    assert site.held() == set()


def test_a_cancel_is_applied_even_if_the_jobs_events_cannot_be_stored(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim()
    session = site.session(claim)
    emit_for(session, claim, "exported", **exported(site, session, claim))
    monkeypatch.setattr(site.store, "put_folder", fails(99, OUTAGE, site.store.put_folder))
    with pytest.raises(Unavailable):
        session.read_events()
    commands.cancel(site.db, **site.world.of(claim.job.id))

    session.apply_directives(directives_for(claim, cancel=True))

    assert site.world.job(claim.job.id).state == "cancelled"


def test_the_recorded_tokens_are_those_that_the_engine_counted(site: PackSite) -> None:
    """The worker does not add the steps of an earlier attempt, or steps that are reported twice."""
    claim = site.claim_with_checkpoints(5)
    session = site.session(claim)
    emit(session, {"type": "stepped", "claim_id": claim.claim_id, "seconds": 0.0, **step(6)})
    emit_for(session, claim, "exported", **exported(site, session, claim), trained_tokens=4321)

    session.read_events()

    job = site.world.job(claim.job.id)
    assert (job.state, job.trained_tokens) == ("succeeded", 4321)


def test_a_job_whose_damaged_tokens_another_job_has_deleted_is_retried(site: PackSite) -> None:
    claim = site.claim()
    session = site.session(claim)
    assert claim.job.train_prepared is not None
    token_cache.forget(site.db, claim.job.train_prepared)
    emit_for(session, claim, "exported", **exported(site, session, claim), trained_tokens=1)

    session.read_events()

    assert (site.reason(claim), site.world.job(claim.job.id).state) == (EndReason.INFRA_LOST, "queued")


def exported(site: PackSite, session: TrainerSession, claim: Claim) -> dict[str, Any]:
    """Return the body of an `exported` event for a verified adapter."""
    folder = site.checkpoint(session, claim, 10)
    course = {"step": 10, "kept_step": 10, "stopped_early": None}
    return {**course, "folder": folder, "num_parameters": 1, "report": PASSED}


def test_memory_that_a_loading_trainer_will_take_is_not_free(site: PackSite) -> None:
    claim = site.claim()
    session = site.loading_session(claim)
    job_bytes = own_bytes(claim.job)
    trainer_bytes = BaseModelMemory(DESCRIPTION, "bfloat16").trainer_bytes()
    assert session.memory.to_come() == trainer_bytes + job_bytes

    emit(session, READY)
    session.read_events()
    assert session.memory.to_come() == trainer_bytes - 1 + job_bytes, "READY reports a base of one byte"

    emit_for(session, claim, "admitted", step=0, num_steps=10, num_parameters=1, steps_per_epoch=2.5)
    session.read_events()
    assert session.memory.to_come() == 0


def test_a_trainer_that_is_ready_and_empty_takes_no_more_memory(site: PackSite) -> None:
    session = site.session()

    assert session.memory.to_come() == 0


@pytest.mark.parametrize(("kind", "num_slices"), [("cpu", 2), ("cuda", 8)])
def test_each_pending_job_enlarges_the_tick_up_to_its_full_size(
    site: PackSite, kind: str, num_slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of the trainer includes the first slice. Each core of a CPU computes its own slice."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    site.context.device = replace(site.context.device, kind=kind)
    first = [site.queued() for _ in range(2)]
    session = site.loading_session(*site.claim_all())
    slice_bytes = BaseModelMemory(DESCRIPTION, "bfloat16").slice_bytes()
    job_bytes = own_bytes(first[0])
    trainer_bytes = BaseModelMemory(DESCRIPTION, "bfloat16").trainer_bytes() + site.context.group.reserve_bytes
    assert session.memory.to_come() == trainer_bytes + 2 * job_bytes + min(1, num_slices - 1) * slice_bytes

    for _ in range(8):
        site.queued()
    for claim in site.claim_all():
        session.admit(claim)

    assert session.memory.to_come() == trainer_bytes + 10 * job_bytes + (num_slices - 1) * slice_bytes


def test_a_pending_job_with_dropout_is_counted_with_its_mask(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # on two cores its slice would count as well
    plain, dropping = site.claim(), site.claim(lora={"dropout": 0.1})
    session = site.loading_session(plain)
    without = session.memory.to_come()

    session.admit(dropping)

    mask_bytes = 1024 * (2 * 64 + 2 * 64)
    assert session.memory.to_come() == without + own_bytes(dropping.job) + mask_bytes


def test_a_crash_counts_against_jobs_that_a_loaded_trainer_received(site: PackSite) -> None:
    crash = End(reason=EndReason.TRAINER_CRASHED, detail="signal 9")
    early, given, late = site.claim(seed=1), site.claim(seed=2), site.claim(seed=3)
    site.loading_session(early).end_all(crash)
    session = site.loading_session(given, trainer_id="trainer-2")
    emit(session, READY)
    session.read_events()
    session.hand_over()
    session.admit(late)

    session.end_all(crash)

    jobs_now = [site.world.job(claim.job.id) for claim in (early, given, late)]
    assert [job.counted_attempts for job in jobs_now] == [0, 1, 0]
    assert {job.state for job in jobs_now} == {"queued"}
    assert {site.reason(claim) for claim in (early, given, late)} == {EndReason.TRAINER_CRASHED}


def test_damaged_tokens_are_recomputed_for_the_job_that_finds_them(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim()
    key = claim.job.train_prepared
    (damaged,) = site.store.get_manifest(
        (token_cache.get(site.db, key) or pytest.fail("prepared")).artifact or ""
    ).files
    site.store.objects.put(blob_key(damaged.digest), b"x" * damaged.num_bytes)
    source = site.store.put_bytes(b"the data file")
    with site.db.write() as db_session:
        db_session.get_one(File, claim.job.training_file).digest = source.digest
    (site.settings.bases_dir() / claim.job.base_digest).mkdir(parents=True)
    site.context.scratch_dir().mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(tokenization, "_run", tokenize)

    session = site.loading_session(claim)

    (message,) = mailbox.InboxReader(session.directory).take()
    assert message.verb == "admit"
    assert (session.directory.path / message.body["train"]).read_text() == "the tokens"
    again = token_cache.get(site.db, key)
    assert again is not None
    assert site.store.verify(site.store.get_manifest(again.artifact or "")) == []


def tokenize(_context: object, work: Path, source: Path, *_: object, **__: object) -> dict[str, Any]:
    """Replaces the child process."""
    assert source.read_bytes() == b"the data file"
    (work / "tokens").mkdir()
    (work / "tokens" / "tokens.safetensors").write_text("the tokens")
    (work / "details.json").write_text("{}")
    return {"usable_rows": 1}
