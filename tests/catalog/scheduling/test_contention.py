"""Concurrent workers claim the same jobs that consecutive claims would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.history import queries
from catalog.queue import charging, claiming
from catalog.scheduling.scheduler import MAX_FALLBACKS, decide, snapshot_without
from catalog.scheduling.snapshot import USUAL, Candidate, Capacity, QueueSnapshot, Share
from catalog.tables.jobs import Job
from catalog.tenancy import projects
from catalog.usage import quotas
from tests.catalog.scheduling.test_fairness_over_days import candidate
from tests.catalog.scheduling.test_scheduler import LIVE, WAITING, snapshot
from tests.catalog.world import WIDE, World

ONE = replace(WIDE, max_jobs=1)
QUEUE = st.lists(WAITING, max_size=20, unique_by=lambda job: job.job_id)
OF_ONE_CLASS = QUEUE.map(lambda queue: [replace(job, priority=1) for job in queue])
HAD = st.fixed_dictionaries(
    {
        name: st.builds(Share, weight=st.sampled_from([1.0, 2.0, 3.0]), device_seconds=st.floats(0, 1e5))
        for name in "abc"
    }
)


def one_after_the_other(whole: QueueSnapshot) -> list[str]:
    """Return the first choices, each decided without the ones before."""
    found: list[str] = []
    while claim_order := decide(snapshot_without(whole, found), USUAL).claim_order:
        found.append(claim_order[0])
    return found


@given(OF_ONE_CLASS, HAD, st.sampled_from([None, LIVE]), st.sampled_from([59, 200]))
def test_claim_order_predicts_consecutive_claims(
    queue: list[Candidate], had: dict[str, Share], resident: str | None, now: int
) -> None:
    """At these times no job, or every job, has waited too long to be passed for a loaded base model."""
    capacity = Capacity(max_jobs=1, memory_bytes_free=100, resident_key=resident)
    whole = snapshot(*queue, shares=had, now=now, capacity=capacity)

    expected = list(decide(whole, USUAL).claim_order)

    assert expected == one_after_the_other(whole)[: len(expected)]
    assert resident is not None or len(expected) == sum(capacity.alone(job) <= 100 for job in queue)


@given(QUEUE, HAD, st.integers(1, 4))
def test_claim_order_stops_where_an_unread_job_might_come_next(
    queue: list[Candidate], had: dict[str, Share], per_group: int
) -> None:
    capacity = Capacity(max_jobs=1, memory_bytes_free=100)
    fitting = [job for job in queue if capacity.alone(job) <= 100]
    read: Counter[tuple[str, int]] = Counter()
    part: list[Candidate] = []
    for job in sorted(fitting, key=lambda each: (each.place, each.job_id)):
        read[job.project_id, job.priority] += 1
        part += [job] if read[job.project_id, job.priority] <= per_group else []
    whole = snapshot(*fitting, shares=had, now=100, capacity=capacity)

    expected = decide(replace(whole, candidates=tuple(part), per_group=per_group), USUAL).claim_order

    assert expected == decide(whole, USUAL).claim_order[: len(expected)]
    assert bool(expected) == bool(fitting)


def test_class_is_not_promoted_again_after_a_claim() -> None:
    now = 3 * USUAL.priority_aging_seconds
    old = [candidate(f"old{number}", number, priority=2) for number in range(2)]
    whole = snapshot(*old, candidate("new0", now - 2), candidate("new1", now - 1), now=now)

    assert one_after_the_other(whole)[:3] == ["old0", "new0", "new1"]


def flooded(world: World, number: int) -> None:
    """Queue `number` jobs of our project, and as many of another project with three times the weight."""
    projects.set_weight(world.db, caller=replace(world.caller, is_operator=True), project="theirs", weight=3)
    world.flood(world.queued(), number - 1)
    job = world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    world.prepare_all()
    world.flood(job, number - 1)


@pytest.mark.both_databases
@pytest.mark.parametrize("max_jobs", [1, 3])
def test_concurrent_claims_share_like_consecutive_ones(world: World, max_jobs: int) -> None:
    flooded(world, 40)
    start, capacity = Barrier(8), replace(WIDE, max_jobs=max_jobs)

    def work(number: int) -> list[list[Job]]:
        world.worker(f"w{number}")
        start.wait(60)
        each = (world.claim(f"w{number}", capacity, trainer_id=f"t{number}-{turn}") for turn in range(3))
        return [[claim.job for claim in some] for some in each]

    with ThreadPoolExecutor(8) as pool:
        packs = [pack for mine in pool.map(work, range(8)) for pack in mine]

    got = [job for pack in packs for job in pack]
    assert len({job.id for job in got}) == len(got)
    assert min(map(len, packs)) > 0
    if max_jobs == 1:
        of_strangers = sum(job.project_id == world.stranger.project_id for job in got)
        assert of_strangers == 18


@pytest.mark.both_databases
def test_decision_reads_one_state_of_the_database(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker claims a job after this worker has read the shares and before it reads the queue."""
    flooded(world, 2)
    world.worker("first")
    world.worker("second")
    claimed: list[Job] = []
    read_shares = charging.shares_of_waiting

    def read_shares_and_claim(*args: Any, **kwargs: Any) -> Any:
        shares = read_shares(*args, **kwargs)
        monkeypatch.setattr(charging, "shares_of_waiting", read_shares)
        claimed.extend(claim.job for claim in world.claim("first", ONE, trainer_id="t1"))
        return shares

    monkeypatch.setattr(charging, "shares_of_waiting", read_shares_and_claim)
    claimed += [claim.job for claim in world.claim("second", ONE, trainer_id="t2")]

    assert len({job.id for job in claimed}) == 2
    assert len({job.project_id for job in claimed}) == 2


def racing(world: World, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], Any]) -> list[int]:
    """Run `meanwhile` after the next decision and before its claim. Returns a list with one item per decision."""
    choose: Any = claiming._choose  # pyright: ignore[reportPrivateUsage]
    decisions: list[int] = []

    def choose_slowly(*given: Any) -> Any:
        found = choose(*given)
        decisions.append(len(decisions))
        if len(decisions) == 1:
            monkeypatch.setattr(claiming, "_choose", choose)
            meanwhile()
            monkeypatch.setattr(claiming, "_choose", choose_slowly)
        return found

    monkeypatch.setattr(claiming, "_choose", choose_slowly)
    return decisions


@pytest.mark.parametrize("max_jobs", [1, 3])
def test_claim_that_lost_a_race_falls_back_without_another_decision(
    world: World, monkeypatch: pytest.MonkeyPatch, max_jobs: int
) -> None:
    flooded(world, 20)
    world.worker()
    capacity = replace(WIDE, max_jobs=max_jobs)
    taken: list[str] = []
    decisions = racing(
        world,
        monkeypatch,
        lambda: taken.extend(c.job.id for n in range(5) for c in world.claim("quicker", ONE, trainer_id=f"t{n}")),
    )

    mine = world.claim(capacity=capacity)

    assert len(decisions) == 1
    assert len({*taken, *(claim.job.id for claim in mine)}) == 5 + max_jobs
    (attempt,) = queries.attempts(world.db, project_id=mine[0].job.project_id, job_id=mine[0].job.id)
    why = attempt.why
    own = sum(world_job.startswith(_stem(mine[0].job.id)) for world_job in taken)
    assert (why["role"], why["position"], why["share"]["num_running"]) == ("anchor", 1, own)
    assert why["normalized_usage"] == why["share"]["normalized_usage"]


def _stem(job_id: str) -> str:
    """Return the id prefix that a job and its copies share."""
    return "-".join(job_id.split("-")[:2])


def test_joining_worker_that_lost_a_race_claims_the_remaining_jobs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.worker()
    held = world.running().job
    world.flood(world.queued(), 9)
    decisions = racing(
        world, monkeypatch, lambda: [world.claim("quicker", ONE, trainer_id=f"t{number}") for number in range(4)]
    )

    mine = world.claim(capacity=replace(WIDE, max_jobs=2), pack_key=held.pack_key)

    assert (len(mine), len(decisions)) == (2, 1)


def test_decision_is_repeated_when_all_fallbacks_are_taken(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.flood(world.queued(), MAX_FALLBACKS + 4)
    decisions = racing(
        world,
        monkeypatch,
        lambda: [world.claim("quicker", ONE, trainer_id=f"t{number}") for number in range(MAX_FALLBACKS + 1)],
    )

    assert len(world.claim(capacity=ONE)) == 1
    assert len(decisions) == 2


def test_limit_reached_meanwhile_by_others_is_respected(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    flooded(world, 4)
    quotas.limit(
        world.db, caller=replace(world.caller, is_operator=True), project="theirs", limits={"concurrent_jobs": 1}
    )
    decisions = racing(world, monkeypatch, lambda: [world.claim("quicker", ONE, trainer_id=f"t{n}") for n in range(2)])

    (claim,) = world.claim(capacity=ONE)

    assert claim.job.project_id == world.caller.project_id
    assert len(decisions) == 2


def test_attempt_event_names_a_new_or_a_loaded_trainer(world: World) -> None:
    world.worker()
    first, second = world.queued(), world.queued()

    world.claim(capacity=ONE)
    world.claim(capacity=replace(ONE, resident_key=second.pack_key))

    for job, expected in ((first, "in a new trainer"), (second, "in a trainer that has the base model loaded")):
        messages = [event.message for event in world.events(job.id)]
        assert messages[-1] == f"Attempt 1 started on worker w1 {expected}"
