"""Jobs over HTTP: idempotent creation, complete representation, and control."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event
from starlette.testclient import TestClient

from api.deps import Services
from catalog.history import queries
from catalog.lifecycle import recording
from catalog.queue import claims
from catalog.registry import adapters
from catalog.states import EndReason
from tests.api.site import error_of
from tests.catalog.world import World

JOBS = "/v1/fine_tuning/jobs"


def create(client: TestClient, world: World, *, headers: Any = None, **fields: Any) -> Any:
    body = {"model": "smol", "training_file": world.file_id, **fields}
    return client.post(JOBS, json=body, headers=headers or {})


def test_job_shows_all_resolved_hyperparameters(client: TestClient, world: World) -> None:
    job = create(client, world, suffix="mine", seed=7, metadata={"team": "a"}, lora={"rank": 8}).json()

    assert job["status"] == "validating_files"
    assert job["hyperparameters"] == {"batch_size": 4, "learning_rate_multiplier": 1.0, "n_epochs": 3}
    own = {"label_smoothing": 0.0, "neftune_alpha": 0.0}
    assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": {**job["hyperparameters"], **own}}}
    assert (job["lora"]["rank"], job["lora"]["alpha"]) == (8, 16.0)
    assert job["optimizer"]["learning_rate"] == 2e-4
    assert (job["seed"], job["suffix"], job["metadata"], job["priority"]) == (7, "mine", {"team": "a"}, "normal")
    assert job["result_files"] == []
    assert job["integrations"] == []
    unset = ("error", "fine_tuned_model", "finished_at", "estimated_finish", "trained_tokens", "adapter_id", "progress")
    assert all(job[name] is None for name in unset)
    assert client.get(f"{JOBS}/{job['id']}").json() == job


def test_shown_method_can_be_submitted_again(client: TestClient, world: World) -> None:
    numbers = {"label_smoothing": 0.1, "neftune_alpha": 5.0}
    job = create(client, world, method={"type": "supervised", "supervised": {"hyperparameters": numbers}}).json()

    again = create(client, world, method=job["method"]).json()

    assert numbers.items() <= job["method"]["supervised"]["hyperparameters"].items()
    assert again["method"] == job["method"]


def test_running_job_shows_its_phase(client: TestClient, world: World) -> None:
    def phase() -> str | None:
        return client.get(f"/v1/fine_tuning/jobs/{job.id}").json()["phase"]

    job = world.queued()
    assert phase() is None
    world.worker()
    (claim,) = world.claim()
    assert phase() == "loading"
    claims.started(world.db, claim.claim_id, trainer_id="t", resumed_from_step=None)
    recording.record_progress(world.db, claim.claim_id, {"step": 59, "num_steps": 60})
    assert phase() == "training"
    recording.record_progress(world.db, claim.claim_id, {"step": 60, "num_steps": 60})
    assert phase() == "verifying"
    recording.record_progress(world.db, claim.claim_id, {"step": 6, "num_steps": 10, "stopped_early": "No progress."})
    assert phase() == "verifying"
    world.complete(claim.claim_id)
    assert phase() is None


def test_null_fields_equal_omitted_fields(client: TestClient, world: World) -> None:
    names = ("validation_file", "method", "hyperparameters", "suffix", "seed", "metadata", "integrations")
    nulls: dict[str, Any] = dict.fromkeys(names)

    assert create(client, world, **nulls).status_code == 200


@pytest.mark.parametrize(
    ("fields", "status", "param", "code", "fragment"),
    [
        ({"model": "gpt-4o-mini"}, 404, "model", "model_not_found", "smol"),
        ({"training_file": "file-none"}, 404, "training_file", "file_not_found", "file-none"),
        ({"validation_file": "file-none"}, 404, "validation_file", "file_not_found", "file-none"),
        ({"lora": {"target_modules": ["c_attn"]}}, 400, "lora.target_modules", "unknown_target_modules", "q_proj"),
    ],
)
def test_unknown_name_is_rejected_with_the_available_ones(
    client: TestClient, world: World, fields: dict[str, Any], status: int, param: str, code: str, fragment: str
) -> None:
    response = create(client, world, **fields)

    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert fragment in error["message"]


def test_validation_file_with_wrong_purpose_is_rejected(client: TestClient, world: World) -> None:
    response = create(client, world, validation_file=world.file(purpose="user_data"))

    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (400, "validation_file", "wrong_file_kind")


def test_idempotency_key_creates_one_job(client: TestClient, world: World) -> None:
    once = {"idempotency-key": "once"}

    first = create(client, world, headers=once, seed=1)
    again = create(client, world, headers=once, seed=1)
    other = create(client, world, headers=once, seed=2)

    assert first.json()["id"] == again.json()["id"]
    assert other.status_code == 409
    assert other.headers["x-should-retry"] == "false"
    assert error_of(other)["code"] == "idempotency_key_reused"
    assert len(client.get(JOBS).json()["data"]) == 1


def test_client_retry_returns_the_same_job_but_resubmission_does_not(client: TestClient, world: World) -> None:
    first = create(client, world, headers={"x-stainless-retry-count": "0"})
    retry = create(client, world, headers={"x-stainless-retry-count": "1"})
    second = create(client, world, headers={"x-stainless-retry-count": "0"})

    assert first.json()["id"] == retry.json()["id"]
    assert second.json()["id"] != first.json()["id"]


@pytest.mark.parametrize("given", ["", "x" * 256, "with space"])
def test_invalid_idempotency_key_is_rejected(client: TestClient, world: World, given: str) -> None:
    response = create(client, world, headers={"idempotency-key": given})

    assert response.status_code == 400
    assert error_of(response)["param"] == "idempotency-key"


def test_waiting_job_is_cancelled_immediately_and_only_once(client: TestClient, world: World) -> None:
    job_id = create(client, world).json()["id"]

    cancelled = client.post(f"{JOBS}/{job_id}/cancel").json()
    again = client.post(f"{JOBS}/{job_id}/cancel")

    assert (cancelled["status"], cancelled["reason"]) == ("cancelled", "cancelled_by_user")
    assert again.status_code == 409
    assert again.headers["x-should-retry"] == "false"
    assert error_of(again)["code"] == "invalid_transition"


def test_cancellation_with_a_lost_response_can_be_retried(client: TestClient, world: World) -> None:
    world.worker()
    done = world.running()
    world.complete(done.claim_id)
    job_id = create(client, world).json()["id"]
    repeated = {"x-stainless-retry-count": "1"}

    client.post(f"{JOBS}/{job_id}/cancel")
    again = client.post(f"{JOBS}/{job_id}/cancel", headers=repeated)
    of_a_success = client.post(f"{JOBS}/{done.job.id}/cancel", headers=repeated)

    assert (again.status_code, again.json()["status"]) == (200, "cancelled")
    assert of_a_success.status_code == 409


def test_running_job_is_marked_until_its_worker_cancels_it(client: TestClient, world: World) -> None:
    world.worker()
    claim = world.running()

    marked = client.post(f"{JOBS}/{claim.job.id}/cancel").json()
    claims.end(world.db, claim.claim_id, reason=EndReason.CANCELLED_BY_USER, detail="")

    assert (marked["status"], marked["cancel_requested"]) == ("running", True)
    assert client.get(f"{JOBS}/{claim.job.id}").json()["status"] == "cancelled"


def test_job_is_paused_and_resumed(client: TestClient, world: World) -> None:
    job_id = world.queued().id

    paused = client.post(f"{JOBS}/{job_id}/pause").json()
    resumed = client.post(f"{JOBS}/{job_id}/resume").json()
    refused = client.post(f"{JOBS}/{job_id}/resume")

    assert (paused["status"], resumed["status"]) == ("paused", "queued")
    assert refused.status_code == 409
    assert error_of(refused)["code"] == "invalid_transition"


def test_project_holds_releases_and_moves_its_jobs(client: TestClient, world: World) -> None:
    first, second = world.queued(), world.queued()

    held = client.post(f"{JOBS}/{first.id}/hold").json()
    why = client.get(f"{JOBS}/{first.id}/why").json()
    released = client.post(f"{JOBS}/{first.id}/release").json()
    moved = client.post(f"{JOBS}/{second.id}/move", json={"before": first.id})
    unknown = client.post(f"{JOBS}/{second.id}/move", json={"befor": first.id})
    queue = client.get("/v1/queue").json()["jobs"]

    assert (held["status"], held["is_held"], released["is_held"]) == ("queued", True, False)
    assert why["explanation"].startswith("It is held")
    assert moved.status_code == 200
    assert "before" in error_of(unknown)["message"]
    assert [entry["job_id"] for entry in queue] == [second.id, first.id]


def test_deadline_is_shown_as_submitted(client: TestClient, world: World) -> None:
    body = {"model": "smol", "training_file": world.file_id, "deadline": 1_900_000_000}

    job = client.post(JOBS, json=body).json()
    refused = client.post(JOBS, json={**body, "deadline": "tomorrow"})

    assert job["deadline"] == 1_900_000_000
    assert error_of(refused)["param"] == "deadline"


def test_resume_with_a_lost_response_can_be_retried(client: TestClient, world: World) -> None:
    job_id = world.queued().id
    client.post(f"{JOBS}/{job_id}/pause")
    client.post(f"{JOBS}/{job_id}/resume")

    again = client.post(f"{JOBS}/{job_id}/resume", headers={"x-stainless-retry-count": "1"})

    assert (again.status_code, again.json()["status"]) == (200, "queued")
    messages = [event["message"] for event in client.get(f"{JOBS}/{job_id}/events").json()["data"]]
    assert messages.count("The job was resumed.") == 1


@pytest.mark.parametrize("what", ["files", "adapters", "models/ft", "models"])
def test_deletion_with_a_lost_response_can_be_retried(
    client: TestClient, operator: TestClient, world: World, what: str
) -> None:
    world.worker()
    adapter = world.complete(world.running().claim_id)
    named = {"files": world.file_id, "adapters": adapter.id, "models/ft": adapter.name, "models": "smol"}[what]
    place, requester = f"/v1/{what.partition('/')[0]}/{named}", operator if what == "models" else client

    first = requester.delete(place)
    again = requester.delete(place, headers={"x-stainless-retry-count": "1"})
    new_request = requester.delete(place)

    assert (first.status_code, again.status_code, new_request.status_code) == (200, 200, 404)
    assert again.json() == first.json()


def test_jobs_are_paginated_and_filtered_by_metadata(client: TestClient, world: World) -> None:
    ids = [create(client, world, seed=i, metadata={"n": str(i)} if i else None).json()["id"] for i in range(5)]

    first = client.get(JOBS, params={"limit": 2}).json()
    second = client.get(JOBS, params={"limit": 10, "after": first["last_id"]}).json()
    labeled = client.get(JOBS, params={"metadata[n]": "3"}).json()
    plain = client.get(JOBS, params={"metadata": "null"}).json()

    assert [job["id"] for job in first["data"] + second["data"]] == ids[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert [job["id"] for job in labeled["data"]] == [ids[3]]
    assert [job["id"] for job in plain["data"]] == [ids[0]]
    assert client.get(JOBS, params={"after": "ftjob-none"}).status_code == 400
    unknown = error_of(client.get(JOBS, params={"metadata": "x"}))
    both = error_of(client.get(JOBS, params={"metadata": "null", "metadata[n]": "3"}))
    assert (unknown["code"], unknown["param"]) == (both["code"], both["param"]) == ("invalid_value", "metadata")
    assert "'metadata' is 'x', but must be null" in unknown["message"]
    assert "can't be combined" in both["message"]


def test_succeeded_job_names_its_adapter(client: TestClient, world: World, services: Services) -> None:
    world.worker()
    claim = world.running(suffix="docs")
    world.complete(claim.claim_id)

    job = client.get(f"{JOBS}/{claim.job.id}").json()

    assert job["status"] == "succeeded"
    assert job["fine_tuned_model"] == f"ft:smol:ours:docs:{claim.job.id[-8:]}"
    assert job["adapter_id"] == adapters.ids_by_job(services.db, [claim.job.id])[claim.job.id]
    assert client.get(JOBS).json()["data"] == [job]


def test_result_file_of_a_job_cannot_be_trained_on(client: TestClient, world: World) -> None:
    world.worker()
    claim = world.running()
    world.complete(claim.claim_id)

    (file_id,) = client.get(f"{JOBS}/{claim.job.id}").json()["result_files"]

    file = client.get(f"/v1/files/{file_id}").json()
    assert (file["purpose"], file["filename"], file["rows"]) == ("fine-tune-results", "step_metrics.csv", None)
    assert client.get("/v1/files", params={"purpose": "fine-tune-results"}).json()["data"] == [file]
    assert error_of(create(client, world, training_file=file_id))["code"] == "wrong_file_kind"


def test_job_shows_validation_losses_and_running_time(client: TestClient, world: World) -> None:
    world.worker()
    claim = world.running()
    recording.record_progress(world.db, claim.claim_id, {"step": 2, "num_steps": 10, "loss": 1.0})
    before = client.get(f"{JOBS}/{claim.job.id}").json()
    for step, loss in ((3, 0.5), (6, 0.75)):
        recording.record_metrics(world.db, claim.claim_id, [{"kind": "valid", "step": step, "loss": loss}])
    claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")

    shown = client.get(f"{JOBS}/{claim.job.id}").json()

    assert (before["progress"]["valid_loss"], before["progress"]["best_valid_loss"]) == (None, None)
    assert (shown["progress"]["valid_loss"], shown["progress"]["best_valid_loss"]) == (0.75, 0.5)
    assert shown["progress"]["step"] == 2
    assert shown["seconds_running"] == queries.seconds_running(world.db, [claim.job.id])[claim.job.id] > 0
    assert client.get(JOBS).json()["data"] == [shown]


def test_job_list_uses_a_constant_number_of_queries(client: TestClient, world: World, services: Services) -> None:
    def fewest() -> int:
        return min(count() for _ in range(8))  # the background loops query the database at times

    def count() -> int:
        statements: list[str] = []

        def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            statements.append(statement)

        event.listen(services.db.engine, "before_cursor_execute", note)
        try:
            client.get(JOBS, params={"limit": 100})
        finally:
            event.remove(services.db.engine, "before_cursor_execute", note)
        return len([text for text in statements if text.startswith("SELECT")])

    world.worker()
    world.complete(world.running().claim_id)
    few = fewest()
    for number in range(5):
        world.complete(world.running(seed=number).claim_id, content=f"adapter {number}")

    assert fewest() == few


def test_job_shows_tags_and_resources_and_is_found_by_tags(client: TestClient, world: World) -> None:
    body = {"model": "smol", "training_file": world.file_id, "tags": ["nightly", "q 3"], "metadata": {"team": "a"}}
    job = client.post(JOBS, json={**body, "resources": {"devices": 1, "strategy": "auto"}}).json()
    client.post(JOBS, json={**body, "tags": ["nightly"]})

    found = client.get(JOBS, params={"tag": ["nightly", "q 3"], "metadata[team]": "a"}).json()["data"]

    assert [one["id"] for one in found] == [job["id"]]
    assert job["tags"] == ["nightly", "q 3"]
    assert job["resources"] == {"devices": 1, "strategy": "single"}
    assert client.get(JOBS, params={"tag": "none"}).json()["data"] == []


@pytest.mark.parametrize(
    ("wrong", "param", "fragment"),
    [
        ({"tags": ["a"] * 17}, "tags", "at most 16"),
        ({"tags": [""]}, "tags.0", "at least 1"),
        ({"tags": ["a\nb"]}, "tags.0", "control characters"),
        ({"resources": {"devices": 2}}, "resources.devices", "one device"),
        ({"resources": {"strategy": "fsdp"}}, "resources.strategy", "single"),
        ({"resources": {"min_memory_bytes": 1}}, "resources.min_memory_bytes", "Known"),
    ],
)
def test_unsupported_tags_and_resources_are_rejected(
    client: TestClient, world: World, wrong: dict[str, Any], param: str, fragment: str
) -> None:
    refused = error_of(client.post(JOBS, json={"model": "smol", "training_file": world.file_id, **wrong}))

    assert refused["param"] == param
    assert fragment in refused["message"]


def test_estimated_finish_is_constant_between_progress_reports(client: TestClient, world: World) -> None:
    world.worker()
    claim = world.running()
    recording.record_progress(world.db, claim.claim_id, {"step": 2, "seconds_left": 100.0})
    path = f"{JOBS}/{claim.job.id}"

    first = client.get(path).json()
    world.clock.advance(50)
    second = client.get(path).json()

    assert first["estimated_finish"] == second["estimated_finish"]
    assert first["estimated_finish"] == int(first["progress"]["updated_at"] + 100)
