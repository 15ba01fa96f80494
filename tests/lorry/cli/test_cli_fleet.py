"""Workers, the logs of trainers, and `lorry usage`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from typer.testing import Result

from tests.lorry.scripted_server import Script

JOBS = "/v1/fine_tuning/jobs"
Run = Callable[..., Result]


def test_logs_are_grouped_by_attempt_and_process(service: Script, run: Run) -> None:
    rows = [("1-0-1", 1, 0, "Loading"), ("1-1-1", 1, 1, "Loading too"), ("2-0-1", 2, 0, "[bold]Again[/bold]")]
    printed = [{"id": i, "attempt": a, "rank": r, "number": 1, "text": text} for i, a, r, text in rows]
    service.on("GET", f"{JOBS}/j/logs", {"data": printed, "has_more": False})
    service.on("GET", f"{JOBS}/none/logs", {"data": [], "has_more": False})

    shown = run("jobs", "logs", "j", "--attempt", "1", "--rank", "0", "--contains", "load").stdout.split("\n")
    path = service.seen[-1].path

    assert [line for line in shown if line] == [
        "ATTEMPT 1",
        "Loading",
        "ATTEMPT 1, PROCESS 1",
        "Loading too",
        "ATTEMPT 2",
        "[bold]Again[/bold]",
    ]
    assert {"attempt=1", "rank=0", "contains=load"} <= set(path.partition("?")[2].split("&"))
    assert [json.loads(line)["id"] for line in run("jobs", "logs", "j", "-n", "2", "--json").stdout.splitlines()] == [
        "1-1-1",
        "2-0-1",
    ]
    assert "lorry jobs events" in run("jobs", "logs", "none").stderr


def test_cordoned_worker_is_listed_with_its_reason_and_can_be_uncordoned(service: Script, run: Run) -> None:
    cordon = {"by": "service", "reason": "3 jobs failed on it.", "at": 1.5}
    one = {"id": "one", "state": "busy", "cordon": cordon}
    service.on("GET", "/v1/workers", {"data": [one, {"id": "two", "state": "idle", "cordon": None}], "has_more": False})
    for verb in ("cordon", "uncordon", "drain"):
        service.on("POST", f"/v1/workers/one/{verb}", one)

    listed = run("workers", "list")
    _, first, second = listed.stdout.splitlines()
    assert "busy, cordoned" in first
    assert second.split()[:2] == ["two", "idle"]
    assert listed.stderr == "one is cordoned by the service: 3 jobs failed on it.\n"
    assert json.loads(run("workers", "list", "--json").stdout)[0]["cordon"] == cordon
    assert "lorry workers uncordon one\n" in run("workers", "cordon", "one", "--reason", "Loud.").stderr
    assert json.loads(service.seen[-1].body) == {"reason": "Loud."}
    assert run("workers", "uncordon", "one").stderr == "Uncordoned one: it accepts jobs again.\n"
    assert "it requeues its jobs and exits" in run("workers", "drain", "one").stderr


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
