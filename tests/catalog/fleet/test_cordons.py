"""Cordoned workers claim nothing: cordons by operators, and automatic ones after several jobs failed in a row."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from catalog.caller import Caller
from catalog.fleet import cordons, workers
from catalog.fleet.cordons import Ended, failed_running, place
from catalog.jobs import explanation
from catalog.queue import claims
from catalog.queue import claims as queue_claims
from catalog.scheduling.snapshot import Capacity
from catalog.states import EndReason, JobState
from catalog.tables.fleet import Worker
from catalog.tables.jobs import Job
from catalog.tables.tenancy import AuditEvent
from tests.catalog import plan_data
from tests.catalog.world import World, begin_plan, begin_preparation
from worker.node.devices import Device, cpu

ALONE = Capacity(max_jobs=1, memory_bytes_free=10**12)


def row(world: World, worker_id: str = "w1") -> Worker:
    with world.db.read() as session:
        return session.get_one(Worker, worker_id)


def fail(
    world: World,
    *,
    worker_id: str = "w1",
    trainer: str,
    reason: EndReason = EndReason.TRAINER_CRASHED,
    caller: Caller | None = None,
) -> str:
    """Run one more job alone in a trainer of that name and let it fail. Returns the job's id."""
    training_file = world.file(caller=caller)
    job = world.submit(caller=caller, training_file=training_file, seed=len(trainer))
    world.prepare_all()
    (claim,) = [one for one in world.claim(worker_id, trainer_id=trainer) if one.job.id == job.id]
    queue_claims.end(world.db, claim.claim_id, reason=reason, detail=f"Trainer {trainer} ended.")
    return job.id


def why(world: World, job_id: str) -> dict[str, Any]:
    return explanation.explain(world.db, **world.of(job_id))


def messages(world: World, job_id: str) -> list[str]:
    return [event.message for event in world.events(job_id)]


def test_cordoned_worker_finishes_its_jobs_and_claims_nothing(world: World) -> None:
    world.worker()
    held = world.running()

    cordons.cordon(world.db, "w1", reason="Its fan is loud.")

    waiting, unprepared = world.queued(), world.submit()
    plan_data.ready(world)
    assert world.claim() == []
    assert world.claim(pack_key=held.job.pack_key, trainer_id="trainer-w1") == []
    assert begin_preparation(world.db, "w1") is None
    assert begin_plan(world.db, "w1") is None
    assert not workers.worker_beat(world.db, "w1", resident_base=None, trainer_id=None, report=None).drain
    assert not world.beat(held.claim_id)[held.claim_id].stale
    world.complete(held.claim_id)
    assert world.job(held.job.id).state == JobState.SUCCEEDED

    cordons.uncordon(world.db, "w1")

    assert [claim.job.id for claim in world.claim()] == [waiting.id]
    prepared = begin_preparation(world.db, "w1")
    assert prepared is not None
    assert prepared.task.subject == unprepared.id


def test_job_events_report_cordons_of_its_worker(world: World) -> None:
    world.worker()
    held = world.running()

    for act in (cordons.cordon, cordons.uncordon, cordons.drain):
        act(world.db, "w1")

    assert messages(world, held.job.id)[-3:] == [
        "Worker w1 was cordoned. It finishes its current jobs, including this one.",
        "Worker w1 accepts new jobs again.",
        "Worker w1 is draining. It saves a checkpoint, and the job continues on another worker. The attempt does not "
        "count as failed.",
    ]


def test_explanation_of_a_queued_job_mentions_the_cordon(world: World) -> None:
    world.worker()
    held = world.running()
    waiting, unprepared = world.queued(), world.submit()
    workers.worker_beat(world.db, "w1", resident_base=held.job.base_digest, trainer_id="t", report=None)

    cordons.cordon(world.db, "w1", reason="Its fan is loud.")

    only = (
        "Worker w1 is cordoned: Its fan is loud. It is the only running worker. "
        "An operator can make one available again: lorry workers uncordon ID."
    )
    assert why(world, waiting.id)["explanation"] == only
    assert why(world, unprepared.id)["explanation"] == f"Its files wait for tokenization. {only}"
    assert why(world, waiting.id)["closed_workers"] == [
        {"worker_id": "w1", "by": "operator", "reason": "Its fan is loud."}
    ]
    assert "That worker is cordoned: it finishes this job" in why(world, held.job.id)["explanation"]

    world.worker("w2")

    explained = why(world, waiting.id)["explanation"]
    assert explained.startswith("It is first in the queue and waits for a worker with free capacity.")
    assert explained.endswith("accepts no new jobs. Worker w1 is cordoned: Its fan is loud.")
    cordons.drain(world.db, "w2")
    explained = why(world, waiting.id)["explanation"]
    assert "None of the 2 running workers accepts new jobs" in explained
    assert "Worker w1 is cordoned: Its fan is loud." in explained or "Worker w2 is cordoned" in explained


def test_successor_of_a_cordoned_worker_is_cordoned(world: World) -> None:
    world.worker("first")
    world.worker("neighbor")
    cordons.cordon(world.db, "first", reason="Its fan is loud.")

    world.worker("comes while the first is there")
    world.worker("gpu", kind="cuda")
    workers.end_worker(world.db, "first")
    world.worker("second")

    cordoned = {worker.id for worker in workers.list_workers(world.db) if worker.cordon is not None}
    assert cordoned == {"second"}
    cordons.uncordon(world.db, "second")
    workers.end_worker(world.db, "second")
    world.worker("third")
    assert row(world, "third").cordon is None


def test_place_of_a_device_survives_a_json_round_trip() -> None:
    device = (
        cpu(cores=(0, 1)).as_json(),
        cpu().as_json(),
        Device(kind="cuda", indices=(2, 3), name="GPU", memory_bytes=1).as_json(),
    )

    assert place(json.loads(json.dumps(device))) == place(device)
    assert len({repr(place([one])) for one in device}) == 3


def test_number_of_cordons_at_a_shared_place_is_preserved(world: World) -> None:
    for worker_id in ("w1", "w2", "w3"):
        world.worker(worker_id)
    cordons.cordon(world.db, "w2", reason="Its fan is loud.")
    for worker_id in ("w2", "w1", "w3"):
        world.clock.advance(1)
        workers.end_worker(world.db, worker_id)

    for worker_id in ("w4", "w5", "w6"):
        world.worker(worker_id)

    cordoned = [one.id for one in workers.list_workers(world.db) if one.cordon is not None]
    assert cordoned == ["w4"]
    cordons.uncordon(world.db, "w4")
    workers.end_worker(world.db, "w4")
    world.worker("w7")
    assert row(world, "w7").cordon is None


def test_successor_is_cordoned_once_the_killed_worker_counts_as_lost(world: World) -> None:
    world.worker("old")
    cordons.cordon(world.db, "old", reason="Its fan is loud.")
    world.clock.advance(1)
    world.worker("new")
    world.worker("gpu", kind="cuda")

    def is_cordoned_after(seconds: float) -> bool:
        world.clock.advance(seconds)
        for worker_id in ("new", "gpu"):
            workers.worker_beat(world.db, worker_id, resident_base=None, trainer_id=None, report=None)
        return row(world, "new").cordon is not None

    assert not is_cordoned_after(workers.SILENT_SECONDS - 10)
    assert is_cordoned_after(20)
    assert row(world, "gpu").cordon is None
    cordons.uncordon(world.db, "new")
    assert not is_cordoned_after(10)


def test_successor_of_a_drained_worker_claims_nothing_until_uncordoned(world: World) -> None:
    world.worker("old")
    cordons.drain(world.db, "old")
    workers.end_worker(world.db, "old")

    world.worker("new")

    world.queued()
    assert not row(world, "new").drain_requested
    assert world.claim("new") == []
    cordons.uncordon(world.db, "new")
    assert len(world.claim("new")) == 1


def test_node_that_fails_three_jobs_in_a_row_is_cordoned_with_evidence(world: World) -> None:
    world.worker()
    failed = [fail(world, trainer=name) for name in ("t1", "t2")]
    assert row(world).cordon is None

    failed.append(fail(world, trainer="t3", reason=EndReason.NODE_FAILED))

    found = row(world).cordon
    assert found is not None
    assert (found["by"], found["reason"]) == ("service", cordons.OF_THE_SERVICE)
    assert [(one["job_id"], one["trainer_id"], one["reason"]) for one in found["evidence"]] == [
        (failed[2], "t3", "node_failed"),
        (failed[1], "t2", "trainer_crashed"),
        (failed[0], "t1", "trainer_crashed"),
    ]
    assert found["evidence"][0]["detail"] == "Trainer t3 ended."
    with world.db.read() as session:
        noted = session.scalars(select(AuditEvent).order_by(AuditEvent.seq.desc())).first()
    assert noted is not None
    assert (noted.type, noted.object_id, noted.actor_type) == ("worker.cordoned", "w1", "server")
    assert sorted(noted.details["jobs"]) == sorted(failed)
    assert all("failed there in a row" in messages(world, job_id)[-1] for job_id in failed)
    world.clock.advance(60)
    world.beat(worker_id="w1")
    assert world.claim() == []
    world.worker("w2")
    assert len(world.claim("w2")) == 3  # the jobs continue on the other worker


def test_failures_before_an_uncordon_do_not_count(world: World) -> None:
    world.worker()
    for name in ("t1", "t2", "t3"):
        fail(world, trainer=name)
    cordons.uncordon(world.db, "w1")

    fail(world, trainer="t4")
    fail(world, trainer="t5")

    assert row(world).cordon is None
    fail(world, trainer="t6")
    assert row(world).cordon is not None


def test_success_between_failures_clears_a_node(world: World) -> None:
    world.worker()
    fail(world, trainer="t1")
    fail(world, trainer="t2")
    world.complete(world.running().claim_id)

    fail(world, trainer="t3")

    assert row(world).cordon is None


def test_poison_job_does_not_cordon_the_node(world: World) -> None:
    world.worker()
    for _ in range(3):
        world.queued(seed=7)
    for _ in range(2):  # until each job is isolated and trains alone
        for claim in world.claim(trainer_id=f"t{world.clock()}"):
            queue_claims.end(world.db, claim.claim_id, reason=EndReason.TRAINER_CRASHED, detail="")
        world.clock.advance(60)

    (poison,) = world.claim(trainer_id="alone")
    queue_claims.end(world.db, poison.claim_id, reason=EndReason.TRAINER_CRASHED, detail="")

    assert world.job(poison.job.id).state == JobState.FAILED
    assert row(world).cordon is None


def busy_stranger(world: World) -> None:
    """Let a job of another project complete on another worker, so that the service counts as shared."""
    world.worker("w9", host="far")
    world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    world.prepare_all()
    (claim,) = world.claim("w9")
    world.complete(claim.claim_id)


def test_failures_of_one_project_cordon_no_worker_of_a_shared_service(world: World) -> None:
    world.worker()
    busy_stranger(world)

    for name in ("t1", "t2", "t3", "t4", "t5"):
        fail(world, trainer=name)

    assert row(world).cordon is None


def test_failures_of_two_projects_cordon_their_worker(world: World) -> None:
    world.worker()
    fail(world, trainer="t1")
    fail(world, trainer="t2")

    fail(world, trainer="t3", caller=world.stranger)

    assert row(world).cordon is not None


def test_bystanders_of_a_crash_are_no_evidence_against_the_worker(world: World) -> None:
    """Jobs of another project share the trainers of the crashing jobs and end with them."""
    world.worker()
    for number in range(4):
        for caller in (world.caller, world.stranger):
            world.submit(caller=caller, training_file=world.file(caller=caller), seed=number)
        world.prepare_all()
        held = world.claim(trainer_id=f"t{number}")
        is_crash = any(claim.job.project_id == world.caller.project_id for claim in held)
        for claim in held:
            reason = EndReason.TRAINER_CRASHED if is_crash else EndReason.DRAINED
            queue_claims.end(world.db, claim.claim_id, reason=reason, detail="")
        world.clock.advance(60)
        world.beat()

    assert row(world).cordon is None


def test_failed_jobs_that_succeed_elsewhere_become_evidence(world: World) -> None:
    world.worker()
    busy_stranger(world)
    failed = [fail(world, trainer=name) for name in ("t1", "t2", "t3")]
    world.worker("w2", host="there")
    world.clock.advance(3600)
    for claim in world.claim("w2"):
        world.complete(claim.claim_id, content=claim.job.id)
    assert {world.job(job_id).state for job_id in failed} == {JobState.SUCCEEDED}
    assert row(world).cordon is None

    fail(world, trainer="t4")

    assert row(world).cordon is not None


def test_out_of_memory_jobs_that_fit_elsewhere_are_no_evidence(world: World) -> None:
    world.worker()
    busy_stranger(world)
    for name in ("t1", "t2", "t3"):
        fail(world, trainer=name, reason=EndReason.CUDA_OOM)
    world.worker("w2", host="there")
    world.clock.advance(3600)
    for claim in world.claim("w2"):
        world.complete(claim.claim_id, content=claim.job.id)

    fail(world, trainer="t4", reason=EndReason.CUDA_OOM)

    assert row(world).cordon is None


def test_failed_jobs_cordon_at_most_a_third_of_the_workers(world: World) -> None:
    names = [f"w{number}" for number in range(1, 7)]
    for name in names:
        world.worker(name, host=name)

    for name in names:
        for number in range(3):
            fail(world, worker_id=name, trainer=f"{name}-{number}", caller=world.stranger if number else None)

    assert [name for name in names if row(world, name).cordon] == names[:2]


def test_cordons_before_any_job_count_toward_the_limit_of_a_third(world: World) -> None:
    names = [f"w{number}" for number in range(1, 7)]
    for name in names:
        world.worker(name, host=name)
        with world.db.write() as session:
            session.get_one(Worker, name).cordon = (
                {"by": "service", "reason": cordons.BEFORE_ANY_JOB} if name in names[:2] else None
            )

    for number in range(3):
        fail(world, worker_id="w6", trainer=f"w6-{number}", caller=world.stranger if number else None)

    assert row(world, "w6").cordon is None


def test_lost_workers_are_not_cordoned(world: World) -> None:
    world.worker()
    for name in ("t1", "t2", "t3", "t4"):
        fail(world, trainer=name, reason=EndReason.INFRA_LOST)

    assert row(world).cordon is None


def ends(*packs: str, reason: EndReason = EndReason.TRAINER_CRASHED) -> list[Ended]:
    """Return the ends of the jobs of one trainer per text. The letters of a text are the jobs."""
    return [
        Ended(job_id=job, trainer_id=str(number), reason=reason) for number, pack in enumerate(packs) for job in pack
    ]


@pytest.mark.parametrize(
    ("packs", "is_at_fault"),
    [
        (("a", "b", "c"), True),
        (("a", "b"), False),
        (("a", "a", "a", "b"), False),
        (("a", "a", "a"), False),
        (("pab", "pab", "p"), False),
        (("pab", "pab", "p", "x"), False),
        (("pab", "pab", "p", "x", "y"), True),
        (("abc",), False),
        (("abc", "abc", "a", "b", "c"), True),
    ],
)
def test_node_is_at_fault_when_no_two_jobs_explain_the_failures(packs: tuple[str, ...], is_at_fault: bool) -> None:
    assert bool(failed_running(ends(*packs))) is is_at_fault


PACKS = st.lists(st.sets(st.sampled_from("abcdef"), min_size=1, max_size=4).map("".join), max_size=6)


@given(PACKS, PACKS)
def test_failures_before_a_success_never_count(after: list[str], before: list[str]) -> None:
    done = Ended(job_id="z", trainer_id="good", reason=EndReason.COMPLETED)

    assert failed_running([*ends(*after), done, *ends(*before)]) == failed_running(ends(*after))


@given(PACKS, st.sampled_from("abcdef"), st.sampled_from("abcdef"))
def test_two_failed_jobs_never_cordon_a_node(packs: list[str], one: str, other: str) -> None:
    with_one = [pack + (one if number % 2 else other) for number, pack in enumerate(packs)]

    assert failed_running(ends(*with_one)) == []


def test_failures_before_any_job_started_are_attributed_to_the_node() -> None:
    names = ("first", "second", "third")
    before = [Ended(job_id="a", trainer_id=name, reason=EndReason.NODE_FAILED, culprit=name) for name in names]

    assert failed_running(before) == before
    assert failed_running([*before[:2], *ends("a", "a")]) != []
    assert failed_running([before[0], *ends("b", "b", "b")]) == []


@pytest.mark.parametrize("seconds_each", [1, 15, 200])
def test_bad_node_is_cordoned_before_three_jobs_exhaust_their_attempts(world: World, seconds_each: int) -> None:
    """The time until a trainer dies does not matter, on a worker with room for one job."""
    waiting = [world.queued().id for _ in range(3)]
    world.worker()
    for number in range(100):
        held = world.claim(trainer_id=f"trainer-{number}", capacity=ALONE)
        world.pass_time(seconds_each if held else 1, *(claim.claim_id for claim in held))
        for claim in held:
            queue_claims.end(world.db, claim.claim_id, reason=EndReason.TRAINER_CRASHED, detail="It ended.")
        if row(world).cordon is not None:
            break

    assert row(world).cordon is not None
    assert [world.job(job_id).state for job_id in waiting] == [JobState.QUEUED] * 3


def test_failed_job_is_retried_at_once_when_no_other_job_waits(world: World) -> None:
    world.worker()
    claim = world.running()
    world.pass_time(100, claim.claim_id)

    queue_claims.end(world.db, claim.claim_id, reason=EndReason.TRAINER_CRASHED, detail="It ended.")

    world.pass_time(3)
    assert [again.job.id for again in world.claim()] == [claim.job.id]


def test_failed_job_does_not_yield_to_a_job_too_large_for_its_worker(world: World) -> None:
    world.worker(memory_bytes=10**9)
    claim = world.running()
    too_large = world.queued()
    with world.db.write() as session:
        job = session.get_one(Job, too_large.id)
        job.own_bytes = job.least_bytes = 10**12
    world.pass_time(100, claim.claim_id)

    queue_claims.end(world.db, claim.claim_id, reason=EndReason.TRAINER_CRASHED, detail="It ended.")

    world.pass_time(3)
    assert [again.job.id for again in world.claim()] == [claim.job.id]


OF_GANG = {"gang": {"name": "pair", "workers": ["w1", "w2"]}}


def fail_of_gang(world: World, trainer: str, *, at_fault: str | None, worker_id: str = "w1") -> None:
    """Run one more job alone in a trainer of the gang, which this worker leads, and let it fail."""
    workers.register_trainer(
        world.db, trainer_id=trainer, worker_id=worker_id, base_digest="", pack_key="", report=OF_GANG
    )
    job = world.queued(seed=len(trainer))
    (claim,) = [one for one in world.claim(worker_id, trainer_id=trainer) if one.job.id == job.id]
    crashed = EndReason.TRAINER_CRASHED
    claims.end(world.db, claim.claim_id, reason=crashed, detail="", blamed_worker_id=at_fault)


@pytest.mark.parametrize(("at_fault", "cordoned"), [("w2", {"w2"}), ("w1", {"w1"}), (None, {"w1"}), ("", set[str]())])
def test_gang_member_at_fault_is_cordoned(world: World, at_fault: str | None, cordoned: set[str]) -> None:
    world.worker("w1")
    world.worker("w2")

    for number in range(3):
        fail_of_gang(world, f"trainer-{number}", at_fault=at_fault)

    assert {worker_id for worker_id in ("w1", "w2") if row(world, worker_id).cordon} == cordoned


def test_success_with_a_gang_member_clears_its_failures(world: World) -> None:
    world.worker("w1")
    world.worker("w2")
    for number in range(2):
        fail_of_gang(world, f"trainer-{number}", at_fault="w2")
    workers.register_trainer(world.db, trainer_id="good", worker_id="w1", base_digest="", pack_key="", report=OF_GANG)
    world.clock.advance(3600)
    for claim in world.claim("w1", trainer_id="good"):
        world.complete(claim.claim_id)

    fail_of_gang(world, "trainer-2", at_fault="w2")
    after_one = row(world, "w2").cordon
    for number in (3, 4):
        fail_of_gang(world, f"trainer-{number}", at_fault="w2")

    assert after_one is None
    assert row(world, "w2").cordon is not None
