"""What a worker does with its claims when the database or the disk is away for long, or at a bad moment."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from catalog.errors import OutOfSpace
from catalog.fleet import workers
from catalog.queue import claims
from catalog.queue.claims import ClaimDirectives
from catalog.states import EndReason
from catalog.storage.store import ArtifactStore
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from tests.worker.pack_site import OUTAGE, READY, PackSite, asked
from tests.worker.scripted_trainer import FakeTrainer, Script, cancels_what_it_gets, loads_for_ever, raising, reasons
from worker import supervisor
from worker.background import base_models
from worker.protocol.mailbox import InboxWriter, TrainerDirectory, TrainerMessage

Run = Callable[[Script], list[FakeTrainer]]
READ_ONLY = OSError(errno.EROFS, "Read-only file system")
FULL = OutOfSpace("The disk is full.", code="out_of_space", remedy="Free some space.")


def give_up(site: PackSite) -> None:
    """As after two thirds of a lease without an answer."""
    heartbeat = site.context.heartbeat
    heartbeat.hold(site.held(), since=-float("inf"))
    heartbeat.give_up_overdue()


def trains(trained: list[str]) -> Script:
    """Whatever it gets."""

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.say("ready", **{name: value for name, value in READY.items() if name != "type"})
        admit = yield from trainer.listen("admit")
        trained.append(admit.body["claim_id"])
        trainer.say("cancelled", claim_id=admit.body["claim_id"])
        yield

    return script


def test_claims_that_were_given_up_while_the_base_was_brought_are_not_trained_on(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, trained = site.queued(), []

    def ensure(*_: object, **__: object) -> Path:
        give_up(site)
        return Path("/nowhere")

    monkeypatch.setattr(base_models, "ensure", ensure)

    run(trains(trained))

    assert (trained, reasons(site, job.id)) == ([], [None]), "the lease ends it"


def test_claims_that_were_given_up_while_the_trainer_before_them_was_unloaded_are_not_trained_on(
    site: PackSite, run: Run
) -> None:
    site.queued()
    trained: list[str] = []
    trainers: list[FakeTrainer] = []
    others: list[str] = []

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainers.append(trainer)
        if len(trainers) > 1:
            yield from trains(trained)(trainer)
            return
        yield from cancels_what_it_gets(trainer)
        others.append(site.queued(suffix="of-another-base").id)
        with site.db.write() as session:
            session.get_one(Job, others[0]).pack_key = "another:float32"
        yield from trainer.listen("unload")
        give_up(site)
        yield

    run(script)

    assert (trained, reasons(site, others[0])) == ([], [None])


def test_a_database_that_goes_away_when_the_trainer_is_put_on_record_gives_the_claims_back(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()
    monkeypatch.setattr(workers, "register_trainer", raising(OUTAGE))

    (trainer,) = run(loads_for_ever)

    assert trainer.is_killed
    assert reasons(site, job.id) == [EndReason.INFRA_LOST]
    assert site.held() == set()


def test_a_disk_that_is_read_only_now_ends_no_worker(site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    job = site.queued()
    site.context.drain_seconds = 0

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.say("ready", **{name: value for name, value in READY.items() if name != "type"})
        yield from trainer.listen("admit")
        read_only = OSError(errno.EROFS, "Read-only file system")
        monkeypatch.setattr(InboxWriter, "send", raising(read_only))
        monkeypatch.setattr(Path, "unlink", raising(read_only))
        site.context.leave.set()
        yield from loads_for_ever(trainer)

    (trainer,) = run(script)

    assert trainer.is_killed
    assert reasons(site, job.id) == [EndReason.DRAINED]
    assert site.held() == set()


def own_folder(trainer: FakeTrainer, admit: TrainerMessage) -> str:
    """A folder that the trainer has written for the job."""
    folder = trainer.directory.checkpoint_path(admit.body["claim_id"], 5)
    folder.mkdir(parents=True)
    return trainer.directory.named(folder)


def test_a_disk_that_is_read_only_when_the_trainer_has_ended_ends_no_worker(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.say("ready", **{name: value for name, value in READY.items() if name != "type"})
        admit = yield from trainer.listen("admit")
        read_only = raising(OSError(errno.EROFS, "Read-only file system"))
        monkeypatch.setattr(ArtifactStore, "put_folder", read_only)
        monkeypatch.setattr(InboxWriter, "send", read_only)
        trainer.say("checkpointed", claim_id=admit.body["claim_id"], step=5, folder=own_folder(trainer, admit))

    run(script)

    assert reasons(site, job.id) == [EndReason.NODE_FAILED]


@pytest.mark.parametrize("error", [READ_ONLY, FULL])
def test_stale_claims_are_dropped_though_the_trainer_can_not_be_told(
    site: PackSite, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    site.queued(suffix="one")
    site.queued(suffix="two")
    one, two = site.claim_all()
    session = site.session(one, two)
    monkeypatch.setattr(InboxWriter, "send", raising(error))

    session.apply_directives(asked(one, stale=True) | asked(two, stale=True))

    assert (len(session), site.held()) == (0, set())
    assert session.fault is not None
    assert (session.fault.reason, session.fault.blamed_worker_id) == (EndReason.NODE_FAILED, "w1")


def test_a_stale_claim_is_dropped_though_what_was_asked_before_can_not_be_done_now(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.queued(suffix="one")
    site.queued(suffix="two")
    cancelled, stale = site.claim_all()
    session = site.loading_session(cancelled, stale)
    monkeypatch.setattr(claims, "end", raising(OUTAGE))

    with pytest.raises(type(OUTAGE)):
        session.apply_directives(asked(cancelled, cancel=True) | asked(stale, stale=True))

    assert session.claim_ids == [cancelled.claim_id]
    assert session.fault is None


def test_a_trainer_that_can_not_be_told_to_let_a_job_go_is_killed_and_its_node_is_to_blame(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, other = site.queued(suffix="one"), site.queued(suffix="two")

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.say("ready", **{name: value for name, value in READY.items() if name != "type"})
        claim_id = (yield from trainer.listen("admit")).body["claim_id"]
        yield from trainer.listen("admit")
        monkeypatch.setattr(InboxWriter, "send", raising(READ_ONLY))
        site.context.heartbeat._note({claim_id: ClaimDirectives(stale=True)}, float("inf"))
        for _ in range(3):
            yield
        site.context.leave.set()
        yield from loads_for_ever(trainer)

    (trainer,) = run(script)

    assert trainer.is_killed
    assert sorted(map(str, reasons(site, taken.id) + reasons(site, other.id))) == ["None", EndReason.NODE_FAILED]


def test_a_disk_that_fails_as_the_last_of_a_trainer_is_recorded_ends_no_worker(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()
    site.context.settings = site.settings.model_copy(update={"lease_seconds": 0})

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.say("ready", **{name: value for name, value in READY.items() if name != "type"})
        yield from trainer.listen("admit")
        monkeypatch.setattr(claims, "end", raising(READ_ONLY))
        yield

    run(script)

    assert reasons(site, job.id) == [EndReason.INFRA_LOST], "its lease has ended it"
    assert site.held() == set()


def test_a_folder_that_can_not_be_read_for_a_lease_after_its_trainer_ended_is_the_nodes_doing(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()
    site.context.settings = site.settings.model_copy(update={"lease_seconds": 0.1})
    monkeypatch.setattr(supervisor, "OUTAGE_SECONDS", 0.01)

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.say("ready", **{name: value for name, value in READY.items() if name != "type"})
        yield from trainer.listen("admit")
        monkeypatch.setattr(TrainerDirectory, "log_tail", raising(OSError(errno.EIO, "Input/output error")))
        yield

    run(script)

    with site.db.read() as session:
        attempt = session.query(Attempt).where(Attempt.job_id == job.id).one()
    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.NODE_FAILED, "w1")
    assert "Input/output error" in str(attempt.detail)


def test_a_trainer_is_told_to_leave_once_its_disk_can_be_written_again(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, send = site.queued(), InboxWriter.send

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.say("ready", **{name: value for name, value in READY.items() if name != "type"})
        admit = yield from trainer.listen("admit")
        monkeypatch.setattr(InboxWriter, "send", raising(FULL))
        site.context.leave.set()
        yield
        yield
        monkeypatch.setattr(InboxWriter, "send", send)
        told = trainer.listen("drain")
        for _ in range(10):
            if next(told, "told") == "told":
                trainer.say("paused", claim_id=admit.body["claim_id"], step=3, adapter=None)
                break
            yield
        yield

    run(script)

    with site.db.read() as session:
        attempt = session.query(Attempt).where(Attempt.job_id == job.id).one()
    assert (attempt.reason, attempt.detail) == (EndReason.DRAINED, "The worker shut down; the job was saved at step 3.")
