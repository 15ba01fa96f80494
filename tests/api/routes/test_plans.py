"""/v1/plans: dry runs of jobs over HTTP."""

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
from tests.catalog.world import World, begin_plan

JOBS = "/v1/fine_tuning/jobs"


def body(world: World, **more: Any) -> dict[str, Any]:
    return {"model": "smol", "training_file": world.file_id, **more}


@pytest.fixture
def planned(client: TestClient, world: World) -> dict[str, Any]:
    """Return a ready plan."""
    world.worker()
    ready(world)
    made = client.post("/v1/plans", json=body(world, lora={"rank": 4}, seed=7))
    assert made.status_code == 200, made.text
    return made.json()


def test_plan_shows_the_resolved_configuration_and_estimates(client: TestClient, planned: dict[str, Any]) -> None:
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


def test_plan_of_unprepared_files_is_computed_by_a_worker(client: TestClient, world: World) -> None:
    made = client.post("/v1/plans", json=body(world)).json()
    assert (made["status"], made["computed_at"], made["num_steps"]) == ("computing", None, None)

    claim = begin_plan(world.db, "w1")
    assert claim is not None
    know(world, ready(world))
    claims.conclude(world.db, claim.task, settings=SETTINGS)

    assert client.get(f"/v1/plans/{made['id']}").json()["status"] == "ready"


def test_sample_rows_require_files_read_and_are_not_in_lists(
    app: FastAPI, client: TestClient, services: Services, world: World, planned: dict[str, Any]
) -> None:
    given = {"name": "some", "project_id": world.caller.project_id, "pepper": services.pepper}
    viewer = with_key(app, authentication.create(services.db, scopes=("jobs:read",), **given)[1])
    path = f"/v1/plans/{planned['id']}"

    shown = client.get(path).json()["data"]["training"]["samples"][0]["rows"][0]["segments"][0]["tokens"]
    assert shown == [{"text": "secret", "id": 7, "is_trained": True}]
    for answer in (viewer.get(path), viewer.post("/v1/plans", json=body(world)), client.get("/v1/plans")):
        assert answer.status_code == 200
        assert "secret" not in answer.text
    assert error_of(viewer.delete(path))["code"] == "missing_scope"
    assert error_of(viewer.post(JOBS, json={"plan": planned["id"]}))["code"] == "missing_scope"


def test_job_is_created_from_only_a_plan(client: TestClient, planned: dict[str, Any]) -> None:
    made = client.post(JOBS, json={"plan": planned["id"]})

    assert made.status_code == 200, made.text
    job = made.json()
    configuration = planned["configuration"]
    assert {name: job[name] for name in configuration} == configuration
    assert job["requested"] == planned["requested"]


def test_job_from_a_plan_accepts_only_equal_fields(client: TestClient, world: World, planned: dict[str, Any]) -> None:
    fields = {"plan": planned["id"], "model": "smol", "training_file": world.file_id}
    assert client.post(JOBS, json={**fields, "seed": 7}).status_code == 200

    other = error_of(client.post(JOBS, json={**fields, "lora": {"rank": 8}}))
    unknown = error_of(client.post(JOBS, json={**fields, "lora": {"rnak": 8}}))
    wrong = error_of(client.post(JOBS, json={"plan": 7}))
    gone = error_of(client.post(JOBS, json={"plan": "plan-none"}))

    assert (other["code"], other["param"]) == ("plan_outdated", "lora.rank")
    assert (unknown["code"], unknown["param"]) == ("unknown_parameter", "lora.rnak")
    assert "'lora.rank'" in unknown["message"]
    assert (wrong["param"], gone["code"]) == ("plan", "plan_not_found")


def test_idempotency_key_with_a_plan_creates_one_job(client: TestClient, planned: dict[str, Any]) -> None:
    ids = {
        client.post(JOBS, json={"plan": planned["id"]}, headers={"idempotency-key": "one"}).json()["id"]
        for _ in range(2)
    }

    assert len(ids) == 1


def test_invalid_bodies_without_a_plan_are_rejected(client: TestClient, world: World) -> None:
    missing, unknown = (
        error_of(client.post(path, json=sent))
        for path, sent in ((JOBS, {"model": "smol"}), ("/v1/plans", body(world, lr=1)))
    )

    assert (missing["code"], missing["param"]) == ("missing_required_parameter", "training_file")
    assert (unknown["code"], unknown["param"]) == ("unknown_parameter", "lr")
    assert "optimizer.learning_rate" in unknown["message"]


def test_deleting_a_plan_keeps_its_jobs(client: TestClient, planned: dict[str, Any]) -> None:
    job = client.post(JOBS, json={"plan": planned["id"]}).json()

    assert client.delete(f"/v1/plans/{planned['id']}").json()["deleted"]

    assert client.get(f"/v1/plans/{planned['id']}").status_code == 404
    assert client.get(f"{JOBS}/{job['id']}").status_code == 200


def test_key_without_jobs_write_gets_known_plan_results_only(
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
