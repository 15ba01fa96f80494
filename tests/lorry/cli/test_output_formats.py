"""`-o json`, `--quiet`, and commands that show one object."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import Result

from lorry.cli.render import output
from tests.lorry.scripted_server import Reply, Script

JOBS = "/v1/fine_tuning/jobs"
Run = Callable[..., Result]


@pytest.mark.parametrize("flags", [["--json"], ["-o", "json"], ["-ojson"], ["--output", "json"], ["--output=json"]])
def test_output_option_prints_json(service: Script, run: Run, flags: list[str]) -> None:
    service.on("GET", JOBS, {"data": [{"id": "j"}], "has_more": False})

    assert json.loads(run("jobs", "list", *flags).stdout) == [{"id": "j"}]


def test_unknown_output_format_is_a_usage_error(service: Script, run: Run) -> None:
    assert run("jobs", "list", "-o", "yaml").exit_code == 2
    assert service.seen == []


def test_quiet_and_json_are_mutually_exclusive(service: Script, run: Run) -> None:
    result = run("jobs", "list", "-q", "-o", "json")

    assert (result.exit_code, service.seen) == (2, [])
    assert "--quiet can't be combined with JSON output." in result.stderr


@pytest.mark.parametrize(
    ("command", "path"),
    [
        ("jobs list", JOBS),
        ("files list", "/v1/files"),
        ("models list", "/v1/models"),
        ("plans list", "/v1/plans"),
        ("batches list", "/v1/batches"),
        ("sweeps list", "/v1/sweeps"),
        ("keys list", "/v1/api_keys"),
        ("projects list", "/v1/projects"),
        ("organizations list", "/v1/organizations"),
        ("webhooks list", "/v1/webhook_endpoints"),
        ("serving list", "/v1/serving/endpoints"),
        ("workers list", "/v1/workers"),
        ("audit list", "/v1/audit_events"),
    ],
)
def test_quiet_list_prints_only_ids(service: Script, run: Run, command: str, path: str) -> None:
    service.on("GET", path, {"data": [{"id": "a", "status": "active"}, {"id": "b", "status": "active"}]})

    result = run(*command.split(), "--quiet")

    assert (result.exit_code, result.stdout, result.stderr) == (0, "a\nb\n", "")


def test_quiet_list_of_adapters_prints_names(service: Script, run: Run) -> None:
    service.on("GET", "/v1/adapters", {"data": [{"id": "a", "name": "ft:m:p:s:1"}], "has_more": False})

    assert run("adapters", "list", "-q").stdout == "ft:m:p:s:1\n"


@pytest.mark.parametrize(
    ("command", "path", "answer"),
    [
        ("jobs submit m train.jsonl", JOBS, {"id": "new"}),
        ("plans create m train.jsonl", "/v1/plans", {"id": "new", "status": "computing"}),
        ("sweeps run m train.jsonl --over lora.rank=4,8", "/v1/sweeps", {"id": "new"}),
        ("batches create file-3f2b", "/v1/batches", {"id": "new"}),
        ("projects create search", "/v1/projects", {"id": "new", "name": "search"}),
        ("organizations create search", "/v1/organizations", {"id": "new", "name": "search"}),
        ("models add m org/m --no-wait", "/v1/models", {"id": "new", "state": "importing"}),
    ],
)
@pytest.mark.usefixtures("submit")
def test_quiet_create_prints_only_the_id(
    service: Script, run: Run, command: str, path: str, answer: dict[str, Any]
) -> None:
    service.on("POST", path, answer)

    result = run(*command.split(), "-q")

    assert (result.exit_code, result.stdout, result.stderr) == (0, "new\n", "")


@pytest.mark.parametrize(
    ("command", "path", "answer", "shown"),
    [
        ("files show f", "/v1/files/f", {"id": "f", "filename": "a.jsonl", "rows": 3}, "name a.jsonl"),
        ("keys show k", "/v1/api_keys/k", {"id": "k", "name": "ci", "scopes": ["jobs:read"]}, "scopes jobs:read"),
        ("webhooks show w", "/v1/webhook_endpoints/w", {"id": "w", "status": "enabled"}, "status enabled"),
        ("organizations show o", "/v1/organizations/o", {"id": "o", "name": "research"}, "name research"),
        (
            "plans show p",
            "/v1/plans/p",
            {"id": "p", "status": "computing", "model": "m"},
            "status computing",
        ),
    ],
)
def test_show_prints_pairs_or_json(
    service: Script, run: Run, command: str, path: str, answer: dict[str, Any], shown: str
) -> None:
    service.on("GET", path, answer)

    plain, as_json = run(*command.split()), run(*command.split(), "--json")

    assert shown in [" ".join(line.split()) for line in plain.stdout.splitlines()]
    assert json.loads(as_json.stdout) == answer


def test_keys_show_prints_no_secret(service: Script, run: Run) -> None:
    key = {"id": "k", "redacted_value": "lorry_k_…x9Qz", "requests_per_minute": 0, "jobs_per_day": 5}
    service.on("GET", "/v1/api_keys/k", key)

    lines = [" ".join(line.split()) for line in run("keys", "show", "k").stdout.splitlines()]

    assert {"secret lorry_k_…x9Qz", "requests/minute unlimited", "jobs/day 5"} <= set(lines)


def test_workers_show_searches_the_list(service: Script, run: Run) -> None:
    rows = [{"id": "box-1", "state": "busy", "host": "box"}, {"id": "other", "state": "idle"}]
    service.on("GET", "/v1/workers", {"data": rows, "has_more": False})

    assert "host   box\n" in run("workers", "show", "box").stdout
    missing = run("workers", "show", "gone")
    assert (missing.exit_code, missing.stderr.splitlines()[0]) == (1, "Error: There is no worker 'gone'.")


def test_project_is_shown_with_limits_and_updated_in_one_command(service: Script, run: Run) -> None:
    limits = {"limits": [{"name": "queued_jobs", "limit": 5, "used": 2}]}
    project = {"id": "proj-1", "name": "search", "weight": 1.0, "highest_priority": "normal"}
    service.on("GET", "/v1/projects/search", project)
    service.on("GET", "/v1/projects/search/limits", limits)
    service.on("POST", "/v1/projects/search/limits", limits)
    service.on("POST", "/v1/projects/search/weight", project)
    service.on("POST", "/v1/projects/search", {**project, "name": "find"})

    shown = run("projects", "show", "search")
    given = "--name find --weight 2 --limit-queued-jobs none --limit-stored-bytes 1GB --highest-priority urgent"
    updated = run("projects", "update", "search", *given.split())
    unchanged = run("projects", "update", "search")

    assert shown.stdout.splitlines()[-2].split() == ["queued", "jobs", "5", "2", "-"]
    assert "Updated project find." in updated.stderr
    sent = [json.loads(request.body) for request in service.seen if request.method == "POST"]
    assert sent == [
        {"queued_jobs": None, "stored_bytes": 10**9, "highest_priority": "urgent"},
        {"weight": 2.0},
        {"name": "find"},
    ]
    assert (unchanged.exit_code, "at least one setting" in unchanged.stderr) == (2, True)


def test_metrics_table_omits_empty_columns(service: Script, run: Run) -> None:
    points = [{"kind": "valid", "step": 1, "loss": 2.5, "grad_norm": None}, {"kind": "valid", "step": 2, "loss": 1.5}]
    service.on("GET", f"{JOBS}/j/metrics", {"data": points})
    service.on("GET", f"{JOBS}/none/metrics", {"data": []})

    lines = run("jobs", "metrics", "j", "--kind", "valid").stdout.splitlines()

    assert [line.split() for line in lines] == [["STEP", "LOSS"], ["1", "2.5"], ["2", "1.5"]]
    assert "kind=valid" in service.requests("GET", f"{JOBS}/j/metrics")[0].path
    assert json.loads(run("jobs", "metrics", "j", "--json").stdout) == points
    assert "No metrics" in run("jobs", "metrics", "none").stderr


def line(number: int, text: str, rank: int = 0) -> dict[str, Any]:
    return {"id": f"1-{rank}-{number}", "attempt": 1, "rank": rank, "number": number, "text": text}


def test_logs_follow_prints_new_lines_once_until_the_job_finishes(
    service: Script, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    lines = [line(1, "one"), line(2, "two"), line(3, "three")]
    pages = [lines[:2], lines[:2], [lines[0], lines[1], line(1, "other process", rank=1)]]
    service.on("GET", f"{JOBS}/j/logs", *({"data": page} for page in pages), {"data": [*lines, *pages[2][2:]]})
    service.on("GET", f"{JOBS}/j", {"id": "j", "status": "running"}, {"id": "j", "status": "running"})
    service.on("GET", f"{JOBS}/j", {"id": "j", "status": "succeeded"})

    result = run("jobs", "logs", "j", "--follow", "-n", "1")

    assert result.exit_code == 0
    shown = [text for text in result.stdout.splitlines() if text]
    assert shown == ["ATTEMPT 1", "two", "ATTEMPT 1, PROCESS 1", "other process", "ATTEMPT 1", "three"]


def test_plans_can_be_listed_and_deleted_and_sweeps_closed(service: Script, run: Run) -> None:
    plan = {"id": "plan-1", "status": "ready", "model": "m", "num_steps": 8, "training_time": {"seconds": 61.0}}
    service.on("GET", "/v1/plans", {"data": [plan], "has_more": False})
    service.on("DELETE", "/v1/plans/plan-1", {"deleted": True})
    service.on("GET", "/v1/sweeps", {"data": [{"id": "sweep-1"}], "has_more": False})
    service.on("POST", "/v1/sweeps/sweep-1/close", {"id": "sweep-1", "status": "running"})

    assert run("plans", "list").stdout.splitlines()[1].split()[:5] == ["plan-1", "ready", "m", "8", "1:01"]
    assert run("plans", "delete", "plan-1", "--yes").stderr == "Deleted plan plan-1.\n"
    assert run("sweeps", "close", "sweep-1", "-y").stderr == "Closed sweep sweep-1. Its existing trials continue.\n"


@pytest.mark.parametrize("flags", ["-m m -F train.jsonl", "--model m --training-file train.jsonl"])
def test_model_and_training_file_can_be_options(service: Script, submit: Run, run: Run, flags: str) -> None:
    service.on("POST", JOBS, {"id": "ftjob-1"})

    assert run("jobs", "submit", *flags.split()).stdout == "ftjob-1\n"
    (sent,) = service.requests("POST", JOBS)
    assert json.loads(sent.body) == {"model": "m", "training_file": "file-1"}


def test_model_as_argument_and_option_is_a_usage_error(service: Script, submit: Run) -> None:
    result = submit("m", "train.jsonl", "-m", "n")

    assert (result.exit_code, "MODEL and --model set the same field." in result.stderr) == (2, True)
    assert service.seen == []


def test_plan_cannot_be_combined_with_the_model_option(service: Script, run: Run) -> None:
    result = run("jobs", "submit", "--plan", "plan-1", "-m", "m")

    assert "--plan can't be combined with --model." in result.stderr


def test_adapters_delete_prints_the_full_name(service: Script, run: Run) -> None:
    name = "ft:m:p:docs:1"
    service.on("GET", "/v1/adapters/docs", Reply(status=404, body={}))
    service.on("GET", "/v1/adapters", {"data": [{"id": "a", "name": name}], "has_more": False})
    service.on("GET", "/v1/adapters/ft%3Am%3Ap%3Adocs%3A1", {"id": "a", "name": name})
    service.on("DELETE", "/v1/adapters/ft%3Am%3Ap%3Adocs%3A1", {"deleted": True})

    assert run("adapters", "delete", "docs", "--yes").stderr == f"Deleted adapter {name}.\n"


EVENTS = "/v1/fine_tuning/jobs/j/events"


def event(step: int, *answers: tuple[str, bool]) -> dict[str, Any]:
    samples = [
        {"prompt": f"p{number}", "answer": text, "num_tokens": 3, "is_complete": is_complete}
        for number, (text, is_complete) in enumerate(answers)
    ]
    return {"id": f"ftevent-{step}", "created_at": 1, "message": "answers", "data": {"step": step, "samples": samples}}


def test_samples_are_grouped_by_step_oldest_first(service: Script, run: Run) -> None:
    others = {"id": "ftevent-9", "created_at": 1, "message": "m", "data": None}
    events = [event(4, ("four", True), ("\x1b[31mred", False)), others, event(0, ("base", False))]
    service.on("GET", EVENTS, {"data": events, "has_more": False})

    lines = [line for line in run("jobs", "samples", "j").stdout.splitlines() if line]

    assert lines == [
        "STEP 0",
        "> p0",
        "base ...",
        "STEP 4",
        "> p0",
        "four",
        "> p1",
        f"{output.clean(chr(27))}[31mred ...",
    ]
    printed = json.loads(run("jobs", "samples", "j", "--json").stdout)
    assert [each["step"] for each in printed] == [4, 4, 0]


def test_job_without_samples_shows_how_to_request_them(service: Script, run: Run) -> None:
    service.on("GET", EVENTS, {"data": [], "has_more": False})

    printed = run("jobs", "samples", "j")

    assert printed.stdout == ""
    assert "--set 'evaluation.samples.prompts=" in printed.stderr
