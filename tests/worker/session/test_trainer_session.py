"""What a pack makes of its trainer's words, and of people's wishes, while the database or the store comes and goes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from catalog.errors import OutOfSpace, StaleClaim, Unavailable
from catalog.history import queries
from catalog.jobs import commands
from catalog.lifecycle import recording
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.resources import memory
from catalog.states import EndReason
from catalog.storage import token_cache
from catalog.storage.store import blob_key
from catalog.tables.storage import File
from tests.catalog.world import DESCRIPTION
from tests.worker.pack_site import OUTAGE, PASSED, READY, PackSite, asked, say, step, tell, told
from worker.background import tokenization
from worker.protocol import mailbox
from worker.session import lineage
from worker.session.session_job import End
from worker.session.trainer_session import TrainerSession

FULL = OutOfSpace("The disk that holds the database is full.", code="disk_full", remedy="Free some space.")


def fails(first: int, error: Exception, act: Callable[..., Any]) -> Callable[..., Any]:
    """`act`, whose first calls raise."""
    left = [error] * first

    def flaky(*arguments: Any, **named: Any) -> Any:
        if left:
            raise left.pop()
        return act(*arguments, **named)

    return flaky


@pytest.mark.parametrize("error", [OUTAGE, FULL])
def test_a_pause_in_an_outage_keeps_the_checkpoint_that_it_stored(
    site: PackSite, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    claim = site.claim()
    pack = site.pack(claim)
    commands.pause(site.db, **site.world.of(claim.job.id))
    pack.obey(asked(claim, pause=True))
    tell(pack, claim, "checkpointed", step=5, folder=site.checkpoint(pack, claim, 5))
    tell(pack, claim, "paused", step=5, adapter=None)
    monkeypatch.setattr(claims, "end", fails(1, error, claims.end))
    with pytest.raises(type(error)):
        pack.hear()

    pack.hear()

    assert (site.world.job(claim.job.id).state, site.reason(claim)) == ("paused", EndReason.PAUSED_BY_USER)
    (kept,) = site.checkpoints(claim)
    assert kept.artifact is not None
    assert [file.path for file in site.store.get_manifest(kept.artifact).files] == ["row"]
    events = queries.events_since(site.db, **site.world.of(claim.job.id), seq=0)
    assert [event.message for event in events].count("Checkpoint created at step 5") == 1


def test_a_refused_checkpoint_costs_itself_alone_however_often_the_database_goes_away(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim_with_checkpoints(10, 20)
    pack = site.pack(claim)
    refused = {"error": {"code": "bad_checkpoint", "message": "It is torn.", "remedy": "None."}, "is_checkpoint": True}
    tell(pack, claim, "refused", **refused)
    monkeypatch.setattr(recording, "record_event", fails(2, OUTAGE, recording.record_event))
    for _ in range(2):
        with pytest.raises(Unavailable):
            pack.hear()

    pack.hear()
    pack.hand_over()

    assert [row.artifact is not None for row in site.checkpoints(claim)] == [True, False]
    (message,) = mailbox.InboxReader(pack.directory).take()
    assert message.verb == "admit"
    assert Path(message.body["resume"]).name == "step-10"


def test_a_pause_is_said_again_to_a_trainer_that_had_refused_the_job_before(site: PackSite) -> None:
    claim = site.claim_with_checkpoints(10, 20)
    pack = site.pack(claim)
    pack.obey(asked(claim, pause=True))
    refused = {"error": {"code": "bad_checkpoint", "message": "It is torn.", "remedy": "None."}, "is_checkpoint": True}
    tell(pack, claim, "refused", **refused)
    pack.hear()
    pack.hand_over()

    pack.obey(asked(claim, pause=True))

    assert told(pack) == ["pause", "admit", "pause"]


def test_a_job_whose_files_cannot_be_stored_now_holds_nobody_else_up(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.queued(suffix="stuck")
    site.queued(suffix="free")
    stuck, free = site.claim_all()
    pack = site.pack(stuck, free)
    tell(pack, stuck, "checkpointed", step=5, folder=site.checkpoint(pack, stuck, 5))
    say(pack, {"type": "stepped", "claim_id": free.claim_id, **step(1)})
    monkeypatch.setattr(site.store, "put_folder", fails(99, OUTAGE, site.store.put_folder))

    for _ in range(2):
        with pytest.raises(Unavailable):
            pack.hear()

    points = queries.metrics(site.db, **site.world.of(free.job.id), kind="train")
    assert [point.step for point in points] == [1]
    assert site.checkpoints(stuck) == []


def test_the_newest_two_checkpoints_wait_for_the_store_and_no_more(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim()
    pack = site.pack(claim)
    folders = [site.checkpoint(pack, claim, number) for number in (1, 2, 3, 4)]
    monkeypatch.setattr(site.store, "put_folder", fails(1, OUTAGE, site.store.put_folder))
    for number, folder in enumerate(folders, start=1):
        tell(pack, claim, "checkpointed", step=number, folder=folder)
    with pytest.raises(Unavailable):
        pack.hear()
    assert [(pack.directory.path / folder).is_dir() for folder in folders] == [False, False, True, True]

    pack.hear()

    assert [row.step for row in site.checkpoints(claim)] == [3, 4]


def test_words_that_wait_to_be_read_are_a_sign_of_life(site: PackSite) -> None:
    pack = site.pack(site.claim())
    pack.heard_at -= 1000
    say(pack, {"type": "memory", "base_bytes": 1})

    assert pack.silent_seconds() < 1000


def test_a_full_disk_keeps_a_wish_until_it_can_be_said(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = site.claim()
    pack = site.pack(claim)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(mailbox, "write_json", fails(1, full, mailbox.write_json))
    with pytest.raises(OutOfSpace):
        pack.obey(asked(claim, cancel=True))

    pack.obey(asked(claim, cancel=True))

    assert told(pack) == ["cancel"]
    assert len(pack) == 1


def test_what_a_trainer_said_waits_for_the_database_to_have_room(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim()
    pack = site.pack(claim)
    tell(pack, claim, "cancelled")
    monkeypatch.setattr(claims, "end", fails(2, FULL, claims.end))
    for _ in range(2):
        with pytest.raises(OutOfSpace):
            pack.hear()
    assert len(pack) == 1

    commands.cancel(site.db, **site.world.of(claim.job.id))
    pack.hear()

    assert site.world.job(claim.job.id).state == "cancelled"


def test_a_claim_that_is_stale_while_its_mishap_is_recorded_is_dropped(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim()
    pack = site.pack(claim)
    tell(
        pack, claim, "checkpointed", step=5, folder=f"jobs/{claim.claim_id}/none"
    )  # a folder that is missing is the job's mishap
    monkeypatch.setattr(claims, "end", fails(1, StaleClaim(), claims.end))

    pack.hear()

    assert len(pack) == 0
    assert "cancel" in told(pack)


def test_who_is_preempted_saves_a_checkpoint_and_goes_back_to_the_queue(site: PackSite) -> None:
    claim = site.claim(priority="batch")
    pack = site.pack(claim)

    for _ in range(2):
        pack.obey(asked(claim, preempt=True))
    messages = told(pack)
    tell(pack, claim, "checkpointed", step=5, folder=site.checkpoint(pack, claim, 5))
    tell(pack, claim, "paused", step=5, adapter=None)
    pack.hear()

    assert messages == ["preempt"]
    job = site.world.job(claim.job.id)
    assert (job.state, job.num_preemptions, site.reason(claim)) == ("queued", 1, EndReason.PREEMPTED)
    assert [row.step for row in site.checkpoints(claim)] == [5]
    assert site.held() == set()


@pytest.mark.parametrize(("wish", "state"), [("cancel", "cancelled"), ("pause", "paused"), ("preempt", "queued")])
def test_a_wish_is_obeyed_at_once_while_the_base_loads(site: PackSite, wish: str, state: str) -> None:
    claim = site.claim()
    pack = site.loading_pack(claim)
    verbs: dict[str, Any] = {"cancel": commands.cancel, "pause": commands.pause}
    if wish in verbs:
        verbs[wish](site.db, **site.world.of(claim.job.id))

    pack.obey(asked(claim, **{wish: True}))

    assert site.world.job(claim.job.id).state == state
    assert told(pack) == ["admit", "cancel"]
    assert len(pack) == 0
    assert site.held() == set()


def test_a_cancel_is_obeyed_though_the_jobs_news_cannot_be_stored(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim()
    pack = site.pack(claim)
    tell(pack, claim, "exported", **exported(site, pack, claim))
    monkeypatch.setattr(site.store, "put_folder", fails(99, OUTAGE, site.store.put_folder))
    with pytest.raises(Unavailable):
        pack.hear()
    commands.cancel(site.db, **site.world.of(claim.job.id))

    pack.obey(asked(claim, cancel=True))

    assert site.world.job(claim.job.id).state == "cancelled"


def test_the_tokens_on_record_are_those_that_the_engine_counted(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of an earlier attempt, or of one that is told twice, are no business of the worker's."""
    claim = site.claim_with_checkpoints(5)
    pack = site.pack(claim)
    monkeypatch.setattr(lineage, "record", lambda *_, **__: ({}, "0" * 64))
    say(pack, {"type": "stepped", "claim_id": claim.claim_id, "seconds": 0.0, **step(6)})
    tell(pack, claim, "exported", **exported(site, pack, claim), trained_tokens=4321)

    pack.hear()

    job = site.world.job(claim.job.id)
    assert (job.state, job.trained_tokens) == ("succeeded", 4321)


def exported(site: PackSite, pack: TrainerSession, claim: Claim) -> dict[str, Any]:
    """What the trainer says of an adapter that has passed."""
    folder = site.checkpoint(pack, claim, 10)
    course = {"step": 10, "kept_step": 10, "stopped_early": None}
    return {**course, "folder": folder, "num_parameters": 1, "report": PASSED}


def test_what_the_trainer_will_take_is_not_free_while_it_loads(site: PackSite) -> None:
    claim = site.claim()
    pack = site.loading_pack(claim)
    row_bytes = 26 * claim.job.adapter_parameters
    trainer_bytes = memory.trainer_bytes(DESCRIPTION, "bfloat16")
    assert pack.bytes_to_come() == trainer_bytes + row_bytes

    say(pack, READY)
    pack.hear()
    assert pack.bytes_to_come() == trainer_bytes - 1 + row_bytes, "READY tells of a base of one byte"

    tell(pack, claim, "admitted", step=0, num_steps=10, num_parameters=1, steps_per_epoch=2.5)
    pack.hear()
    assert pack.bytes_to_come() == 0


def test_a_trainer_that_is_ready_and_empty_takes_nothing_more(site: PackSite) -> None:
    pack = site.pack()

    assert pack.bytes_to_come() == 0


@pytest.mark.parametrize(("kind", "num_slices"), [("cpu", 2), ("cuda", 8)])
def test_each_job_that_is_still_to_come_widens_the_tick_until_it_has_its_size(
    site: PackSite, kind: str, num_slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first slice is in what the trainer needs. Each core of a CPU computes one of its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    site.context.device = replace(site.context.device, kind=kind)
    first = [site.queued() for _ in range(2)]
    pack = site.loading_pack(*site.claim_all())
    slice_bytes = memory.slice_bytes(DESCRIPTION, "bfloat16")
    row_bytes = 26 * first[0].adapter_parameters
    trainer_bytes = memory.trainer_bytes(DESCRIPTION, "bfloat16")
    assert pack.bytes_to_come() == trainer_bytes + 2 * row_bytes + min(1, num_slices - 1) * slice_bytes

    for _ in range(8):
        site.queued()
    for claim in site.claim_all():
        pack.admit(claim)

    assert pack.bytes_to_come() == trainer_bytes + 10 * row_bytes + (num_slices - 1) * slice_bytes


def test_a_job_with_dropout_is_still_to_take_its_mask(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # on two cores its slice would count as well
    plain, dropping = site.claim(), site.claim(lora={"dropout": 0.1})
    pack = site.loading_pack(plain)
    without = pack.bytes_to_come()

    pack.admit(dropping)

    mask_bytes = 1024 * (2 * 64 + 2 * 64)
    assert pack.bytes_to_come() == without + 26 * dropping.job.adapter_parameters + mask_bytes


def test_a_trainer_that_ends_counts_against_the_jobs_that_it_was_given_once_it_had_loaded_its_base(
    site: PackSite,
) -> None:
    crash = End(reason=EndReason.TRAINER_CRASHED, detail="signal 9")
    early, given, late = site.claim(seed=1), site.claim(seed=2), site.claim(seed=3)
    site.loading_pack(early).end_all(crash)
    pack = site.loading_pack(given, trainer_id="trainer-2")
    say(pack, READY)
    pack.hear()
    pack.hand_over()
    pack.admit(late)

    pack.end_all(crash)

    jobs_now = [site.world.job(claim.job.id) for claim in (early, given, late)]
    assert [job.counted_attempts for job in jobs_now] == [0, 1, 0]
    assert {job.state for job in jobs_now} == {"queued"}
    assert {site.reason(claim) for claim in (early, given, late)} == {EndReason.TRAINER_CRASHED}


def test_damaged_tokens_are_made_again_for_the_job_that_finds_them(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim()
    key = claim.job.train_prepared
    assert key is not None
    (damaged,) = site.store.get_manifest(
        (token_cache.get(site.db, key) or pytest.fail("prepared")).artifact or ""
    ).files
    site.store.objects.put(blob_key(damaged.digest), b"x" * damaged.num_bytes)
    source = site.store.put_bytes(b"the data file")
    with site.db.write() as session:
        session.get_one(File, claim.job.training_file).digest = source.digest
    (site.settings.bases_dir() / claim.job.base_digest).mkdir(parents=True)
    site.context.scratch_dir().mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(tokenization, "_run", tokenize)

    pack = site.loading_pack(claim)

    (message,) = mailbox.InboxReader(pack.directory).take()
    assert message.verb == "admit"
    assert (pack.directory.path / message.body["train"]).read_text() == "the tokens"
    again = token_cache.get(site.db, key)
    assert again is not None
    assert site.store.verify(site.store.get_manifest(again.artifact or "")) == []


def tokenize(_context: object, work: Path, source: Path, *_: object, **__: object) -> dict[str, Any]:
    """In place of the child process."""
    assert source.read_bytes() == b"the data file"
    (work / "tokens").mkdir()
    (work / "tokens" / "tokens.safetensors").write_text("the tokens")
    return {"usable_rows": 1}
