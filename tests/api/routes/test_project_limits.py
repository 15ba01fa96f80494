"""Project limits over the API: operators set them, projects see them, and errors report them."""

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
from tests.api.site import Site, chat_lines, error_of
from tests.catalog.world import World

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
