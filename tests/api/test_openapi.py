"""The OpenAPI document tells everything: ids, tags, examples, refusals and how to sign in."""

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
from api.requests.query_parameters import query_parameters
from catalog.spec.strict import Strict
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


def test_the_document_is_served_without_a_key_and_loads_nothing_from_elsewhere(anonymous: TestClient) -> None:
    assert anonymous.get("/openapi.json").json()["openapi"].startswith("3.1")
    assert anonymous.get("/docs").status_code == 404


def test_every_operation_has_its_own_id_a_tag_and_a_summary(app: FastAPI) -> None:
    found = operations(app)

    ids = [operation["operationId"] for _, _, operation in found]
    assert len(ids) == len(set(ids)) >= 35
    tags = {tag["name"] for tag in app.openapi()["tags"]}
    assert all(set(operation["tags"]) <= tags and operation["summary"] for _, _, operation in found)


def test_what_requests_are_told_of_routes_is_what_the_document_tells(app: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, set[str]] = {}
    include = Api.include_router

    def noting(api: Api, router: APIRouter, **given: Any) -> None:
        include(api, router, **given)
        for route in router.routes:
            if isinstance(route, APIRoute) and route.include_in_schema:
                asked[str(route.operation_id)] = query_parameters(route.dependant)

    monkeypatch.setattr(Api, "include_router", noting)
    create_app(app.state.services.settings).state.services.db.close()

    told = {path: {method.upper() for method in methods} for path, methods in app.openapi()["paths"].items()}
    assert app.methods == told
    for _, _, operation in operations(app):
        named = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"}
        assert asked[operation["operationId"]] == named, operation["operationId"]


def test_only_who_asks_for_the_document_waits_for_it(app: FastAPI, client: TestClient) -> None:
    answers = [client.get(path).status_code for path in ("/v1/files?limit=1", "/v1/files?limt=1", "/v1/fles")]
    answers.append(client.put("/v1/files").status_code)

    assert answers == [200, 400, 404, 405]
    assert app.openapi_schema is None


def test_while_the_document_is_made_others_are_answered(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_every_refusal_is_in_openais_shape(app: FastAPI) -> None:
    for path, method, operation in operations(app):
        for status, response in operation["responses"].items():
            if status < "400" or path == "/readyz":
                continue
            schema = response["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorResponse"}, (path, method, status)


def test_every_operation_behind_a_key_says_so(app: FastAPI) -> None:
    for path, method, operation in operations(app):
        if path in OPEN_PATHS:
            continue
        assert {"apiKey": []} in operation["security"], (path, method)
        assert {"400", "401"} <= set(operation["responses"]), (path, method)


def test_the_document_names_every_purpose_that_is_taken(app: FastAPI, client: TestClient) -> None:
    form = app.openapi()["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]

    for purpose in form["properties"]["purpose"]["enum"]:
        sent = client.post("/v1/files", data={"purpose": purpose}, files={"file": ("a.jsonl", chat_lines(1))})
        assert sent.json()["purpose"] == purpose
    assert form["properties"]["purpose"]["enum"] == list(files.PURPOSES)


def test_every_object_of_the_wire_has_an_example(app: FastAPI) -> None:
    schemas = app.openapi()["components"]["schemas"]
    objects = {name: schema for name, schema in schemas.items() if "object" in schema.get("properties", {})}
    small = {"FileDeleted", "ModelDeleted", "AdapterDeleted", "PlanDeleted", "SignedOut"}

    without = [
        name
        for name, schema in objects.items()
        if "example" not in schema and not name.startswith("ListPage") and name not in small
    ]

    assert without == []


def test_every_json_body_is_read_strictly(app: FastAPI) -> None:
    """Unknown fields are refused, and `false` is no 0."""
    bodies = [told["requestBody"]["content"] for _, _, told in operations(app) if "requestBody" in told]
    named = {name for body in bodies for name in REFERENCE.findall(json.dumps(body.get("application/json", {})))}

    assert len(named) >= 9
    assert named - {model.__name__ for model in _subclasses(Strict)} == set()


def test_where_keys_have_a_pattern_the_document_says_that_there_are_no_others(app: FastAPI) -> None:
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


def test_fields_that_stay_as_they_are_have_no_default(app: FastAPI) -> None:
    schemas = app.openapi()["components"]["schemas"]

    for name in ("LimitsRequest", "ProjectLimits"):
        assert "example" in schemas[name]
        assert [field for field, schema in schemas[name]["properties"].items() if "default" in schema] == []
