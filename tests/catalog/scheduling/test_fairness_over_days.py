"""The order of the queue by project, class and age."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from catalog.scheduling.ordering import order
from catalog.scheduling.snapshot import Candidate, Share


def candidate(job_id: str, created_at: float = 0, project_id: str = "p", priority: int = 1, **more: Any) -> Candidate:
    fields: dict[str, Any] = {
        "base_digest": "b",
        "pack_key": "b:bfloat16:causal-lm",
        "own_bytes": 1,
        "trainer_bytes": 10,
    }
    fields["queued_at"] = created_at
    return Candidate(job_id=job_id, place=created_at, project_id=project_id, priority=priority, **{**fields, **more})


def ids(candidates: list[Candidate], now: float = 100, **running: int) -> list[str]:
    shares = {project_id: Share(num_running=number, devices_in_use=number) for project_id, number in running.items()}
    return [entry.candidate.job_id for entry in order(candidates, now, shares=shares)]


def test_priority_comes_before_age() -> None:
    assert ids([candidate("old"), candidate("new", 5), candidate("urgent", 9, priority=0)]) == ["urgent", "old", "new"]


def test_projects_alternate_regardless_of_their_number_of_jobs() -> None:
    many = [candidate(f"a{i}", i, "a") for i in range(4)]
    few = [candidate(f"b{i}", 10 + i, "b") for i in range(2)]

    assert ids(many + few) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_running_jobs_of_a_project_count() -> None:
    assert ids([candidate("a", 0, "a"), candidate("b", 9, "b")], a=2) == ["b", "a"]


def test_queue_entry_explains_its_position() -> None:
    entry = order([candidate("a", 40)], 100)[0]

    assert (entry.position, entry.waited_seconds) == (1, 60)
    assert entry.reason == "priority normal; no other job of its project runs or waits before it; waited 60 s"


WAITING = st.builds(
    candidate,
    job_id=st.uuids().map(str),
    created_at=st.integers(0, 50),
    project_id=st.sampled_from("abc"),
    priority=st.integers(0, 2),
)


@given(st.lists(WAITING, max_size=20, unique_by=lambda c: c.job_id), st.randoms())
def test_order_is_total_and_independent_of_the_listing(jobs: list[Candidate], random: Any) -> None:
    shuffled = list(jobs)
    random.shuffle(shuffled)

    assert ids(jobs) == ids(shuffled)
    entries = order(jobs, 100)
    assert [entry.position for entry in entries] == list(range(1, len(jobs) + 1))
    assert [entry.candidate.priority for entry in entries] == sorted(c.priority for c in jobs)


@given(st.lists(WAITING, max_size=20, unique_by=lambda c: c.job_id))
def test_age_decides_within_a_project_and_class(jobs: list[Candidate]) -> None:
    entries = order(jobs, 100)

    for entry, later in pairwise(entries):
        same = (entry.candidate.project_id, entry.candidate.priority) == (
            later.candidate.project_id,
            later.candidate.priority,
        )
        assert not same or entry.candidate.place <= later.candidate.place
