"""Workers, and the logs of trainers."""

from __future__ import annotations

import json
from collections.abc import Callable

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
