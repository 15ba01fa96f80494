"""/v1/usage and the limits of projects: operators see all projects and set limits, other keys see their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from api.deps import Services
from api.schemas.projects import MOST
from catalog.audit import chain
from catalog.usage import quotas
from catalog.usage.ledger import DAY_SECONDS
from lorry.resources.usage import Usage
from tests.api.site import Site, chat_lines, error_of
from tests.catalog.world import World


def test_last_bucket_has_todays_usage(client: TestClient, world: World) -> None:
    client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", chat_lines(3))})
    job = client.post("/v1/fine_tuning/jobs", json={"model": "smol", "training_file": world.file_id}).json()
    client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")

    page = client.get("/v1/usage").json()

    assert (page["object"], len(page["data"]), page["has_more"], page["next_page"]) == ("page", 7, False, None)
    assert {bucket["end_time"] - bucket["start_time"] for bucket in page["data"]} == {DAY_SECONDS}
    assert [bucket["results"] for bucket in page["data"][:-1]] == [[]] * 6
    (used,) = page["data"][-1]["results"]
    assert used == {
        "object": "usage.result",
        "organization_id": None,
        "project_id": world.caller.project_id,
        "model": None,
        "device_seconds": 0.0,
        "trained_tokens": 0,
        "num_jobs": {"created": 1, "succeeded": 0, "failed": 0, "cancelled": 1},
        "completions": {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0},
        "stored_bytes": len(chat_lines(3)),
    }


def test_only_operators_see_the_usage_of_other_projects(
    client: TestClient, operator: TestClient, stranger: TestClient, world: World
) -> None:
    client.post("/v1/fine_tuning/jobs", json={"model": "smol", "training_file": world.file_id})

    def seen(viewer: TestClient, **params: Any) -> list[str]:
        return [used["model"] for used in viewer.get("/v1/usage", params=params).json()["data"][-1]["results"]]

    named = {"project_ids[]": world.caller.project_id, "group_by[]": "model"}
    assert seen(operator, **named) == ["smol"]
    assert seen(stranger, **named) == seen(stranger) == []


def test_days_are_paginated(client: TestClient) -> None:
    now = int(client.get("/v1/usage").json()["data"][-1]["end_time"])
    query = {"start_time": now - 5 * DAY_SECONDS, "limit": 2}
    starts: list[int] = []
    page: str | None = None
    while True:
        found = client.get("/v1/usage", params={**query, **({"page": page} if page else {})}).json()
        starts += [bucket["start_time"] for bucket in found["data"]]
        page = found["next_page"]
        if not found["has_more"]:
            break

    assert starts == [now - days * DAY_SECONDS for days in (5, 4, 3, 2, 1)]


def test_inverted_time_range_is_rejected(client: TestClient) -> None:
    refused = client.get("/v1/usage", params={"start_time": 500, "end_time": 400})

    assert (refused.status_code, error_of(refused)["param"]) == (400, "start_time")
    assert "'start_time' (500) must be earlier than 'end_time' (400)" in error_of(refused)["message"]
    none = error_of(client.get("/v1/usage", params={"end_time": 0}))
    assert "'start_time' (0) must be earlier than 'end_time' (0)" in none["message"]


def test_page_after_the_report_is_rejected(client: TestClient) -> None:
    refused = error_of(client.get("/v1/usage", params={"page": "9999999"}))

    assert (refused["param"], "'next_page' of the previous response" in refused["remedy"]) == ("page", True)


@pytest.mark.parametrize("group_by", [("project_id",), ("model",)])
def test_sdk_follows_the_pages(client: TestClient, world: World, services: Services, group_by: Any) -> None:
    class InProcess:
        def get(self, path: str, params: dict[str, Any]) -> Any:
            given = {name: value for name, value in params.items() if value is not None}
            return client.get(f"/v1/{path}", params={**given, "limit": 3}).json()

    client.post("/v1/fine_tuning/jobs", json={"model": "smol", "training_file": world.file_id})

    days = list(Usage(InProcess()).list(group_by=group_by))  # pyright: ignore[reportArgumentType]

    assert len(days) == 7
    assert [result.num_jobs["created"] for result in days[-1].results] == [1]


JOBS = "/v1/fine_tuning/jobs"


def limits(client: TestClient, project: str) -> dict[str, Any]:
    found = client.get(f"/v1/projects/{project}/limits").json()["limits"]
    return {one["name"]: (one["limit"], one["used"]) for one in found}


def test_operators_set_limits_and_projects_see_their_usage(
    client: TestClient, operator: TestClient, world: World
) -> None:
    path = f"/v1/projects/{world.caller.project_id}/limits"
    client.post(JOBS, json={"model": "smol", "training_file": world.file_id})

    refused = client.post(path, json={"queued_jobs": None})
    operator.post(path, json={"queued_jobs": 5, "device_hours_per_month": 1.5})
    operator.post(path, json={"stored_bytes": 100})
    wrong = operator.post(path, json={"que_jobs": 5})
    highest = operator.post(path, json={"highest_priority": "batch"}).json()["highest_priority"]
    unclear = operator.post(path, json={"highest_priority": None})
    too_high = client.post(JOBS, json={"model": "smol", "training_file": world.file_id, "seed": 1})

    assert error_of(refused)["code"] == "operator_required"
    assert (highest, operator.get("/v1/projects/ours").json()["highest_priority"]) == ("batch", "batch")
    assert unclear.status_code == 400
    assert (too_high.status_code, error_of(too_high)["code"]) == (403, "exceeds_own_rights")
    assert limits(client, "ours") == {
        "concurrent_jobs": (None, 0),
        "queued_jobs": (5, 1),
        "jobs_per_day": (None, 1),
        "device_hours_per_month": (1.5, 0),
        "stored_bytes": (100, 0),
        "plans_per_day": (500, 0),
        "tokens_per_day": (None, 0),
    }
    assert "Did you mean 'queued_jobs'?" in error_of(wrong)["message"]


@pytest.mark.parametrize("name", ["stored_bytes", "jobs_per_day"])
def test_largest_limit_can_be_sealed_and_larger_limits_are_rejected(
    services: Services, operator: TestClient, world: World, name: str
) -> None:
    path = f"/v1/projects/{world.caller.project_id}/limits"

    answers = [operator.post(path, json={name: most}) for most in (MOST, MOST + 1)]
    chain.seal(services.db, pepper=services.pepper.current)

    assert [answer.status_code for answer in answers] == [200, 400]
    assert chain.check(services.db, peppers=[services.pepper.current]).num_unsealed == 0


def test_quota_error_has_limit_and_usage_and_is_not_retryable(
    client: TestClient, operator: TestClient, world: World
) -> None:
    operator.post(f"/v1/projects/{world.caller.project_id}/limits", json={"jobs_per_day": 0, "stored_bytes": 10})

    job = client.post(JOBS, json={"model": "smol", "training_file": world.file_id})
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", chat_lines(2))})

    error = error_of(job)
    assert (job.status_code, error["code"], error["type"]) == (429, "quota_exceeded", "rate_limit_error")
    resets_at = error["quota"].pop("resets_at")
    assert error["quota"] == {"name": "jobs_per_day", "limit": 0, "used": 0}
    assert resets_at % 86_400 == 0
    assert job.headers["x-should-retry"] == file.headers["x-should-retry"] == "false"
    assert (file.status_code, error_of(file)["quota"]["name"]) == (429, "stored_bytes")
    assert "retry-after" not in file.headers
    assert [file["id"] for file in client.get("/v1/files").json()["data"]] == [world.file_id]


def test_openai_client_does_not_retry_quota_errors(site: Site, services: Services, world: World) -> None:
    caller = replace(world.caller, is_operator=True)
    quotas.limit(services.db, caller=caller, project="ours", limits={"queued_jobs": 0})

    with (
        openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key) as client,
        pytest.raises(openai.RateLimitError) as refusal,
    ):
        client.fine_tuning.jobs.create(model="smol", training_file=world.file_id)

    assert refusal.value.code == "quota_exceeded"
