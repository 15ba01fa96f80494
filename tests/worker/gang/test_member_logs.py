"""Output of the trainers of gang members appears in the logs of their jobs, by job and rank."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from catalog.db.database import Database
from catalog.error_texts import ErrorText
from catalog.errors import Unavailable
from catalog.fleet import gangs
from catalog.history import job_logs as history_job_logs
from catalog.queue import claims
from catalog.states import EndReason
from catalog.storage.store import Blob
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from tests.worker.context.test_gang_membership import LOCAL, GangSite, start_once_joined
from tests.worker.pack_site import PackSite
from tests.worker.scripted_trainer import FakeTrainer, Script
from tests.worker.session.test_job_logs import log_texts, printed
from worker import supervisor
from worker.background.task_runner import TaskRunner
from worker.gang import member as lending
from worker.gang.gang import gang_of
from worker.gang.member import MemberOutput
from worker.process.launcher import TrainerProcess
from worker.protocol.mailbox import Json
from worker.session import job_logs as session_job_logs

HUNG = "The trainer sent no events for 300 s."


class MemberSite:
    """Worker w2 takes part in trainer-1 of w1. The tests make the claims of w1."""

    def __init__(self, site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site = site
        self.gang = GangSite(site, monkeypatch)
        self.leader = self.gang.place("w1")
        self.round_id = ""
        monkeypatch.setattr(lending, "LOG_POLL_SECONDS", 0.0)
        monkeypatch.setattr(session_job_logs, "PUSH_SECONDS", 0.0)
        start_once_joined(self.gang, monkeypatch)

    def run_trainer(self, script: Script) -> None:
        member = self.gang.seated("w2")
        self.gang.seated("w1")
        gangs.lead(self.leader)
        task: Json = {"trainer_id": "trainer-1", "base_model": "smol", "base_digest": "1", "address": LOCAL}
        led = gangs.open_round(self.leader, members=["w1", "w2"], task=task | {"settings": {}}, seconds=60)
        self.round_id, self.gang.script = led.round_id, script
        with TaskRunner(member) as tasks:
            assert gang_of(member).participate(tasks, supervisor._launch_trainer)  # pyright: ignore[reportPrivateUsage]

    def end_round(self) -> Generator[None]:
        gangs.end_round(self.leader, self.round_id)
        while True:
            yield


@pytest.fixture
def member(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> MemberSite:
    return MemberSite(site, monkeypatch)


def test_output_of_a_member_is_logged_by_its_ranks_in_the_gang(member: MemberSite) -> None:
    claim = member.site.claim()

    def script(trainer: FakeTrainer) -> Generator[None]:
        printed(trainer.directory, "the members first\n")
        printed(trainer.directory, f"its second, of {claim.job.id} in {member.site.settings.data_dir}\n", rank=1)
        trainer.returncode = 1
        yield

    member.run_trainer(script)

    assert log_texts(member.site, claim.job.id, rank=0) == []
    assert log_texts(member.site, claim.job.id, rank=1) == ["the members first"]
    assert log_texts(member.site, claim.job.id, rank=2) == [f"its second, of {claim.job.id} in $LORRY_DATA_DIR"]


def test_a_job_logs_only_the_output_of_its_period_and_no_foreign_ids(member: MemberSite) -> None:
    first = member.site.claim(seed=1)
    second_id: list[str] = []
    midway: list[list[str]] = []

    def script(trainer: FakeTrainer) -> Generator[None]:
        printed(trainer.directory, "first\n")
        yield
        second = member.site.claim(seed=2)
        second_id.append(second.job.id)
        printed(trainer.directory, f"both: {first.job.id}\n")
        yield
        midway.append(log_texts(member.site, first.job.id))
        claims.end(member.site.db, first.claim_id, reason=EndReason.DRAINED, detail="")
        yield
        printed(trainer.directory, "second alone\n")
        yield from member.end_round()

    member.run_trainer(script)

    assert midway == [["first", f"both: {first.job.id}"]]
    assert log_texts(member.site, first.job.id) == midway[0]
    assert log_texts(member.site, second_id[0]) == ["both: …", "second alone"]


def test_attempts_that_ended_long_ago_are_neither_queried_nor_remembered(
    member: MemberSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, attempts_of, kept = member.site.claim(seed=1), history_job_logs.attempts_of, list[MemberOutput]()
    found: list[list[str]] = []

    def seen(db: Database, trainer_id: str, *, ended_after: float) -> tuple[list[tuple[Attempt, Job]], float]:
        attempts, now = attempts_of(db, trainer_id, ended_after=ended_after)
        found.append([attempt.claim_id for attempt, _ in attempts])
        return attempts, now

    class Kept(MemberOutput):
        def end(self) -> None:
            kept.append(self)
            super().end()

    monkeypatch.setattr(history_job_logs, "attempts_of", seen)
    monkeypatch.setattr(history_job_logs, "LATE_SECONDS", 0.0)
    monkeypatch.setattr(lending, "MemberOutput", Kept)

    def script(trainer: FakeTrainer) -> Generator[None]:
        printed(trainer.directory, "first\n")
        yield
        claims.end(member.site.db, first.claim_id, reason=EndReason.DRAINED, detail="")
        yield
        yield
        yield
        printed(trainer.directory, "of no job\n")
        yield from member.end_round()

    member.run_trainer(script)

    assert (first.claim_id in found[0], found[-1]) == (True, [])
    assert [(one._begun, one._over) for one in kept] == [(set(), set())]  # pyright: ignore[reportPrivateUsage]
    assert log_texts(member.site, first.job.id) == ["first"]


def test_output_after_the_end_of_a_job_does_not_replace_its_last_lines(member: MemberSite) -> None:
    claim = member.site.claim()

    def script(trainer: FakeTrainer) -> Generator[None]:
        printed(trainer.directory, "its own\n")
        yield
        claims.end(member.site.db, claim.claim_id, reason=EndReason.DRAINED, detail="")
        yield
        printed(trainer.directory, "of no job\n")
        yield
        printed(trainer.directory, "of no job\n")
        yield from member.end_round()

    member.run_trainer(script)

    assert log_texts(member.site, claim.job.id) == ["its own"]


@pytest.mark.parametrize("reason", [EndReason.TIMEOUT, EndReason.TRAINER_CRASHED])
def test_a_members_trainer_dumps_its_stacks_if_the_leaders_trainer_hung(
    member: MemberSite, monkeypatch: pytest.MonkeyPatch, reason: EndReason
) -> None:
    claim = member.site.claim()

    def ask(trainer: TrainerProcess, why: str) -> None:
        assert not trainer.is_killed
        printed(trainer.directory, f"{why} It stands here.\n")

    monkeypatch.setattr(lending.exit_status, "dump_stacks", ask)

    def script(_: FakeTrainer) -> Generator[None]:
        yield
        claims.end(member.site.db, claim.claim_id, reason=reason, detail=HUNG)
        yield from member.end_round()

    member.run_trainer(script)

    expected = [f"On the leader's node: {HUNG} It stands here."] if reason == EndReason.TIMEOUT else []
    assert log_texts(member.site, claim.job.id) == expected


def test_the_leader_learns_of_the_end_before_logs_are_stored(
    member: MemberSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = member.site.claim()
    known: list[bool] = []

    def away(_: bytes) -> Blob:
        known.append("w2" in gangs.progress(member.leader, member.round_id).ended)
        raise Unavailable(ErrorText(code="store_unavailable", message="The store does not answer.", remedy=""))

    monkeypatch.setattr(member.site.store, "put_bytes", away)

    def script(trainer: FakeTrainer) -> Generator[None]:
        printed(trainer.directory, "last words\n")
        trainer.returncode = 1
        yield

    monkeypatch.setattr(session_job_logs, "PUSH_SECONDS", 3600.0)
    member.run_trainer(script)

    assert known == [True]
    assert log_texts(member.site, claim.job.id) == []
