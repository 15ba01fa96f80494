"""Jobs: creation, idempotency, lists by metadata and tags, data reports, and canceling, pausing and resuming."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from catalog.error_texts import ErrorText
from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.jobs import commands, data_reports
from catalog.lifecycle import preparation, queue_position
from catalog.queue import claims
from catalog.states import EndReason, JobState
from catalog.tables.storage import BaseModelRow
from catalog.tasks import outcomes
from tests.catalog.world import World, begin_preparation, request, sha


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


def test_unstorable_id_is_rejected_or_not_found(world: World) -> None:
    for job_id in ("ftjob-\0", "ftjob-\ud800"):
        with pytest.raises((InvalidRequest, NotFound)):
            commands.get(world.db, **world.of(job_id))


def found(world: World, **wanted: Any) -> list[str]:
    page = commands.list_page(world.db, project_id=world.caller.project_id, **wanted)
    return [job.id for job in page.items]


def test_jobs_match_all_requested_metadata_and_tags(world: World) -> None:
    both = world.submit(metadata={"team": "search", "run": "1"}, tags=["nightly", "q3", 'odd"tag']).id
    one = world.submit(metadata={"team": "search"}, tags=["nightly"]).id
    bare = world.submit().id
    world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger), tags=["nightly"])

    assert found(world, metadata={"team": "search"}) == [one, both]
    assert found(world, metadata={"team": "search", "run": "1"}) == [both]
    assert found(world, metadata={"team": "search"}, tags=["q3"]) == [both]
    assert found(world, tags=["nightly"]) == [one, both]
    assert found(world, tags=["nightly"], limit=1) == [one]
    assert found(world, tags=['odd"tag']) == [both]
    assert found(world, tags=["team"]) == found(world, metadata={"nightly": ""}) == []
    assert found(world, metadata={}) == [bare]
    assert found(world, metadata={}, tags=["nightly"]) == []
    assert found(world) == [bare, one, both]


def test_pages_of_filtered_jobs_follow_each_other(world: World) -> None:
    tagged = [world.submit(tags=["a"]).id for _ in range(3)]
    other = world.submit().id
    project = world.caller.project_id

    first = commands.list_page(world.db, project_id=project, tags=["a"], limit=2)
    rest = commands.list_page(world.db, project_id=project, tags=["a"], limit=2, after=first.items[-1].id)

    assert [job.id for job in [*first.items, *rest.items]] == tagged[::-1]
    assert (first.has_more, rest.has_more) == (True, False)
    with pytest.raises(InvalidRequest, match="no item"):
        commands.list_page(world.db, project_id=project, tags=["a"], after=other)


def test_repeated_tag_counts_once(world: World) -> None:
    job = world.submit(tags=["a", "a"])

    assert found(world, tags=["a", "a"]) == [job.id]


REFUSAL = {"refusal": {"code": "nothing_to_learn"}}
NOTHING = ErrorText(code="nothing_to_learn", message="No row has tokens to train on.", remedy="Add rows.")


def test_rejection_is_reported_for_its_model_only(world: World) -> None:
    world.base("other")
    with world.db.write() as session:
        tokenizer = {"path": "tokenizer.json", "digest": sha("other"), "num_bytes": 1}
        session.get_one(BaseModelRow, "other").manifest = {"files": [tokenizer]}
    refused = world.submit()
    unprepared = begin_preparation(world.db, "w1")
    assert unprepared is not None
    wanted = unprepared.files
    world.put_tokens(wanted.train_key, file_digest=wanted.training.digest, artifact=None, report=REFUSAL)
    outcomes.fail(world.db, unprepared.task, preparation.PREPARATION, NOTHING)
    waiting = world.submit(model="other")

    of_file = {"project_id": world.caller.project_id, "file_id": world.file_id}
    assert data_reports.of_job(world.db, **world.of(refused.id)).training == REFUSAL
    assert data_reports.of_job(world.db, **world.of(waiting.id)).training is None
    assert data_reports.of_file(world.db, **of_file, model="smol") == REFUSAL
    assert data_reports.of_file(world.db, **of_file, model="other") is None


def test_each_file_of_a_rejected_job_keeps_its_report(world: World) -> None:
    job = world.submit(validation_file=world.file())
    unprepared = begin_preparation(world.db, "w1")
    assert unprepared is not None
    wanted = unprepared.files
    world.put_tokens(wanted.train_key, file_digest=sha("x"), artifact=None, report={"rows": 1})
    world.put_tokens(wanted.valid_key or "", file_digest=sha("y"), artifact=None, report=REFUSAL)

    outcomes.fail(world.db, unprepared.task, preparation.PREPARATION, NOTHING)

    reports = data_reports.of_job(world.db, **world.of(job.id))
    assert (reports.training, reports.validation) == ({"rows": 1}, REFUSAL)


def test_waiting_job_is_canceled_at_once(world: World) -> None:
    validating = world.submit()
    queued = world.queued()
    paused = world.submit()
    verbs: dict[str, Any] = {"project_id": world.caller.project_id}
    commands.pause(world.db, job_id=paused.id, **verbs)

    states = {commands.cancel(world.db, job_id=job.id, **verbs).state for job in (validating, queued, paused)}

    assert states == {JobState.CANCELLED}
    assert world.job(queued.id).finished_at is not None
    assert world.job(queued.id).reason == EndReason.CANCELLED_BY_USER


def test_running_job_is_canceled_by_its_worker(world: World) -> None:
    claim = world.running()

    requested = commands.cancel(world.db, **world.of(claim.job.id))
    orders = world.beat(claim.claim_id)
    state = claims.end(world.db, claim.claim_id, reason=EndReason.CANCELLED_BY_USER, detail="")

    assert (requested.state, requested.cancel_requested) == (JobState.RUNNING, True)
    assert orders[claim.claim_id].cancel
    assert state == JobState.CANCELLED
    assert not world.job(claim.job.id).cancel_requested


def test_finished_job_cannot_be_canceled_paused_or_resumed(world: World) -> None:
    job = world.submit()
    commands.cancel(world.db, **world.of(job.id))

    for verb in (commands.cancel, commands.pause, commands.resume):
        with pytest.raises(Conflict) as refusal:
            verb(world.db, **world.of(job.id))
        assert refusal.value.code == "invalid_transition"
        assert refusal.value.remedy


def test_paused_job_with_prepared_files_resumes_into_the_queue(world: World) -> None:
    job = world.queued()
    verb = world.of(job.id)

    assert commands.pause(world.db, **verb).state == JobState.PAUSED
    assert commands.pause(world.db, **verb).state == JobState.PAUSED
    assert commands.resume(world.db, **verb).state == JobState.QUEUED

    assert world.transitions(job.id)[-2:] == [("paused", "validating_files"), ("validating_files", "queued")]


def test_remedy_for_resuming_a_held_job_is_to_release_it(world: World) -> None:
    job = world.queued()

    def remedy() -> str:
        with pytest.raises(Conflict) as refused:
            commands.resume(world.db, **world.of(job.id))
        return refused.value.remedy

    assert remedy() == "No action is needed: the job continues without being resumed."
    queue_position.hold(world.db, **world.of(job.id))
    assert remedy() == f"The job is held. To let it start, release it with `lorry jobs release {job.id}`."


def test_job_paused_before_preparation_is_prepared_after_resuming(world: World) -> None:
    job = world.submit()
    verb = world.of(job.id)
    commands.pause(world.db, **verb)

    assert begin_preparation(world.db, "w") is None
    assert commands.resume(world.db, **verb).state == JobState.VALIDATING_FILES
    assert begin_preparation(world.db, "w") is not None


def test_running_job_is_paused_by_its_worker_and_resumes(world: World) -> None:
    claim = world.running()
    verb = world.of(claim.job.id)

    commands.pause(world.db, **verb)
    order = world.beat(claim.claim_id)[claim.claim_id]
    state = claims.end(world.db, claim.claim_id, reason=EndReason.PAUSED_BY_USER, detail="")
    commands.resume(world.db, **verb)

    assert order.pause
    assert state == JobState.PAUSED
    assert world.claim()[0].attempt == 2
    assert world.job(claim.job.id).counted_attempts == 0


def test_withdrawn_pause_returns_the_job_to_the_queue(world: World) -> None:
    claim = world.running()
    verb = world.of(claim.job.id)
    commands.pause(world.db, **verb)

    commands.resume(world.db, **verb)
    state = claims.end(world.db, claim.claim_id, reason=EndReason.PAUSED_BY_USER, detail="")

    assert state == JobState.QUEUED


def test_job_being_canceled_cannot_be_paused_or_resumed(world: World) -> None:
    claim = world.running()
    verb = world.of(claim.job.id)
    commands.cancel(world.db, **verb)
    commands.cancel(world.db, **verb)

    for ask, code in ((commands.pause, "invalid_transition"), (commands.resume, "invalid_transition")):
        with pytest.raises(Conflict, match="because it is being cancelled") as refusal:
            ask(world.db, **verb)
        assert (refusal.value.code, refusal.value.remedy) == (code, "To train again, create a new job.")
