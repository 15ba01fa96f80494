"""The supervisor around a trainer, which is a script here. Each poll advances the script by one step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from catalog.db.database import Database
from catalog.error_texts import ErrorText
from catalog.errors import OutOfSpace
from catalog.jobs import commands
from catalog.queue import claiming
from catalog.queue.claiming import Claim
from catalog.queue.claims import ClaimDirectives
from catalog.queue.notifier import FileNotifier
from catalog.resources import memory
from catalog.resources.memory import BaseModelMemory
from catalog.scheduling.snapshot import Capacity
from catalog.states import EndReason
from catalog.storage.store import ArtifactStore
from catalog.tables.fleet import Worker
from catalog.tables.jobs import Job
from tests.catalog.world import DESCRIPTION
from tests.worker.pack_site import OUTAGE, READY, PackSite, emit, own_bytes, products_bytes
from tests.worker.scripted_trainer import FakeTrainer, Script, cancel_first_job, load_forever, raising, reasons
from worker import next_work
from worker.background import base_models, task_runner
from worker.background.child_task import Abandoned
from worker.context.context import WorkerContext
from worker.entrypoints import loop
from worker.gang.gang import gang_of
from worker.next_work import free_capacity
from worker.node import devices
from worker.session.failures import TrainerEnd


@pytest.mark.parametrize(
    ("error", "reason"), [(OUTAGE, EndReason.INFRA_LOST), (OSError("No such disk"), EndReason.NODE_FAILED)]
)
def test_a_base_that_cannot_be_imported_releases_the_claims(
    site: PackSite,
    run: Callable[[Script], list[FakeTrainer]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: EndReason,
) -> None:
    job = site.queued()
    monkeypatch.setattr(base_models, "ensure", raising(error))

    assert run(load_forever) == []

    assert site.world.job(job.id).state == "queued"
    assert reasons(site, job.id) == [reason]
    assert site.held() == set()


def test_an_internal_error_leaves_no_lease_that_is_renewed(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.queued()
    monkeypatch.setattr(base_models, "ensure", raising(RuntimeError("ours")))

    with pytest.raises(RuntimeError, match="ours"):
        run(load_forever)

    assert site.held() == set()


def test_a_cancel_is_applied_while_the_base_is_imported(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()

    def ensure(*_: object, is_unwanted: Callable[[], bool]) -> Path:
        assert not is_unwanted()
        (claim_id,) = site.held()
        commands.cancel(site.db, **site.world.of(job.id))
        site.context.heartbeat._note({claim_id: ClaimDirectives(cancel=True)}, float("inf"))
        assert is_unwanted()
        raise Abandoned

    monkeypatch.setattr(base_models, "ensure", ensure)

    assert run(load_forever) == []

    assert site.world.job(job.id).state == "cancelled"
    assert site.held() == set()


def test_a_trainer_that_loads_for_no_job_is_killed(site: PackSite, run: Callable[[Script], list[FakeTrainer]]) -> None:
    job = site.queued()

    def is_cancelled_meanwhile(_trainer: FakeTrainer) -> Generator[None]:
        (claim_id,) = site.held()
        commands.cancel(site.db, **site.world.of(job.id))
        site.context.heartbeat._note({claim_id: ClaimDirectives(cancel=True)}, float("inf"))
        while True:
            yield

    (trainer,) = run(is_cancelled_meanwhile)

    assert trainer.is_killed
    assert site.world.job(job.id).state == "cancelled"


def test_an_unkillable_trainer_is_left_behind_and_its_worker_is_cordoned(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]]
) -> None:
    job = site.queued()
    with site.db.write() as session:
        session.get_one(Job, job.id).counted_attempts = 1

    def hangs(trainer: FakeTrainer) -> Generator[None]:
        trainer.is_left_behind, trainer.started_at = True, -float("inf")
        while True:
            yield

    (trainer,) = run(hangs)

    with site.db.read() as session:
        cordon = session.get_one(Worker, "w1").cordon
    assert trainer.returncode is None
    assert (site.world.job(job.id).state, reasons(site, job.id)) == ("queued", [EndReason.NODE_FAILED])
    assert site.held() == set()
    assert cordon is not None
    assert (cordon["by"], cordon["reason"]) == ("service", TrainerEnd.UNKILLABLE.value.detail)
    site.world.clock.advance(3600)
    assert site.world.claim("w1") == []


@pytest.mark.parametrize("error", [OUTAGE, RuntimeError("ours"), OSError("No such disk")])
def test_a_background_task_that_fails_stops_no_training(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    job = site.queued()
    monkeypatch.setattr(task_runner, "run_next", raising(error))

    run(cancel_first_job)

    assert reasons(site, job.id) == [EndReason.CANCELLED_BY_USER]


def test_a_drain_is_sent_while_nothing_can_be_recorded(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()
    put_folder = site.store.put_folder

    def outage(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        admit = yield from trainer.listen("admit")
        claim_id = admit.body["claim_id"]
        monkeypatch.setattr(ArtifactStore, "put_folder", raising(OUTAGE))
        folder = trainer.directory.checkpoint_path(claim_id, 5)
        folder.mkdir(parents=True)
        trainer.emit("checkpointed", claim_id=claim_id, step=5, folder=trainer.directory.named(folder))
        site.context.shutdown.set()
        yield from trainer.listen("drain")
        monkeypatch.setattr(ArtifactStore, "put_folder", lambda _, *given, **named: put_folder(*given, **named))
        trainer.emit("paused", claim_id=claim_id, step=5, adapter=None)
        yield

    run(outage)

    assert reasons(site, job.id) == [EndReason.DRAINED]
    assert site.world.job(job.id).state == "queued"


def test_a_waiting_worker_reports_its_free_capacity(site: PackSite, run: Callable[[Script], list[FakeTrainer]]) -> None:
    assert run(load_forever) == []

    assert site.context.heartbeat.status["report"]["capacity"]["memory_bytes_free"] == 10**12


def test_no_job_joins_an_isolated_job_in_an_empty_trainer(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]]
) -> None:
    """The claim names another trainer until the job is admitted, so the database alone does not show the isolation."""
    site.queued()
    others_attempts: list[list[str | None]] = []

    def script(trainer: FakeTrainer) -> Generator[None]:
        yield from cancel_first_job(trainer)
        suspect = site.queued(suffix="suspect")
        with site.db.write() as session:
            session.get_one(Job, suspect.id).counted_attempts = 2
        yield from trainer.listen("admit")
        other = site.queued(suffix="other")
        for _ in range(3):
            yield
        others_attempts.append(reasons(site, other.id))
        site.context.shutdown.set()
        yield

    run(script)

    assert others_attempts == [[]]


def test_a_claim_of_an_empty_trainer_is_handed_over_despite_an_outage(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the claim is in no pack, its lease is renewed, and no command can stop it."""
    site.queued()
    ids: list[str] = []
    claim_pack, read = claiming.claim_pack, Database.read

    def fails_once(db: Database) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return read(db)
        monkeypatch.setattr(Database, "read", read)
        raise OUTAGE

    def claim_then_fail(*given: Any, **named: Any) -> list[Claim]:
        claimed = claim_pack(*given, **named)
        if claimed:
            monkeypatch.setattr(Database, "read", fails_once)
        return claimed

    def script(trainer: FakeTrainer) -> Generator[None]:
        yield from cancel_first_job(trainer)
        monkeypatch.setattr(claiming, "claim_pack", claim_then_fail)
        ids.append(site.queued(suffix="second").id)
        admission = trainer.listen("admit")
        for _ in range(100):
            try:
                next(admission)
            except StopIteration as listened:
                trainer.emit("cancelled", claim_id=listened.value.body["claim_id"])
                break
            yield
        yield
        site.context.shutdown.set()
        yield

    run(script)

    assert reasons(site, ids[0]) == [EndReason.CANCELLED_BY_USER]


def test_memory_of_a_base_that_loads_is_not_free_for_joining_jobs(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.claim()
    session = site.loading_session(claim)
    monkeypatch.setattr(devices, "free_bytes", lambda _: 10**9)

    capacity: Capacity = free_capacity(site.context, session)

    assert capacity.memory_bytes_free == 10**9 - session.memory.to_come() < 10**9 - 1000


def test_two_polls_before_the_trainer_is_ready_promise_no_memory_twice(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU has memory for a trainer, three adapter states and two more slices of its tick."""
    site.context.device = replace(site.context.device, kind="cuda")
    session = site.loading_session(site.claim())
    job_bytes = own_bytes(site.world.queued(suffix="next"))
    slice_bytes = BaseModelMemory(DESCRIPTION, "bfloat16").slice_bytes()
    free = BaseModelMemory(DESCRIPTION, "bfloat16").trainer_bytes() + 3 * job_bytes + 2 * slice_bytes
    free += site.context.group.reserve_bytes
    monkeypatch.setattr(devices, "free_bytes", lambda _: free)

    held: list[int] = []
    for _ in range(2):
        for _ in range(2):
            site.queued()
        next_work._claim_more(site.context, gang_of(site.context), session)
        held.append(len(session))

    assert held == [3, 3]


def test_memory_that_torch_caches_beyond_the_ticks_of_the_jobs_is_free_for_others(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.context.device = replace(site.context.device, kind="cuda")
    monkeypatch.setattr(devices, "free_bytes", lambda _: 10**9)
    claims = [site.claim(), site.claim()]
    session = site.session(*claims)
    ticks = BaseModelMemory(DESCRIPTION, "bfloat16").tick_bytes(memory.JOB_TOKENS)
    ticks += BaseModelMemory(DESCRIPTION, "bfloat16").slice_bytes()
    ticks += sum(products_bytes(claim.job) for claim in claims)

    found = []
    for cached_bytes in (0, ticks, ticks + 5000):
        session.memory.report = {"cached_bytes": cached_bytes}
        found.append(free_capacity(site.context, session).memory_bytes_free)

    assert found == [10**9, 10**9, 10**9 + 5000]


def test_the_base_of_an_empty_trainer_counts_as_free_memory(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    session = site.session()
    assert session.ready is not None
    session.ready = {**session.ready, "memory": {"base_bytes": 500}}
    monkeypatch.setattr(devices, "free_bytes", lambda _: 1000)

    capacity: Capacity = free_capacity(site.context, session)

    assert (capacity.memory_bytes_free, capacity.resident_key) == (1500, session.pack_key)


def test_a_worker_survives_a_full_disk(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def supervised(_: object) -> int:
        calls.append(1)
        if len(calls) == 1:
            raise OutOfSpace(ErrorText(code="out_of_space", message="The disk is full.", remedy="Free some space."))
        return 0

    monkeypatch.setattr(loop, "supervise", supervised)

    loop.run(site.context, once=True)

    assert len(calls) == 2


def test_a_waiting_worker_polls_again_after_a_notification(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def wait(_seconds: float) -> bool:
        calls.append("wait")
        return site.context.shutdown.is_set()

    def supervised(context: WorkerContext) -> int:
        calls.append("poll")
        if len(calls) == 1:
            FileNotifier(site.settings.notification_path()).wake_workers()
        else:
            context.shutdown.set()
        return 0

    monkeypatch.setattr(loop, "supervise", supervised)
    monkeypatch.setattr(site.context.shutdown, "wait", wait)

    loop.run(site.context)

    assert calls == ["poll", "poll", "wait"]


def test_jobs_join_up_to_the_allowed_slowdown(site: PackSite) -> None:
    for _ in range(4):
        site.queued()
    session = site.session(*site.claim_all())
    for _ in range(8):
        site.queued()

    next_work._claim_more(site.context, gang_of(site.context), session)
    before, reported = len(session), site.context.heartbeat.status["report"]["saturation"]
    speeds = {"alone": [[64, 500.0]], "together": [[256, 1000.0], [384, 1000.0]]}
    emit(session, {"type": "memory", "base_bytes": 1, "tick_speeds": speeds})
    session.read_events()
    next_work._claim_more(site.context, gang_of(site.context), session)

    assert (before, reported["is_full"]) == (4, True), (
        "before any measurement, each job is assumed to slow down the others"
    )
    assert len(session) == 8, "8 jobs with 500 tokens/s alone are four times as slow at 1,000 tokens/s together"
