"""Attribution of the exit of a gang's trainer, and retries of calls that meet an outage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from catalog.fleet import cordons, gangs
from catalog.fleet.gangs import GangMember
from catalog.history import queries
from catalog.settings import InvalidSettings, Settings
from catalog.states import EndReason, JobState
from catalog.tables.fleet import Gang
from catalog.tables.history import Attempt
from tests.worker.context.test_gang_membership import (
    KILLED,
    LOCAL,
    GangSite,
    leads,
    loads,
    membership_of,
    start_once_joined,
)
from tests.worker.pack_site import OUTAGE, PackSite
from tests.worker.process.test_exit_status import GLOO, fellow
from tests.worker.scripted_trainer import FakeTrainer, load_forever, reasons
from worker import supervisor
from worker.background.task_runner import TaskRunner
from worker.context.context import WorkerContext
from worker.context.gang_membership import matching_members
from worker.gang.gang import gang_of
from worker.protocol.mailbox import Json
from worker.protocol.rendezvous import report_port
from worker.session import staging

ECHOED = {"reason": "infra_lost", "detail": "The trainer exited together with others of its gang.", "is_echo": True}


@pytest.fixture
def gang(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> GangSite:
    return GangSite(site, monkeypatch)


def begun(gang: GangSite, trainer: FakeTrainer, context: WorkerContext, *, is_ready: bool = True) -> Generator[None]:
    """Let all join, and load the base model if `is_ready`."""
    led = membership_of(context).round
    assert led is not None
    report_port(trainer.directory, 4711)
    gangs.join(gang.place("w2"), led.round_id)
    yield
    if is_ready:
        loads(trainer)


def report_end(gang: GangSite, context: WorkerContext, end: Json) -> None:
    led = membership_of(context).round
    assert led is not None
    gangs.leave(gang.place("w2"), led.round_id, end=end)


def attempt_of(gang: GangSite, job_id: str) -> Attempt:
    return queries.attempts(gang.site.db, **gang.site.world.of(job_id))[0]


def write_log(trainer: FakeTrainer, log: str) -> None:
    trainer.directory.log_path.write_text(log)


def test_a_leaders_trainer_that_dies_before_it_listens_is_a_normal_crash(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        write_log(trainer, "Traceback:\nKeyError: 'step'\n")
        trainer.returncode = 1
        yield

    job_id = leads(gang, script)

    attempt, job = attempt_of(gang, job_id), gang.site.world.job(job_id)
    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.TRAINER_CRASHED, "w1")
    assert attempt.detail == "The trainer exited with status 1. KeyError: 'step'"
    assert (job.state, job.counted_attempts) == (JobState.QUEUED, 0)
    assert job.run_after is not None


def test_a_failed_leader_is_at_fault_even_if_the_others_exit_first(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        yield from trainer.listen("admit")
        report_end(gang, context, ECHOED)
        yield
        yield
        write_log(trainer, "Traceback:\nKeyError: 'step'\n")
        trainer.returncode = 1
        yield

    attempt = attempt_of(gang, leads(gang, script))

    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.TRAINER_CRASHED, "w1")
    assert "KeyError" in str(attempt.detail)
    assert not gang.trainers[0].is_killed


def test_a_peer_error_in_the_leaders_log_is_attributed_to_the_member(gang: GangSite) -> None:
    full = {
        "reason": "node_failed",
        "detail": "The trainer exited because the worker's disk was full.",
        "is_echo": False,
    }

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        yield from trainer.listen("admit")
        write_log(trainer, fellow(1, "OSError: [Errno 28] No space left on device"))
        trainer.returncode = 1
        report_end(gang, context, full)
        yield

    attempt = attempt_of(gang, leads(gang, script))

    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.NODE_FAILED, "w2")


@pytest.mark.parametrize(("ranks", "at_fault"), [([1], "w2"), ([0], "w1"), ([0, 1], "")])
def test_a_node_whose_rank_alone_could_not_load_the_base_is_at_fault(
    gang: GangSite, ranks: list[int], at_fault: str
) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context, is_ready=False)
        error = {"code": "unsafe_file", "message": "A shard is cut short.", "remedy": "Restore it."}
        trainer.emit("load_refused", error=error, ranks=ranks)
        yield

    job_id = leads(gang, script)

    attempt, job = attempt_of(gang, job_id), gang.site.world.job(job_id)
    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.TRAINER_CRASHED, at_fault)
    assert (job.state, job.counted_attempts) == (JobState.QUEUED, 0)
    if at_fault:
        assert attempt.detail == f"Process {ranks[0]}, on {at_fault} of the gang: A shard is cut short. Restore it."


def test_without_evidence_no_worker_is_at_fault(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        yield from trainer.listen("admit")
        write_log(trainer, GLOO)
        trainer.returncode = 1
        report_end(gang, context, ECHOED)
        yield

    attempt = attempt_of(gang, leads(gang, script))

    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.INFRA_LOST, "")


def failed_rendezvous(gang: GangSite, trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
    """The script of a trainer that can't reach the other one."""
    yield from begun(gang, trainer, context, is_ready=False)
    write_log(trainer, "torch.distributed.DistStoreError: wait timeout after 300000ms, keys: /default_pg/0//0//1\n")
    trainer.returncode = 1
    report_end(gang, context, ECHOED)
    yield


def test_unreachable_trainers_cost_no_attempt_and_name_the_address(gang: GangSite) -> None:
    job_id = leads(gang, partial(failed_rendezvous, gang))

    attempt, job = attempt_of(gang, job_id), gang.site.world.job(job_id)
    assert attempt.reason == EndReason.GANG_INCOMPLETE
    assert f"{LOCAL}, port 4711" in str(attempt.detail)
    assert (job.state, job.counted_attempts) == (JobState.QUEUED, 0)
    assert gangs.standing(gang.place("w1")).members[1].num_missed == 1
    assert len(gang.trainers) == 1, "it is retried immediately"


def test_a_leader_that_loses_the_lead_ends_its_attempts(gang: GangSite, monkeypatch: pytest.MonkeyPatch) -> None:
    missed = gangs.missed

    def loses_the_lead(place: GangMember, round_id: str, worker_ids: Collection[str]) -> None:
        gangs.end_round(place, round_id)
        with place.db.write() as session:
            session.get_one(Gang, place.gang).leader_id = "w2"
        missed(place, round_id, worker_ids)

    monkeypatch.setattr(gangs, "missed", loses_the_lead)

    attempt = attempt_of(gang, leads(gang, partial(failed_rendezvous, gang)))

    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.INFRA_LOST, "")
    assert "Another worker became the leader of the gang" in str(attempt.detail)


def test_an_unknown_end_reason_of_a_newer_member_is_infra_lost(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        yield from trainer.listen("admit")
        report_end(gang, context, KILLED | {"reason": "of_next_year"})
        yield from load_forever(trainer)

    assert reasons(gang.site, leads(gang, script)) == [EndReason.INFRA_LOST]


def test_a_member_that_leaves_while_the_trainer_loads_costs_nothing(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context, is_ready=False)
        gangs.ask_to_leave(gang.place("w2"))
        yield from load_forever(trainer)

    job_id = leads(gang, script)

    assert reasons(gang.site, job_id) == [EndReason.DRAINED]
    assert gang.site.world.job(job_id).run_after is None


def test_a_member_that_leaves_before_a_job_is_handed_over_costs_nothing(
    gang: GangSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outage(*_: object) -> Json:
        raise OUTAGE

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        monkeypatch.setattr(staging, "stage_files", outage)
        yield from begun(gang, trainer, context)
        gangs.ask_to_leave(gang.place("w2"))
        yield from trainer.listen("drain")

    job_id = leads(gang, script)

    attempt = attempt_of(gang, job_id)
    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.DRAINED, "")
    assert gang.site.world.job(job_id).run_after is None


def test_a_leaders_trainer_that_fails_while_it_drains_is_at_fault(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        yield from trainer.listen("admit")
        gangs.ask_to_leave(gang.place("w2"))
        yield from trainer.listen("drain")
        write_log(trainer, "Traceback:\nMemoryError\n")
        trainer.returncode = 1
        yield

    attempt = attempt_of(gang, leads(gang, script))

    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.HOST_OOM, "w1")


def test_a_database_outage_while_the_gang_gathers_is_no_workers_fault(gang: GangSite) -> None:
    """The leader gives up its claims and kills its trainer. The database returns before the leases expire."""

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        context.heartbeat.hold(gang.site.held(), since=-float("inf"))
        context.heartbeat.abandon_overdue()
        yield

    attempt = attempt_of(gang, leads(gang, script))

    assert gang.trainers[0].is_killed
    assert (attempt.reason, attempt.blamed_worker_id) == (EndReason.INFRA_LOST, None)


def test_a_gang_with_a_cordoned_member_claims_nothing_and_unloads(gang: GangSite) -> None:
    later: list[str] = []

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        admit = yield from trainer.listen("admit")
        cordons.cordon(gang.site.db, "w2")
        later.append(gang.site.queued(seed=7).id)
        for _ in range(10):
            yield
        trainer.emit("cancelled", claim_id=admit.body["claim_id"])
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
            report_end(gang, context, KILLED)
            yield from load_forever(trainer)

    leads(gang, script)

    (attempt,) = queries.attempts(gang.site.db, **gang.site.world.of(later[0]))
    assert attempt.trainer_id == gang.trainers[1].directory.path.name


def test_the_gang_size_cannot_be_below_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_GANG_SIZE", "2")
    monkeypatch.setenv("LORRY_GANG_MIN_SIZE", "3")

    with pytest.raises(InvalidSettings, match="Set at most 2"):
        Settings()


def test_members_that_missed_rounds_are_called_last_and_other_versions_never() -> None:
    def member(name: str, **about: Any) -> gangs.LiveMember:
        plain: dict[str, Any] = {"host": "h", "kind": "cpu", "num_processes": 1, "free_bytes": 1, "is_open": True}
        return gangs.LiveMember(worker_id=name, **{**plain, **about})

    members = [member("missed", num_missed=1), member("old", versions="torch 2.12"), member("leads"), member("new")]

    assert [one.worker_id for one in matching_members(members, "leads", size=2)] == ["leads", "new"]
    assert [one.worker_id for one in matching_members(members, "leads", size=9)] == ["leads", "new", "missed"]


def failing_once(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Make the first call of this function of `gangs` raise an outage. Return the list of its calls."""
    calls: list[str] = []
    verb: Callable[..., object] = getattr(gangs, name)

    def stand_in(*arguments: Any, **options: Any) -> object:
        calls.append(name)
        if len(calls) == 1:
            raise OUTAGE
        return verb(*arguments, **options)

    monkeypatch.setattr(gangs, name, stand_in)
    return calls


@pytest.mark.parametrize("verb", ["progress", "start"])
def test_an_outage_while_the_gang_gathers_stops_nothing(
    gang: GangSite, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    calls = failing_once(monkeypatch, verb)

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from begun(gang, trainer, context)
        admit = yield from trainer.listen("admit")
        trainer.emit("cancelled", claim_id=admit.body["claim_id"])
        yield

    job_id = leads(gang, script)

    assert reasons(gang.site, job_id) == [EndReason.CANCELLED_BY_USER]
    assert len(calls) > 1


@pytest.mark.parametrize("verb", ["join", "leave", "ask_to_leave"])
def test_a_call_of_a_member_is_retried_after_an_outage(
    gang: GangSite, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    member, leader = gang.seated("w2"), gang.place("w1")
    gang.seated("w1")
    gangs.lead(leader)
    task: Json = {"trainer_id": "trainer-1", "base_model": "smol", "base_digest": "1", "address": LOCAL, "settings": {}}
    led = gangs.open_round(leader, members=["w1", "w2"], task=task, seconds=60)
    calls = failing_once(monkeypatch, verb)
    wants_to_leave: list[bool] = []

    def script(trainer: FakeTrainer) -> Generator[None]:
        if verb == "ask_to_leave":
            wants_to_leave.append(True)
            while not gangs.progress(leader, led.round_id).is_anyone_leaving:
                yield
        write_log(trainer, GLOO)
        trainer.returncode = 1
        yield

    gang.script = script
    start_once_joined(gang, monkeypatch)
    member = replace(member, is_shutdown_requested=lambda: bool(wants_to_leave))
    with TaskRunner(member) as tasks:
        for _ in range(2):
            gang_of(member).participate(tasks, supervisor._launch_trainer)  # pyright: ignore[reportPrivateUsage]

    end = gangs.progress(leader, led.round_id).ended["w2"]
    assert end["is_echo"]
    assert len(calls) > 1
