"""Plans: validated like a job, computed once, and reproduced exactly by a job created from one."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import func, select

from catalog.errors import Conflict, InvalidRequest, NotFound, StaleClaim
from catalog.fleet import workers
from catalog.jobs import submission
from catalog.maintenance import garbage_collection
from catalog.plans import claims as plan_claims
from catalog.plans import plans
from catalog.plans.plans import MAX_COMPUTING, PLAN_SECONDS
from catalog.queue import claims as queue_claims
from catalog.queue import notifier
from catalog.registry import base_models
from catalog.spec.job import JobSpec, PlannedJob
from catalog.states import EndReason
from catalog.storage import files
from catalog.tables.history import Attempt
from catalog.tables.jobs import FileOverlap, Job, Plan
from catalog.tasks import outcomes, task_queue
from catalog.tasks.task_queue import MAX_ATTEMPTS, TaskKind
from tests.catalog.plan_data import SETTINGS, know, plan, put, ready
from tests.catalog.prepared_data import REPORT
from tests.catalog.world import LEASE, World, begin_plan, claim_task, linears, request, sha


def found(row: Plan) -> dict[str, Any]:
    assert row.state == "ready", row.error
    assert row.found is not None
    return row.found


def codes(row: Plan) -> set[str]:
    return {warning["code"] for warning in found(row)["warnings"]}


def look(world: World, row: Plan) -> Plan:
    return plans.get(world.db, project_id=world.caller.project_id, plan_id=row.id)


def num_jobs(world: World) -> int:
    with world.db.read() as session:
        return session.scalar(select(func.count()).select_from(Job)) or 0


def submit(world: World, row: Plan, **fields: Any) -> Job:
    body = PlannedJob.model_validate({"plan": row.id, **fields})
    return submission.create(world.db, caller=world.caller, request=body, body_digest=sha(body.model_dump_json()))


def test_plan_of_prepared_files_is_ready_at_once(world: World) -> None:
    world.worker()
    first = plan(world)
    assert first.state == "computing"
    know(world, first)

    row = plan(world)

    assert found(row)["num_steps"] == 75
    assert found(row)["trainable_parameters"] == 2 * 16 * (64 + 64) + 2 * 16 * (16 + 64)
    assert look(world, first).state == "computing", "only a worker concludes it"
    assert num_jobs(world) == 0


def test_plan_is_rejected_for_the_same_reasons_as_a_job(world: World) -> None:
    bodies: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"training_file": "file-none"}, NotFound),
        ({"model": "none"}, NotFound),
        ({"optimizer": {"type": "sgd"}}, InvalidRequest),
        ({"lora": {"target_modules": ["none"]}}, InvalidRequest),
        ({"early_stopping": {"patience": 3}}, InvalidRequest),
    ]
    for body, kind in bodies:
        with pytest.raises(kind) as of_plan:
            plan(world, **body)
        with pytest.raises(kind) as of_job:
            world.submit(**body)
        assert str(of_plan.value) == str(of_job.value)


def test_unusable_file_fails_the_plan_with_the_error_of_a_job(world: World) -> None:
    first = plan(world)
    refusal = {"code": "nothing_to_learn", "message": "There is nothing.", "remedy": "Give more."}
    put(world, first.train_prepared, REPORT | {"usable_rows": 0, "refusal": refusal})

    row = plan(world)

    assert row.state == "failed"
    assert row.error == {
        "code": "nothing_to_learn",
        "message": "There is nothing. Give more.",
        "param": "training_file",
    }
    with pytest.raises(Conflict, match="failed: There is nothing") as refused:
        submit(world, row)
    assert refused.value.remedy == "Correct the problem, and create the job from a new plan."


def test_plan_is_computed_by_one_worker_at_a_time(world: World) -> None:
    row = plan(world, validation_file=world.file())
    assert notifier.has_work(world.db)

    claim = begin_plan(world.db, "w1")
    assert claim is not None
    assert claim.task.subject == row.id
    assert begin_plan(world.db, "w2") is None
    assert not notifier.has_work(world.db)
    know(world, row, overlap=(7, 100))
    plan_claims.conclude(world.db, claim.task, settings=SETTINGS)

    assert found(look(world, row))["data"]["overlap"] == {"rows": 7, "of_rows": 100}
    assert "overlap" in codes(look(world, row))
    with pytest.raises(StaleClaim):
        plan_claims.conclude(world.db, claim.task, settings=SETTINGS)


def test_plan_of_a_lost_worker_is_retried_and_fails_after_the_limit(world: World) -> None:
    row = plan(world)
    for _ in range(MAX_ATTEMPTS[TaskKind.PLAN]):
        claim = begin_plan(world.db, "w1")
        assert claim is not None
        world.clock.advance(LEASE + 1)

    outcomes.fail_lost(world.db, claim_task(world.db, TaskKind.PLAN), plan_claims.PLAN)

    assert look(world, row).state == "failed"
    error = look(world, row).error or {}
    assert (error["code"], error["param"]) == ("preparation_failed", None)
    assert error["message"].endswith("Once the workers run normally, create the job or plan again.")
    with pytest.raises(Conflict, match="was lost") as refused:
        submit(world, row)
    assert refused.value.code == "plan_failed"


def test_renewed_plan_lease_is_kept_and_a_deleted_plan_ends_it(world: World) -> None:
    row = plan(world)
    claim = begin_plan(world.db, "w1")
    assert claim is not None
    world.clock.advance(LEASE - 1)
    assert task_queue.renew(world.db, claim.task, lease_seconds=LEASE)
    world.clock.advance(LEASE - 1)
    assert begin_plan(world.db, "w2") is None

    plans.delete(world.db, project_id=world.caller.project_id, plan_id=row.id)

    assert not task_queue.renew(world.db, claim.task, lease_seconds=LEASE)


@pytest.mark.parametrize(
    ("gone", "code", "remedy"),
    [
        ("file", "file_not_found", "Upload it again, and create a new plan with the new file's ID."),
        ("base", "model_changed", "Create a new plan with another base model."),
    ],
)
def test_plan_fails_if_its_file_or_base_is_gone_before_it_is_computed(
    world: World, gone: str, code: str, remedy: str
) -> None:
    row = plan(world)
    if gone == "file":
        files.delete(world.db, project_id=world.caller.project_id, file_id=world.file_id)
    else:
        base_models.delete(world.db, "smol")

    assert begin_plan(world.db, "w1") is None

    error = look(world, row).error or {}
    assert error["code"] == code
    assert error["message"].endswith(remedy)
    with pytest.raises(Conflict) as refused:
        submit(world, row)
    assert (refused.value.code, refused.value.message) == ("plan_failed", f"Plan {row.id} failed: {error['message']}")
    assert refused.value.remedy == "Correct the problem, and create the job from a new plan."


def test_computing_plans_per_project_are_limited(world: World) -> None:
    for number in range(MAX_COMPUTING):
        plan(world, seed=number)

    with pytest.raises(Conflict, match="being computed"):
        plan(world)


def test_job_from_a_plan_equals_the_plan(world: World) -> None:
    row = ready(world, lora={"rank": 4}, suffix="mine", metadata={"team": "a"})

    job = submit(world, row)

    assert JobSpec.model_validate(job.spec) == JobSpec.model_validate(row.spec)
    assert (job.requested, job.suffix, job.labels) == (row.requested, "mine", {"team": "a"})
    assert job.state == "validating_files"
    messages = [event.message for event in world.events(job.id)]
    assert f"The job was created from {row.id} without changes." in messages


def test_fields_given_with_a_plan_must_match_it(world: World) -> None:
    row = ready(world, lora={"rank": 4, "alpha": 9.0}, metadata={"team": "a"})
    same = {"model": "smol", "training_file": world.file_id, "lora": {"rank": 4}, "seed": row.spec["seed"]}
    assert submit(world, row, **same, metadata={"team": "a"}).spec == row.spec

    seed = row.spec["seed"]
    for other, message in (
        ({"lora": {"rank": 8}}, f"lora.rank is 8, but 4 in plan {row.id}."),
        ({"seed": seed + 1}, f"seed is {seed + 1}, but {seed} in plan {row.id}."),
        ({"suffix": "x"}, f"suffix is 'x', but null in plan {row.id}."),
        ({"metadata": {}}, f'metadata is {{}}, but {{"team": "a"}} in plan {row.id}.'),
    ):
        with pytest.raises(Conflict) as refused:
            submit(world, row, **other)
        assert (refused.value.code, refused.value.message) == ("plan_outdated", message)
    with pytest.raises(ValidationError):
        submit(world, row, unheard_of=1)


def test_null_that_differs_from_a_plan_is_named_with_the_planned_value(world: World) -> None:
    row = ready(world, early_stopping={"patience": 2}, validation_file=world.file())

    with pytest.raises(Conflict, match=r'^early_stopping is null, but \{"patience": 2, ') as refused:
        submit(world, row, early_stopping=None)

    assert refused.value.param == "early_stopping"


def test_error_of_an_outdated_plan_names_the_field_that_changed(world: World) -> None:
    row = ready(world)
    with world.db.write() as session:
        session.get_one(Plan, row.id).spec = {**row.spec, "max_length": 100}

    with pytest.raises(Conflict, match=r"now resolves to max_length \d+ instead of 100\.$") as refused:
        submit(world, row)

    assert refused.value.code == "plan_outdated"


def test_plan_is_outdated_after_its_base_model_changed(world: World) -> None:
    row = ready(world)
    base_models.delete(world.db, "smol")
    base_models.add(world.db, name="smol", kind="folder", source="/models/smol", revision=None)
    another = {"num_parameters": 1, **linears(q_proj=([64, 64], 2))}
    world.finish_import("smol", digest=sha("another"), description=another)

    with pytest.raises(Conflict) as refused:
        submit(world, row)

    assert refused.value.code == "plan_outdated"


def test_plan_of_a_deleted_file_creates_no_job_and_shows_no_rows(world: World) -> None:
    row = ready(world)
    assert plans.details(world.db, row).training is not None
    files.delete(world.db, project_id=world.caller.project_id, file_id=world.file_id)

    assert plans.details(world.db, row).training is None
    with pytest.raises(NotFound):
        submit(world, row)


def test_expired_plan_and_its_row_are_removed(world: World) -> None:
    row = ready(world, validation_file=world.file())
    world.clock.advance(PLAN_SECONDS + 1)

    with pytest.raises(NotFound, match="No plan"):
        look(world, row)
    assert plans.list_page(world.db, project_id=world.caller.project_id).items == []
    garbage_collection.drop_references(world.db)

    with world.db.read() as session:
        assert session.scalar(select(func.count()).select_from(Plan)) == 0
        assert session.scalar(select(func.count()).select_from(FileOverlap)) == 0, (
            "its token caches are gone: no file here has them"
        )


def test_expired_plan_without_a_worker_leaves_no_task(world: World) -> None:
    plan(world)
    world.clock.advance(PLAN_SECONDS + 1)
    garbage_collection.drop_references(world.db)

    assert begin_plan(world.db, "w1") is None


def test_expected_start_depends_on_free_workers_and_jobs_ahead(world: World) -> None:
    assert "no worker is running" in found(ready(world))["expected_start"]["basis"]
    world.worker()
    assert found(plan(world))["expected_start"]["seconds"] == 0

    world.queued()
    estimate = found(plan(world))["expected_start"]
    assert estimate["seconds"] is None
    assert "no job of the project has succeeded yet" in estimate["basis"]

    (claim,) = world.claim()
    queue_claims.started(world.db, claim.claim_id, trainer_id="trainer-w1", resumed_from_step=None)
    world.clock.advance(30)
    world.complete(claim.claim_id)
    world.queued()
    estimate = found(plan(world))["expected_start"]
    assert "1 job is ahead" in estimate["basis"]
    assert estimate["seconds"] == pytest.approx(30, abs=1)


def test_job_that_fits_no_worker_causes_a_warning(world: World) -> None:
    world.worker(memory_bytes=1000)

    row = ready(world)

    assert "fits_no_worker" in codes(row)
    assert found(row)["devices"]["smallest_gpu"]["gigabytes"] == 8
    assert found(row)["training_time"]["seconds"] is None
    (remedy,) = [each["remedy"] for each in found(row)["warnings"] if each["code"] == "fits_no_worker"]
    assert remedy.endswith("Or lower lora.rank, set quantization to 'nf4', or use a smaller base model.")
    dora = found(ready(world, lora={"use_dora": True}))["warnings"]
    (remedy,) = [each["remedy"] for each in dora if each["code"] == "fits_no_worker"]
    assert remedy.endswith("Or lower lora.rank, or use a smaller base model."), "DoRA needs an unquantized base model"


def test_planned_memory_equals_the_scheduling_requirements(world: World) -> None:
    row = ready(world)
    job = submit(world, row)
    world.prepare_all(longest_example=80)

    with world.db.read() as session:
        stored = session.get_one(Job, job.id)
    (cpu,) = [memory for memory in found(row)["memory"] if memory["kind"] == "cpu"]
    assert cpu["total_bytes"] == (stored.own_bytes or 0) + (stored.trainer_bytes or 0)
    assert cpu["total_bytes"] == sum(part["bytes"] for part in cpu["parts"])


def trained_before(world: World) -> str:
    """Record a trainer that has measured its speed. Returns its id."""
    world.worker()
    row = ready(world)
    assert found(row)["training_time"]["basis_kind"] == "none", "the device reports no number of cores"
    pack_key = submit(world, row).pack_key
    workers.register_trainer(world.db, trainer_id="t1", worker_id="w1", base_digest=sha("smol"), pack_key=pack_key)
    speeds = {"alone": [[100, 50.0], [200, 80.0]], "together": []}
    workers.end_trainer(world.db, "t1", report={"tick_speeds": speeds})
    return "t1"


def test_training_time_uses_measurements_of_its_base(world: World) -> None:
    trainer_id = trained_before(world)

    estimate = found(plan(world))["training_time"]

    assert estimate["basis_kind"] == "measured"
    assert estimate["worker_id"] == "w1"
    assert "with this base" in estimate["basis"]
    training_seconds = 75 * 4 * 50 / estimate["tokens_per_second"]
    assert estimate["seconds"] > training_seconds
    assert "(a guess) for loading" in estimate["basis"]

    record(world, trainer_id, at=1000, load=40)  # this job waited for the base model
    record(world, trainer_id, at=2000, load=1)

    estimate = found(plan(world))["training_time"]
    assert estimate["seconds"] == pytest.approx(40 + training_seconds + 6)
    assert estimate["min_seconds"] < estimate["seconds"] < estimate["max_seconds"]


@pytest.mark.parametrize(
    ("first", "stated"),
    [
        ({"reason": EndReason.DIVERGED}, "40 s (measured) for loading"),
        ({"reason": EndReason.COMPLETED, "number": 2}, "(a guess) for loading"),  # it was admitted before, elsewhere
        ({"reason": EndReason.INFRA_LOST, "load": 9000}, "(a guess) for loading"),  # another trainer admitted it
    ],
)
def test_load_time_is_that_of_the_first_job_of_a_trainer_however_it_ended(
    world: World, first: dict[str, Any], stated: str
) -> None:
    trainer_id = trained_before(world)
    record(world, trainer_id, at=1000, **first)
    record(world, trainer_id, at=2000, load=1)

    basis = found(plan(world))["training_time"]["basis"]

    assert stated in basis
    assert "(measured) for verification" in basis


def record(
    world: World,
    trainer_id: str,
    *,
    at: float,
    load: float = 40,
    reason: EndReason = EndReason.COMPLETED,
    number: int = 1,
) -> None:
    """Record an attempt of 200 s, for a job that was admitted `load` seconds after its start. Verification took 6 s."""
    job_id = submit(world, plan(world)).id
    with world.db.write() as session:
        job = session.get_one(Job, job_id)
        job.started_at, job.progress = at + load, {"updated_at": at + 194}
        session.add(
            Attempt(
                claim_id=f"claim-{at}",
                job_id=job_id,
                number=number,
                worker_id="w1",
                trainer_id=trainer_id,
                started_at=at,
                ended_at=at + 200,
                reason=reason,
                why={},
            )
        )


def test_few_steps_warning_of_a_plan_becomes_a_job_event(world: World) -> None:
    row = ready(world, max_steps=8)
    assert "few_steps" in codes(row)
    job = submit(world, row)
    world.prepare_all(num_steps=8)

    warned = [e.message for e in world.events(job.id) if e.level == "warn"]

    assert any("8 optimizer steps" in message and "Raise max_steps" in message for message in warned)


def test_plan_request_keeps_omitted_fields_omitted(world: World) -> None:
    row = ready(world)

    assert row.requested == {"model": "smol", "training_file": world.file_id}
    assert request(**row.requested).lora.rank == 16
