"""New jobs: initial state, visibility, idempotency, and paging of lists and events."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.history import queries
from catalog.jobs import commands, explanation
from catalog.lifecycle import recording
from catalog.states import JobState
from tests.catalog.world import World, request, sha


def test_new_job_waits_for_file_validation(world: World) -> None:
    job = world.submit(suffix="mine", metadata={"team": "a"}, priority="urgent", seed=7)

    assert job.state == JobState.VALIDATING_FILES
    assert job.spec["seed"] == 7
    assert job.spec["lora"]["rank"] == 16
    assert job.adapter_parameters == 16 * (128 + 80) * 2
    assert job.pack_key == f"{sha('smol')}:bfloat16:causal-lm"
    assert (job.labels, job.suffix, job.priority) == ({"team": "a"}, "mine", 0)
    assert world.transitions(job.id) == [(None, "validating_files")]


def test_job_without_a_seed_gets_a_random_one(world: World) -> None:
    seeds = {world.submit().spec["seed"] for _ in range(4)}

    assert len(seeds) > 1


def test_idempotency_key_creates_one_job(world: World) -> None:
    body = request(training_file=world.file_id)

    first = world.send(body, idempotency_key="k")
    again = world.send(body, idempotency_key="k")
    other_project = world.send(
        request(training_file=world.file(caller=world.stranger)), caller=world.stranger, idempotency_key="k"
    )

    assert first.id == again.id != other_project.id
    with pytest.raises(Conflict) as refusal:
        world.send(request(training_file=world.file_id, seed=3), idempotency_key="k")
    assert (refusal.value.code, refusal.value.param) == ("idempotency_key_reused", "Idempotency-Key")
    assert refusal.value.message.endswith(f"to create job {first.id}, with a different request body.")


@pytest.mark.both_databases
@pytest.mark.parametrize("given", [{"idempotency_key": "k"}, {"is_client_retry": True}])
def test_concurrent_identical_submissions_create_one_job(world: World, given: dict[str, Any]) -> None:
    body = request(training_file=world.file_id)

    with ThreadPoolExecutor(8) as pool:
        made = [future.result() for future in [pool.submit(world.send, body, **given) for _ in range(16)]]

    assert len({job.id for job in made}) == 1
    assert len(commands.list_page(world.db, project_id=world.caller.project_id).items) == 1


def test_identical_body_is_deduplicated_only_as_a_retry_within_ten_minutes(world: World) -> None:
    body = request(training_file=world.file_id)
    first = world.send(body)

    second = world.send(body)
    retry = world.send(body, is_client_retry=True)
    world.clock.advance(601)
    late = world.send(body, is_client_retry=True)

    assert len({first.id, second.id, late.id}) == 3
    assert retry.id == second.id


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_idempotency_key_length_is_limited(world: World, key: str) -> None:
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        world.send(request(training_file=world.file_id), idempotency_key=key)


def test_jobs_of_another_project_are_not_found(world: World) -> None:
    job = world.submit()
    theirs: dict[str, Any] = {"project_id": world.stranger.project_id, "job_id": job.id}

    for ask in (
        commands.get,
        commands.cancel,
        commands.pause,
        commands.resume,
        explanation.explain,
        queries.attempts,
        queries.packmates,
        queries.events_page,
        queries.checkpoints_page,
    ):
        with pytest.raises(NotFound):
            ask(world.db, **theirs)
    with pytest.raises(NotFound):
        queries.metrics(world.db, **theirs, kind="train")
    assert commands.list_page(world.db, project_id=world.stranger.project_id).items == []


def test_pages_have_no_gaps_or_repeats(world: World) -> None:
    made = [world.submit().id for _ in range(5)]
    seen: list[str] = []

    after = None
    while True:
        page = commands.list_page(world.db, project_id=world.caller.project_id, after=after, limit=2)
        seen += [job.id for job in page.items]
        if not page.has_more:
            break
        after = seen[-1]

    assert seen == made[::-1]
    with pytest.raises(InvalidRequest) as refusal:
        commands.list_page(world.db, project_id=world.caller.project_id, after="ftjob-0")
    assert refusal.value.code == "conflicting_value"


def test_job_list_is_filtered_by_labels(world: World) -> None:
    labels = [{"a": "1"}, None, {"a": "1", 'odd"key': "x"}, {"a": "2"}, {"a": "1"}]
    made = [world.submit(metadata=each).id for each in labels]

    def listed(metadata: dict[str, str], limit: int = 20) -> list[str]:
        page = commands.list_page(world.db, project_id=world.caller.project_id, metadata=metadata, limit=limit)
        return [job.id for job in page.items]

    assert listed({"a": "1"}) == [made[4], made[2], made[0]]
    assert listed({"a": "1"}, limit=1) == [made[4]]
    assert listed({'odd"key': "x"}) == [made[2]]
    assert listed({}) == [made[1]]


def test_events_are_paged_newest_first(world: World) -> None:
    claim = world.running()
    for i in range(3):
        recording.record_event(world.db, claim.claim_id, "info", f"event {i}")
    of_job = world.of(claim.job.id)

    first = queries.events_page(world.db, **of_job, limit=2)
    second = queries.events_page(world.db, **of_job, after=first.items[-1].seq, limit=100)

    assert [event.message for event in first.items] == ["event 2", "event 1"]
    assert first.has_more
    assert not second.has_more
    assert second.items[0].message == "event 0"
    for unknown in (10**30, -1, 10**9):
        with pytest.raises(InvalidRequest):
            queries.events_page(world.db, **of_job, after=unknown)


def test_unstorable_id_is_rejected_or_not_found(world: World) -> None:
    for job_id in ("ftjob-\0", "ftjob-\ud800"):
        with pytest.raises((InvalidRequest, NotFound)):
            commands.get(world.db, **world.of(job_id))
