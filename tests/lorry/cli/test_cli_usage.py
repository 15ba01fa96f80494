"""`lorry usage`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from typer.testing import Result

from tests.lorry.scripted_server import Script

Run = Callable[..., Result]
RESULT: dict[str, Any] = {
    "project_id": "proj-1",
    "model": "m",
    "device_seconds": 5400.0,
    "trained_tokens": 7,
    "num_jobs": {"created": 4, "succeeded": 3, "failed": 2, "cancelled": 1},
    "completions": {"requests": 40, "prompt_tokens": 5200, "completion_tokens": 1900},
    "stored_bytes": 2_000_000,
}
DAY = {"start_time": 1789948800, "end_time": 1790035200, "results": [RESULT]}


def test_usage_prints_one_line_per_day_with_the_project_name(service: Script, run: Run) -> None:
    service.on("GET", "/v1/projects", {"data": [{"id": "proj-1", "name": "search"}], "has_more": False})
    service.on("GET", "/v1/usage", {"data": [DAY], "has_more": False, "next_page": None})

    head, line = run("usage", "--since", "30d", "--by", "both", "--project", "search").stdout.splitlines()

    assert line.split() == (
        ["2026-09-21", "search", "m", "1.50", "7", "4", "3", "2", "1", "40", "5200", "1900", "2.00", "MB"]
    )
    assert re.split("  +", head)[9:] == ["REQUESTS", "PROMPT TOKENS", "ANSWER TOKENS", "STORED"]
    (request,) = service.requests("GET", "/v1/usage")
    assert "group_by%5B%5D=project_id&group_by%5B%5D=model&project_ids%5B%5D=search" in request.path


def test_usage_can_be_grouped_by_organization(service: Script, run: Run) -> None:
    day = {**DAY, "results": [{**RESULT, "project_id": None, "model": None, "organization_id": "org-1"}]}
    service.on("GET", "/v1/organizations", {"data": [{"id": "org-1", "name": "research"}], "has_more": False})
    service.on("GET", "/v1/usage", {"data": [day], "has_more": False, "next_page": None})

    head, line = run("usage", "--by", "organization", "--organization", "research").stdout.splitlines()

    assert (head.split()[1], line.split()[1]) == ("ORGANIZATION", "research")
    (request,) = service.requests("GET", "/v1/usage")
    assert "group_by%5B%5D=organization_id&organization_ids%5B%5D=research" in request.path


def test_unknown_grouping_is_rejected(run: Run) -> None:
    assert run("usage", "--by", "device").exit_code == 2
