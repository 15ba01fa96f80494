"""Whose doing the end of a gang's trainer is, and what is done again where a word is lost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from catalog.fleet import cordons, gangs
from catalog.fleet.gangs import GangMember
from catalog.history import queries
from catalog.settings import Settings
from catalog.states import EndReason, JobState
from catalog.tables.fleet import Gang
from catalog.tables.history import Attempt
from tests.worker.context.test_gang_membership import KILLED, LOCAL, GangSite, leads, loads, seat_of
from tests.worker.pack_site import OUTAGE, PackSite
from tests.worker.process.test_exit_status import GLOO, fellow
from tests.worker.scripted_trainer import FakeTrainer, loads_for_ever, reasons
from worker import supervisor
from worker.background.chores import Chores
from worker.context.context import WorkerContext
from worker.context.gang_membership import alike
from worker.gang.gang import gang_of
from worker.protocol.mailbox import Json
from worker.protocol.rendezvous import report_port
from worker.session import staging

ECHOED = {"reason": "infra_lost", "detail": "The trainer exited together with others of its gang.", "is_echo": True}


@pytest.fixture
def gang(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> GangSite:
    return GangSite(site, monkeypatch)


def begun(gang: GangSite, trainer: FakeTrainer, context: WorkerContext, *, is_ready: bool = True) -> Generator[None]:
    """All have joined, and the trainer listens."""
    led = seat_of(context).round
    assert led is not None
    report_port(trainer.directory, 4711)
    gangs.join(gang.place("w2"), led.round_id)
    yield
    if is_ready:
        loads(trainer)


def tells(gang: GangSite, context: WorkerContext, end: Json) -> None:
    led = seat_of(context).round
    assert led is not None
    gangs.leave(gang.place("w2"), led.round_id, end=end)


def attempt_of(gang: GangSite, job_id: str) -> Attempt:
    return queries.attempts(gang.site.db, **gang.site.world.of(job_id))[0]


def prints(trainer: FakeTrainer, log: str) -> None:
    trainer.directory.log_path.write_text(log)


def test_a_leaders_trainer_that_dies_before_it_listens_ends_as_any_trainer(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        prints(trainer, "Traceback:\nKeyError: 'step'\n")
        trainer.returncode = 1
        yield

    job_id = leads(gang, script)

    attempt, job = attempt_of(gang, job_id), gang.site.world.job(job_id)
    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.TRAINER_CRASHED, "w1")
    assert attempt.detail == "The trainer exited with status 1. KeyError: 'step'"
    assert (job.state, job.counted_attempts) == (JobState.QUEUED, 0)
    assert job.run_after is not None


def test_a_leader_that_failed_is_blamed_though_the_others_end_first(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        yield from trainer.listen("admit")
        tells(gang, context, ECHOED)
        yield
        yield
        prints(trainer, "Traceback:\nKeyError: 'step'\n")
        trainer.returncode = 1
        yield

    attempt = attempt_of(gang, leads(gang, script))

    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.TRAINER_CRASHED, "w1")
    assert "KeyError" in str(attempt.detail)
    assert not gang.trainers[0].is_killed


def test_a_member_is_asked_where_the_leader_prints_what_another_lacked(gang: GangSite) -> None:
    full = {
        "reason": "node_failed",
        "detail": "The trainer exited because the worker's disk was full.",
        "is_echo": False,
    }

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        yield from trainer.listen("admit")
        prints(trainer, fellow(1, "OSError: [Errno 28] No space left on device"))
        trainer.returncode = 1
        tells(gang, context, full)
        yield

    attempt = attempt_of(gang, leads(gang, script))

    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.NODE_FAILED, "w2")


@pytest.mark.parametrize(("ranks", "blamed"), [([1], "w2"), ([0], "w1"), ([0, 1], "")])
def test_of_a_gang_the_node_is_blamed_whose_process_alone_could_not_load_the_base(
    gang: GangSite, ranks: list[int], blamed: str
) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context, is_ready=False)
        error = {"code": "unsafe_file", "message": "A shard is cut short.", "remedy": "Restore it."}
        trainer.say("load_refused", error=error, ranks=ranks)
        yield

    job_id = leads(gang, script)

    attempt, job = attempt_of(gang, job_id), gang.site.world.job(job_id)
    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.TRAINER_CRASHED, blamed)
    assert (job.state, job.counted_attempts) == (JobState.QUEUED, 0)
    if blamed:
        assert attempt.detail == f"Process {ranks[0]}, on {blamed} of the gang: A shard is cut short. Restore it."


def test_where_nobody_can_tell_nobody_is_blamed(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        yield from trainer.listen("admit")
        prints(trainer, GLOO)
        trainer.returncode = 1
        tells(gang, context, ECHOED)
        yield

    attempt = attempt_of(gang, leads(gang, script))

    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.INFRA_LOST, "")


def test_trainers_that_never_reach_each_other_cost_no_job_and_name_the_place(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context, is_ready=False)
        prints(trainer, "torch.distributed.DistStoreError: wait timeout after 300000ms, keys: /default_pg/0//0//1\n")
        trainer.returncode = 1
        tells(gang, context, ECHOED)
        yield

    job_id = leads(gang, script)

    attempt, job = attempt_of(gang, job_id), gang.site.world.job(job_id)
    assert attempt.reason == EndReason.GANG_INCOMPLETE
    assert f"{LOCAL}, port 4711" in str(attempt.detail)
    assert (job.state, job.counted_attempts) == (JobState.QUEUED, 0)
    assert gangs.standing(gang.place("w1")).members[1].num_missed == 1
    assert len(gang.trainers) == 1, "it is tried again at once"


def test_a_leader_that_lost_the_lead_as_it_records_who_did_not_meet_ends_its_attempts(
    gang: GangSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = gangs.missed

    def loses_the_lead(place: GangMember, round_id: str, worker_ids: Collection[str]) -> None:
        gangs.end_round(place, round_id)
        with place.db.write() as session:
            session.get_one(Gang, place.gang).leader_id = "w2"
        missed(place, round_id, worker_ids)

    monkeypatch.setattr(gangs, "missed", loses_the_lead)

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context, is_ready=False)
        prints(trainer, "torch.distributed.DistStoreError: wait timeout after 300000ms, keys: /default_pg/0//0//1\n")
        trainer.returncode = 1
        tells(gang, context, ECHOED)
        yield

    attempt = attempt_of(gang, leads(gang, script))

    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.INFRA_LOST, "")
    assert "another worker leads the gang now" in str(attempt.detail)


def test_a_newer_members_word_that_is_not_known_is_a_loss(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        yield from trainer.listen("admit")
        tells(gang, context, KILLED | {"reason": "of_next_year"})
        yield from loads_for_ever(trainer)

    assert reasons(gang.site, leads(gang, script)) == [EndReason.INFRA_LOST]


def test_a_member_that_leaves_while_the_trainer_loads_costs_nobody_anything(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context, is_ready=False)
        gangs.ask_to_leave(gang.place("w2"))
        yield from loads_for_ever(trainer)

    job_id = leads(gang, script)

    assert reasons(gang.site, job_id) == [EndReason.DRAINED]
    assert gang.site.world.job(job_id).run_after is None


def test_a_member_that_leaves_costs_nothing_where_a_job_could_not_be_handed_over_yet(
    gang: GangSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outage(*_: object) -> Json:
        raise OUTAGE

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        monkeypatch.setattr(staging, "bring_files", outage)
        yield from begun(gang, trainer, context)
        gangs.ask_to_leave(gang.place("w2"))
        yield from trainer.listen("drain")

    job_id = leads(gang, script)

    attempt = attempt_of(gang, job_id)
    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.DRAINED, "")
    assert gang.site.world.job(job_id).run_after is None


def test_a_leaders_trainer_that_fails_as_it_saves_for_a_member_that_leaves_is_to_blame(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        yield from trainer.listen("admit")
        gangs.ask_to_leave(gang.place("w2"))
        yield from trainer.listen("drain")
        prints(trainer, "Traceback:\nMemoryError\n")
        trainer.returncode = 1
        yield

    attempt = attempt_of(gang, leads(gang, script))

    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.HOST_OOM, "w1")


def test_a_leader_without_a_database_while_its_gang_gathers_blames_nobody(gang: GangSite) -> None:
    """Its trainer is killed with its claims; the database is back before they could have become another's."""

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        context.heartbeat.hold(gang.site.held(), since=-float("inf"))
        context.heartbeat.give_up_overdue()
        yield

    attempt = attempt_of(gang, leads(gang, script))

    assert gang.trainers[0].is_killed
    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.INFRA_LOST, None)


def test_a_gang_of_which_one_is_cordoned_takes_no_more_and_its_empty_trainer_goes(gang: GangSite) -> None:
    later: list[str] = []

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        admit = yield from trainer.listen("admit")
        cordons.cordon(gang.site.db, "w2")
        later.append(gang.site.queued(seed=7).id)
        for _ in range(10):
            yield
        trainer.say("cancelled", claim_id=admit.body["claim_id"])
        yield from trainer.listen("unload")
        yield

    leads(gang, script)

    assert reasons(gang.site, later[0]) == []


def test_nothing_is_claimed_for_a_trainer_that_was_just_killed(gang: GangSite) -> None:
    later: list[str] = []

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        if not later:
            yield from trainer.listen("admit")
            later.append(gang.site.queued(seed=7).id)
            tells(gang, context, KILLED)
            yield from loads_for_ever(trainer)

    leads(gang, script)

    (attempt,) = queries.attempts(gang.site.db, **gang.site.world.of(later[0]))
    assert attempt.trainer_id == gang.trainers[1].directory.path.name


def test_fewer_than_begin_can_not_be_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_GANG_SIZE", "2")
    monkeypatch.setenv("LORRY_GANG_MIN_SIZE", "3")

    with pytest.raises(ValidationError, match="Set 2 at most"):
        Settings()


def test_who_has_other_versions_or_missed_more_rounds_is_called_last_or_not_at_all() -> None:
    def member(name: str, **about: Any) -> gangs.LiveMember:
        plain: dict[str, Any] = {"host": "h", "kind": "cpu", "num_processes": 1, "free_bytes": 1, "is_open": True}
        return gangs.LiveMember(worker_id=name, **{**plain, **about})

    members = [member("missed", num_missed=1), member("old", versions="torch 2.12"), member("leads"), member("new")]

    assert [one.worker_id for one in alike(members, "leads", size=2)] == ["leads", "new"]
    assert [one.worker_id for one in alike(members, "leads", size=9)] == ["leads", "new", "missed"]


def failing_once(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """That verb of gangs meets an outage the first time it is said."""
    said: list[str] = []
    verb: Callable[..., object] = getattr(gangs, name)

    def stand_in(*arguments: Any, **options: Any) -> object:
        said.append(name)
        if len(said) == 1:
            raise OUTAGE
        return verb(*arguments, **options)

    monkeypatch.setattr(gangs, name, stand_in)
    return said


@pytest.mark.parametrize("verb", ["progress", "start"])
def test_an_outage_while_the_gang_gathers_ends_nothing(
    gang: GangSite, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    said = failing_once(monkeypatch, verb)

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        admit = yield from trainer.listen("admit")
        trainer.say("cancelled", claim_id=admit.body["claim_id"])
        yield

    job_id = leads(gang, script)

    assert reasons(gang.site, job_id) == [EndReason.CANCELLED_BY_USER]
    assert len(said) > 1


@pytest.mark.parametrize("verb", ["join", "leave", "ask_to_leave"])
def test_a_members_word_is_said_until_it_is_heard(gang: GangSite, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    member, leader = gang.seated("w2"), gang.place("w1")
    gang.seated("w1")
    gangs.lead(leader)
    task: Json = {"trainer_id": "trainer-1", "base_model": "smol", "base_digest": "1", "address": LOCAL, "settings": {}}
    led = gangs.open_round(leader, members=["w1", "w2"], task=task, seconds=60)
    said = failing_once(monkeypatch, verb)
    look = gangs.standing
    wants_to_leave: list[bool] = []

    def on_looking(place: GangMember) -> gangs.GangState:
        found = look(place)
        if found.call is not None and found.call.has_joined and found.call.port is None:
            gangs.start(leader, led.round_id, port=4711)
        return found

    def script(trainer: FakeTrainer) -> Generator[None]:
        if verb == "ask_to_leave":
            wants_to_leave.append(True)
            while not gangs.progress(leader, led.round_id).is_anyone_leaving:
                yield
        prints(trainer, GLOO)
        trainer.returncode = 1
        yield

    gang.script = script
    monkeypatch.setattr(gangs, "standing", on_looking)
    member = replace(member, has_asked_to_leave=lambda: bool(wants_to_leave))
    with Chores(member) as chores:
        for _ in range(2):
            gang_of(member).participate(chores, supervisor._launch_trainer)  # pyright: ignore[reportPrivateUsage]

    told = gangs.progress(leader, led.round_id).ended["w2"]
    assert told["is_echo"]
    assert len(said) > 1
