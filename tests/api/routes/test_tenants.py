"""What is another project's looks exactly as what doesn't exist: asked of every route that the OpenAPI document has.

A route that names something by a parameter which isn't known here fails, so that none is left out by oversight.
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
from catalog.tables.storage import UploadPart
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
    }
)
"""What they answer is of no project."""
NAMELESS = frozenset(
    {
        *("upload_file", "create_upload", "add_model", "create_project", "create_organization"),
        "create_webhook_endpoint",
        *("create_sign_in_link", "preview_sign_in_link", "open_sign_in_link"),
        *("create_browser_session", "delete_browser_session"),
    }
)
"""Changes that name nothing of a project, neither in their path nor in their body."""
PERMISSION = "cp-of-the-checkpoint"
GIVEN = {"model": BASE, "path": "README.md", "number": "0", "permission_id": PERMISSION}
"""What a request needs beside the name of what it is about."""
PART = "part-of-the-upload"
SENT: dict[str, dict[str, Any]] = {
    "rename_organization": {"json": {"name": "renamed"}},
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
    "add_trial": {"json": {"parameters": {"lora.rank": 4}}},
}
"""What goes with a request that needs a body, by its operation."""
AS_A_RETRY = {"x-stainless-retry-count": "1"}
SENT_ANEW = frozenset({"x-request-id", "content-length", "date"})
"""Headers that differ from answer to answer, or as ids do in length."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    path: str
    method: str
    told: dict[str, Any]

    @property
    def id(self) -> str:
        return self.told["operationId"]

    def parameters(self, place: str) -> dict[str, dict[str, Any]]:
        return {one["name"]: one for one in self.told.get("parameters", []) if one["in"] == place}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Something of ours, and a name of the same form that nothing has."""

    ours: str
    absent: str


@dataclass(frozen=True, kw_only=True)
class Ours:
    """What the project has, by the parameter of a path that names it."""

    pairs: dict[str, list[Pair]]
    project_id: str
    their_file: str
    """A file of the stranger's own."""

    def all(self) -> list[Pair]:
        """But for workers, which are of no project, and which everybody sees."""
        own = (pairs for kind, pairs in self.pairs.items() if kind != "worker_id")
        return list(dict.fromkeys(pair for pairs in own for pair in pairs))

    def marks(self) -> list[str]:
        """No answer to a stranger holds any of these."""
        return [*(pair.ours for pair in self.all()), self.project_id, PERMISSION, '"ours"', "secret-label"]


@pytest.fixture
def ours(services: Services, world: World, client: TestClient, tmp_path: Path) -> Ours:
    """One of everything; a job has succeeded, one runs and has a checkpoint, and one waits."""
    adapter = trained(services, world, tmp_path / "made")
    hook = {"name": "secret-label", "url": "https://hooks.invalid/", "event_types": list(EVENT_TYPES)}
    hook_id = client.post("/v1/webhook_endpoints", json=hook).json()["id"]
    client.post(f"/v1/webhook_endpoints/{hook_id}", json={"enabled": False})  # so that nothing changes by itself
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
    asked = {"model": BASE, "training_file": world.file_id, "search": {"type": "ask_tell", "trials": 9}}
    measured = {"objective": {"metric": "train_loss"}}
    sweep_id = client.post("/v1/sweeps", json={**asked, **measured}).json()["id"]
    client.post(f"/v1/sweeps/{sweep_id}/trials", json={"parameters": {"lora.rank": 8}})
    commands.cancel(world.db, **world.of(world.submit().id))
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
            "plan_id": [_pair(planned.id)],
            "worker_id": [_pair(world.worker("worker-1"))],
            "job_id": [_pair(adapter.job_id), _pair(claim.job.id), _pair(waiting.id)],
            "adapter": [_pair(adapter.id), named, checkpoint],
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
    """For whom streams end after what they begin with."""
    services.feed.close()
    return stranger


def test_a_stranger_is_told_of_an_id_of_ours_what_he_is_told_of_none(
    app: FastAPI, stranger: TestClient, operator: TestClient, ours: Ours, services: Services
) -> None:
    before = _rows(services.db)

    for operation in _naming(app):
        for pair in _pairs(operation, ours):
            found, absent = (_told(_ask(stranger, operation, name), name) for name in (pair.ours, pair.absent))
            assert found == absent, (operation.id, pair.ours)

    assert _rows(services.db) == before
    for operation in sorted(_naming(app), key=lambda one: ("get", "post", "delete").index(one.method)):
        for pair in _pairs(operation, ours)[:1]:
            owners = _ask(operator, operation, pair.ours)
            assert owners.status_code not in (400, 401, 404), (operation.id, owners.text)  # so it was well asked


def test_no_list_and_no_answer_without_an_id_shows_a_stranger_anything_of_ours(
    app: FastAPI, stranger: TestClient, operator: TestClient, ours: Ours
) -> None:
    for operation in _nameless(app, "get"):
        for query in _queries(operation):
            answer = _ask(stranger, operation, "", query=query).text
            assert [mark for mark in ours.marks() if mark in answer] == [], operation.id
        if operation.id not in SHARED:
            own = _ask(operator, operation, "").text
            assert any(mark in own for mark in ours.marks()), f"{operation.id} shows nothing to its owner either"


def test_nothing_of_ours_can_be_named_in_a_query(app: FastAPI, stranger: TestClient, ours: Ours) -> None:
    for operation in _operations(app):
        if operation.method != "get" or "{" in operation.path:
            continue
        for parameter in _texts(operation):
            for pair in ours.all():
                answers = [
                    _told(_ask(stranger, operation, "", query={parameter: name}), name)
                    for name in (pair.ours, pair.absent)
                ]
                assert answers[0] == answers[1], (operation.id, parameter, pair.ours)


def test_nothing_of_ours_can_be_named_in_a_body(app: FastAPI, stranger: TestClient, ours: Ours) -> None:
    bodies = _bodies(ours)
    unknown = {operation.id for operation in _nameless(app, "post", "delete")} - bodies.keys() - NAMELESS
    assert unknown == set(), "say here what they may name"

    for operation_id, fields in bodies.items():
        (operation,) = [one for one in _operations(app) if one.id == operation_id]
        for field, least, pairs in fields:
            for pair in pairs:
                answers = [
                    _told(_ask(stranger, operation, "", body={**least, field: name}), name)
                    for name in (pair.ours, pair.absent)
                ]
                assert answers[0] == answers[1], (operation_id, field, pair.ours)
                assert answers[0][0] in (400, 404), (operation_id, field, answers[0])


def test_a_part_of_ours_completes_no_upload_of_a_strangers(stranger: TestClient, ours: Ours) -> None:
    announced = {"bytes": 1, "filename": "a", "mime_type": "text/plain", "purpose": "user_data"}
    path = f"/v1/uploads/{stranger.post('/v1/uploads', json=announced).json()['id']}/complete"

    found, absent = (
        _told(stranger.post(path, json={"part_ids": [name]}), name) for name in (PART, "part-of-none-known")
    )

    assert found == absent
    assert found[0] in (400, 404)


def _bodies(ours: Ours) -> dict[str, list[tuple[str, dict[str, Any], list[Pair]]]]:
    """By operation: a field that names something, what else is sent, and what is tried."""
    job = {"model": BASE, "training_file": ours.their_file}
    named = {"training_file": "file_id", "validation_file": "file_id", "parent_adapter": "adapter", "model": "model"}
    sweep = {**job, "search": {"type": "ask_tell", "trials": 1}, "objective": {"metric": "train_loss"}}
    return {
        "create_job": [
            *((field, job, ours.pairs[kind]) for field, kind in named.items()),
            ("plan", {}, ours.pairs["plan_id"]),
        ],
        "create_plan": [(field, job, ours.pairs[kind]) for field, kind in named.items()],
        "create_sweep": [(field, sweep, ours.pairs[kind]) for field, kind in named.items()],
        "create_api_key": [("project", {"name": "x"}, ours.pairs["project"])],
    }


def _operations(app: FastAPI) -> list[Operation]:
    return [Operation(path=path, method=method, told=told) for path, method, told in operations(app)]


def _naming(app: FastAPI) -> list[Operation]:
    return [operation for operation in _operations(app) if "{" in operation.path]


def _nameless(app: FastAPI, *methods: str) -> list[Operation]:
    return [one for one in _operations(app) if "{" not in one.path and one.method in methods]


def _pairs(operation: Operation, ours: Ours) -> list[Pair]:
    return ours.pairs[_subject(operation)]


def _subject(operation: Operation) -> str:
    """The parameter that says what the request is about."""
    named = [
        name for name in operation.parameters("path") if name not in GIVEN or f"models/{{{name}}}" in operation.path
    ]
    assert len(named) == 1, f"{operation.id}: say how its path is filled: {named}"
    return named[0]


def _texts(operation: Operation) -> list[str]:
    """Its query parameters that can hold a name."""
    schemas = {name: one["schema"] for name, one in operation.parameters("query").items()}
    return [name for name, schema in schemas.items() if "string" in json.dumps(schema) and "enum" not in schema]


def _queries(operation: Operation) -> Iterator[dict[str, str]]:
    """Without any, and with each switch turned on."""
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


def _told(response: Any, name: str) -> tuple[int, str, dict[str, str]]:
    """All of an answer but the name that was asked for."""
    headers = {key: value for key, value in response.headers.items() if key not in SENT_ANEW}
    return response.status_code, response.text.replace(name, "NAME"), headers


def _rows(db: Database) -> str:
    """Everything that is stored, but when keys were used, and what chores write beside requests."""
    told: list[str] = []
    chores = {"pulse", "audit_head"}
    with db.read() as session:
        for table in Table.metadata.sorted_tables:
            passed_over = {"last_used_at", *(("link", "previous", "digest") if table.name == "audit_events" else ())}
            columns = [column for column in table.columns if column.name not in passed_over]
            if table.name in chores:
                continue
            told += [f"{table.name} {json.dumps(list(row), default=str)}" for row in session.execute(select(*columns))]
    return "\n".join(sorted(told))


def _pair(ident: str) -> Pair:
    return Pair(ours=ident, absent=f"{ident.partition('-')[0]}-{ABSENT}")
