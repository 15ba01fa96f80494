"""Leader and members of a gang around their trainers, which are scripts here."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from catalog.errors import Unavailable
from catalog.fleet import cordons, gangs, workers
from catalog.fleet.gangs import GangMember, LiveMember, NotGathered, Round
from catalog.history import queries
from catalog.states import EndReason, JobState
from tests.worker.pack_site import READY, PackSite
from tests.worker.scripted_trainer import FakeTrainer, Script, reasons
from worker import supervisor
from worker.background import base_models
from worker.background.task_runner import TaskRunner
from worker.context.context import WorkerContext
from worker.context.gang_membership import GangMembership, matching_members
from worker.gang.gang import gang_of
from worker.node import devices
from worker.protocol.mailbox import Json, TrainerDirectory
from worker.protocol.rendezvous import place_of, report_port

LOCAL = "127.0.0.1"
KILLED = {"reason": "trainer_crashed", "detail": "The trainer was killed (signal 9).", "is_echo": False}


class GangSite:
    """The workers w1 and w2 of the gang `pair`, on one database. Each new trainer follows the current script."""

    def __init__(self, site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site = site
        self.trainers: list[FakeTrainer] = []
        self.script: Script = never
        site.context.scratch_dir().mkdir(parents=True, exist_ok=True)
        site.world.worker("w2")
        monkeypatch.setattr(supervisor, "launch", self._launch)
        monkeypatch.setattr(base_models, "ensure", lambda *_, **__: Path("/bases/here"))
        monkeypatch.setattr(devices, "free_bytes", lambda _: 10**12)

    def _launch(
        self,
        directory: TrainerDirectory,
        _device: devices.Device,
        *,
        silence_seconds: float,
        bases_dir: Path,
        num_processes: int,
        in_gang: bool,
    ) -> FakeTrainer:
        self.trainers.append(FakeTrainer(directory, self.script))
        return self.trainers[-1]

    def seated(self, worker_id: str, **settings: Any) -> WorkerContext:
        """Return the worker's context as a member of the gang."""
        given = {"gang": "pair", "advertise_address": LOCAL, **settings}
        member_settings = self.site.settings.model_copy(update=given)
        membership = GangMembership(member_settings, self.site.db, worker_id, kind="cpu", own_free_bytes=lambda: 10**12)
        membership.enter(num_processes=1)
        return replace(self.site.context, settings=member_settings, worker_id=worker_id, membership=membership)

    def place(self, worker_id: str) -> GangMember:
        return GangMember(db=self.site.db, worker_id=worker_id, gang="pair", silent_seconds=60.0)

    def call_of(self, worker_id: str) -> gangs.Call | None:
        return gangs.standing(self.place(worker_id)).call


@pytest.fixture
def gang(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> GangSite:
    return GangSite(site, monkeypatch)


def never(trainer: FakeTrainer) -> Generator[None]:
    raise AssertionError("no trainer should start")
    yield


def start_once_joined(gang: GangSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let w1 start the round that it leads when a member that has joined reads the gang's state."""
    standing = gangs.standing

    def started(place: GangMember) -> gangs.GangState:
        found = standing(place)
        if found.call is not None and found.call.has_joined and found.call.port is None:
            gangs.start(gang.place("w1"), found.call.round_id, port=4711)
        return found

    monkeypatch.setattr(gangs, "standing", started)


def membership_of(context: WorkerContext) -> GangMembership:
    assert context.membership is not None
    return context.membership


def loads(trainer: FakeTrainer) -> None:
    trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})


def test_no_job_is_claimed_before_the_gang_is_complete(gang: GangSite) -> None:
    job = gang.site.queued()
    context = gang.seated("w1")

    supervisor.supervise(context)

    assert gang.site.world.job(job.id).state == JobState.QUEUED
    assert reasons(gang.site, job.id) == []


def test_a_smaller_gang_starts_after_the_wait_if_the_minimum_allows_it(gang: GangSite) -> None:
    gang.site.queued()
    patient = gang.seated("w1", gang_min_size=1, gang_wait_seconds=3600)
    hasty = gang.seated("w1", gang_min_size=1, gang_wait_seconds=0)

    assert not membership_of(patient).may_claim()
    assert membership_of(hasty).may_claim()


def test_a_member_starts_with_the_leaders_settings_and_stops_with_the_round(
    gang: GangSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, member = gang.place("w1"), gang.seated("w2")
    gang.seated("w1")
    gangs.lead(leader)
    task: Json = {"trainer_id": "trainer-1", "base_model": "smol", "base_digest": "1", "address": LOCAL}
    led = gangs.open_round(
        leader, members=["w1", "w2"], task={**task, "settings": {"dtype": "float32", "device": "cuda:0"}}, seconds=60
    )
    trainer_settings: list[Json] = []

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer_settings.append(trainer.directory.settings())
        yield
        gangs.end_round(leader, led.round_id)
        while True:
            yield

    gang.script = script
    start_once_joined(gang, monkeypatch)
    with TaskRunner(member) as tasks:
        took_part = gang_of(member).participate(tasks, supervisor._launch_trainer)  # pyright: ignore[reportPrivateUsage]
        again = gang_of(member).participate(tasks, supervisor._launch_trainer)  # pyright: ignore[reportPrivateUsage]

    (trainer,) = gang.trainers
    met = trainer_settings[0].pop("meeting")
    assert (took_part, again) == (True, False)
    assert trainer_settings == [{"dtype": "float32", "device": "cpu", "base_dir": "/bases/here"}]
    assert (met["address"], met["port"], met["first_rank"], met["num_ranks"]) == (LOCAL, 4711, 1, 2)
    assert met["name"] == led.round_id
    assert trainer.is_killed
    assert not trainer.directory.path.exists()


def leads(gang: GangSite, script: Callable[[FakeTrainer, WorkerContext], Generator[None]]) -> str:
    """Run a job on w1 as the leader, whose trainer follows the script, and w2. Return the job's id."""
    job = gang.site.queued()
    context = gang.seated("w1")
    gang.seated("w2")
    gang.script = lambda trainer: script(trainer, context)
    supervisor.supervise(context)
    return job.id


def test_an_attempt_has_the_end_reason_that_a_member_reports(gang: GangSite) -> None:
    met: list[Json] = []

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        led = membership_of(context).round
        assert led is not None
        met.append(trainer.directory.settings()["meeting"])
        report_port(trainer.directory, 4711)
        gangs.join(gang.place("w2"), led.round_id)
        yield
        loads(trainer)
        yield from trainer.listen("admit")
        gangs.leave(gang.place("w2"), led.round_id, end=KILLED)
        while True:
            yield

    job_id = leads(gang, script)

    (attempt,) = queries.attempts(gang.site.db, **gang.site.world.of(job_id))
    assert attempt.reason == EndReason.TRAINER_CRASHED
    assert attempt.detail == "On w2 of the gang: The trainer was killed (signal 9)."
    assert attempt.blamed_worker_id == "w2"
    assert gang.trainers[0].is_killed
    assert gang.call_of("w2") is None
    assert met[0].pop("name").startswith("round-")
    where = {"address": LOCAL, "interface": place_of(LOCAL)[1], "port": None}
    assert met == [{**where, "first_rank": 0, "num_ranks": 2}]


def test_the_strategy_is_chosen_once_for_all_nodes(gang: GangSite, monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = chain(["replicated"], repeat("fsdp2"))
    monkeypatch.setattr(supervisor, "strategy_for", lambda *_: next(strategies))
    used: list[str] = []

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        call = gang.call_of("w2")
        assert call is not None
        used.extend(settings["strategy"] for settings in (call.task["settings"], trainer.directory.settings()))
        trainer.returncode = 1
        yield

    leads(gang, script)

    assert used == ["replicated", "replicated"]


def test_a_member_that_cannot_participate_is_at_fault_and_not_the_job(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        led = membership_of(context).round
        assert led is not None
        gangs.leave(
            gang.place("w2"), led.round_id, end=KILLED | {"reason": "node_failed", "detail": "Its disk is full."}
        )
        while True:
            yield

    job_id = leads(gang, script)

    job = gang.site.world.job(job_id)
    (attempt,) = queries.attempts(gang.site.db, **gang.site.world.of(job_id))
    assert (job.state, job.counted_attempts) == (JobState.QUEUED, 0)
    assert (attempt.reason, attempt.detail) == (
        EndReason.NODE_FAILED,
        "On w2 of the gang: Its disk is full.",
    )
    assert attempt.blamed_worker_id == "w2"
    assert job.run_after is not None
    assert len(gang.trainers) == 1, "it is retried immediately"


def test_a_member_that_is_lost_before_it_joins_releases_the_job(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        workers.declare_lost(gang.site.db, "w2")
        while True:
            yield

    job_id = leads(gang, script)

    (attempt,) = queries.attempts(gang.site.db, **gang.site.world.of(job_id))
    assert attempt.reason == EndReason.GANG_INCOMPLETE
    assert "stopped sending heartbeats." in str(attempt.detail)


def meets(gang: GangSite, trainer: FakeTrainer, context: WorkerContext) -> Generator[None, None, Round]:
    """Let the other member join, start the round, and load the base model in the leader's trainer."""
    led = membership_of(context).round
    assert led is not None
    report_port(trainer.directory, 4711)
    gangs.join(gang.place("w2"), led.round_id)
    yield
    loads(trainer)
    return led


def test_a_leader_whose_round_is_over_stops_its_trainer(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        led = yield from meets(gang, trainer, context)
        yield from trainer.listen("admit")
        gangs.end_round(gang.place("w1"), led.round_id)
        while True:
            yield

    job_id = leads(gang, script)

    assert reasons(gang.site, job_id)[0] == EndReason.INFRA_LOST
    assert gang.trainers[0].is_killed


def test_an_incomplete_gang_does_not_train_a_job_claimed_before(gang: GangSite) -> None:
    job = gang.site.queued()
    context = gang.seated("w1")
    membership_of(context).poll()

    with (
        ExitStack() as stack,
        pytest.raises(NotGathered, match="needs 2 workers, but the number of available workers is 1") as refused,
    ):
        gang_of(context).gather(stack, job, {})

    assert "Start or uncordon more workers" in refused.value.remedy
    assert gangs.standing(gang.place("w1")).call is None


def test_a_cordoned_leader_is_not_counted_as_available(gang: GangSite) -> None:
    job = gang.site.queued()
    context = gang.seated("w1")
    cordons.cordon(gang.site.db, "w1")
    membership_of(context).poll()

    with (
        ExitStack() as stack,
        pytest.raises(NotGathered, match="needs 2 workers, but the number of available workers is 0"),
    ):
        gang_of(context).gather(stack, job, {})


def test_a_claim_that_expires_before_the_trainer_starts_is_reported_with_the_worker(gang: GangSite) -> None:
    job = gang.site.queued()
    context = gang.seated("w1")
    gang.seated("w2")
    membership_of(context).poll()
    trainer: Any = SimpleNamespace(
        returncode=None,
        is_killed=False,
        directory=TrainerDirectory(context.scratch_dir()),
        send_heartbeat=lambda *_: None,
        kill=lambda: None,
        wait=lambda _: None,
    )
    member = gang_of(context)

    def lose_claim() -> bool:
        context.heartbeat.lost.set()
        trainer.returncode = -9
        return False

    with ExitStack() as stack:
        member.gather(stack, job, {})
        with pytest.raises(Unavailable, match="Worker w1 could not reach the database") as caught:
            member.start(trainer, is_unwanted=lose_claim)

    assert caught.value.code == "database_unavailable"


def test_jobs_are_saved_before_a_member_leaves(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from meets(gang, trainer, context)
        admit = yield from trainer.listen("admit")
        gangs.ask_to_leave(gang.place("w2"))
        yield from trainer.listen("drain")
        trainer.emit("paused", claim_id=admit.body["claim_id"], step=0, adapter=None)
        yield

    job_id = leads(gang, script)

    assert reasons(gang.site, job_id) == [EndReason.DRAINED]
    assert gang.site.world.job(job_id).state == JobState.QUEUED


def test_only_open_members_with_the_leaders_device_kind_are_called() -> None:
    def member(name: str, kind: str = "cuda", *, is_open: bool = True) -> LiveMember:
        return LiveMember(worker_id=name, host="h", kind=kind, num_processes=1, free_bytes=1, is_open=is_open)

    members = [member("cordoned", is_open=False), member("a"), member("cpu", "cpu"), member("leads"), member("b")]

    assert [one.worker_id for one in matching_members(members, "leads", size=2)] == ["leads", "a"]
    assert [one.worker_id for one in matching_members(members, "leads", size=9)] == ["leads", "a", "b"]
    assert matching_members(members, "cordoned", size=2) == []


@pytest.mark.parametrize("address", [None, "203.0.113.7"])
def test_a_gang_worker_requires_an_address_of_its_node(gang: GangSite, address: str | None) -> None:
    with pytest.raises(SystemExit, match="LORRY_ADVERTISE_ADDRESS"):
        gang.seated("w1", advertise_address=address)
