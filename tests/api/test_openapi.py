"""The OpenAPI document is complete: ids, tags, examples, errors and authentication."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.testclient import TestClient

from api.app import create_app
from api.openapi import Api
from api.requests.parameters import query_parameters
from catalog.spec.model_fields import Strict
from catalog.storage import files
from tests.api.auth.test_authentication import OPEN_PATHS
from tests.api.site import chat_lines

REFERENCE = re.compile(r'"#/components/schemas/(\w+)"')


def operations(app: FastAPI) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation)
        for path, methods in app.openapi()["paths"].items()
        for method, operation in methods.items()
    ]


def test_document_is_served_without_a_key_and_without_a_docs_page(anonymous: TestClient) -> None:
    assert anonymous.get("/openapi.json").json()["openapi"].startswith("3.1")
    assert anonymous.get("/docs").status_code == 404


def test_every_operation_has_a_unique_id_a_tag_and_a_summary(app: FastAPI) -> None:
    found = operations(app)

    ids = [operation["operationId"] for _, _, operation in found]
    assert len(ids) == len(set(ids)) >= 35
    tags = {tag["name"] for tag in app.openapi()["tags"]}
    assert all(set(operation["tags"]) <= tags and operation["summary"] for _, _, operation in found)


def test_document_matches_the_methods_and_parameters_of_the_app(app: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    declared: dict[str, set[str]] = {}
    include = Api.include_router

    def noting(api: Api, router: APIRouter, **given: Any) -> None:
        include(api, router, **given)
        for route in router.routes:
            if isinstance(route, APIRoute) and route.include_in_schema:
                declared[str(route.operation_id)] = query_parameters(route.dependant)

    monkeypatch.setattr(Api, "include_router", noting)
    create_app(app.state.services.settings).state.services.db.close()

    documented = {path: {method.upper() for method in methods} for path, methods in app.openapi()["paths"].items()}
    assert app.methods == documented
    for _, _, operation in operations(app):
        named = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"}
        assert declared[operation["operationId"]] == named, operation["operationId"]


def test_document_is_generated_only_on_request(app: FastAPI, client: TestClient) -> None:
    answers = [client.get(path).status_code for path in ("/v1/files?limit=1", "/v1/files?limt=1", "/v1/fles")]
    answers.append(client.put("/v1/files").status_code)

    assert answers == [200, 400, 404, 405]
    assert app.openapi_schema is None


def test_document_is_generated_outside_the_event_loop_thread(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    made_in: list[threading.Thread] = []
    make = app.openapi

    def noting() -> dict[str, Any]:
        made_in.append(threading.current_thread())
        return make()

    monkeypatch.setattr(app, "openapi", noting)

    async def ask() -> threading.Thread:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            assert (await client.get("/openapi.json")).json()["paths"]
        return threading.current_thread()

    serving = asyncio.run(ask())

    assert made_in
    assert serving not in made_in


def test_every_error_response_has_the_standard_schema(app: FastAPI) -> None:
    for path, method, operation in operations(app):
        for status, response in operation["responses"].items():
            if status < "400" or path == "/readyz":
                continue
            schema = response["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorResponse"}, (path, method, status)


def test_authenticated_operations_document_their_security(app: FastAPI) -> None:
    for path, method, operation in operations(app):
        if path in OPEN_PATHS:
            continue
        assert {"apiKey": []} in operation["security"], (path, method)
        assert {"400", "401"} <= set(operation["responses"]), (path, method)


def test_document_lists_every_accepted_purpose(app: FastAPI, client: TestClient) -> None:
    form = app.openapi()["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]

    for purpose in form["properties"]["purpose"]["enum"]:
        sent = client.post("/v1/files", data={"purpose": purpose}, files={"file": ("a.jsonl", chat_lines(1))})
        assert sent.json()["purpose"] == purpose
    assert form["properties"]["purpose"]["enum"] == list(files.PURPOSES)


def test_every_object_schema_has_an_example(app: FastAPI) -> None:
    schemas = app.openapi()["components"]["schemas"]
    objects = {name: schema for name, schema in schemas.items() if "object" in schema.get("properties", {})}
    small = {"FileDeleted", "ModelDeleted", "AdapterDeleted", "PlanDeleted", "SignedOut", "BatchErrors"}
    small |= {"ServingEndpointDeleted", "DeploymentDeleted"}

    without = [
        name
        for name, schema in objects.items()
        if "example" not in schema and not name.startswith("ListPage") and name not in small
    ]

    assert without == []


def test_every_json_body_is_strict(app: FastAPI) -> None:
    """Strict models reject unknown fields, and do not accept `false` for 0."""
    bodies = [each["requestBody"]["content"] for _, _, each in operations(app) if "requestBody" in each]
    named = {name for body in bodies for name in REFERENCE.findall(json.dumps(body.get("application/json", {})))}

    assert len(named) >= 9
    assert named - {model.__name__ for model in _subclasses(Strict)} == set()


def test_schemas_with_pattern_properties_forbid_other_keys(app: FastAPI) -> None:
    def with_patterns(part: Any) -> list[dict[str, Any]]:
        if isinstance(part, list):
            return [found for each in part for found in with_patterns(each)]
        if not isinstance(part, dict):
            return []
        below = [found for each in part.values() for found in with_patterns(each)]
        return [part, *below] if "patternProperties" in part else below

    found = with_patterns(app.openapi()["components"])
    assert found
    assert [schema for schema in found if schema.get("additionalProperties") is not False] == []


def _subclasses(model: type[BaseModel]) -> set[type[BaseModel]]:
    return {one for child in model.__subclasses__() for one in {child, *_subclasses(child)}}


def test_fields_that_stay_unchanged_if_omitted_have_no_default(app: FastAPI) -> None:
    schemas = app.openapi()["components"]["schemas"]

    for name in ("LimitsRequest", "ProjectLimits"):
        assert "example" in schemas[name]
        assert [field for field, schema in schemas[name]["properties"].items() if "default" in schema] == []
