"""/v1/plans: what a job would come to, over the wire."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.deps import Services
from catalog.plans import claims
from catalog.tenancy import authentication
from tests.api.conftest import with_key
from tests.api.site import error_of
from tests.catalog.plan_data import SETTINGS, know, ready
from tests.catalog.world import LEASE, World

JOBS = "/v1/fine_tuning/jobs"


def body(world: World, **more: Any) -> dict[str, Any]:
    return {"model": "smol", "training_file": world.file_id, **more}


@pytest.fixture
def planned(client: TestClient, world: World) -> dict[str, Any]:
    """A plan that is ready."""
    world.worker()
    ready(world)
    made = client.post("/v1/plans", json=body(world, lora={"rank": 4}, seed=7))
    assert made.status_code == 200, made.text
    return made.json()


def test_a_plan_tells_all_of_what_a_job_would_come_to(client: TestClient, planned: dict[str, Any]) -> None:
    assert planned["status"] == "ready"
    assert planned["configuration"]["lora"]["rank"] == 4
    assert planned["configuration"]["hyperparameters"] == {
        "batch_size": 4,
        "learning_rate_multiplier": 1.0,
        "n_epochs": 3,
    }
    assert (planned["num_steps"], planned["adapted_layers"]) == (75, 4)
    assert planned["data"]["training"]["supervised_tokens"] == 2000
    assert planned["data"]["validation"] is None
    for memory in planned["memory"]:
        assert memory["total_bytes"] == sum(part["bytes"] for part in memory["parts"])
    assert planned["devices"]["workers_that_fit"][0]["worker_id"] == "w1"
    assert planned["expected_start"]["seconds"] == 0
    assert planned["training_time"]["basis"]
    assert planned["servable"]["vllm"]["verdict"] == "yes"
    assert [warning["code"] for warning in planned["warnings"]] == ["no_validation_file"]
    assert client.get(JOBS).json()["data"] == []
    assert client.get(f"/v1/plans/{planned['id']}").json() == planned


def test_a_plan_is_computed_where_its_files_are_not_prepared(client: TestClient, world: World) -> None:
    made = client.post("/v1/plans", json=body(world)).json()
    assert (made["status"], made["computed_at"], made["num_steps"]) == ("computing", None, None)

    claim = claims.claim(world.db, worker_id="w1", lease_seconds=LEASE)
    assert claim is not None
    know(world, ready(world))
    claims.conclude(world.db, claim.claim_id, settings=SETTINGS)

    assert client.get(f"/v1/plans/{made['id']}").json()["status"] == "ready"


def test_sample_rows_are_shown_to_keys_that_may_read_files_alone_and_not_in_lists(
    app: FastAPI, client: TestClient, services: Services, world: World, planned: dict[str, Any]
) -> None:
    given = {"name": "some", "project_id": world.caller.project_id, "pepper": services.pepper}
    looker = with_key(app, authentication.create(services.db, scopes=("jobs:read",), **given)[1])
    path = f"/v1/plans/{planned['id']}"

    shown = client.get(path).json()["data"]["training"]["samples"][0]["rows"][0]["segments"][0]["tokens"]
    assert shown == [{"text": "secret", "id": 7, "is_trained": True}]
    for answer in (looker.get(path), looker.post("/v1/plans", json=body(world)), client.get("/v1/plans")):
        assert answer.status_code == 200
        assert "secret" not in answer.text
    assert error_of(looker.delete(path))["code"] == "missing_scope"
    assert error_of(looker.post(JOBS, json={"plan": planned["id"]}))["code"] == "missing_scope"


def test_a_job_is_created_from_a_plan_alone(client: TestClient, planned: dict[str, Any]) -> None:
    made = client.post(JOBS, json={"plan": planned["id"]})

    assert made.status_code == 200, made.text
    job = made.json()
    configuration = planned["configuration"]
    assert {name: job[name] for name in configuration} == configuration
    assert job["requested"] == planned["requested"]


def test_a_job_from_a_plan_may_say_the_same_and_nothing_else(
    client: TestClient, world: World, planned: dict[str, Any]
) -> None:
    told = {"plan": planned["id"], "model": "smol", "training_file": world.file_id}
    assert client.post(JOBS, json={**told, "seed": 7}).status_code == 200

    other = error_of(client.post(JOBS, json={**told, "lora": {"rank": 8}}))
    unknown = error_of(client.post(JOBS, json={**told, "lora": {"rnak": 8}}))
    wrong = error_of(client.post(JOBS, json={"plan": 7}))
    gone = error_of(client.post(JOBS, json={"plan": "plan-none"}))

    assert (other["code"], other["param"]) == ("differs_from_plan", "lora.rank")
    assert (unknown["code"], unknown["param"]) == ("unknown_parameter", "lora.rnak")
    assert "'lora.rank'" in unknown["message"]
    assert (wrong["param"], gone["code"]) == ("plan", "plan_not_found")


def test_the_same_submission_of_a_plan_twice_is_one_job(client: TestClient, planned: dict[str, Any]) -> None:
    ids = {
        client.post(JOBS, json={"plan": planned["id"]}, headers={"idempotency-key": "one"}).json()["id"]
        for _ in range(2)
    }

    assert len(ids) == 1


def test_a_body_without_a_plan_is_refused_as_it_was_before(client: TestClient, world: World) -> None:
    missing, unknown = (
        error_of(client.post(path, json=sent))
        for path, sent in ((JOBS, {"model": "smol"}), ("/v1/plans", body(world, lr=1)))
    )

    assert (missing["code"], missing["param"]) == ("missing_required_parameter", "training_file")
    assert (unknown["code"], unknown["param"]) == ("unknown_parameter", "lr")
    assert "optimizer.learning_rate" in unknown["message"]


def test_a_plan_is_deleted_and_its_jobs_stay(client: TestClient, planned: dict[str, Any]) -> None:
    job = client.post(JOBS, json={"plan": planned["id"]}).json()

    assert client.delete(f"/v1/plans/{planned['id']}").json()["deleted"]

    assert client.get(f"/v1/plans/{planned['id']}").status_code == 404
    assert client.get(f"{JOBS}/{job['id']}").status_code == 200


def test_a_key_without_jobs_write_reads_known_results_and_starts_no_computation(
    app: FastAPI, client: TestClient, services: Services, world: World, planned: dict[str, Any]
) -> None:
    given = {"name": "reader", "project_id": world.caller.project_id, "pepper": services.pepper}
    reader = with_key(app, authentication.create(services.db, scopes=("jobs:read",), **given)[1])

    before = client.get("/v1/plans").json()["data"]

    refused = reader.post("/v1/plans", json=body(world, max_length=9))
    known = reader.post("/v1/plans", json=body(world))

    assert (refused.status_code, error_of(refused)["code"]) == (403, "missing_scope")
    assert "jobs:write" in error_of(refused)["message"]
    assert known.json()["status"] == "ready"
    after = client.get("/v1/plans").json()["data"]
    assert [plan["id"] for plan in after] == [known.json()["id"], *(plan["id"] for plan in before)]
