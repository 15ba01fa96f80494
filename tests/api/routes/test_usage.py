"""/v1/usage: daily buckets, of the own project or, for operators, of all projects."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from api.deps import Services
from catalog.usage.ledger import DAY_SECONDS
from lorry.resources.usage import Usage
from tests.api.site import chat_lines, error_of
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
