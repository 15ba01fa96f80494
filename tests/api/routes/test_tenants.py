"""Resources of other projects are indistinguishable from missing ones, for every route of the OpenAPI document.

A route with a path parameter that is unknown here fails the tests, so that no route is skipped by oversight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import select, update
from starlette.testclient import TestClient

from api.deps import Services
from catalog.audit import chain
from catalog.db.database import Database
from catalog.jobs import commands
from catalog.lifecycle import recording
from catalog.registry import permissions
from catalog.serving import deployments, endpoints
from catalog.serving.endpoints import NewEndpoint
from catalog.tables.storage import AdapterExport, UploadPart
from catalog.tables.table import Table
from catalog.tables.tenancy import ModelPermission
from catalog.tenancy import organizations
from catalog.webhooks.outbox import EVENT_TYPES
from tests.api.site import chat_lines
from tests.api.test_openapi import operations
from tests.api.trained import BASE, stored_weights, trained
from tests.catalog.plan_data import ready as ready_plan
from tests.catalog.world import PEPPER, World, manifest

ABSENT = "0" * 24
SHARED = frozenset(
    {
        *("get_health", "get_readiness", "get_prometheus_metrics", "list_workers", "verify_audit_events"),
        *("list_webhook_event_types", "get_service_identity", "get_signing_keys"),
        *("list_serving_endpoints", "get_serving_endpoint"),
    }
)
"""Operations whose responses do not belong to a project."""
NAMELESS = frozenset(
    {
        *("upload_file", "create_upload", "add_model", "create_project", "create_organization"),
        *("create_webhook_endpoint", "create_serving_endpoint"),
        *("create_sign_in_link", "preview_sign_in_link", "open_sign_in_link"),
        *("create_browser_session", "delete_browser_session"),
    }
)
"""Changes that name no resource of a project in their path or body."""
PERMISSION = "cp-of-the-checkpoint"
ADAPTER = "ft:of-the-export"
ENDPOINT = "vllm-1"
GIVEN = {
    "model": BASE,
    "adapter": ADAPTER,
    "path": "README.md",
    "number": "0",
    "permission_id": PERMISSION,
    "endpoint": ENDPOINT,
}
"""Values of the parameters that do not name the subject of a request."""
PART = "part-of-the-upload"
SENT: dict[str, dict[str, Any]] = {
    "rename_organization": {"json": {"name": "renamed"}},
    "report_serving_endpoint": {"json": {"error": None}},
    "rename_project": {"json": {"name": "renamed"}},
    "weigh_project": {"json": {"weight": 2}},
    "limit_api_key": {"json": {}},
    "limit_project": {"json": {"queued_jobs": 5}},
    "move_job": {"json": {"to": "first"}},
    "create_model_permissions": {"json": {"project_ids": ["theirs"]}},
    "add_upload_part": {"files": {"data": ("a", b"more")}},
    "change_webhook_endpoint": {"json": {}},
    "test_webhook_endpoint": {"json": {"event_type": "fine_tuning.job.succeeded"}},
    "replay_webhook_endpoint": {"json": {"since": 0}},
    "complete_upload": {"json": {"part_ids": [PART]}},
    "create_deployment": {"json": {"endpoint": ENDPOINT}},
    "create_adapter_export": {"json": {"format": "merged"}},
}
"""The body of each operation that requires one."""
AS_A_RETRY = {"x-stainless-retry-count": "1"}
VARYING_HEADERS = frozenset({"x-request-id", "content-length", "date"})
"""Headers that differ between responses, or with the length of an id."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    path: str
    method: str
    definition: dict[str, Any]

    @property
    def id(self) -> str:
        return self.definition["operationId"]

    def parameters(self, place: str) -> dict[str, dict[str, Any]]:
        return {one["name"]: one for one in self.definition.get("parameters", []) if one["in"] == place}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A name of one of our resources, and a name of the same form that does not exist."""

    ours: str
    absent: str


@dataclass(frozen=True, kw_only=True)
class Ours:
    """The project's resources, by the path parameter that names them."""

    pairs: dict[str, list[Pair]]
    project_id: str
    their_file: str
    """A file of the other project."""

    def all(self) -> list[Pair]:
        """Return all pairs except workers and serving endpoints, which belong to no project and are visible to all."""
        own = (pairs for kind, pairs in self.pairs.items() if kind not in ("worker_id", "endpoint"))
        return list(dict.fromkeys(pair for pairs in own for pair in pairs))

    def marks(self) -> list[str]:
        """Return the texts that no response to the other project may contain."""
        return [*(pair.ours for pair in self.all()), self.project_id, PERMISSION, '"ours"', "secret-label"]


@pytest.fixture
def ours(services: Services, world: World, client: TestClient, tmp_path: Path) -> Ours:
    """Create one of each resource, with a succeeded job, a running job that has a checkpoint, and a waiting job."""
    adapter = trained(services, world, tmp_path / "made")
    server = NewEndpoint(
        name=ENDPOINT, base_model=BASE, kind="vllm", url="http://h", adapter_folder="/f", max_rank=16, api_key=None
    )
    endpoints.register(world.db, project_id=world.caller.project_id, new=server, pepper=PEPPER)
    deployments.deploy(world.db, project_id=world.caller.project_id, adapter=adapter.id, endpoint=ENDPOINT)
    hook = {"name": "secret-label", "url": "https://hooks.invalid/", "event_types": list(EVENT_TYPES)}
    hook_id = client.post("/v1/webhook_endpoints", json=hook).json()["id"]
    client.post(
        f"/v1/webhook_endpoints/{hook_id}", json={"enabled": False}
    )  # so that no delivery changes rows during a test
    claim = world.running(suffix="two", model=BASE)
    exported = stored_weights(services, tmp_path / "exported")
    files = manifest("c", kind="checkpoint")
    recording.record_checkpoint(world.db, claim.claim_id, step=5, artifact=files, exported=exported)
    waiting = world.submit(metadata={"team": "secret-label"})
    planned = ready_plan(world, model=BASE, metadata={"team": "secret-label"})
    file_id = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", chat_lines(2))}).json()["id"]
    announced = {"bytes": 1, "filename": "a", "mime_type": "text/plain", "purpose": "user_data"}
    upload_id = client.post("/v1/uploads", json=announced).json()["id"]
    client.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("a", b"x")})
    with world.db.write() as session:
        session.execute(update(UploadPart).values(id=PART))
    requests_id = world.file(purpose="batch", num_rows=None)
    batch = {"input_file_id": requests_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch_id = client.post("/v1/batches", json=batch).json()["id"]
    sweep_body = {"model": BASE, "training_file": world.file_id, "search": {"type": "grid"}}
    measured = {"objective": {"metric": "train_loss"}, "parameters": {"lora.rank": {"values": [8]}}}
    sweep_id = client.post("/v1/sweeps", json={**sweep_body, **measured}).json()["id"]
    commands.cancel(world.db, **world.of(world.submit().id))
    export_id = client.post(f"/v1/adapters/{adapter.id}/exports", json={"format": "merged"}).json()["id"]
    with world.db.write() as session:
        session.execute(update(AdapterExport).values(adapter_name=ADAPTER))
    (delivery,) = client.get(f"/v1/webhook_endpoints/{hook_id}/deliveries").json()["data"]
    chain.seal(world.db, pepper=PEPPER.current)
    name = f"ft:{BASE}:ours:two:{claim.job.id[-8:]}:ckpt-step-5"
    third = world.new_caller("third").project_id
    operator = replace(world.caller, is_operator=True)
    permissions.grant(world.db, caller=operator, model=name, projects_named=[third])
    with world.db.write() as session:
        session.execute(update(ModelPermission).values(id=PERMISSION))
    checkpoint = Pair(ours=name, absent=f"ft:{BASE}:ours:two:{'0' * 8}:ckpt-step-5")
    stem = adapter.name.rpartition(":")[0]
    named = Pair(ours=adapter.name, absent=f"{stem}:{'0' * 8}")
    return Ours(
        pairs={
            "file_id": [_pair(file_id), _pair(world.file_id)],
            "webhook_endpoint_id": [_pair(hook_id)],
            "webhook_delivery_id": [_pair(delivery["id"])],
            "upload_id": [_pair(upload_id)],
            "sweep_id": [_pair(sweep_id)],
            "batch_id": [_pair(batch_id)],
            "plan_id": [_pair(planned.id)],
            "worker_id": [_pair(world.worker("worker-1"))],
            "endpoint": [Pair(ours=ENDPOINT, absent="vllm-0")],
            "job_id": [_pair(adapter.job_id), _pair(claim.job.id), _pair(waiting.id)],
            "adapter": [_pair(adapter.id), named, checkpoint],
            "export": [_pair(export_id)],
            "api_key_id": [_pair(world.caller.api_key_id)],
            "organization": [_pair(organizations.create(world.db, "another").id)],
            "project": [_pair(world.caller.project_id)],
            "model": [named, checkpoint],
            "fine_tuned_model": [checkpoint, named],
        },
        project_id=world.caller.project_id,
        their_file=world.file(caller=world.stranger),
    )


@pytest.fixture
def stranger(stranger: TestClient, services: Services) -> TestClient:
    """Return the other project's client, with streams that end after their first messages."""
    services.feed.close()
    return stranger


def test_foreign_ids_are_indistinguishable_from_missing_ids(
    app: FastAPI, stranger: TestClient, operator: TestClient, ours: Ours, services: Services
) -> None:
    before = _rows(services.db)

    for operation in _naming(app):
        for pair in _pairs(operation, ours):
            found, absent = (_comparable(_ask(stranger, operation, name), name) for name in (pair.ours, pair.absent))
            assert found == absent, (operation.id, pair.ours)

    assert _rows(services.db) == before
    for operation in sorted(_naming(app), key=lambda one: ("get", "post", "delete").index(one.method)):
        for pair in _pairs(operation, ours)[:1]:
            owners = _ask(operator, operation, pair.ours)
            assert owners.status_code not in (400, 401, 404), (operation.id, owners.text)  # so the request was valid


def test_lists_and_routes_without_ids_reveal_no_foreign_resources(
    app: FastAPI, stranger: TestClient, operator: TestClient, ours: Ours
) -> None:
    for operation in _nameless(app, "get"):
        for query in _queries(operation):
            answer = _ask(stranger, operation, "", query=query).text
            assert [mark for mark in ours.marks() if mark in answer] == [], operation.id
        if operation.id not in SHARED:
            own = _ask(operator, operation, "").text
            assert any(mark in own for mark in ours.marks()), (
                f"{operation.id} does not show its resources to their owner either"
            )


def test_foreign_ids_in_queries_are_indistinguishable_from_missing_ids(
    app: FastAPI, stranger: TestClient, ours: Ours
) -> None:
    for operation in _operations(app):
        if operation.method != "get" or "{" in operation.path:
            continue
        for parameter in _texts(operation):
            for pair in ours.all():
                answers = [
                    _comparable(_ask(stranger, operation, "", query={parameter: name}), name)
                    for name in (pair.ours, pair.absent)
                ]
                assert answers[0] == answers[1], (operation.id, parameter, pair.ours)


def test_foreign_ids_in_bodies_are_indistinguishable_from_missing_ids(
    app: FastAPI, stranger: TestClient, ours: Ours
) -> None:
    bodies = _bodies(ours)
    unknown = {operation.id for operation in _nameless(app, "post", "delete")} - bodies.keys() - NAMELESS
    assert unknown == set(), "add these operations to NAMELESS or to _bodies"

    for operation_id, fields in bodies.items():
        (operation,) = [one for one in _operations(app) if one.id == operation_id]
        for field, least, pairs in fields:
            for pair in pairs:
                answers = [
                    _comparable(_ask(stranger, operation, "", body={**least, field: name}), name)
                    for name in (pair.ours, pair.absent)
                ]
                assert answers[0] == answers[1], (operation_id, field, pair.ours)
                assert answers[0][0] in (400, 404), (operation_id, field, answers[0])


def test_foreign_upload_part_cannot_complete_an_upload(stranger: TestClient, ours: Ours) -> None:
    announced = {"bytes": 1, "filename": "a", "mime_type": "text/plain", "purpose": "user_data"}
    path = f"/v1/uploads/{stranger.post('/v1/uploads', json=announced).json()['id']}/complete"

    found, absent = (
        _comparable(stranger.post(path, json={"part_ids": [name]}), name) for name in (PART, "part-of-none-known")
    )

    assert found == absent
    assert found[0] in (400, 404)


def _bodies(ours: Ours) -> dict[str, list[tuple[str, dict[str, Any], list[Pair]]]]:
    """Return, by operation, each field that names a resource, the rest of the body, and the pairs to try."""
    job = {"model": BASE, "training_file": ours.their_file}
    named = {"training_file": "file_id", "validation_file": "file_id", "parent_adapter": "adapter", "model": "model"}
    search = {"search": {"type": "grid"}, "parameters": {"lora.rank": {"values": [8]}}}
    sweep = {**job, **search, "objective": {"metric": "train_loss"}}
    return {
        "create_job": [
            *((field, job, ours.pairs[kind]) for field, kind in named.items()),
            ("plan", {}, ours.pairs["plan_id"]),
        ],
        "create_plan": [(field, job, ours.pairs[kind]) for field, kind in named.items()],
        "create_sweep": [(field, sweep, ours.pairs[kind]) for field, kind in named.items()],
        "create_chat_completion": [
            ("model", {"messages": [{"role": "user", "content": "Hi"}]}, ours.pairs["model"]),
        ],
        "create_completion": [("model", {"prompt": "Hi"}, ours.pairs["model"])],
        "create_batch": [
            ("input_file_id", {"endpoint": "/v1/completions", "completion_window": "24h"}, ours.pairs["file_id"]),
        ],
        "create_api_key": [("project", {"name": "x"}, ours.pairs["project"])],
    }


def _operations(app: FastAPI) -> list[Operation]:
    return [Operation(path=path, method=method, definition=definition) for path, method, definition in operations(app)]


def _naming(app: FastAPI) -> list[Operation]:
    return [one for one in _operations(app) if "{" in one.path and one.id not in SHARED]


def _nameless(app: FastAPI, *methods: str) -> list[Operation]:
    return [one for one in _operations(app) if "{" not in one.path and one.method in methods]


def _pairs(operation: Operation, ours: Ours) -> list[Pair]:
    return ours.pairs[_subject(operation)]


def _subject(operation: Operation) -> str:
    """Return the path parameter that names the subject of the request."""
    subjects = ("models/{model}", "adapters/{adapter}", "endpoints/{endpoint}")
    named = [
        name
        for name in operation.parameters("path")
        if name not in GIVEN or any(f"/{{{name}}}" in subject and subject in operation.path for subject in subjects)
    ]
    named = ["export"] if "export" in named else named
    assert len(named) == 1, f"{operation.id}: add its other path parameters to GIVEN: {named}"
    return named[0]


def _texts(operation: Operation) -> list[str]:
    """Return the query parameters that can hold a name."""
    schemas = {name: one["schema"] for name, one in operation.parameters("query").items()}
    return [name for name, schema in schemas.items() if "string" in json.dumps(schema) and "enum" not in schema]


def _queries(operation: Operation) -> Iterator[dict[str, str]]:
    """Yield an empty query, and a query with each Boolean parameter set."""
    yield {}
    for name, one in operation.parameters("query").items():
        if one["schema"].get("type") == "boolean":
            yield {name: "true"}


def _ask(
    client: TestClient,
    operation: Operation,
    name: str,
    *,
    query: dict[str, str] | None = None,
    body: dict[str, Any] | None = None,
) -> Any:
    path = operation.path
    if "{" in path:
        path = path.replace(f"{{{_subject(operation)}}}", name).format(**GIVEN)
    needed = {key: GIVEN[key] for key, one in operation.parameters("query").items() if one["required"] and key in GIVEN}
    sent = SENT.get(operation.id, {}) if body is None else {"json": body}
    request: Any = client.request
    return request(operation.method, path, params={**needed, **(query or {})}, headers=AS_A_RETRY, **sent)


def _comparable(response: Any, name: str) -> tuple[int, str, dict[str, str]]:
    """Return the response, with the requested name replaced."""
    headers = {key: value for key, value in response.headers.items() if key not in VARYING_HEADERS}
    return response.status_code, response.text.replace(name, "NAME"), headers


def _rows(db: Database) -> str:
    """Return all stored rows, without the times of key use and the writes of background tasks."""
    rows: list[str] = []
    background_tables = {"pulse", "audit_head"}
    with db.read() as session:
        for table in Table.metadata.sorted_tables:
            ignored = {"last_used_at", *(("link", "previous", "digest") if table.name == "audit_events" else ())}
            columns = [column for column in table.columns if column.name not in ignored]
            if table.name in background_tables:
                continue
            rows += [f"{table.name} {json.dumps(list(row), default=str)}" for row in session.execute(select(*columns))]
    return "\n".join(sorted(rows))


def _pair(ident: str) -> Pair:
    return Pair(ours=ident, absent=f"{ident.partition('-')[0]}-{ABSENT}")
