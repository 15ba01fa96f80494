"""The preemption rule: the choice of the jobs to preempt for an urgent one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from catalog.scheduling.ordering import QueueEntry, order
from catalog.scheduling.preemption import Holder, Preemption, Training, choose, level_if_it_left, pressing
from catalog.scheduling.snapshot import Candidate, Policy, Share, WorkerService
from tests.catalog.scheduling.test_fairness_over_days import candidate

POLICY = Policy()
NOW = 10_000.0
KEY = "b:bfloat16:causal-lm"
URGENT = candidate("urgent", NOW - 60, priority=0, own_bytes=10)


def training(job_id: str, *, effective_priority: int = 1, trained: float = 1000, **more: Any) -> Training:
    fields: dict[str, Any] = {"own_bytes": 10, "num_packmates": 1, "project_id": "p", "effective_level": 0.0, **more}
    fields |= {"job_id": job_id, "claim_id": f"claim of {job_id}"}
    return Training(effective_priority=effective_priority, began_at=NOW - trained, **fields)


def holder(*jobs: Training, worker_id: str = "w1", key: str = KEY, memory_bytes: int = 100, **more: Any) -> Holder:
    service = WorkerService(at={}, memory_bytes=memory_bytes)
    return Holder(worker_id=worker_id, pack_key=key, service=service, jobs=jobs, **more)


def entry_of(job: Candidate, shares: dict[str, Share] | None = None) -> QueueEntry:
    (entry,) = order([job], NOW, shares=shares)
    return entry


def leaving(*holders: Holder, job: Any = URGENT, policy: Policy = POLICY) -> list[str] | None:
    chosen = choose(entry_of(job), holders, now=NOW, policy=policy)
    return None if chosen is None else sorted(victim.job_id for victim in chosen.victims)


def test_lowest_class_and_latest_start_are_preempted_first() -> None:
    assert leaving(holder(training("normal"), training("batch", effective_priority=2))) == ["batch"]
    assert leaving(holder(training("old", trained=2000), training("young", trained=400))) == ["young"]


def test_no_more_jobs_are_preempted_than_needed() -> None:
    small, large = training("small", own_bytes=4, trained=400), training("large", own_bytes=10)

    assert leaving(holder(small, large, training("other"))) == ["large"]
    assert leaving(holder(small, training("half", own_bytes=6))) == ["half", "small"]
    assert leaving(holder(small, large, memory_bytes_free=7)) == ["small"]


def test_equal_new_or_often_preempted_jobs_are_spared() -> None:
    spared = [
        training("urgent too", effective_priority=0),
        training("risen", effective_priority=-1),
        training("young", trained=POLICY.spared_seconds - 1),
        training("weary", num_preemptions=POLICY.max_preemptions),
    ]

    assert [leaving(holder(each)) for each in spared] == [None] * 4
    assert leaving(holder(*spared, training("batch", effective_priority=2))) == ["batch"]


def test_no_preemption_if_capacity_is_about_to_become_free() -> None:
    ending = training("ending", seconds_left=POLICY.preempt_after_seconds)

    assert leaving(holder(ending, training("batch", effective_priority=2))) == []
    assert leaving(holder(training("asked", is_leaving=True), training("batch", effective_priority=2))) == []
    assert leaving(holder(training("batch", effective_priority=2), places=1, memory_bytes_free=10)) == []


def test_another_base_preempts_the_whole_trainer_or_nothing() -> None:
    batch, normal, high = (
        training("batch", effective_priority=2),
        training("normal"),
        training("high", effective_priority=0),
    )

    assert leaving(holder(batch, normal, key="c:bfloat16:causal-lm")) == ["batch", "normal"]
    assert leaving(holder(batch, high, key="c:bfloat16:causal-lm")) is None
    assert leaving(holder(batch, has_suspect=True)) == ["batch"]
    assert leaving(holder(batch), job=replace(URGENT, is_suspect=True)) == ["batch"]


def test_worker_too_small_for_the_job_is_skipped() -> None:
    assert leaving(holder(training("batch"), memory_bytes=19)) is None
    assert leaving(holder(training("batch"), memory_bytes=20)) == ["batch"]


def test_worker_with_the_lowest_victims_and_least_lost_work_is_chosen() -> None:
    normal = holder(training("normal", trained=301))
    batch = holder(training("batch", effective_priority=2), worker_id="w2")
    younger = holder(training("younger", effective_priority=2, trained=500), worker_id="w3")

    assert leaving(normal, batch) == ["batch"]
    assert leaving(normal, batch, younger) == ["younger"]


def test_foreign_job_is_preempted_only_if_it_would_queue_behind() -> None:
    def victim(device_seconds: float) -> Training:
        share = Share(device_seconds=device_seconds, devices_in_use=1)
        level = level_if_it_left(share, priority=1, devices_left=1, policy=POLICY)
        return training("foreign", project_id="q", effective_level=level)

    entry = entry_of(URGENT, {"p": Share(device_seconds=10_000)})
    least = 10_000 - POLICY.class_step_seconds

    found = [choose(entry, [holder(victim(had))], now=NOW, policy=POLICY) for had in (least, least + 1)]

    assert [chosen is not None for chosen in found] == [False, True]
    own = choose(entry, [holder(training("own", effective_level=-1e9))], now=NOW, policy=POLICY)
    assert own is not None


def test_no_preemption_while_a_fitting_job_of_another_project_is_ahead() -> None:
    shares = {"p": Share(device_seconds=10_000)}
    small, large = candidate("small", 0, "q"), candidate("large", 0, "q", own_bytes=500)

    def chosen(*others: Candidate) -> bool:
        entries = order([URGENT, *others], NOW, shares=shares)
        ((entry, ahead),) = pressing(entries, now=NOW, policy=POLICY)
        batch = training("batch", effective_priority=2)
        return choose(entry, [holder(batch)], ahead=ahead, now=NOW, policy=POLICY) is not None

    assert [chosen(), chosen(large), chosen(small)] == [True, True, False]
    assert chosen(replace(small, project_id="p", place=0)), "jobs of the same project are ordered by class"
    assert pressing(order([replace(URGENT, queued_at=NOW)], NOW), now=NOW, policy=POLICY) == []


TRAININGS = st.builds(
    training,
    job_id=st.uuids().map(str),
    effective_priority=st.integers(-1, 2),
    trained=st.floats(0, 1e5),
    own_bytes=st.integers(1, 20),
    num_packmates=st.integers(1, 8),
    num_preemptions=st.integers(0, 4),
    is_leaving=st.booleans(),
)
HOLDERS = st.builds(
    lambda jobs, **more: holder(*jobs, **more),
    jobs=st.lists(TRAININGS, min_size=1, max_size=6, unique_by=lambda each: each.job_id),
    worker_id=st.sampled_from(["w1", "w2", "w3"]),
    key=st.sampled_from([KEY, "c:bfloat16:causal-lm"]),
    memory_bytes_free=st.integers(0, 15),
    places=st.integers(0, 1),
)


@given(st.lists(HOLDERS, max_size=3))
def test_victims_may_be_preempted_and_are_all_needed(holders: list[Holder]) -> None:
    chosen = choose(entry_of(URGENT), holders, now=NOW, policy=POLICY)

    if chosen is None or not chosen.victims:
        return
    for victim in chosen.victims:
        assert victim.effective_priority > URGENT.priority
        assert NOW - victim.began_at >= POLICY.spared_seconds
        assert victim.num_preemptions < POLICY.max_preemptions
        assert not victim.is_leaving
    if chosen.makes == "a place":
        assert not any(_is_enough(chosen, without, holders) for without in chosen.victims)


def _is_enough(chosen: Preemption, without: Training, holders: list[Holder]) -> bool:
    """Return whether the urgent job would still fit if this victim stayed."""
    options = [each for each in holders if each.worker_id == chosen.worker_id and without in each.jobs]
    fewer = [victim for victim in chosen.victims if victim is not without]
    for each in options:
        gone = [job for job in each.jobs if job.is_leaving]
        free = each.memory_bytes_free + sum(job.own_bytes for job in [*fewer, *gone])
        if free >= URGENT.own_bytes and (each.places or fewer or gone):
            return True
    return False
