"""What the trainers of a gang's members print is in the logs of the jobs that they train, by job and rank."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from catalog.db.database import Database
from catalog.errors import Unavailable
from catalog.fleet import gangs
from catalog.fleet.gangs import GangMember
from catalog.history import job_logs as history_job_logs
from catalog.queue import claims
from catalog.states import EndReason
from catalog.storage.store import Blob
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from tests.worker.context.test_gang_membership import LOCAL, GangSite
from tests.worker.pack_site import PackSite
from tests.worker.scripted_trainer import FakeTrainer, Script
from tests.worker.session.test_job_logs import printed, told
from worker import supervisor
from worker.background.chores import Chores
from worker.gang import member as lending
from worker.gang import member_logs
from worker.gang.gang import gang_of
from worker.gang.member_logs import LentOutput
from worker.process.launcher import TrainerProcess
from worker.protocol.mailbox import Json
from worker.session import job_logs as session_job_logs

HUNG = "The trainer sent no events for 300 s."


class Lent:
    """w2 lends its devices to trainer-1 of w1, whose claims are the test's to make."""

    def __init__(self, site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site = site
        self.gang = GangSite(site, monkeypatch)
        self.leader = self.gang.place("w1")
        self.round_id = ""
        monkeypatch.setattr(member_logs, "LOOK_SECONDS", 0.0)
        monkeypatch.setattr(session_job_logs, "PUSH_SECONDS", 0.0)
        self._look = gangs.standing
        monkeypatch.setattr(gangs, "standing", self._on_looking)

    def by(self, script: Script) -> None:
        member = self.gang.seated("w2")
        self.gang.seated("w1")
        gangs.lead(self.leader)
        task: Json = {"trainer_id": "trainer-1", "base_model": "smol", "base_digest": "1", "address": LOCAL}
        led = gangs.open_round(self.leader, members=["w1", "w2"], task=task | {"settings": {}}, seconds=60)
        self.round_id, self.gang.script = led.round_id, script
        with Chores(member) as chores:
            assert gang_of(member).participate(chores, supervisor._launch_trainer)  # pyright: ignore[reportPrivateUsage]

    def over(self) -> Generator[None]:
        gangs.end_round(self.leader, self.round_id)
        while True:
            yield

    def _on_looking(self, place: GangMember) -> gangs.GangState:
        found = self._look(place)
        if found.call is not None and found.call.has_joined and found.call.port is None:
            gangs.start(self.leader, self.round_id, port=4711)
        return found


@pytest.fixture
def lent(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> Lent:
    return Lent(site, monkeypatch)


def test_what_a_members_processes_print_is_the_jobs_by_the_ranks_that_they_have_in_the_gang(lent: Lent) -> None:
    claim = lent.site.claim()

    def script(trainer: FakeTrainer) -> Generator[None]:
        printed(trainer.directory, "the members first\n")
        printed(trainer.directory, f"its second, of {claim.job.id} in {lent.site.settings.data_dir}\n", rank=1)
        trainer.returncode = 1
        yield

    lent.by(script)

    assert told(lent.site, claim.job.id, rank=0) == []
    assert told(lent.site, claim.job.id, rank=1) == ["the members first"]
    assert told(lent.site, claim.job.id, rank=2) == [f"its second, of {claim.job.id} in $LORRY_DATA_DIR"]


def test_each_job_has_what_is_printed_from_when_it_is_seen_until_it_has_ended_and_no_name_of_anothers(
    lent: Lent,
) -> None:
    first = lent.site.claim(seed=1)
    second_id: list[str] = []
    amid: list[list[str]] = []

    def script(trainer: FakeTrainer) -> Generator[None]:
        printed(trainer.directory, "first\n")
        yield
        second = lent.site.claim(seed=2)
        second_id.append(second.job.id)
        printed(trainer.directory, f"both: {first.job.id}\n")
        yield
        amid.append(told(lent.site, first.job.id))
        claims.end(lent.site.db, first.claim_id, reason=EndReason.DRAINED, detail="")
        yield
        printed(trainer.directory, "second alone\n")
        yield from lent.over()

    lent.by(script)

    assert amid == [["first", f"both: {first.job.id}"]]
    assert told(lent.site, first.job.id) == amid[0]
    assert told(lent.site, second_id[0]) == ["both: …", "second alone"]


def test_of_what_ended_long_ago_no_look_asks_again_and_nothing_is_remembered(
    lent: Lent, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, asked, kept = lent.site.claim(seed=1), history_job_logs.attempts_of, list[LentOutput]()
    found: list[list[str]] = []

    def seen(db: Database, trainer_id: str, *, ended_after: float) -> tuple[list[tuple[Attempt, Job]], float]:
        attempts, now = asked(db, trainer_id, ended_after=ended_after)
        found.append([attempt.claim_id for attempt, _ in attempts])
        return attempts, now

    class Kept(LentOutput):
        def end(self) -> None:
            kept.append(self)
            super().end()

    monkeypatch.setattr(history_job_logs, "attempts_of", seen)
    monkeypatch.setattr(history_job_logs, "LATE_SECONDS", 0.0)
    monkeypatch.setattr(lending, "LentOutput", Kept)

    def script(trainer: FakeTrainer) -> Generator[None]:
        printed(trainer.directory, "first\n")
        yield
        claims.end(lent.site.db, first.claim_id, reason=EndReason.DRAINED, detail="")
        yield
        yield
        yield
        printed(trainer.directory, "nobody's\n")
        yield from lent.over()

    lent.by(script)

    assert (first.claim_id in found[0], found[-1]) == (True, [])
    assert [(one._begun, one._over) for one in kept] == [(set(), set())]  # pyright: ignore[reportPrivateUsage]
    assert told(lent.site, first.job.id) == ["first"]


def test_of_what_is_told_once_more_after_its_end_the_last_words_stay(lent: Lent) -> None:
    claim = lent.site.claim()

    def script(trainer: FakeTrainer) -> Generator[None]:
        printed(trainer.directory, "its own\n")
        yield
        claims.end(lent.site.db, claim.claim_id, reason=EndReason.DRAINED, detail="")
        yield
        printed(trainer.directory, "of nobody\n")
        yield
        printed(trainer.directory, "of nobody\n")
        yield from lent.over()

    lent.by(script)

    assert told(lent.site, claim.job.id) == ["its own"]


@pytest.mark.parametrize("reason", [EndReason.TIMEOUT, EndReason.TRAINER_CRASHED])
def test_a_trainer_that_is_still_there_when_the_leaders_hung_is_asked_where_it_stands(
    lent: Lent, monkeypatch: pytest.MonkeyPatch, reason: EndReason
) -> None:
    claim = lent.site.claim()

    def ask(trainer: TrainerProcess, why: str) -> None:
        assert not trainer.is_killed
        printed(trainer.directory, f"{why} It stands here.\n")

    monkeypatch.setattr(member_logs.exit_status, "dump_stacks", ask)

    def script(_: FakeTrainer) -> Generator[None]:
        yield
        claims.end(lent.site.db, claim.claim_id, reason=reason, detail=HUNG)
        yield from lent.over()

    lent.by(script)

    asked = [f"On the leader's node: {HUNG} It stands here."] if reason == EndReason.TIMEOUT else []
    assert told(lent.site, claim.job.id) == asked


def test_the_leader_is_told_of_the_end_before_the_store_is_asked_and_though_it_is_away(
    lent: Lent, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = lent.site.claim()
    known: list[bool] = []

    def away(_: bytes) -> Blob:
        known.append("w2" in gangs.progress(lent.leader, lent.round_id).ended)
        raise Unavailable("The store does not answer.", code="store_unavailable", remedy="")

    monkeypatch.setattr(lent.site.store, "put_bytes", away)

    def script(trainer: FakeTrainer) -> Generator[None]:
        printed(trainer.directory, "last words\n")
        trainer.returncode = 1
        yield

    monkeypatch.setattr(session_job_logs, "PUSH_SECONDS", 3600.0)
    lent.by(script)

    assert known == [True]
    assert told(lent.site, claim.job.id) == []
