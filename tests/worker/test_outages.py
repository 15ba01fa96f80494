"""What a worker does with its claims when the database or the disk is away for long, or at a bad moment."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from catalog import workers
from catalog.artifacts.store import ArtifactStore
from catalog.states import EndReason
from catalog.tables import Job
from tests.worker.pack_site import OUTAGE, READY, PackSite
from tests.worker.scripted_trainer import FakeTrainer, Script, cancels_what_it_gets, loads_for_ever, raising, reasons
from worker import bases
from worker.trainer_directory import InboxWriter

Run = Callable[[Script], list[FakeTrainer]]


def give_up(site: PackSite) -> None:
    """As after two thirds of a lease without an answer."""
    pulse = site.context.pulse
    pulse.hold(site.held(), since=-float("inf"))
    pulse.give_up_overdue()


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

    monkeypatch.setattr(bases, "ensure", ensure)

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
        trainer.say("checkpointed", claim_id=admit.body["claim_id"], step=5, folder="jobs")

    run(script)

    assert reasons(site, job.id) == [EndReason.NODE_FAILED]
