"""The scheduling decision: a pure function of the queue and a worker's capacity, with a trace of its inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from catalog.scheduling.scheduler import Decision, Join, Start, Wait, decide
from catalog.scheduling.snapshot import PATIENCE_SECONDS, USUAL, Candidate, Capacity, Policy, QueueSnapshot, Share
from tests.catalog.resources.test_pack_key import other
from tests.catalog.scheduling.test_fairness_over_days import candidate

LIVE = "b:bfloat16:causal-lm"


def snapshot(*candidates: Candidate, now: float = 10, max_jobs: int = 4, **given: Any) -> QueueSnapshot:
    capacity = Capacity(max_jobs=max_jobs, memory_bytes_free=100)
    values: dict[str, Any] = {"shares": {}, "served": (), "capacity": capacity, "worker_bytes": 100, **given}
    return QueueSnapshot(now=now, candidates=candidates, **values)


def chosen(decision: Decision) -> list[str]:
    return [choice.entry.candidate.job_id for choice in decision.action.choices]


def test_new_trainer_starts_with_the_first_job_and_matching_ones() -> None:
    decision = decide(snapshot(other("x", 1), candidate("b", 2), candidate("a")), USUAL)

    assert isinstance(decision.action, Start)
    assert chosen(decision) == ["a", "b"]


def test_joining_stops_when_another_job_has_waited_too_long() -> None:
    waiting = (candidate("a"), other("x", 1), candidate("b", 2))

    soon, late = (decide(snapshot(*waiting, live_key=LIVE, now=now), USUAL) for now in (10, PATIENCE_SECONDS + 1))

    assert isinstance(soon.action, Join)
    assert [chosen(decision) for decision in (soon, late)] == [["a", "b"], ["a"]]
    assert [decision.trace["is_draining_for_other_base"] for decision in (soon, late)] == [False, True]
    stopped = decide(snapshot(other("x"), candidate("a", 1), live_key=LIVE, now=PATIENCE_SECONDS), USUAL)
    assert stopped.action == Wait(reason="a job that can't join has waited too long, so the trainer drains")


def test_freed_capacity_starts_the_preempting_job_not_a_resident_base() -> None:
    preempting, resident = (
        replace(other("preempting", priority=0), preemption_requested_at=30.0),
        candidate("resident", 40, priority=0),
    )
    emptied = Capacity(max_jobs=4, memory_bytes_free=100, resident_key=LIVE)
    patient = replace(USUAL, patience_seconds=1000)
    over = 30 + USUAL.ask_again_seconds

    def first(policy: Policy, now: float) -> list[str]:
        return chosen(decide(snapshot(preempting, resident, capacity=emptied, now=now), policy))

    assert first(USUAL, 45) == ["preempting"]
    assert [first(patient, now) for now in (over - 1, over)] == [["preempting"], ["resident"]]


def test_trace_distinguishes_preemption_from_draining() -> None:
    urgent, joins = other("urgent", 2, priority=0), candidate("joins", 1, priority=0)
    preempting = replace(urgent, preemption_requested_at=5.0)
    late = PATIENCE_SECONDS + 2

    def values(job: Candidate, now: float) -> tuple[bool, bool]:
        decision = decide(snapshot(joins, job, live_key=LIVE, now=now), USUAL)
        why = decision.why(decision.action.choices[0])
        return why["awaits_preemption"], why["is_draining_for_other_base"]

    assert [values(urgent, 10), values(preempting, 10)] == [(False, False), (True, False)]
    assert [values(urgent, late), values(preempting, late)] == [(False, True), (True, True)]
    stopped = decide(snapshot(preempting, candidate("a", 3), live_key=LIVE), USUAL)
    assert stopped.action == Wait(reason="jobs are being preempted for another job, and no job joins before it")


def test_waiting_has_a_reason() -> None:
    reasons = [
        decide(given, USUAL).action
        for given in (
            snapshot(),
            snapshot(candidate("large", own_bytes=1000)),
            snapshot(candidate("a"), live_key=LIVE, has_suspect=True),
        )
    ]

    assert reasons == [
        Wait(reason="no job is queued"),
        Wait(reason="no queued job fits"),
        Wait(reason="a job in the trainer failed twice and trains alone"),
    ]


def test_why_contains_all_inputs_but_nothing_of_other_projects() -> None:
    shares = {"ours": Share(num_running=1), "theirs": Share()}
    mine, foreign = candidate("mine", 0, "ours"), candidate("foreign", 0, "theirs")
    decision = decide(snapshot(mine, foreign, shares=shares), USUAL)

    why = decision.why(decision.action.choices[1])

    assert (why["role"], why["position"], why["looked_at"]) == ("packmate", 2, 2)
    assert why["position_reason"].startswith("priority normal; 1 of its project's jobs runs")
    assert (why["share"]["num_projects"], why["share"]["projects_ahead"], why["share"]["num_running"]) == (2, 0, 1)
    assert why["capacity"] == {"max_jobs": 4, "memory_bytes_free": 100, "num_jobs": 0}
    assert why["policy"]["patience_seconds"] == PATIENCE_SECONDS
    assert "theirs" not in str(why)
    assert "foreign" not in str(why)


WAITING = st.builds(
    candidate,
    job_id=st.uuids().map(str),
    created_at=st.integers(0, 90),
    project_id=st.sampled_from("abc"),
    priority=st.integers(0, 2),
    own_bytes=st.integers(1, 60),
    pack_key=st.sampled_from([LIVE, "c:bfloat16:causal-lm"]),
)
QUEUE = st.lists(WAITING, max_size=12, unique_by=lambda c: c.job_id)


@given(QUEUE, st.randoms(), st.sampled_from([None, LIVE]))
def test_decision_does_not_depend_on_the_listing_order(
    jobs: list[Candidate], random: Any, live_key: str | None
) -> None:
    shuffled = [*jobs, *jobs]
    random.shuffle(shuffled)

    assert decide(snapshot(*jobs, now=100, live_key=live_key), USUAL) == decide(
        snapshot(*shuffled, now=100, live_key=live_key), USUAL
    )


def lead_of(whole: QueueSnapshot) -> Candidate | None:
    """Return the first job that the decision chooses."""
    choices = decide(whole, USUAL).action.choices
    return choices[0].entry.candidate if choices else None


@given(QUEUE, QUEUE)
def test_packmates_do_not_affect_the_anchor(jobs: list[Candidate], more: list[Candidate]) -> None:
    """The anchor is the same with other jobs behind it and alone."""
    whole = snapshot(*jobs, now=100)
    lead = lead_of(whole)
    behind = [replace(job, place=200, queued_at=200.0, priority=2) for job in more]

    if lead is not None:
        assert chosen(decide(replace(whole, candidates=(*jobs, *behind)), USUAL))[0] == lead.job_id
        assert chosen(decide(snapshot(lead, now=100), USUAL)) == [lead.job_id]


@given(QUEUE)
def test_chosen_jobs_fit(jobs: list[Candidate]) -> None:
    capacity = Capacity(max_jobs=4, memory_bytes_free=100)

    taken = [choice.entry.candidate for choice in decide(snapshot(*jobs, now=100), USUAL).action.choices]

    assert len(taken) <= 4
    assert sum(capacity.own(job) for job in taken) + (taken[0].trainer_bytes if taken else 0) <= 100


@given(QUEUE, st.integers(1, 4))
def test_first_jobs_per_group_suffice_to_choose_the_anchor(jobs: list[Candidate], max_jobs: int) -> None:
    """The part that is read from the database is sufficient."""
    fitting = [job for job in jobs if Capacity(max_jobs=1, memory_bytes_free=100).alone(job) <= 100]
    whole = snapshot(*fitting, now=100, max_jobs=max_jobs)
    part = replace(whole, candidates=tuple(_firsts(fitting, 1)))
    lead = lead_of(part)
    alike = [job for job in fitting if lead and job.pack_key == lead.pack_key]
    part = replace(part, candidates=(*part.candidates, *_firsts(alike, max_jobs)))

    assert chosen(decide(part, USUAL))[:1] == chosen(decide(whole, USUAL))[:1]


def _firsts(jobs: list[Candidate], per_group: int) -> list[Candidate]:
    seen: dict[tuple[str, int], list[Candidate]] = {}
    for job in sorted(jobs, key=lambda each: (each.place, each.job_id)):
        seen.setdefault((job.project_id, job.priority), []).append(job)
    return [job for group in seen.values() for job in group[:per_group]]
