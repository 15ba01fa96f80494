"""/v1/audit_events: every change over the API is recorded with its actor, address and request."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.testclient import TestClient

from api.app import open_services
from api.auth.scopes import NEEDED
from api.background.periodic import PERIODIC
from api.deps import Services
from api.rate_limits.threads import SlowWork
from catalog.audit import chain
from tests.api.site import chat_lines, error_of, open_link
from tests.api.test_openapi import operations
from tests.api.trained import trained
from tests.catalog.world import World

CHANGES_NOTHING = {
    "preview_sign_in_link",
    "verify_adapter",
    "create_plan",  # a dry run
    "delete_plan",  # plans expire within a week
    "create_chat_completion",  # answers are not stored
    "create_completion",
    "add_upload_part",  # the log records the creation and the end of the upload
}
"""Operations other than GET that the audit log does not record."""
EVENT_TYPES: dict[str, str] = {
    "upload_file": "file.created",
    "delete_file": "file.deleted",
    "create_upload": "upload.created",
    "complete_upload": "file.created",
    "cancel_upload": "upload.cancelled",
    "create_adapter_export": "adapter_export.created",
    "cancel_adapter_export": "adapter_export.cancelled",
    "delete_adapter_export": "adapter_export.deleted",
    "create_deployment": "adapter.deployed",
    "delete_deployment": "adapter.undeployed",
    "create_serving_endpoint": "serving_endpoint.created",
    "delete_serving_endpoint": "serving_endpoint.deleted",
    "report_serving_endpoint": "serving_endpoint.reported",
    "create_batch": "batch.created",
    "cancel_batch": "batch.cancelled",
    "create_job": "job.created",
    "reproduce_adapter": "job.created",
    "cancel_job": "job.cancelled",
    "pause_job": "job.paused",
    "resume_job": "job.resumed",
    "create_sweep": "sweep.created",
    "cancel_sweep": "sweep.cancelled",
    "close_sweep": "sweep.closed",
    "stop_trial": "trial.stopped",
    "hold_job": "job.held",
    "release_job": "job.released",
    "move_job": "job.moved",
    "delete_adapter": "adapter.deleted",
    "create_webhook_endpoint": "webhook_endpoint.created",
    "change_webhook_endpoint": "webhook_endpoint.updated",
    "rotate_webhook_secret": "webhook_endpoint.secret_rotated",
    "delete_webhook_endpoint": "webhook_endpoint.deleted",
    "test_webhook_endpoint": "webhook_endpoint.tested",
    "replay_webhook_endpoint": "webhook_endpoint.replayed",
    "replay_webhook_delivery": "webhook_delivery.replayed",
    "delete_model": "model.deleted",
    "create_model_permissions": "permission.created",
    "delete_model_permission": "permission.deleted",
    "add_model": "model.added",
    "create_api_key": "api_key.created",
    "revoke_api_key": "api_key.revoked",
    "rotate_api_key": "api_key.rotated",
    "limit_api_key": "api_key.updated",
    "create_organization": "organization.created",
    "rename_organization": "organization.updated",
    "create_project": "project.created",
    "rename_project": "project.updated",
    "weigh_project": "project.updated",
    "limit_project": "project.updated",
    "archive_project": "project.archived",
    "restore_project": "project.restored",
    "cordon_worker": "worker.cordoned",
    "uncordon_worker": "worker.uncordoned",
    "drain_worker": "worker.drained",
    "create_sign_in_link": "sign_in_link.created",
    "create_browser_session": "login.succeeded",
    "open_sign_in_link": "login.succeeded",
    "delete_browser_session": "logout.succeeded",
}
"""The audit event of each operation. tests/catalog/audit/test_audit.py creates one of each."""


def latest(operator: TestClient, **params: Any) -> dict[str, Any]:
    return operator.get("/v1/audit_events", params={"limit": 1, **params}).json()["data"][0]


def test_every_changing_operation_has_an_audit_event(app: FastAPI) -> None:
    changing = {route["operationId"] for _, method, route in operations(app) if method != "get"}

    assert changing - CHANGES_NOTHING - EVENT_TYPES.keys() == set()
    without_a_key = {"create_browser_session", "open_sign_in_link", "preview_sign_in_link"}
    assert EVENT_TYPES.keys() <= changing <= NEEDED.keys() | without_a_key


def test_event_records_key_request_and_address(client: TestClient, operator: TestClient, world: World) -> None:
    answer = client.post("/v1/fine_tuning/jobs", json={"model": "smol", "training_file": world.file_id})

    event = latest(operator)
    assert (event["type"], event["object_id"]) == ("job.created", answer.json()["id"])
    assert event["request_id"] == answer.headers["x-request-id"]
    assert event["address"] == "127.0.0.1"
    assert event["actor"]["type"] == "api_key"
    assert event["actor"]["name"] == "test"
    assert event["actor"]["id"] == client.get("/v1/api_keys").json()["data"][1]["id"]
    assert event["project_id"] == world.caller.project_id
    assert event["link"] is None
    assert event["details"] == {"model": "smol", "training_file": world.file_id, "method": "supervised"}


@pytest.mark.parametrize("purpose", ["fine-tune"])
def test_file_events_keep_the_actor_across_threads(client: TestClient, operator: TestClient, purpose: str) -> None:
    made = client.post("/v1/files", data={"purpose": purpose}, files={"file": ("a.jsonl", chat_lines(2))}).json()
    created = latest(operator)
    client.delete(f"/v1/files/{made['id']}")
    deleted = latest(operator)

    assert [(event["type"], event["object_id"]) for event in (created, deleted)] == [
        ("file.created", made["id"]),
        ("file.deleted", made["id"]),
    ]
    assert created["actor"]["type"] == deleted["actor"]["type"] == "api_key"
    assert created["details"]["filename"] == "a.jsonl"


def test_browser_actor_differs_from_its_key(
    anonymous: TestClient, operator: TestClient, operator_key: str, world: World
) -> None:
    headers = {"x-lorry-csrf": "1", "origin": "http://127.0.0.1"}
    anonymous.post("/v1/browser_session", json={"api_key": operator_key}, headers=headers)
    login = latest(operator)

    anonymous.post(f"/v1/projects/{world.stranger.project_id}/weight", json={"weight": 3}, headers=headers)
    weighed = latest(operator)

    assert login["type"] == "login.succeeded"
    assert weighed["details"] == {"weight": 3.0, "was": 1.0}
    assert login["actor"] == weighed["actor"]
    assert login["actor"]["type"] == "browser"
    assert weighed["project_id"] == world.stranger.project_id


def test_actor_does_not_leak_between_requests(
    client: TestClient, anonymous: TestClient, operator: TestClient, services: Services
) -> None:
    client.post("/v1/sign_in_links")
    operator.get("/v1/projects")

    open_link(anonymous, client)

    event = latest(operator)
    assert event["type"] == "login.succeeded"
    assert event["actor"]["type"] == "browser"


def test_project_pages_through_only_its_own_events(client: TestClient, stranger: TestClient, world: World) -> None:
    for _ in range(3):
        client.post("/v1/sign_in_links")
    pages, after = 0, None
    seen: list[str] = []
    while True:
        page = client.get("/v1/audit_events", params={"limit": 2, **({"after": after} if after else {})}).json()
        seen += [event["id"] for event in page["data"]]
        pages, after = pages + 1, page["last_id"]
        if not page["has_more"]:
            break

    whole = client.get("/v1/audit_events", params={"limit": 100}).json()["data"]
    assert seen == [event["id"] for event in whole]
    assert pages == -(-len(seen) // 2) > 2
    assert {event["project_id"] for event in whole} == {world.caller.project_id}
    theirs = stranger.get("/v1/audit_events", params={"limit": 100}).json()["data"]
    assert {event["project_id"] for event in theirs} == {world.stranger.project_id}


def test_events_support_openais_filters(client: TestClient, operator: TestClient) -> None:
    client.post("/v1/sign_in_links")
    at = latest(operator)["effective_at"]

    def number(**params: Any) -> int:
        return len(operator.get("/v1/audit_events", params={"limit": 100, **params}).json()["data"])

    assert number(**{"event_types[]": "sign_in_link.created"}) == 1
    assert number(**{"event_types[]": ["sign_in_link.created", "model.added"]}) == 2
    assert number(**{"effective_at[gte]": at, "effective_at[lte]": at}) == 1
    assert number(**{"effective_at[gt]": at}) == number(**{"effective_at[lt]": 5}) == 0
    wrong = operator.get("/v1/audit_events", params={"event_types[]": "job.eaten"})
    assert (wrong.status_code, error_of(wrong)["code"]) == (400, "invalid_value")


def test_background_task_seals_the_log_and_the_chain_verifies(operator: TestClient, services: Services) -> None:
    open_ends = operator.get("/v1/audit_events/verify").json()
    seal(services)

    found = operator.get("/v1/audit_events/verify").json()
    lines = operator.get("/v1/audit_events/export").text.splitlines()

    assert open_ends["num_events"] == 0 < open_ends["num_unsealed"]
    assert (found["is_sound"], found["num_events"]) == (True, open_ends["num_unsealed"])
    exported = [json.loads(line) for line in lines]
    verified = chain.check_export(exported, peppers=[services.pepper.current])
    assert (verified.misfit, verified.last_digest) == (None, found["last_digest"])
    assert exported[-1] == latest(operator, **{"event_types[]": "api_key.created"})
    assert (latest(operator)["type"], latest(operator)["link"]) == ("audit.exported", None)


def test_verify_and_export_require_an_operator(client: TestClient) -> None:
    refused = [client.get(f"/v1/audit_events/{what}") for what in ("verify", "export")]

    assert [(answer.status_code, error_of(answer)["code"]) for answer in refused] == [(403, "operator_required")] * 2


def test_downloads_and_exports_are_recorded(
    client: TestClient, operator: TestClient, services: Services, world: World, tmp_path: Path
) -> None:
    adapter = trained(services, world, tmp_path / "made")
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", chat_lines(2))}}
    file = client.post("/v1/files", **form).json()["id"]

    assert client.get(f"/v1/files/{file}/content").content == chat_lines(2)
    client.get(f"/v1/files/{file}/content")
    client.get("/v1/files/file-none/content")
    client.get(f"/v1/adapters/{adapter.name}/files/none")
    client.get(f"/v1/adapters/{adapter.name}/archive")
    client.get(f"/v1/adapters/{adapter.name}/files/README.md")
    operator.get("/v1/audit_events/export")

    types = ["file.downloaded", "adapter.downloaded", "audit.exported"]
    found = operator.get("/v1/audit_events", params={"event_types[]": types}).json()["data"]
    assert [(event["type"], event["object_id"]) for event in reversed(found)] == [
        ("file.downloaded", file),
        ("adapter.downloaded", adapter.id),
        ("audit.exported", None),
    ]
    key_id = client.headers["authorization"].split("_")[1]
    assert [event["actor"]["id"] == key_id for event in reversed(found)] == [True, True, False]
    assert {event["address"] for event in found} == {"127.0.0.1"}
    assert {event["project_id"] for event in found} == {world.caller.project_id}


def test_download_that_does_not_begin_is_not_recorded(
    client: TestClient, operator: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", chat_lines(2))}}
    file = client.post("/v1/files", **form).json()["id"]
    monkeypatch.setattr(services.downloads, "_per_key", 0)

    assert client.get(f"/v1/files/{file}/content").status_code == 429

    params = {"event_types[]": "file.downloaded"}
    assert operator.get("/v1/audit_events", params=params).json()["data"] == []


def test_verification_runs_in_the_threads_of_slow_work(
    operator: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verification reads store files, and routes that only read the database must not wait for it."""
    seal(services)
    run, num_runs = SlowWork.run, list[str]()

    async def counted(self: SlowWork, project_id: str, work: Callable[[], Any]) -> Any:
        num_runs.append(project_id)
        return await run(self, project_id, work)

    monkeypatch.setattr(SlowWork, "run", counted)

    assert operator.get("/v1/audit_events/verify").json()["is_sound"]
    assert len(num_runs) == 1


def test_log_verifies_after_a_pepper_rotation(operator: TestClient, services: Services) -> None:
    """A server that starts with both peppers stores the keys of the old one. After that, the new pepper is enough."""
    seal(services)
    old_file = services.settings.data_dir / "pepper.previous"
    old_file.write_bytes(services.pepper.current)
    settings = services.settings.model_copy(update={"pepper": SecretStr("n" * 32)})
    open_services(settings, services.api_settings).db.close()
    old_file.unlink()

    started = open_services(settings, services.api_settings)
    operator.post("/v1/projects", json={"name": "after"})
    seal(started)

    assert started.pepper.previous is None
    found = chain.check(started.db, peppers=started.pepper.all())
    assert (found.misfit, found.num_unsealed) == (None, 0)
    started.db.close()


def seal(services: Services) -> None:
    next(each for each in PERIODIC if each.name == "seal_audit_log").run(services)
