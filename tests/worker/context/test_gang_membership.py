"""What the leader of a gang and its members do around their trainers, which are scripts here."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from catalog.fleet import gangs, workers
from catalog.fleet.gangs import GangMember, LiveMember, NotGathered, Round
from catalog.history import queries
from catalog.states import EndReason, JobState
from tests.worker.pack_site import READY, PackSite
from tests.worker.scripted_trainer import FakeTrainer, Script, reasons
from worker import supervisor
from worker.background import base_models
from worker.background.chores import Chores
from worker.context.context import WorkerContext
from worker.context.gang_membership import Seat, alike
from worker.gang.gang import gang_of
from worker.node import devices
from worker.protocol.mailbox import Json, TrainerDirectory
from worker.protocol.rendezvous import place_of, report_port

LOCAL = "127.0.0.1"
KILLED = {"reason": "trainer_crashed", "detail": "The trainer was killed (signal 9).", "is_echo": False}


class GangSite:
    """The workers w1 and w2 on one database, of the gang `pair`. A trainer follows the script that was given last."""

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
        """The worker's context, in its gang."""
        given = {"gang": "pair", "advertise_address": LOCAL, **settings}
        told = self.site.settings.model_copy(update=given)
        seat = Seat(told, self.site.db, worker_id, kind="cpu", own_free_bytes=lambda: 10**12)
        seat.enter(num_processes=1)
        return replace(self.site.context, settings=told, worker_id=worker_id, seat=seat)

    def place(self, worker_id: str) -> GangMember:
        return GangMember(db=self.site.db, worker_id=worker_id, gang="pair", silent_seconds=60.0)

    def call_of(self, worker_id: str) -> gangs.Call | None:
        return gangs.standing(self.place(worker_id)).call


@pytest.fixture
def gang(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> GangSite:
    return GangSite(site, monkeypatch)


def never(trainer: FakeTrainer) -> Generator[None]:
    raise AssertionError("no trainer was to start")
    yield


def seat_of(context: WorkerContext) -> Seat:
    assert context.seat is not None
    return context.seat


def loads(trainer: FakeTrainer) -> None:
    trainer.say("ready", **{name: value for name, value in READY.items() if name != "type"})


def test_no_job_is_claimed_before_the_gang_is_complete(gang: GangSite) -> None:
    job = gang.site.queued()
    context = gang.seated("w1")

    supervisor.supervise(context)

    assert gang.site.world.job(job.id).state == JobState.QUEUED
    assert reasons(gang.site, job.id) == []


def test_fewer_begin_where_the_operator_lets_them_and_their_patience_is_over(gang: GangSite) -> None:
    gang.site.queued()
    patient = gang.seated("w1", gang_min_size=1, gang_wait_seconds=3600)
    hasty = gang.seated("w1", gang_min_size=1, gang_wait_seconds=0)

    assert not seat_of(patient).may_claim()
    assert seat_of(hasty).may_claim()


def test_one_that_is_called_begins_with_the_leaders_settings_and_ends_with_the_round(gang: GangSite) -> None:
    leader, member = gang.place("w1"), gang.seated("w2")
    gang.seated("w1")
    gangs.lead(leader)
    task: Json = {"trainer_id": "trainer-1", "base_model": "smol", "base_digest": "1", "address": LOCAL}
    led = gangs.open_round(
        leader, members=["w1", "w2"], task={**task, "settings": {"dtype": "float32", "device": "cuda:0"}}, seconds=60
    )
    has_joined: list[bool] = []
    told: list[Json] = []

    def on_looking(place: GangMember) -> gangs.GangState:
        found = look(place)
        if found.call is not None and found.call.has_joined and found.call.port is None:
            has_joined.append(True)
            gangs.start(leader, led.round_id, port=4711)
        return found

    def script(trainer: FakeTrainer) -> Generator[None]:
        told.append(trainer.directory.settings())
        yield
        gangs.end_round(leader, led.round_id)
        while True:
            yield

    look, gang.script = gangs.standing, script
    with pytest.MonkeyPatch.context() as patched, Chores(member) as chores:
        patched.setattr(gangs, "standing", on_looking)
        took_part = gang_of(member).participate(chores, supervisor._launch_trainer)  # pyright: ignore[reportPrivateUsage]
        again = gang_of(member).participate(chores, supervisor._launch_trainer)  # pyright: ignore[reportPrivateUsage]

    (trainer,) = gang.trainers
    met = told[0].pop("meeting")
    assert (took_part, again, has_joined) == (True, False, [True])
    assert told == [{"dtype": "float32", "device": "cpu", "base_dir": "/bases/here"}]
    assert (met["address"], met["port"], met["first_rank"], met["num_ranks"]) == (LOCAL, 4711, 1, 2)
    assert met["name"] == led.round_id
    assert trainer.is_killed
    assert not trainer.directory.path.exists()


def leads(gang: GangSite, script: Callable[[FakeTrainer, WorkerContext], Generator[None]]) -> str:
    """A job that the leader's trainer, which follows the script, gets with one other member; its id."""
    job = gang.site.queued()
    context = gang.seated("w1")
    gang.seated("w2")
    gang.script = lambda trainer: script(trainer, context)
    supervisor.supervise(context)
    return job.id


def test_when_a_member_tells_that_its_trainer_died_the_attempt_ends_as_that_one_did(gang: GangSite) -> None:
    met: list[Json] = []

    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        led = seat_of(context).round
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


def test_all_nodes_shard_the_base_in_one_way_though_its_description_changes_while_they_gather(
    gang: GangSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the blocks of an older base are counted meanwhile."""
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


def test_where_a_member_can_not_take_part_the_job_does_not_pay_and_the_member_is_blamed(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        led = seat_of(context).round
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
    assert len(gang.trainers) == 1, "it is tried again at once"


def test_where_a_member_is_lost_before_it_has_joined_the_job_is_given_back(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        workers.declare_lost(gang.site.db, "w2")
        while True:
            yield

    job_id = leads(gang, script)

    assert reasons(gang.site, job_id) == [EndReason.GANG_INCOMPLETE]


def meets(gang: GangSite, trainer: FakeTrainer, context: WorkerContext) -> Generator[None, None, Round]:
    """The other member joins, all begin, and the leader's trainer has its base."""
    led = seat_of(context).round
    assert led is not None
    report_port(trainer.directory, 4711)
    gangs.join(gang.place("w2"), led.round_id)
    yield
    loads(trainer)
    return led


def test_a_leader_whose_round_is_over_ends_its_trainer(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        led = yield from meets(gang, trainer, context)
        yield from trainer.listen("admit")
        gangs.end_round(gang.place("w1"), led.round_id)
        while True:
            yield

    job_id = leads(gang, script)

    assert reasons(gang.site, job_id)[0] == EndReason.INFRA_LOST
    assert gang.trainers[0].is_killed


def test_what_was_claimed_before_one_went_is_not_trained_by_those_that_are_left(gang: GangSite) -> None:
    job = gang.site.queued()
    context = gang.seated("w1")
    seat_of(context).look()

    with ExitStack() as stack, pytest.raises(NotGathered, match="1 of the 2 workers"):
        gang_of(context).gather(stack, job, {})

    assert gangs.standing(gang.place("w1")).call is None


def test_when_a_member_is_to_leave_the_jobs_are_saved_first(gang: GangSite) -> None:
    def script(trainer: FakeTrainer, context: WorkerContext) -> Generator[None]:
        yield from meets(gang, trainer, context)
        admit = yield from trainer.listen("admit")
        gangs.ask_to_leave(gang.place("w2"))
        yield from trainer.listen("drain")
        trainer.say("paused", claim_id=admit.body["claim_id"], step=0, adapter=None)
        yield

    job_id = leads(gang, script)

    assert reasons(gang.site, job_id) == [EndReason.DRAINED]
    assert gang.site.world.job(job_id).state == JobState.QUEUED


def test_those_are_called_that_may_begin_and_have_devices_of_the_leaders_kind() -> None:
    def member(name: str, kind: str = "cuda", *, is_open: bool = True) -> LiveMember:
        return LiveMember(worker_id=name, host="h", kind=kind, num_processes=1, free_bytes=1, is_open=is_open)

    members = [member("cordoned", is_open=False), member("a"), member("cpu", "cpu"), member("leads"), member("b")]

    assert [one.worker_id for one in alike(members, "leads", size=2)] == ["leads", "a"]
    assert [one.worker_id for one in alike(members, "leads", size=9)] == ["leads", "a", "b"]
    assert alike(members, "cordoned", size=2) == []


@pytest.mark.parametrize("address", [None, "203.0.113.7"])
def test_a_worker_of_a_gang_says_where_it_is_reached(gang: GangSite, address: str | None) -> None:
    with pytest.raises(SystemExit, match="LORRY_ADVERTISE_ADDRESS"):
        gang.seated("w1", advertise_address=address)
