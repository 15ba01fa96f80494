"""`lorry keys` and `lorry projects`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import Result

from catalog.tenancy import scopes
from catalog.tenancy.scopes import granted
from lorry import connection
from lorry.cli.commands import keys
from lorry.cli.commands.up import replace_invalid_key
from lorry.cli.parsing.durations import seconds
from lorry.connection import Connection
from tests.lorry.scripted_server import Reply, Script

Run = Callable[..., Result]
KEY: dict[str, Any] = {
    "id": "key-1",
    "name": "ci",
    "redacted_value": "lorry_key-1_…x9Qz",
    "status": "active",
    "scopes": ["jobs:read"],
    "created_at": 1790000000,
}
PROJECT = {"id": "proj-1", "name": "search", "status": "active", "created_at": 1790000000}


def test_create_prints_only_the_secret_on_stdout(service: Script, run: Run) -> None:
    service.on("POST", "/v1/api_keys", {**KEY, "value": "lorry_key-1_secret"})

    result = run("keys", "create", "ci", "--scope", "jobs:read", "--scope", "jobs:write", "--project", "search")

    assert result.stdout == "lorry_key-1_secret\n"
    assert "Its secret is on stdout and is not shown again." in result.stderr
    (sent,) = service.requests("POST", "/v1/api_keys")
    assert json.loads(sent.body) == {
        "name": "ci",
        "is_operator": False,
        "scopes": ["jobs:read", "jobs:write"],
        "project": "search",
    }


def test_list_omits_revoked_keys_by_default(service: Script, run: Run) -> None:
    gone = {**KEY, "id": "key-0", "status": "revoked"}
    service.on("GET", "/v1/api_keys", {"data": [KEY, gone], "has_more": False})

    some, every = run("keys", "list").stdout, run("keys", "list", "--all").stdout

    assert "…x9Qz" in some
    assert "key-0" not in some
    assert "key-0" in every


@pytest.mark.parametrize(
    ("overlap", "seconds", "words"),
    [("12h", 43_200, "12 hours"), ("0s", 0, "0 seconds"), ("90s", 90, "90 seconds"), ("1d", 86_400, "1 day")],
)
def test_rotate_prints_how_long_the_old_key_remains_valid(
    service: Script, run: Run, overlap: str, seconds: int, words: str
) -> None:
    service.on("POST", "/v1/api_keys/key-1/rotate", {**KEY, "id": "key-2", "value": "lorry_key-2_secret"})
    service.on("GET", "/v1/api_keys/key-1", {**KEY, "expires_at": 1790043200})

    result = run("keys", "rotate", "key-1", "--overlap", overlap)

    assert json.loads(service.requests("POST", "/v1/api_keys/key-1/rotate")[0].body) == {"overlap_seconds": seconds}
    assert result.stdout == "lorry_key-2_secret\n"
    assert f"The old key key-1 remains valid for at most {words}." in result.stderr


def test_rotating_the_key_in_use_updates_the_connection_file(
    service: Script, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service.on("POST", "/v1/api_keys/key-1/rotate", {**KEY, "id": "key-2", "value": "lorry_key-2_secret"})
    service.on("GET", "/v1/api_keys/key-1", KEY)
    known = Connection(url=service.url, api_key="lorry_key-1_old", identity_secret=service.identity_secret)
    connection.write(tmp_path, known)
    monkeypatch.setenv("LORRY_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("LORRY_API_KEY", "lorry_key-1_other")
    elsewhere = run("keys", "rotate", "key-1").stderr
    for name in ("LORRY_URL", "LORRY_API_KEY"):
        monkeypatch.delenv(name)

    here = run("keys", "rotate", "key-1").stderr

    assert "Set LORRY_API_KEY to the new one" in elsewhere
    assert f"Stored the new key in {tmp_path / 'connection.json'}." in here
    assert connection.read(tmp_path) == replace(known, api_key="lorry_key-2_secret")


@pytest.mark.parametrize(("status", "kept"), [(401, "new"), (200, "old")])
def test_start_replaces_an_invalid_key_in_the_connection_file(
    service: Script, tmp_path: Path, status: int, kept: str
) -> None:
    service.on("GET", "/v1/browser_session", Reply(status=status, body={}))
    known = Connection(url=service.url, api_key="old", identity_secret=service.identity_secret)
    connection.write(tmp_path, known)
    running: Any = SimpleNamespace(data_dir=tmp_path, new_key=lambda: "new")

    replace_invalid_key(running, known)

    assert connection.read(tmp_path) == replace(known, api_key=kept)


def test_scopes_are_those_of_the_service() -> None:
    assert set(scopes.SCOPES) - scopes.OPERATORS == keys.SCOPES
    assert keys.OPERATOR_SCOPES == scopes.OPERATORS


def test_list_abbreviates_full_scopes_as_all(service: Script, run: Run) -> None:
    able = [sorted(granted(None, is_operator=is_operator)) for is_operator in (True, False)]
    operators = {**KEY, "name": "first", "is_operator": True, "scopes": able[0]}
    less = {**KEY, "name": "less", "is_operator": True, "scopes": able[1]}
    projects = {**KEY, "name": "second", "scopes": able[1]}
    service.on("GET", "/v1/api_keys", {"data": [operators, less, projects, KEY], "has_more": False})

    lines = run("keys", "list").stdout.splitlines()[1:]

    assert " active  operator: all  " in lines[0]
    assert " active  operator: adapters:read " in lines[1]
    assert " active  all  " in lines[2]
    assert " active  jobs:read  " in lines[3]


@pytest.mark.parametrize(
    "command",
    ["keys create", "keys rotate", "usage", "audit list", "webhooks replay", "webhooks rotate-secret", "files upload"],
)
def test_help_shows_duration_placeholders(run: Run, command: str) -> None:
    assert "<duration>" in run(*command.split(), "--help").stdout


@pytest.mark.parametrize(
    ("options", "response", "sent", "printed"),
    [
        ("", {}, None, ["Revoked key-1 (ci)."]),
        (
            "",
            {"valid_descendants": 2, "unfinished_jobs": 3, "unfinished_batches": 1},
            None,
            [
                "Revoked key-1 (ci).",
                "3 jobs, 1 batches. Cancel them: lorry keys revoke key-1 --cancel",
                "2. Revoke them: lorry keys revoke key-1 --with-descendants",
            ],
        ),
        (
            "--with-descendants",
            {"revoked_keys": ["key-1", "key-2"]},
            {"with_descendants": True},
            ["Revoked key-1 (ci) and 1 key that descends from it."],
        ),
        (
            "--cancel --with-descendants",
            {"revoked_keys": ["key-1", "key-2", "key-3"]},
            {"cancel": True, "with_descendants": True},
            ["Revoked key-1 (ci) and 2 keys that descend from it.", "Its unfinished work is being cancelled."],
        ),
    ],
)
def test_revoke_reports_what_ended_and_what_remains(
    service: Script, run: Run, options: str, response: dict[str, Any], sent: dict[str, bool] | None, printed: list[str]
) -> None:
    path = "/v1/api_keys/key-1/revoke"
    service.on("POST", path, {**KEY, "status": "revoked", "revoked_keys": ["key-1"], **response})

    lines = run("keys", "revoke", "key-1", *options.split(), "--yes").stderr.splitlines()

    assert len(lines) == len(printed)
    assert all(line.endswith(expected) for line, expected in zip(lines, printed, strict=True)), lines
    assert json.loads(service.requests("POST", path)[0].body or "null") == sent


def test_projects_are_created_listed_renamed_archived_and_restored(service: Script, run: Run) -> None:
    service.on("POST", "/v1/projects", PROJECT)
    service.on("GET", "/v1/projects", {"data": [PROJECT], "has_more": False})
    service.on("POST", "/v1/projects/search", {**PROJECT, "name": "find"})
    service.on("POST", "/v1/projects/find/weight", {**PROJECT, "name": "find", "weight": 2.5})
    service.on("GET", "/v1/projects/find", {**PROJECT, "name": "find", "weight": 2.5})
    for verb in ("archive", "restore"):
        service.on("POST", f"/v1/projects/find/{verb}", {**PROJECT, "name": "find"})

    printed = [
        run("projects", "create", "search").stderr,
        run("projects", "list").stdout,
        run("projects", "update", "search", "--name", "find").stderr,
        run("projects", "update", "find", "--weight", "2.5").stderr,
        run("projects", "archive", "find", "--yes").stderr,
        run("projects", "restore", "find").stderr,
    ]

    words = (
        "lorry keys create NAME --project search",
        "proj-1",
        "Updated project find",
        "Updated project find",
        "restore find",
        "Restored project find",
    )
    assert [word in text for word, text in zip(words, printed, strict=True)] == [True] * 6
    (weighed,) = service.requests("POST", "/v1/projects/find/weight")
    assert json.loads(weighed.body) == {"weight": 2.5}
    assert run("projects", "archive", "find").exit_code != 0  # there is no terminal to ask for confirmation


def test_organizations_are_created_listed_renamed_and_shown_with_projects(service: Script, run: Run) -> None:
    organization = {"id": "org-1", "name": "research", "created_at": 1790000000}
    service.on("POST", "/v1/organizations", organization)
    service.on("GET", "/v1/organizations", {"data": [organization], "has_more": False})
    service.on("POST", "/v1/organizations/research", {**organization, "name": "science"})
    project = {**PROJECT, "organization_id": "org-1"}
    service.on("POST", "/v1/projects", project)
    service.on("GET", "/v1/projects", {"data": [project], "has_more": False})

    made = run("organizations", "create", "research").stderr
    _, line = run("organizations", "list").stdout.splitlines()
    renamed = run("organizations", "update", "research", "--name", "science").stderr
    run("projects", "create", "search", "--organization", "research")
    _, listed = run("projects", "list").stdout.splitlines()

    assert "lorry projects create NAME --organization research" in made
    assert line.split()[:2] == ["research", "org-1"]
    assert "Renamed organization research to science" in renamed
    (sent,) = service.requests("POST", "/v1/projects")
    assert json.loads(sent.body) == {"name": "search", "organization": "research"}
    assert listed.split()[:3] == ["search", "proj-1", "research"]


def test_duration_requires_a_unit(run: Run) -> None:
    assert [seconds(text) for text in ("90s", "15m", "12h", "30d")] == [90, 900, 43_200, 2_592_000]
    refused = run("keys", "create", "ci", "--expires-in", "soon")
    assert refused.exit_code == 2
    assert "90s, 15m, 12h or 30d" in refused.stderr


def test_key_limits_are_set_and_reset_to_the_service_defaults(service: Script, run: Run) -> None:
    path = "/v1/api_keys/key-1/limits"
    answers = ({**KEY, "requests_per_minute": 600}, {**KEY, "jobs_per_day": 0}, {**KEY, "highest_priority": "urgent"})
    service.on("POST", path, *answers)

    printed = run("keys", "update", "key-1", "--requests-per-minute", "600").stderr
    run("keys", "update", "key-1", "--requests-per-minute", "service", "--jobs-per-day", "0")
    run("keys", "update", "key-1", "--highest-priority", "urgent")
    wrong = run("keys", "update", "key-1", "--jobs-per-day", "many")

    assert "600 requests/minute, jobs/day: service default" in printed
    sent = [json.loads(request.body) for request in service.requests("POST", path)]
    assert sent == [
        {"requests_per_minute": 600},
        {"requests_per_minute": None, "jobs_per_day": 0},
        {"highest_priority": "urgent"},
    ]
    assert wrong.exit_code == 2


def test_project_limits_are_set_and_shown(service: Script, run: Run) -> None:
    path = "/v1/projects/search/limits"
    hours = {"name": "device_hours_per_month", "limit": 100, "used": 12.5, "resets_at": 1790812800}
    found = {"limits": [hours, {"name": "stored_bytes", "limit": None, "used": 2_000_000}]}
    service.on("POST", path, found)
    service.on("GET", path, found)
    service.on("GET", "/v1/projects/search", {"id": "proj-1", "name": "search", "highest_priority": "normal"})

    given = (
        "--limit-device-hours",
        "100",
        "--limit-stored-bytes",
        "1.5GB",
        "--limit-queued-jobs",
        "none",
        "--highest-priority",
        "normal",
    )
    updated, shown = run("projects", "update", "search", *given), run("projects", "show", "search")
    bad_values = ("--limit-stored-bytes", "much"), ("--limit-queued-jobs", "-1")
    wrong = [run("projects", "update", "search", *one) for one in bad_values]

    (sent,) = service.requests("POST", path)
    assert json.loads(sent.body) == {
        "queued_jobs": None,
        "device_hours_per_month": 100.0,
        "stored_bytes": 1_500_000_000,
        "highest_priority": "normal",
    }
    assert "Updated project search." in updated.stderr
    first, second, third = shown.stdout.splitlines()[-3:]
    assert first.split()[:5] == ["device-hours", "per", "month", "100", "12.5"]
    assert second.split() == ["stored", "bytes", "any", "2.00", "MB", "-"]
    assert third.split() == ["priority", "normal", "-", "-"]
    assert [one.exit_code for one in wrong] == [2, 2]
