"""How a worker handles its claims if the database or the disk fails for long, or at a bad moment."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from catalog.error_texts import ErrorText
from catalog.errors import OutOfSpace
from catalog.fleet import workers
from catalog.queue import claims
from catalog.queue.claims import ClaimDirectives
from catalog.states import EndReason
from catalog.storage.store import ArtifactStore
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from tests.worker.pack_site import OUTAGE, READY, PackSite, directives_for
from tests.worker.scripted_trainer import FakeTrainer, Script, cancel_first_job, load_forever, raising, reasons
from worker import supervisor
from worker.background import base_models
from worker.protocol.mailbox import InboxWriter, TrainerDirectory, TrainerMessage

Run = Callable[[Script], list[FakeTrainer]]
READ_ONLY = OSError(errno.EROFS, "Read-only file system")
FULL = OutOfSpace(ErrorText(code="out_of_space", message="The disk is full.", remedy="Free some space."))


def give_up(site: PackSite) -> None:
    """Give up all claims, as after two thirds of a lease without a response."""
    heartbeat = site.context.heartbeat
    heartbeat.hold(site.held(), since=-float("inf"))
    heartbeat.abandon_overdue()


def trains(trained: list[str]) -> Script:
    """Return a script that appends its first claim to the list, and reports it as cancelled."""

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        admit = yield from trainer.listen("admit")
        trained.append(admit.body["claim_id"])
        trainer.emit("cancelled", claim_id=admit.body["claim_id"])
        yield

    return script


def test_claims_given_up_during_an_import_are_not_trained(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, trained = site.queued(), []

    def ensure(*_: object, **__: object) -> Path:
        give_up(site)
        return Path("/nowhere")

    monkeypatch.setattr(base_models, "ensure", ensure)

    run(trains(trained))

    assert (trained, reasons(site, job.id)) == ([], [None]), "the expired lease ends it"


def test_claims_given_up_during_the_previous_trainers_unload_are_not_trained(site: PackSite, run: Run) -> None:
    site.queued()
    trained: list[str] = []
    trainers: list[FakeTrainer] = []
    others: list[str] = []

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainers.append(trainer)
        if len(trainers) > 1:
            yield from trains(trained)(trainer)
            return
        yield from cancel_first_job(trainer)
        others.append(site.queued(suffix="of-another-base").id)
        with site.db.write() as session:
            session.get_one(Job, others[0]).pack_key = "another:float32"
        yield from trainer.listen("unload")
        give_up(site)
        yield

    run(script)

    assert (trained, reasons(site, others[0])) == ([], [None])


def test_a_database_outage_at_the_registration_of_a_trainer_releases_claims(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()
    monkeypatch.setattr(workers, "register_trainer", raising(OUTAGE))

    (trainer,) = run(load_forever)

    assert trainer.is_killed
    assert reasons(site, job.id) == [EndReason.INFRA_LOST]
    assert site.held() == set()


def test_a_disk_that_becomes_read_only_stops_no_worker(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()
    site.context.drain_seconds = 0

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        yield from trainer.listen("admit")
        read_only = OSError(errno.EROFS, "Read-only file system")
        monkeypatch.setattr(InboxWriter, "send", raising(read_only))
        monkeypatch.setattr(Path, "unlink", raising(read_only))
        site.context.shutdown.set()
        yield from load_forever(trainer)

    (trainer,) = run(script)

    assert trainer.is_killed
    assert reasons(site, job.id) == [EndReason.DRAINED]
    assert site.held() == set()


def own_folder(trainer: FakeTrainer, admit: TrainerMessage) -> str:
    """Return a folder that the trainer has written for the job."""
    folder = trainer.directory.checkpoint_path(admit.body["claim_id"], 5)
    folder.mkdir(parents=True)
    return trainer.directory.named(folder)


def test_a_disk_that_is_read_only_after_the_trainers_exit_stops_no_worker(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        admit = yield from trainer.listen("admit")
        read_only = raising(OSError(errno.EROFS, "Read-only file system"))
        monkeypatch.setattr(ArtifactStore, "put_folder", read_only)
        monkeypatch.setattr(InboxWriter, "send", read_only)
        trainer.emit("checkpointed", claim_id=admit.body["claim_id"], step=5, folder=own_folder(trainer, admit))

    run(script)

    assert reasons(site, job.id) == [EndReason.NODE_FAILED]


@pytest.mark.parametrize("error", [READ_ONLY, FULL])
def test_stale_claims_are_dropped_even_if_the_inbox_cannot_be_written(
    site: PackSite, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    site.queued(suffix="one")
    site.queued(suffix="two")
    one, two = site.claim_all()
    session = site.session(one, two)
    monkeypatch.setattr(InboxWriter, "send", raising(error))

    session.apply_directives(directives_for(one, stale=True) | directives_for(two, stale=True))

    assert (len(session), site.held()) == (0, set())
    assert session.fault is not None
    assert (session.fault.reason, session.fault.blamed_worker_id) == (EndReason.NODE_FAILED, "w1")


def test_a_stale_claim_is_dropped_even_if_an_earlier_directive_fails(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.queued(suffix="one")
    site.queued(suffix="two")
    cancelled, stale = site.claim_all()
    session = site.loading_session(cancelled, stale)
    monkeypatch.setattr(claims, "end", raising(OUTAGE))

    with pytest.raises(type(OUTAGE)):
        session.apply_directives(directives_for(cancelled, cancel=True) | directives_for(stale, stale=True))

    assert session.claim_ids == [cancelled.claim_id]
    assert session.fault is None


def test_a_trainer_whose_inbox_cannot_be_written_is_killed_as_a_node_failure(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, other = site.queued(suffix="one"), site.queued(suffix="two")

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        claim_id = (yield from trainer.listen("admit")).body["claim_id"]
        yield from trainer.listen("admit")
        monkeypatch.setattr(InboxWriter, "send", raising(READ_ONLY))
        site.context.heartbeat._note({claim_id: ClaimDirectives(stale=True)}, float("inf"))
        for _ in range(3):
            yield
        site.context.shutdown.set()
        yield from load_forever(trainer)

    (trainer,) = run(script)

    assert trainer.is_killed
    assert sorted(map(str, reasons(site, taken.id) + reasons(site, other.id))) == ["None", EndReason.NODE_FAILED]


def test_a_disk_error_while_a_trainers_end_is_recorded_stops_no_worker(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()
    site.context.settings = site.settings.model_copy(update={"lease_seconds": 0})

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        yield from trainer.listen("admit")
        monkeypatch.setattr(claims, "end", raising(READ_ONLY))
        yield

    run(script)

    assert reasons(site, job.id) == [EndReason.INFRA_LOST], "its expired lease has ended it"
    assert site.held() == set()


def test_a_folder_that_is_unreadable_for_a_lease_is_a_node_failure(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()
    site.context.settings = site.settings.model_copy(update={"lease_seconds": 0.1})
    monkeypatch.setattr(supervisor, "OUTAGE_SECONDS", 0.01)

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        yield from trainer.listen("admit")
        monkeypatch.setattr(TrainerDirectory, "log_tail", raising(OSError(errno.EIO, "Input/output error")))
        yield

    run(script)

    with site.db.read() as session:
        attempt = session.query(Attempt).where(Attempt.job_id == job.id).one()
    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.NODE_FAILED, "w1")
    assert "Input/output error" in str(attempt.detail)


def test_a_drain_is_sent_once_the_disk_can_be_written_again(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, send = site.queued(), InboxWriter.send

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        admit = yield from trainer.listen("admit")
        monkeypatch.setattr(InboxWriter, "send", raising(FULL))
        site.context.shutdown.set()
        yield
        yield
        monkeypatch.setattr(InboxWriter, "send", send)
        drain = trainer.listen("drain")
        for _ in range(10):
            if next(drain, "received") == "received":
                trainer.emit("paused", claim_id=admit.body["claim_id"], step=3, adapter=None)
                break
            yield
        yield

    run(script)

    with site.db.read() as session:
        attempt = session.query(Attempt).where(Attempt.job_id == job.id).one()
    assert (attempt.reason, attempt.detail) == (EndReason.DRAINED, "The worker shut down; the job was saved at step 3.")
