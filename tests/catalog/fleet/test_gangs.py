"""Gangs: a round starts only when all members have joined, only one worker leads, and explanations and plans agree."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from catalog.fleet import cordons, gangs, workers
from catalog.fleet.gangs import GangMember, LivenessTracker, NotGathered, Round
from catalog.jobs import explanation
from catalog.jobs.explanation import explain
from catalog.tables.jobs import Job
from tests.catalog.plan_data import ready
from tests.catalog.plans.test_plans import found
from tests.catalog.queue.test_sharded_claims import GB, queued_large
from tests.catalog.world import Clock, World
from tests.suspension import NEEDS_BOOTTIME, Suspension

SILENT = 60.0
JOIN = 300.0
TASK = {"trainer_id": "trainer-1", "base_model": "smol"}
KILLED = {"reason": "trainer_crashed", "detail": "The trainer was killed (signal 9).", "is_echo": False}
FULL = KILLED | {"reason": "node_failed", "detail": "Its disk is full."}


class Gang:
    """The workers of one gang, by short names."""

    def __init__(self, world: World) -> None:
        self.world = world

    def place(self, worker_id: str) -> GangMember:
        return GangMember(db=self.world.db, worker_id=worker_id, gang="pair", silent_seconds=SILENT)

    def enter(self, *worker_ids: str, size: int = 2, min_size: int = 2, num_processes: int = 1) -> None:
        about: dict[str, Any] = {"kind": "cpu", "num_processes": num_processes, "free_bytes": 10**9}
        for worker_id in worker_ids:
            self.world.worker(worker_id)
            gangs.enter(self.place(worker_id), size=size, min_size=min_size, **about)

    def beat(self, *worker_ids: str) -> None:
        for worker_id in worker_ids:
            self.world.beat(worker_id=worker_id)
            workers.worker_beat(self.world.db, worker_id, resident_base=None, trainer_id=None, report=None)

    def lead(self, worker_id: str) -> bool:
        return gangs.lead(self.place(worker_id))

    def open(self, leader_id: str, *others: str) -> Round:
        return gangs.open_round(self.place(leader_id), members=[leader_id, *others], task=TASK, seconds=JOIN)

    def called(self, worker_id: str) -> gangs.Call | None:
        return gangs.standing(self.place(worker_id)).call

    def member(self, worker_id: str) -> gangs.LiveMember:
        return next(one for one in gangs.standing(self.place(worker_id)).members if one.worker_id == worker_id)

    def start(self, leader_id: str, led: Round) -> None:
        gangs.start(self.place(leader_id), led.round_id, port=4711)

    def has_started(self) -> bool:
        call = self.called("w2")
        return call is not None and call.port is not None


@pytest.fixture
def gang(world: World) -> Gang:
    found = Gang(world)
    found.enter("w1", "w2")
    return found


def refuses(act: Callable[[], object]) -> str:
    with pytest.raises(NotGathered) as refused:
        act()
    return refused.value.message


def test_round_starts_once_all_members_have_joined(gang: Gang) -> None:
    assert gang.lead("w1")
    assert not gang.lead("w2")
    led = gang.open("w1", "w2")
    refused = refuses(lambda: gang.start("w1", led))

    gangs.join(gang.place("w2"), led.round_id)
    gang.start("w1", led)

    call = gang.called("w2")
    assert refused.endswith(": worker w2 did not join in time.")
    assert call is not None
    assert (call.round_id, call.first_rank, call.port, call.has_joined) == (led.round_id, 1, 4711, True)
    assert call.task == {**TASK, "num_ranks": 2}
    assert gang.called("w1") is None


def test_ranks_follow_from_the_number_of_processes_per_worker(world: World) -> None:
    gang = Gang(world)
    gang.enter("w1", num_processes=4)
    gang.enter("w2", "w3", num_processes=2)
    gang.lead("w2")

    led = gang.open("w2", "w1", "w3")

    calls = [gang.called(worker) for worker in ("w1", "w3")]
    assert [call and call.first_rank for call in calls] == [2, 6]
    assert led.num_ranks == 8
    assert led.workers == ["w2", "w1", "w3"]


@pytest.mark.parametrize("why", ["silent", "ended", "cordoned", "leaving", "no member"])
def test_round_is_not_opened_with_an_unavailable_member(gang: Gang, clock: Clock, why: str) -> None:
    gang.lead("w1")
    clock.advance(SILENT + 1)
    gang.beat("w1", *([] if why == "silent" else ["w2"]))
    if why == "ended":
        workers.end_worker(gang.world.db, "w2")
    if why == "cordoned":
        cordons.cordon(gang.world.db, "w2")
    if why == "leaving":
        gangs.ask_to_leave(gang.place("w2"))

    refused = refuses(lambda: gang.open("w1", "w3" if why == "no member" else "w2"))

    assert f"cordoned or draining: worker {'w3' if why == 'no member' else 'w2'}." in refused
    assert gang.called("w2") is None


@pytest.mark.parametrize("why", ["silent", "ended", "reported", "leaving", "late", "over"])
def test_round_does_not_start_if_a_member_is_lost_after_joining(gang: Gang, clock: Clock, why: str) -> None:
    gang.lead("w1")
    led = gang.open("w1", "w2")
    gangs.join(gang.place("w2"), led.round_id)
    clock.advance(SILENT + 1 if why != "late" else JOIN + 1)
    gang.beat("w1", *([] if why == "silent" else ["w2"]))
    if why == "ended":
        workers.declare_lost(gang.world.db, "w2")
    if why == "reported":
        assert gangs.leave(gang.place("w2"), led.round_id, end=KILLED)
    if why == "leaving":
        gangs.ask_to_leave(gang.place("w2"))
    if why == "over":
        gangs.end_round(gang.place("w1"), led.round_id)

    with pytest.raises(NotGathered) as caught:
        gang.start("w1", led)

    refused, fixes = caught.value.message, {"late": "LORRY_GANG_JOIN_SECONDS", "over": "No action is needed"}
    assert fixes.get(why, "lorry workers list") in caught.value.remedy
    assert (led.round_id if why == "over" else "trainer" if why == "late" else "w2") in refused
    assert not gang.has_started()


def test_joining_too_late_or_an_ended_round_is_rejected(gang: Gang, clock: Clock) -> None:
    gang.lead("w1")
    first = gang.open("w1", "w2")
    clock.advance(JOIN + 1)
    gang.beat("w1", "w2")
    late = refuses(lambda: gangs.join(gang.place("w2"), first.round_id))

    second = gang.open("w1", "w2")

    assert "worker w2 joined 1.0 s after the time limit" in late
    assert "already ended" in refuses(lambda: gangs.join(gang.place("w2"), first.round_id))
    assert not gangs.leave(gang.place("w2"), first.round_id, end=KILLED)
    assert gangs.progress(gang.place("w1"), second.round_id).ended == {}


def test_lead_passes_on_when_the_leader_is_lost(gang: Gang, clock: Clock) -> None:
    gang.lead("w1")
    led = gang.open("w1", "w2")
    gangs.join(gang.place("w2"), led.round_id)
    clock.advance(SILENT + 1)
    gang.beat("w2")

    assert gang.lead("w2")

    gang.beat("w1")  # the former leader was only suspended
    assert not gang.lead("w1")
    for act in (lambda: gang.start("w1", led), lambda: gang.open("w1", "w2")):
        assert "led by worker w2" in refuses(act)
    assert "led by worker w2" in refuses(lambda: gangs.progress(gang.place("w1"), led.round_id))
    gangs.end_round(gang.place("w1"), led.round_id)
    assert gang.open("w2", "w1").workers == ["w2", "w1"]


def test_cordoned_leader_ends_its_round_and_leads_no_other(gang: Gang) -> None:
    gang.lead("w1")
    led = gang.open("w1", "w2")
    cordons.cordon(gang.world.db, "w1")
    during = gang.lead("w2")

    gangs.end_round(gang.place("w1"), led.round_id)

    assert not during
    assert gang.lead("w2")
    assert not gang.lead("w1")


def test_leader_sees_ended_and_lost_members(gang: Gang, clock: Clock) -> None:
    gang.enter("w3")
    gang.lead("w1")
    led = gang.open("w1", "w2", "w3")
    gangs.leave(gang.place("w2"), led.round_id, end=KILLED)
    clock.advance(SILENT + 1)
    gang.beat("w1", "w2")

    found = gangs.progress(gang.place("w1"), led.round_id)

    assert (found.ended, found.lost, found.num_others) == ({"w2": KILLED}, ("w3",), 2)
    assert gang.called("w2") is None
    assert "killed (signal 9)" in str(gangs.hindrance_of(found))


def test_member_that_fails_to_join_three_times_is_cordoned(gang: Gang) -> None:
    gang.enter("w3")
    gang.lead("w1")
    missed: list[int] = []
    for _ in range(3):
        led = gang.open("w1", "w2")
        missed.append(gang.member("w2").num_missed)
        gangs.leave(gang.place("w2"), led.round_id, end=FULL)

    (worker,) = (one for one in workers.list_workers(gang.world.db) if one.id == "w2")

    assert missed == [0, 1, 2]
    assert worker.cordon is not None
    assert worker.cordon["reason"] == "It failed to join its gang's trainer 3 times in a row."
    assert worker.cordon["evidence"] == [FULL]
    assert not gang.member("w2").is_open
    assert gang.member("w3").is_open


def test_late_joins_and_outages_do_not_cordon_a_member(gang: Gang) -> None:
    gang.lead("w1")
    for _ in range(2):
        gangs.missed(gang.place("w1"), gang.open("w1", "w2").round_id, ["w2"])
    gangs.leave(gang.place("w2"), gang.open("w1", "w2").round_id, end=KILLED | {"reason": "infra_lost"})
    are_open: list[bool] = []
    for _ in range(3):
        gangs.leave(gang.place("w2"), gang.open("w1", "w2").round_id, end=FULL)
        are_open.append(gang.member("w2").is_open)

    assert are_open == [True, True, False]


@pytest.mark.parametrize("end", [KILLED | {"reason": "drained"}, KILLED | {"reason": "infra_lost"}])
def test_drained_or_disconnected_member_is_not_cordoned(gang: Gang, end: dict[str, Any]) -> None:
    gang.lead("w1")
    for _ in range(4):
        led = gang.open("w1", "w2")
        gangs.leave(gang.place("w2"), led.round_id, end=end)

    assert gang.member("w2").is_open


def test_started_round_clears_missed_joins(gang: Gang) -> None:
    gang.lead("w1")
    first = gang.open("w1", "w2")
    gangs.missed(gang.place("w1"), first.round_id, ["w2"])
    before = gang.member("w2").num_missed
    second = gang.open("w1", "w2")
    gangs.join(gang.place("w2"), second.round_id)

    gang.start("w1", second)

    assert (before, gang.member("w2").num_missed) == (1, 0)


@pytest.mark.parametrize("hours", [1, -1])
def test_member_liveness_survives_a_database_clock_change(gang: Gang, clock: Clock, hours: int) -> None:
    own = [0.0]
    liveness = LivenessTracker(silent_seconds=SILENT, clock=lambda: own[0])
    gang.lead("w1")
    led = gang.open("w1", "w2")
    place = replace(gang.place("w1"), heard=liveness)
    for _ in range(2):
        clock.advance(10)
        gang.beat("w1", "w2")
        gangs.progress(place, led.round_id)
    clock.advance(hours * 3600)

    at_once = gangs.progress(place, led.round_id).lost
    own[0] += SILENT / 2
    gang.beat("w1")
    in_time = gangs.progress(place, led.round_id).lost
    own[0] += SILENT / 2
    gang.beat("w1")
    later = gangs.progress(place, led.round_id).lost

    assert (at_once, in_time, later) == ((), (), ("w2",))


@NEEDS_BOOTTIME
def test_member_that_was_lost_during_a_suspension_is_not_live_afterwards(suspension: Suspension) -> None:
    liveness = LivenessTracker(silent_seconds=SILENT)
    liveness.is_live("w2", 1.0, now=1.0)
    before = liveness.is_live("w2", 2.0, now=2.0)

    suspension.add(SILENT)

    assert (before, liveness.is_live("w2", 2.0, now=2.0 + SILENT)) == (True, False)


@pytest.mark.both_databases
def test_only_one_of_several_candidates_leads(gang: Gang) -> None:
    gang.enter("w3", "w4")
    names = ["w1", "w2", "w3", "w4"]

    with ThreadPoolExecutor(4) as pool:
        leads = list(pool.map(gang.lead, names))

    assert leads.count(True) == 1
    leader = names[leads.index(True)]
    assert all(gang.lead(name) == (name == leader) for name in names)


def test_explanation_reports_how_many_gang_workers_are_available(gang: Gang, clock: Clock) -> None:
    job = gang.world.queued()
    gang.lead("w1")
    with_both = explain(gang.world.db, **gang.world.of(job.id))
    clock.advance(SILENT + 1)
    gang.beat("w1")

    alone = explain(gang.world.db, **gang.world.of(job.id))

    assert with_both["explanation"].startswith("It is first in the queue and waits for a worker with free capacity.")
    assert alone["explanation"] == (
        "It waits for missing workers of a gang (workers that train together). 1 of 2 workers of pair is available."
    )
    assert [one["workers"] for one in alone["gangs"]] == [["w1"]]


NAMES = ("w1", "w2", "w3")
ACTS = st.sampled_from(["lead", "open", "join", "start", "leave", "end", "wait", "die"])


class Course:
    """Actions of three workers, with the conditions that must hold after each."""

    def __init__(self, world: World, clock: Clock) -> None:
        self.gang, self.clock = Gang(world), clock
        self.rounds: dict[str, Round] = {}
        self.joined: dict[str, set[str]] = {}
        self.dead: set[str] = set()
        for name in NAMES:
            self.gang.enter(name, size=3, min_size=3)

    def does(self, act: str, worker_id: str) -> None:
        with contextlib.suppress(NotGathered):
            getattr(self, act)(worker_id)

    def lead(self, worker_id: str) -> None:
        self.gang.lead(worker_id)

    def open(self, worker_id: str) -> None:
        led = self.gang.open(worker_id, *(name for name in NAMES if name != worker_id))
        assert not self.dead
        self.rounds[worker_id], self.joined[led.round_id] = led, {worker_id}

    def join(self, worker_id: str) -> None:
        if (call := self.gang.called(worker_id)) is not None:
            gangs.join(self.gang.place(worker_id), call.round_id)
            self.joined[call.round_id].add(worker_id)

    def leave(self, worker_id: str) -> None:
        if (call := self.gang.called(worker_id)) is not None:
            gangs.leave(self.gang.place(worker_id), call.round_id, end=KILLED)
            self.joined[call.round_id].discard(worker_id)

    def start(self, worker_id: str) -> None:
        if (led := self.rounds.get(worker_id)) is not None:
            self.gang.start(worker_id, led)
            assert self.joined[led.round_id] == set(NAMES)
            assert not self.dead

    def end(self, worker_id: str) -> None:
        if (led := self.rounds.get(worker_id)) is not None:
            gangs.end_round(self.gang.place(worker_id), led.round_id)

    def wait(self, _: str) -> None:
        self.clock.advance(SILENT + 1)
        self.gang.beat(*(name for name in NAMES if name not in self.dead))

    def die(self, worker_id: str) -> None:
        workers.declare_lost(self.gang.world.db, worker_id)
        self.dead.add(worker_id)


@given(st.lists(st.tuples(ACTS, st.sampled_from(NAMES)), max_size=25))
@example([("lead", "w1"), ("open", "w1"), ("join", "w2"), ("join", "w3"), ("start", "w1")])
@example([("lead", "w1"), ("open", "w1"), ("join", "w2"), ("join", "w3"), ("die", "w3"), ("start", "w1")])
@example([("lead", "w1"), ("open", "w1"), ("join", "w2"), ("die", "w1"), ("lead", "w2"), ("start", "w1")])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_started_round_has_all_members_after_any_sequence_of_actions(
    world: World, clock: Clock, acts: list[tuple[str, str]]
) -> None:
    course = Course(world, clock)
    for act, worker_id in acts:
        course.does(act, worker_id)


def enter(world: World, worker_id: str, *, gigabytes: float = 1000, size: int = 2, min_size: int = 2) -> GangMember:
    """Add a worker to the gang `pair`. Alone, its devices would shard base models."""
    devices = [{"kind": "cpu", "num_processes": 2, "strategy": "auto", "gang": "pair"}]
    about: dict[str, Any] = {"host": "here", "pid": 1, "devices": devices, "version": "1"}
    workers.register_worker(world.db, worker_id=worker_id, memory_bytes=int(gigabytes * GB), **about)
    place = GangMember(db=world.db, worker_id=worker_id, gang="pair", silent_seconds=SILENT)
    gangs.enter(place, size=size, min_size=min_size, kind="cpu", num_processes=2, free_bytes=GB)
    return place


def explanation_of(world: World, job: Job) -> str:
    return explanation.explain(world.db, project_id=job.project_id, job_id=job.id)["explanation"]


@pytest.mark.parametrize("has_leader", [True, False])
def test_explanation_names_the_smallest_gang_worker_for_a_large_job(world: World, has_leader: bool) -> None:
    leader = enter(world, "w1", gigabytes=100)
    enter(world, "w2", gigabytes=17)
    if has_leader:
        gangs.lead(leader)
    job = queued_large(world)

    assert explanation_of(world, job).startswith(
        "The job needs about 20.0 GB per device, but the smallest worker of gang pair, w2, has 17.0 GB. It would fit"
    )


def test_plan_uses_the_smallest_gang_worker_and_does_not_shard(world: World) -> None:
    gangs.lead(enter(world, "w1", gigabytes=100))
    enter(world, "w2", gigabytes=17)
    world.worker("w3", 18 * GB)
    queued_large(world)

    refused = found(ready(world, model="large", precision="bfloat16"))
    enter(world, "w2", gigabytes=30)
    fits = found(ready(world, model="large", precision="bfloat16", lora={"rank": 4}))

    assert refused["devices"]["workers_that_fit"] == []
    (worker,) = fits["devices"]["workers_that_fit"]
    assert (worker["worker_id"], worker["memory_bytes"], worker["strategy"]) == ("w1", 30 * GB, "replicated")


def test_smaller_workers_beyond_the_gang_size_do_not_limit_a_job(world: World) -> None:
    gangs.lead(enter(world, "w1", gigabytes=100))
    enter(world, "w2", gigabytes=17)
    enter(world, "w3", gigabytes=50)
    job = queued_large(world)

    assert "The job needs about" not in explanation_of(world, job)


def test_gang_that_trains_with_fewer_workers_waits_for_capacity_only(world: World, clock: Clock) -> None:
    gangs.lead(enter(world, "w1", min_size=1))
    job = world.queued()
    before = explanation_of(world, job)

    workers.worker_beat(world.db, "w1", resident_base=None, trainer_id="trainer-1", report=None)

    assert before.startswith("It waits for missing workers of a gang (")
    assert explanation_of(world, job).startswith("It is first in the queue and waits for a worker with free capacity.")
