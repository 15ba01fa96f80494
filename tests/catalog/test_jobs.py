"""A person's verbs on jobs: what is accepted, what is refused and why, and what each verb does in each state."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from catalog import bases, claims, jobs
from catalog.errors import Conflict, InvalidRequest, LorryError, NotFound
from catalog.states import EndReason, JobState
from tests.catalog.world import World, request, sha


def test_a_new_job_waits_for_its_files_to_be_validated(world: World) -> None:
    job = world.submit(suffix="mine", metadata={"team": "a"}, priority="urgent", seed=7)

    assert job.state == JobState.VALIDATING_FILES
    assert job.spec["seed"] == 7
    assert job.spec["lora"]["rank"] == 16
    assert job.adapter_parameters == 16 * (128 + 80) * 2
    assert job.pack_key == f"{sha('smol')}:bfloat16:causal-lm"
    assert (job.labels, job.suffix, job.priority) == ({"team": "a"}, "mine", 0)
    assert world.transitions(job.id) == [(None, "validating_files")]


def test_a_job_without_a_seed_gets_one_by_chance(world: World) -> None:
    seeds = {world.submit().spec["seed"] for _ in range(4)}

    assert len(seeds) > 1


def test_an_unknown_model_is_refused_with_the_names_there_are(world: World) -> None:
    with pytest.raises(NotFound) as refusal:
        world.submit(model="gpt-9")

    assert refusal.value.code == "model_not_found"
    assert refusal.value.param == "model"
    assert "smol" in refusal.value.remedy


def test_a_model_that_is_still_imported_or_failed_is_refused(world: World) -> None:
    bases.add(world.db, name="new", kind="hub", source="org/new", revision=None)
    with pytest.raises(InvalidRequest, match="still being imported") as early:
        world.submit(model="new")

    world.fail_import("new", {"code": "unsupported_model", "message": "/srv/new is a picture."})
    with pytest.raises(InvalidRequest, match=r"failed: unsupported_model\.$") as failed:
        world.submit(model="new")

    assert (early.value.code, failed.value.code) == ("model_not_ready", "model_import_failed")


def test_an_operator_is_told_why_the_import_of_a_jobs_model_failed(world: World) -> None:
    bases.add(world.db, name="new", kind="hub", source="org/new", revision=None)
    told = {"code": "unsupported_model", "message": "/srv/new is a picture.", "remedy": "Give a language model."}
    world.fail_import("new", told)

    with pytest.raises(InvalidRequest) as failed:
        world.submit(model="new", caller=replace(world.caller, is_operator=True))

    assert failed.value.message.endswith("failed: unsupported_model: /srv/new is a picture.")
    assert failed.value.remedy == "Give a language model. Or choose another model."


def test_advice_to_add_a_model_again_is_given_once(world: World) -> None:
    bases.add(world.db, name="new", kind="hub", source="org/new", revision=None)
    remedy = "Look at the source; then add the same model again, which retries."
    world.fail_import("new", {"code": "import_failed", "message": "It ended.", "remedy": remedy})

    with pytest.raises(InvalidRequest) as failed:
        world.submit(model="new", caller=replace(world.caller, is_operator=True))

    assert failed.value.remedy == f"{remedy} Or choose another model."


def test_a_failed_model_is_not_offered_and_one_that_comes_is_marked(world: World) -> None:
    for name in ("broken", "coming"):
        bases.add(world.db, name=name, kind="hub", source=f"org/{name}", revision=None)
    world.fail_import("broken", {"code": "unsupported_model", "message": "", "remedy": ""})

    with pytest.raises(NotFound) as refusal:
        world.submit(model="gpt-9")

    assert refusal.value.remedy == "Base models here: coming (importing), smol."


def with_rates(multiplier: float | str | None, rate: float | str | None) -> dict[str, Any]:
    return {
        **({"hyperparameters": {"learning_rate_multiplier": multiplier}} if multiplier is not None else {}),
        **({"optimizer": {"learning_rate": rate}} if rate is not None else {}),
    }


@pytest.mark.parametrize("at_the_top", [True, False])
def test_a_learning_rate_that_is_given_twice_must_be_the_same(world: World, at_the_top: bool) -> None:
    fields = with_rates(2.0, 1e-3)
    if not at_the_top:
        fields["method"] = {"type": "supervised", "supervised": {"hyperparameters": fields.pop("hyperparameters")}}

    with pytest.raises(InvalidRequest) as refusal:
        world.submit(**fields)

    assert (refusal.value.code, refusal.value.param) == ("conflicting_learning_rates", "optimizer.learning_rate")


@pytest.mark.parametrize(
    ("multiplier", "rate", "found"),
    [
        (None, None, (1.0, 2e-4)),
        (2.0, "auto", (2.0, 4e-4)),
        ("auto", 1e-3, (5.0, 1e-3)),
        (None, 1e-3, (5.0, 1e-3)),
        (5.0, 1e-3, (5.0, 1e-3)),
    ],
)
def test_a_learning_rate_and_its_multiplier_say_the_same(
    world: World, multiplier: Any, rate: Any, found: tuple[float, float]
) -> None:
    spec = world.submit(**with_rates(multiplier, rate)).spec

    assert (spec["learning_rate_multiplier"], spec["optimizer"]["learning_rate"]) == pytest.approx(found)


def test_sgd_needs_a_learning_rate_of_its_own(world: World) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        world.submit(optimizer={"type": "sgd"})
    assert (refusal.value.code, refusal.value.param) == ("learning_rate_required", "optimizer.learning_rate")

    spec = world.submit(optimizer={"type": "sgd", "momentum": 0.9}, hyperparameters={"learning_rate_multiplier": 500.0})
    assert spec.spec["optimizer"]["learning_rate"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"early_stopping": {"patience": 2}}, "early_stopping"),
        ({"evaluation": {"keep": "best"}}, "evaluation.keep"),
        ({"evaluation": {"every_steps": 5, "keep": "best"}}, "evaluation.keep"),
        ({"evaluation": {"every_steps": 5}}, "evaluation.every_steps"),
    ],
)
def test_what_goes_by_the_held_out_loss_is_refused_without_a_validation_file(
    world: World, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        world.submit(**fields)
    assert (refusal.value.code, refusal.value.param) == ("validation_file_required", param)

    spec = world.submit(**fields, validation_file=world.file()).spec
    assert spec["keep"] == ("last" if param == "evaluation.every_steps" else "best")


def _warnings(world: World, **fields: Any) -> list[str]:
    job = world.submit(**fields)
    told = jobs.events_since(world.db, **world.of(job.id), seq=0)
    return [event.message for event in told if event.level == "warn"]


def test_held_out_rows_that_are_those_of_the_training_are_warned_of(world: World) -> None:
    (warning,) = _warnings(world, validation_file=world.file_id)

    assert "the same rows" in warning
    assert _warnings(world, validation_file=world.file()) == []


def test_rows_longer_than_the_base_was_made_for_are_told_with_the_length_that_is_used(world: World) -> None:
    longest = world.submit(max_length=100_000).spec["max_length"]

    (warning,) = _warnings(world, max_length=longest + 1)

    assert f"max_length is {longest} tokens" in warning
    assert _warnings(world, max_length=longest) == []


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_files_that_cannot_be_trained_on_are_refused_by_name(world: World, param: str) -> None:
    foreign = world.file(caller=world.stranger)
    results = world.file(purpose="fine-tune-results")
    empty = world.file(num_rows=0)

    codes: dict[str, str] = {}
    for name, file_id in {"foreign": foreign, "none": "file-0", "purpose": results, "empty": empty}.items():
        fields: dict[str, Any] = {param: file_id}
        with pytest.raises(LorryError) as refusal:
            world.submit(**fields)
        assert refusal.value.param == param
        codes[name] = refusal.value.code

    assert codes == {
        "foreign": "file_not_found",
        "none": "file_not_found",
        "purpose": "wrong_file_purpose",
        "empty": "empty_file",
    }


def test_targets_that_match_nothing_are_refused_with_those_that_exist(world: World) -> None:
    with pytest.raises(InvalidRequest, match="no linear layers named wq") as refusal:
        world.submit(lora={"target_modules": ["q_proj", "wq"]})

    assert refusal.value.code == "unknown_target_modules"
    assert "q_proj, v_proj" in refusal.value.remedy


@pytest.mark.parametrize(
    "fields",
    [
        {"lora": {"rank": 0}},
        {"optimizer": {"learning_rate": -1}},
        {"optimizer": {"momentum": 0.9}},
        {"optimizer": {"eps": 1e-46}},
        {"optimizer": {"eps": 1e39}},
        {"optimizer": {"type": "sgd", "beta1": 0.8}},
        {"schedule": {"decay_ratio": 0.2}},
        {"schedule": {"type": "wsd", "warmup_ratio": 0.3, "decay_ratio": 0.8}},
        {"schedule": {"type": "wsd", "warmup_ratio": 0.9}},
        {"early_stopping": {}},
        {"early_stopping": {"patience": 0}},
        {"hyperparameters": {"n_epochs": "many"}},
        {"suffix": "a/b"},
        {"suffix": "a\nb"},
        {"suffix": "a\n"},
        {"no_such_field": 1},
    ],
)
def test_a_body_outside_the_limits_never_becomes_a_request(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        request(training_file="file-1", **fields)


def test_one_idempotency_key_makes_one_job(world: World) -> None:
    body = request(training_file=world.file_id)

    first = world.send(body, idempotency_key="k")
    again = world.send(body, idempotency_key="k")
    other_project = world.send(
        request(training_file=world.file(caller=world.stranger)), caller=world.stranger, idempotency_key="k"
    )

    assert first.id == again.id != other_project.id
    with pytest.raises(Conflict) as refusal:
        world.send(request(training_file=world.file_id, seed=3), idempotency_key="k")
    assert refusal.value.code == "idempotency_key_reused"


@pytest.mark.parametrize("given", [{"idempotency_key": "k"}, {"is_client_retry": True}])
def test_the_same_submission_many_times_at_once_is_one_job(world: World, given: dict[str, Any]) -> None:
    body = request(training_file=world.file_id)

    with ThreadPoolExecutor(8) as pool:
        made = [future.result() for future in [pool.submit(world.send, body, **given) for _ in range(16)]]

    assert len({job.id for job in made}) == 1
    assert len(jobs.list_page(world.db, project_id=world.caller.project_id).items) == 1


def test_an_identical_body_is_the_same_job_only_as_a_retry_and_only_for_ten_minutes(world: World) -> None:
    body = request(training_file=world.file_id)
    first = world.send(body)

    second = world.send(body)
    retry = world.send(body, is_client_retry=True)
    world.clock.turn(601)
    late = world.send(body, is_client_retry=True)

    assert len({first.id, second.id, late.id}) == 3
    assert retry.id == second.id


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_an_idempotency_key_has_a_length(world: World, key: str) -> None:
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        world.send(request(training_file=world.file_id), idempotency_key=key)


def test_what_is_anothers_does_not_exist(world: World) -> None:
    job = world.submit()
    theirs: dict[str, Any] = {"project_id": world.stranger.project_id, "job_id": job.id}

    for ask in (
        jobs.get,
        jobs.cancel,
        jobs.pause,
        jobs.resume,
        jobs.explain,
        jobs.attempts,
        jobs.packmates,
        jobs.events_page,
        jobs.checkpoints_page,
    ):
        with pytest.raises(NotFound):
            ask(world.db, **theirs)
    with pytest.raises(NotFound):
        jobs.metrics(world.db, **theirs, kind="train")
    with pytest.raises(NotFound):
        jobs.events_since(world.db, **theirs, seq=0)
    assert jobs.list_page(world.db, project_id=world.stranger.project_id).items == []


def test_pages_follow_one_another_without_gap_or_repeat(world: World) -> None:
    made = [world.submit().id for _ in range(5)]
    seen: list[str] = []

    after = None
    while True:
        page = jobs.list_page(world.db, project_id=world.caller.project_id, after=after, limit=2)
        seen += [job.id for job in page.items]
        if not page.has_more:
            break
        after = seen[-1]

    assert seen == made[::-1]
    with pytest.raises(InvalidRequest) as refusal:
        jobs.list_page(world.db, project_id=world.caller.project_id, after="ftjob-0")
    assert refusal.value.code == "unknown_cursor"


def test_a_list_can_be_narrowed_by_labels(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SCAN_ROWS", 2)
    labels = [{"a": "1"}, None, {"a": "1", 'odd"key': "x"}, {"a": "2"}, {"a": "1"}]
    made = [world.submit(metadata=each).id for each in labels]

    def listed(metadata: dict[str, str], limit: int = 20) -> list[str]:
        page = jobs.list_page(world.db, project_id=world.caller.project_id, metadata=metadata, limit=limit)
        return [job.id for job in page.items]

    assert listed({"a": "1"}) == [made[4], made[2], made[0]]
    assert listed({"a": "1"}, limit=1) == [made[4]]
    assert listed({'odd"key': "x"}) == [made[2]]
    assert listed({}) == [made[1]]


def test_a_waiting_job_is_cancelled_at_once(world: World) -> None:
    validating = world.submit()
    queued = world.queued()
    paused = world.submit()
    verbs: dict[str, Any] = {"project_id": world.caller.project_id}
    jobs.pause(world.db, job_id=paused.id, **verbs)

    states = {jobs.cancel(world.db, job_id=job.id, **verbs).state for job in (validating, queued, paused)}

    assert states == {JobState.CANCELLED}
    assert world.job(queued.id).finished_at is not None
    assert world.job(queued.id).reason == EndReason.CANCELLED_BY_USER


def test_a_running_job_is_cancelled_by_its_worker(world: World) -> None:
    claim = world.running()

    asked = jobs.cancel(world.db, **world.of(claim.job.id))
    orders = world.beat(claim.claim_id)
    state = claims.end(world.db, claim.claim_id, reason=EndReason.CANCELLED_BY_USER, detail="")

    assert (asked.state, asked.cancel_requested) == (JobState.RUNNING, True)
    assert orders[claim.claim_id].cancel
    assert state == JobState.CANCELLED
    assert not world.job(claim.job.id).cancel_requested


def test_a_finished_job_takes_no_verb(world: World) -> None:
    job = world.submit()
    jobs.cancel(world.db, **world.of(job.id))

    for verb in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(Conflict) as refusal:
            verb(world.db, **world.of(job.id))
        assert refusal.value.code == "job_already_final"
        assert refusal.value.remedy


def test_a_paused_job_whose_files_are_prepared_resumes_into_the_queue(world: World) -> None:
    job = world.queued()
    verb = world.of(job.id)

    assert jobs.pause(world.db, **verb).state == JobState.PAUSED
    assert jobs.pause(world.db, **verb).state == JobState.PAUSED
    assert jobs.resume(world.db, **verb).state == JobState.QUEUED

    assert world.transitions(job.id)[-2:] == [("paused", "validating_files"), ("validating_files", "queued")]


def test_a_job_paused_before_preparation_is_prepared_after_it_resumes(world: World) -> None:
    job = world.submit()
    verb = world.of(job.id)
    jobs.pause(world.db, **verb)

    assert claims.next_unprepared(world.db, worker_id="w", lease_seconds=60) is None
    assert jobs.resume(world.db, **verb).state == JobState.VALIDATING_FILES
    assert claims.next_unprepared(world.db, worker_id="w", lease_seconds=60) is not None


def test_a_running_job_is_paused_by_its_worker_and_goes_on_from_there(world: World) -> None:
    claim = world.running()
    verb = world.of(claim.job.id)

    jobs.pause(world.db, **verb)
    order = world.beat(claim.claim_id)[claim.claim_id]
    state = claims.end(world.db, claim.claim_id, reason=EndReason.PAUSED_BY_USER, detail="")
    jobs.resume(world.db, **verb)

    assert order.pause
    assert state == JobState.PAUSED
    assert world.claim()[0].attempt == 2
    assert world.job(claim.job.id).counted_attempts == 0


def test_a_pause_that_was_withdrawn_sends_the_job_back_to_the_queue(world: World) -> None:
    claim = world.running()
    verb = world.of(claim.job.id)
    jobs.pause(world.db, **verb)

    jobs.resume(world.db, **verb)
    state = claims.end(world.db, claim.claim_id, reason=EndReason.PAUSED_BY_USER, detail="")

    assert state == JobState.QUEUED


def test_a_job_that_is_being_cancelled_is_neither_paused_nor_resumed(world: World) -> None:
    claim = world.running()
    verb = world.of(claim.job.id)
    jobs.cancel(world.db, **verb)
    jobs.cancel(world.db, **verb)

    for ask, code in ((jobs.pause, "job_cancelling"), (jobs.resume, "job_not_paused")):
        with pytest.raises(Conflict) as refusal:
            ask(world.db, **verb)
        assert refusal.value.code == code


def test_events_are_read_backwards_in_pages_and_forwards_as_a_stream(world: World) -> None:
    claim = world.running()
    for i in range(3):
        claims.record_event(world.db, claim.claim_id, "info", f"event {i}")
    of_job = world.of(claim.job.id)

    first = jobs.events_page(world.db, **of_job, limit=2)
    second = jobs.events_page(world.db, **of_job, after=first.items[-1].seq, limit=100)
    stream = jobs.events_since(world.db, **of_job, seq=first.items[-1].seq)

    assert [event.message for event in first.items] == ["event 2", "event 1"]
    assert first.has_more
    assert not second.has_more
    assert second.items[0].message == "event 0"
    assert [event.message for event in stream] == ["event 2"]
    for unknown in (10**30, -1, 10**9):
        with pytest.raises(InvalidRequest):
            jobs.events_page(world.db, **of_job, after=unknown)


def test_an_id_that_no_database_can_hold_is_refused_or_not_found(world: World) -> None:
    for job_id in ("ftjob-\0", "ftjob-\ud800"):
        with pytest.raises((InvalidRequest, NotFound)):
            jobs.get(world.db, **world.of(job_id))


@pytest.mark.parametrize(
    ("data", "kind", "code"),
    [
        ({"loss": "last_turn"}, "text", "loss_needs_chat"),
        ({"loss": "last_turn"}, "completion", "loss_needs_chat"),
        ({"overflow": "split"}, "completion", "split_needs_text"),
        ({"overflow": "split"}, None, "split_needs_text"),
    ],
)
@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_what_does_not_suit_the_rows_of_a_file_is_refused(
    world: World, data: dict[str, str], kind: str | None, code: str, field: str
) -> None:
    suits = world.file(kind="chat" if "loss" in data else "text")
    unlike = world.file(kind=kind)

    with pytest.raises(InvalidRequest) as refusal:
        world.send(request(**{"training_file": suits, field: unlike}, data=data))

    assert (refusal.value.code, refusal.value.param) == (code, f"data.{next(iter(data))}")
    assert unlike in refusal.value.message
    assert world.submit(training_file=suits, validation_file=suits, data=data).spec["data"].items() >= data.items()


def test_prompts_need_held_out_data_and_are_bounded(world: World) -> None:
    samples = {"prompts": ["a"], "max_tokens": 8}

    with pytest.raises(InvalidRequest) as refusal:
        world.submit(evaluation={"samples": samples})

    assert (refusal.value.code, refusal.value.param) == ("samples_need_validation_file", "evaluation.samples")
    job = world.submit(evaluation={"samples": samples}, validation_file=world.file())
    assert job.spec["samples"] == samples
    for wrong in ({"prompts": []}, {"prompts": ["a"] * 9}, {"prompts": [" "]}, {"prompts": ["a"], "max_tokens": 129}):
        with pytest.raises(ValidationError):
            request(evaluation={"samples": wrong})
