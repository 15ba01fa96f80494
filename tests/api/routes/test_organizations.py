"""/v1/organizations, and organizations in other responses."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.deps import Services
from lorry import APIError, Lorry
from tests.api.conftest import new_key, with_key
from tests.api.site import Site, error_of
from tests.catalog.world import World

JOBS = "/v1/fine_tuning/jobs"


def test_operator_creates_an_organization_and_project_with_the_sdk(site: Site, operator_key: str, world: World) -> None:
    with Lorry(site.url, operator_key) as lorry:
        made = lorry.organizations.create("research")
        project = lorry.projects.create("search", organization="research")
        own = lorry.projects.create("own")
        key = lorry.keys.create("first", project="search")
        renamed = lorry.organizations.rename(made.id, "science")

        assert (project.organization_id, own.organization_id) == (made.id, world.caller.organization_id)
        assert [one.name for one in lorry.organizations.list()] == ["science", "default"]
        assert lorry.organizations.get("science") == renamed
        with pytest.raises(APIError) as taken:
            lorry.organizations.create("science")
        with Lorry(site.url, key.value) as theirs:
            assert [one.id for one in theirs.organizations.list()] == [made.id]
            with pytest.raises(APIError) as hidden:
                theirs.organizations.get("default")
            with pytest.raises(APIError) as refused:
                theirs.organizations.create("mine")

    assert (taken.value.status, taken.value.code) == (409, "already_exists")
    assert (hidden.value.status, hidden.value.code) == (404, "organization_not_found")
    assert (refused.value.status, refused.value.code) == (403, "operator_required")


def test_retried_creation_makes_one_organization(operator: TestClient) -> None:
    retry = {"x-stainless-retry-count": "1"}

    first, again = (operator.post("/v1/organizations", json={"name": "new"}, headers=retry).json() for _ in range(2))

    assert again == first
    assert len(operator.get("/v1/organizations").json()["data"]) == 2


def test_unknown_and_invalid_organization_fields_are_rejected(operator: TestClient) -> None:
    unknown = operator.post("/v1/projects", json={"name": "a", "organisation": "default"})
    nowhere = operator.post("/v1/projects", json={"name": "a", "organization": "nowhere"})
    renamed = operator.post("/v1/projects/ours", json={"name": "a", "organization": "default"})

    assert "Did you mean 'organization'?" in error_of(unknown)["message"]
    assert (nowhere.status_code, error_of(nowhere)["param"]) == (404, "organization")
    assert error_of(renamed)["code"] == "unknown_parameter"


def test_job_shows_the_organization_of_its_project(
    app: FastAPI, services: Services, client: TestClient, world: World
) -> None:
    away = world.caller_of("elsewhere", "away")
    theirs = with_key(app, new_key(services, away.project_id))
    files = {theirs: world.file(caller=away), client: world.file_id}

    shown = {
        requester: [
            requester.post(JOBS, json={"model": "smol", "training_file": file_id}).json()["organization_id"],
            *(job["organization_id"] for job in requester.get(JOBS).json()["data"]),
        ]
        for requester, file_id in files.items()
    }

    assert shown[theirs] == [away.organization_id] * 2
    assert shown[client] == [world.caller.organization_id] * 2
    assert theirs.get("/v1/projects").json()["data"][0]["organization_id"] == away.organization_id


def test_openai_client_must_name_its_own_organization_and_project(site: Site, world: World) -> None:
    caller = world.caller

    def ask(organization: str, project: str) -> str | None:
        url = f"{site.url}/v1"
        with openai.OpenAI(base_url=url, api_key=site.key, organization=organization, project=project) as client:
            return client.files.with_raw_response.list().headers.get("openai-organization")

    def refused(organization: str, project: str, variable: str) -> str | None:
        with pytest.raises(openai.AuthenticationError, match=variable) as refusal:
            ask(organization, project)
        return refusal.value.code

    world.caller_of("elsewhere", "away")
    assert ask("default", "ours") == ask(caller.organization_id, caller.project_id) == "default"
    for organization in ("elsewhere", "org-none", "ours"):
        assert refused(organization, "ours", "OPENAI_ORG_ID") == "mismatched_project"
    for project in ("away", "theirs", "default"):
        assert refused("default", project, "OPENAI_PROJECT_ID") == "mismatched_project"


def test_operators_see_usage_by_organization(operator: TestClient, client: TestClient, world: World) -> None:
    away = world.caller_of("elsewhere", "away")
    for caller, number in ((world.caller, 1), (world.stranger, 2), (away, 4)):
        for _ in range(number):
            world.submit(caller=caller, training_file=world.file(caller=caller))

    def shown(requester: TestClient, **params: Any) -> dict[str, int]:
        results = requester.get("/v1/usage", params=params).json()["data"][-1]["results"]
        return {used["organization_id"]: used["num_jobs"]["created"] for used in results}

    ours, theirs = world.caller.organization_id, away.organization_id
    by = {"group_by[]": "organization_id"}
    assert shown(operator, **by) == {ours: 3, theirs: 4}
    assert shown(operator, **by, **{"organization_ids[]": "elsewhere"}) == {theirs: 4}
    assert shown(operator, **by, **{"organization_ids[]": ours, "project_ids[]": "away"}) == {}
    assert shown(client, **by) == shown(client, **by, **{"organization_ids[]": ours}) == {ours: 1}
    assert shown(client, **by, **{"organization_ids[]": theirs}) == {}
