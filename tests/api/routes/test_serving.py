"""/v1/serving/endpoints and /v1/adapters/{adapter}/deployments: who may do what, and which requests are rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from api.deps import Services
from catalog.registry import base_models
from catalog.tables.serving import Deployment
from catalog.tables.storage import Adapter, BaseModelRow
from tests.api.trained import BASE
from tests.catalog.world import DESCRIPTION, World

ENDPOINTS = "/v1/serving/endpoints"


@pytest.fixture
def endpoint(operator: TestClient, adapter: Adapter, tmp_path: Path) -> dict[str, Any]:
    response = operator.post(ENDPOINTS, json=body(tmp_path))
    assert response.status_code == 200, response.text
    return response.json()


def body(folder: Path, **changes: Any) -> dict[str, Any]:
    given = {"name": "vllm-1", "base_model": BASE, "url": "http://127.0.0.1:9/v1/", "adapter_folder": str(folder)}
    return {**given, **changes}


def deployments(adapter: Adapter) -> str:
    return f"/v1/adapters/{adapter.id}/deployments"


def test_operator_registers_and_removes_an_endpoint(
    operator: TestClient, endpoint: dict[str, Any], client: TestClient, tmp_path: Path
) -> None:
    assert endpoint["url"] == "http://127.0.0.1:9"
    assert (endpoint["state"], endpoint["max_rank"], endpoint["has_api_key"]) == ("pending", 16, False)
    assert operator.get(f"{ENDPOINTS}/{endpoint['id']}").json()["id"] == endpoint["id"]
    assert [one["name"] for one in client.get(ENDPOINTS).json()["data"]] == ["vllm-1"]

    retry = operator.post(ENDPOINTS, json=body(tmp_path), headers={"x-stainless-retry-count": "1"})
    assert retry.json()["id"] == endpoint["id"]
    assert operator.post(ENDPOINTS, json=body(tmp_path)).json()["error"]["code"] == "already_exists"
    assert operator.delete(f"{ENDPOINTS}/vllm-1").json()["id"] == endpoint["id"]
    events = operator.get("/v1/audit_events").json()["data"]
    types = [event["type"] for event in events if event["type"].startswith("serving")]
    assert types == ["serving_endpoint.deleted", "serving_endpoint.created"]


def test_reports_are_recorded_if_they_change_the_endpoint(operator: TestClient, endpoint: dict[str, Any]) -> None:
    for error in (None, "It crashed.", "It crashed.", None, None):
        assert operator.post(f"{ENDPOINTS}/vllm-1/report", json={"error": error}).status_code == 200

    params = {"event_types[]": "serving_endpoint.reported"}
    events = operator.get("/v1/audit_events", params=params).json()["data"]
    assert [(event["object_id"], event["details"]) for event in events] == [
        (endpoint["id"], {"name": "vllm-1", "state": "pending"}),
        (endpoint["id"], {"name": "vllm-1", "state": "failed"}),
    ]


def test_other_keys_see_neither_the_address_nor_errors_of_an_endpoint(
    client: TestClient, endpoint: dict[str, Any]
) -> None:
    shown = client.get(f"{ENDPOINTS}/vllm-1").json()

    assert (shown["url"], shown["adapter_folder"], shown["last_error"]) == (None, None, None)
    assert (shown["name"], shown["base_model"]) == ("vllm-1", BASE)
    assert client.post(ENDPOINTS, json=body(Path("/"))).status_code == 403
    assert client.delete(f"{ENDPOINTS}/vllm-1").status_code == 403
    assert client.get(f"{ENDPOINTS}/vllm-1/deployments").status_code == 403


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"name": "vllm"}, "name", "invalid_value"),
        ({"name": "built-in"}, "name", "invalid_value"),
        ({"name": "a b"}, "name", "invalid_value"),
        ({"base_model": "none"}, "model", "model_not_found"),
        ({"url": "ftp://host"}, "url", "invalid_value"),
        ({"url": "http://user@host"}, "url", "invalid_value"),
        ({"url": "http://host/?a=1"}, "url", "invalid_value"),
        ({"adapter_folder": "relative"}, "adapter_folder", "bad_download"),
        ({"adapter_folder": "/does/not/exist"}, "adapter_folder", "bad_download"),
        ({"max_rank": 0}, "max_rank", None),
        ({"api_key": "two\nlines"}, "api_key", None),
        ({"api_key": "schlüssel"}, "api_key", None),
        ({"kind": "other"}, "kind", None),
    ],
)
def test_invalid_endpoint_is_rejected_with_the_field(
    operator: TestClient, adapter: Adapter, tmp_path: Path, change: dict[str, Any], param: str, code: str | None
) -> None:
    error = operator.post(ENDPOINTS, json=body(tmp_path, **change)).json()["error"]

    assert error["param"] == param
    assert code is None or error["code"] == code
    assert str(change.get("api_key")) not in error["message"]


def test_base_model_for_which_vllm_has_no_lora_is_not_registered(
    operator: TestClient, adapter: Adapter, services: Services, tmp_path: Path
) -> None:
    with services.db.write() as session:
        session.get_one(BaseModelRow, BASE).description = {"architecture": "GPT2LMHeadModel"}

    error = operator.post(ENDPOINTS, json=body(tmp_path)).json()["error"]

    assert (error["code"], error["param"]) == ("not_servable", "base_model")
    assert "GPT2LMHeadModel" in error["message"]


def test_deployment_is_requested_shown_and_removed(
    client: TestClient, operator: TestClient, endpoint: dict[str, Any], adapter: Adapter
) -> None:
    made = client.post(deployments(adapter), json={"endpoint": "vllm-1"}).json()

    assert (made["state"], made["endpoint"], made["adapter"]) == ("pending", "vllm-1", adapter.name)
    assert client.post(deployments(adapter), json={"endpoint": endpoint["id"]}).json()["id"] == made["id"]
    assert [one["id"] for one in client.get(deployments(adapter)).json()["data"]] == [made["id"]]
    on_endpoint = operator.get(f"{ENDPOINTS}/vllm-1/deployments").json()["data"]
    assert [one["id"] for one in on_endpoint] == [made["id"]]
    assert client.delete(f"{deployments(adapter)}/vllm-1").json() == {
        "id": made["id"], "object": "adapter.deployment", "deleted": True
    }  # fmt: skip
    again = client.delete(f"{deployments(adapter)}/vllm-1")
    assert again.json()["error"]["code"] == "deployment_not_found"
    assert client.delete(f"{deployments(adapter)}/vllm-1", headers={"x-stainless-retry-count": "1"}).status_code == 200


def test_repeated_deployment_clears_the_error_of_the_failed_one(
    client: TestClient, services: Services, endpoint: dict[str, Any], adapter: Adapter
) -> None:
    client.post(deployments(adapter), json={"endpoint": "vllm-1"})
    with services.db.write() as session:
        row = session.scalars(select(Deployment)).one()
        row.state, row.last_error, row.operator_error = "failed", "The server refused it.", "500"

    again = client.post(deployments(adapter), json={"endpoint": "vllm-1"}).json()

    assert (again["state"], again["last_error"]) == ("pending", "Endpoint 'vllm-1' is not ready yet.")


def test_number_of_deployments_is_limited(
    client: TestClient, endpoint: dict[str, Any], adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catalog.serving.deployments.MAX_DEPLOYMENTS", 0)

    refused = client.post(deployments(adapter), json={"endpoint": "vllm-1"})

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "limit_reached")


def test_projects_see_no_deployments_of_each_other(
    client: TestClient, stranger: TestClient, endpoint: dict[str, Any], adapter: Adapter
) -> None:
    client.post(deployments(adapter), json={"endpoint": "vllm-1"})

    for response in (
        stranger.get(deployments(adapter)),
        stranger.post(deployments(adapter), json={"endpoint": "vllm-1"}),
        stranger.delete(f"{deployments(adapter)}/vllm-1"),
    ):
        assert response.json()["error"]["code"] == "adapter_not_found"


@pytest.mark.parametrize(
    ("change", "reason"), [({"base_model": "smol"}, "base model"), ({"max_rank": 8}, "--max-lora-rank")]
)
def test_adapter_that_the_endpoint_can_not_serve_is_not_deployed(
    client: TestClient, operator: TestClient, adapter: Adapter, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    operator.post(ENDPOINTS, json=body(tmp_path, **change))

    error = client.post(deployments(adapter), json={"endpoint": "vllm-1"}).json()["error"]

    assert error["code"] == "not_servable"
    assert reason in error["message"]


def test_endpoint_of_the_same_base_model_under_another_name_serves_the_adapter(
    client: TestClient, operator: TestClient, world: World, adapter: Adapter, tmp_path: Path
) -> None:
    base_models.add(world.db, name="twin", kind="folder", source="/models/solid")
    world.finish_import("twin", digest=adapter.base_digest, description=DESCRIPTION)
    assert operator.post(ENDPOINTS, json=body(tmp_path, base_model="twin")).status_code == 200

    made = client.post(deployments(adapter), json={"endpoint": "vllm-1"})

    assert (made.status_code, made.json()["state"]) == (200, "pending")


def test_unknown_endpoint_names_the_existing_ones(
    client: TestClient, endpoint: dict[str, Any], adapter: Adapter
) -> None:
    error = client.post(deployments(adapter), json={"endpoint": "vllm-2"}).json()["error"]

    assert (error["code"], error["param"]) == ("serving_endpoint_not_found", "endpoint")
    assert "vllm-1" in error["remedy"]
