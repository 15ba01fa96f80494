"""Each route requires a scope, documents it, and rejects keys without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.auth.scopes import ANY_KEY, NEEDED
from api.deps import Services
from catalog.tenancy import authentication
from catalog.tenancy.scopes import OPERATORS, SCOPES
from tests.api.auth.test_authentication import OPEN_PATHS
from tests.api.conftest import with_key
from tests.api.site import error_of, open_link
from tests.api.test_openapi import operations
from tests.architecture.source_files import ROOT
from tests.catalog.world import World

NewClient = Callable[..., TestClient]


@pytest.fixture
def holder(app: FastAPI, anonymous: TestClient, services: Services, world: World) -> NewClient:
    """Return a factory: `holder("jobs:read")` creates a client whose key has only this scope."""

    def new_client(*scopes: str, is_operator: bool = True) -> TestClient:
        project_id = world.caller.project_id
        given = {"name": "some", "scopes": scopes, "is_operator": is_operator, "project_id": project_id}
        return with_key(app, authentication.create(services.db, pepper=services.pepper, **given)[1])  # pyright: ignore

    return new_client


def test_openapi_documents_the_scopes_of_authenticated_operations(app: FastAPI) -> None:
    documented = {
        each["operationId"]: (path, method, each.get("x-scopes", [])) for path, method, each in operations(app)
    }
    read_only = {"verify_adapter"}  # reads every byte again, and changes nothing
    by_work = {"create_plan"}  # needs jobs:write where a worker has to prepare files
    inference = {
        "create_chat_completion",
        "create_completion",
        "create_batch",
        "list_batches",
        "get_batch",
        "cancel_batch",
    }

    assert {name for name, (path, _, _) in documented.items() if path not in OPEN_PATHS} - NEEDED.keys() == set()
    assert {scope for needed in NEEDED.values() for scope in needed} == set(SCOPES)
    for name, needed in NEEDED.items():
        _, method, shown = documented[name]
        verb = "answer" if name in inference else "read" if method == "get" or name in read_only else "write"
        assert shown == list(needed), name
        assert name in by_work or all(scope.endswith(f":{verb}") for scope in needed), name


def test_every_operation_requires_exactly_its_scope(app: FastAPI, services: Services, holder: NewClient) -> None:
    services.feed.close()
    clients = {
        needed: (holder(*(one for one in SCOPES if one not in needed)), holder(*needed))
        for needed in set(NEEDED.values()) - {ANY_KEY}
    }

    for path, method, operation in operations(app):
        needed = NEEDED.get(operation["operationId"], ANY_KEY)
        if needed == ANY_KEY:
            continue
        filled = path.replace("{", "").replace("}", "")
        rejected, opened = (client.request(method, filled) for client in clients[needed])

        error = error_of(rejected)
        assert (rejected.status_code, error["code"]) == (403, "missing_scope"), (path, method)
        assert f"does not have the scope {' or '.join(needed)}." in error["message"]
        option = " --operator" if needed[0] in OPERATORS else ""
        assert f"`lorry keys create NAME{option} --project ours --scope {needed[0]}`." in error["remedy"]
        assert opened.status_code != 403, (path, method, opened.text)


def test_deleting_adapters_and_base_models_requires_different_scopes(holder: NewClient) -> None:
    clients = [holder("adapters:write"), holder("models:write")]

    answers = [client.delete(f"/v1/models/{name}") for client in clients for name in ("ft:x", "smol")]

    assert [answer.status_code for answer in answers] == [404, 403, 403, 200]
    assert "models:write" in error_of(answers[1])["message"]


def test_scopes_do_not_make_a_project_key_an_operator_key(holder: NewClient) -> None:
    plain = holder(*SCOPES, is_operator=False)

    refused = [plain.post("/v1/projects", json={"name": "x"}), plain.post("/v1/models", json={})]

    assert [error_of(answer)["code"] for answer in refused] == ["operator_required"] * 2
    assert all("the API key 'some' is not one" in error_of(answer)["message"] for answer in refused)
    assert set(plain.get("/v1/browser_session").json()["scopes"]) == set(SCOPES) - OPERATORS


def test_browser_session_has_the_scopes_of_its_key(holder: NewClient, anonymous: TestClient) -> None:
    open_link(anonymous, holder("files:read"))

    assert anonymous.get("/v1/files").status_code == 200
    assert error_of(anonymous.get("/v1/fine_tuning/jobs"))["code"] == "missing_scope"


def test_every_scope_is_described(app: FastAPI) -> None:
    text = (ROOT / "docs/reference/audit-events.md").read_text(encoding="utf-8")

    assert [scope for scope in SCOPES if f"| `{scope}` |" not in text] == []
