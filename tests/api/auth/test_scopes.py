"""Each route needs a scope, says which, and is shut without it."""

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
    """holder("jobs:read"): a client whose key has these scopes alone."""

    def new_client(*scopes: str, is_operator: bool = True) -> TestClient:
        project_id = world.caller.project_id
        given = {"name": "some", "scopes": scopes, "is_operator": is_operator, "project_id": project_id}
        return with_key(app, authentication.create(services.db, pepper=services.pepper, **given)[1])  # pyright: ignore

    return new_client


def test_every_operation_behind_a_key_says_which_scope_it_needs_to_look_or_to_change(app: FastAPI) -> None:
    told = {told["operationId"]: (path, method, told.get("x-scopes", [])) for path, method, told in operations(app)}
    looks = {"verify_adapter"}  # reads every byte again, and changes nothing
    by_work = {"create_plan"}  # needs jobs:write where a worker has to prepare files

    assert {name for name, (path, _, _) in told.items() if path not in OPEN_PATHS} - NEEDED.keys() == set()
    assert {scope for needed in NEEDED.values() for scope in needed} == set(SCOPES)
    for name, needed in NEEDED.items():
        _, method, shown = told[name]
        verb = "read" if method == "get" or name in looks else "write"
        assert shown == list(needed), name
        assert name in by_work or all(scope.endswith(f":{verb}") for scope in needed), name


def test_every_operation_is_shut_without_its_scope_and_opened_by_it_alone(
    app: FastAPI, services: Services, holder: NewClient
) -> None:
    services.feed.close()
    clients = {
        needed: (holder(*(one for one in SCOPES if one not in needed)), holder(*needed))
        for needed in set(NEEDED.values()) - {ANY_KEY}
    }

    for path, method, told in operations(app):
        needed = NEEDED.get(told["operationId"], ANY_KEY)
        if needed == ANY_KEY:
            continue
        filled = path.replace("{", "").replace("}", "")
        shut, opened = (client.request(method, filled) for client in clients[needed])

        error = error_of(shut)
        assert (shut.status_code, error["code"]) == (403, "missing_scope"), (path, method)
        assert needed[0] in error["message"]
        assert f"lorry keys create NAME --scope {needed[0]}" in error["remedy"]
        assert opened.status_code != 403, (path, method, opened.text)


def test_an_adapter_and_a_base_are_deleted_by_different_scopes(holder: NewClient) -> None:
    clients = [holder("adapters:write"), holder("models:write")]

    answers = [client.delete(f"/v1/models/{name}") for client in clients for name in ("ft:x", "smol")]

    assert [answer.status_code for answer in answers] == [404, 403, 403, 200]
    assert "models:write" in error_of(answers[1])["message"]


def test_no_scope_makes_an_operator_of_a_projects_key(holder: NewClient) -> None:
    plain = holder(*SCOPES, is_operator=False)

    refused = [plain.post("/v1/projects", json={"name": "x"}), plain.post("/v1/models", json={})]

    assert [error_of(answer)["code"] for answer in refused] == ["operator_required"] * 2
    assert set(plain.get("/v1/browser_session").json()["scopes"]) == set(SCOPES) - OPERATORS


def test_a_browser_can_do_what_the_key_can_that_signed_it_in(holder: NewClient, anonymous: TestClient) -> None:
    open_link(anonymous, holder("files:read"))

    assert anonymous.get("/v1/files").status_code == 200
    assert error_of(anonymous.get("/v1/fine_tuning/jobs"))["code"] == "missing_scope"


def test_every_scope_is_described(app: FastAPI) -> None:
    text = (ROOT / "docs/reference/audit-events.md").read_text(encoding="utf-8")

    assert [scope for scope in SCOPES if f"| `{scope}` |" not in text] == []
