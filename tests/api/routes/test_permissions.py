"""Sharing an adapter or checkpoint: the other project can read it and continue it, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.deps import Services
from catalog.lifecycle import recording
from catalog.registry import adapters
from tests.api.conftest import new_key, with_key
from tests.api.site import error_of
from tests.api.trained import BASE, solid_base, stored_weights, trained
from tests.catalog.world import World, manifest


@pytest.fixture(params=["adapter", "checkpoint"])
def model(request: pytest.FixtureRequest, services: Services, world: World, tmp_path: Path) -> str:
    """Return the name of an adapter or checkpoint of our project."""
    if request.param == "adapter":
        return trained(services, world, tmp_path / "made").name
    world.worker()
    solid_base(world)
    claim = world.running(suffix="two", model=BASE)
    exported = stored_weights(services, tmp_path / "exported")
    recording.record_checkpoint(
        world.db, claim.claim_id, step=5, artifact=manifest("c", kind="checkpoint"), exported=exported
    )
    return f"ft:{BASE}:ours:two:{claim.job.id[-8:]}:ckpt-step-5"


def path(model: str) -> str:
    return f"/v1/fine_tuning/checkpoints/{model}/permissions"


def share(operator: TestClient, model: str, *projects: str) -> list[dict[str, Any]]:
    answer = operator.post(path(model), json={"project_ids": list(projects)})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def reads(client: TestClient, model: str) -> set[int]:
    """Return the statuses of all GET routes of a model."""
    adapter = f"/v1/adapters/{model}"
    paths = [f"/v1/models/{model}", adapter, f"{adapter}/files", f"{adapter}/files/README.md", f"{adapter}/archive"]
    return {client.get(one).status_code for one in [*paths, f"{adapter}/lineage"]}


def listed(client: TestClient, model: str) -> bool:
    return model in {one["id"] for one in client.get("/v1/models").json()["data"]}


def test_only_the_permitted_project_reads_a_shared_model(
    app: FastAPI, services: Services, world: World, operator: TestClient, stranger: TestClient, model: str
) -> None:
    third = with_key(app, new_key(services, world.new_caller("third").project_id))
    assert (reads(stranger, model), listed(stranger, model)) == ({404}, False)

    share(operator, model, world.stranger.project_id)

    assert (reads(stranger, model), listed(stranger, model)) == ({200}, True)
    assert (reads(third, model), listed(third, model)) == ({404}, False)
    assert stranger.get(f"/v1/adapters/{model}").json()["owned_by"] == world.caller.project_id


def test_permitted_project_sees_no_job_and_changes_nothing(
    operator: TestClient, stranger: TestClient, world: World, model: str
) -> None:
    share(operator, model, "theirs")
    job_id = stranger.get(f"/v1/adapters/{model}").json()["job_id"]

    job = f"/v1/fine_tuning/jobs/{job_id}"
    assert {stranger.get(f"{job}{rest}").status_code for rest in ("", "/events", "/checkpoints", "/metrics")} == {404}
    assert stranger.get("/v1/fine_tuning/jobs").json()["data"] == []
    for deleted in (f"/v1/models/{model}", f"/v1/adapters/{model}"):
        assert stranger.delete(deleted).status_code == 404
    assert stranger.get(path(model)).status_code == 403
    assert reads(operator, model) == {200}


def test_revoking_permission_stops_new_jobs_but_not_existing_ones(
    operator: TestClient, stranger: TestClient, world: World, model: str
) -> None:
    body = {"model": model, "training_file": world.file(caller=world.stranger)}
    before = stranger.post("/v1/fine_tuning/jobs", json=body)
    (given,) = share(operator, model, "theirs")

    job = stranger.post("/v1/fine_tuning/jobs", json=body).json()
    answer = operator.delete(f"{path(model)}/{given['id']}")
    after = stranger.post("/v1/fine_tuning/jobs", json=body)

    assert (before.status_code, after.status_code) == (404, 404)
    assert job["parent_adapter"] == model
    assert answer.json() == {"id": given["id"], "object": "checkpoint.permission", "deleted": True}
    assert stranger.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["status"] == "validating_files"
    assert reads(stranger, model) == {404}
    refused = error_of(operator.delete(f"/v1/models/{model}"))
    assert (refused["code"] == "in_use", job["id"] in refused["message"]) == (True, False)


def test_permissions_are_paginated_and_granting_is_idempotent(operator: TestClient, world: World, model: str) -> None:
    others = [world.new_caller(f"other-{number}").project_id for number in range(3)]
    given = [share(operator, model, other)[0] for other in others]

    again = share(operator, model, *others)
    first = operator.get(path(model), params={"limit": 2, "order": "ascending"}).json()
    rest = operator.get(path(model), params={"after": first["last_id"], "order": "ascending"}).json()

    assert again == given
    assert (first["data"] + rest["data"], first["has_more"], rest["has_more"]) == (given, True, False)
    assert operator.get(path(model)).json()["data"] == given[::-1]
    assert operator.get(path(model), params={"project_id": others[1]}).json()["data"] == [given[1]]


@pytest.mark.parametrize(("named", "code"), [("none", "project_not_found"), ("ours", "conflicting_value")])
def test_one_invalid_project_rejects_all_permissions(operator: TestClient, model: str, named: str, code: str) -> None:
    refused = operator.post(path(model), json={"project_ids": ["theirs", named]})

    assert (error_of(refused)["code"], error_of(refused)["param"]) == (code, "project_ids")
    assert code == "conflicting_value" or "in organization 'default'" in error_of(refused)["message"]
    assert operator.get(path(model)).json()["data"] == []


def test_unknown_model_or_permission_is_not_found(operator: TestClient, model: str) -> None:
    assert error_of(operator.get(path("ft:none:ours::00000000")))["code"] == "adapter_not_found"
    assert error_of(operator.get(path("ft:none:ours::00000000:ckpt-step-1")))["code"] == "checkpoint_not_found"
    assert error_of(operator.get(path("ft:none:ours::00000000")))["param"] == "fine_tuned_model"
    unknown = error_of(operator.delete(f"{path(model)}/cp-none"))
    assert unknown["code"] == "adapter_not_found"
    assert unknown["remedy"] == f"List the model's permissions with `lorry adapters shares {model}`."


def test_owner_is_named_as_in_the_request(operator: TestClient, world: World, model: str) -> None:
    owner = world.caller.project_id

    refused = error_of(operator.post(path(model), json={"project_ids": ["theirs", owner]}))

    assert f"Project 'ours' owns model '{model}'" in refused["message"]
    assert refused["remedy"].endswith(f" omit '{owner}' from 'project_ids'.")


def test_shared_adapters_are_listed_separately(
    operator: TestClient, stranger: TestClient, services: Services, world: World, tmp_path: Path
) -> None:
    name = trained(services, world, tmp_path / "made").name
    share(operator, name, "theirs")

    assert stranger.get("/v1/adapters").json()["data"] == []
    (shown,) = stranger.get("/v1/adapters", params={"shared": True}).json()["data"]
    assert shown["name"] == name
    assert operator.get("/v1/adapters", params={"shared": True}).json()["data"] == []
    adapters.delete(world.db, project_id=world.caller.project_id, name=name)
    assert stranger.get("/v1/adapters", params={"shared": True}).json()["data"] == []
