"""`lorry login`, `lorry whoami` and `lorry status`."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lorry import connection
from lorry.cli.main import app
from lorry.cli.render import output
from lorry.connection import Connection
from tests.lorry.scripted_server import Reply, Script

Run = Callable[..., Result]
IDENTITY = {
    "object": "browser_session",
    "project_id": "proj-1",
    "project": "default",
    "key_name": "laptop",
    "is_operator": False,
    "scopes": ["jobs:read", "jobs:write"],
}
SECRET = "lorry_key-1_very-secret"


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The configuration folder of a user with an empty home and without Lorry's variables."""
    for name in ("LORRY_URL", "LORRY_API_KEY", "LORRY_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "lorry"


def login(service: Script, *arguments: str, key: str = f"{SECRET}\n") -> Result:
    return CliRunner().invoke(app, ["login", service.url, *arguments], input=key)


def test_login_is_stored_privately_and_used_by_later_commands(service: Script, config: Path) -> None:
    service.on("GET", "/v1/browser_session", IDENTITY)
    service.on("GET", "/v1/fine_tuning/jobs", {"data": [{"id": "j"}], "has_more": False})

    result = login(service)
    listed = CliRunner().invoke(app, ["jobs", "list", "-q"])

    path = config / "connection.json"
    assert result.exit_code == 0, result.stderr
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(config.stat().st_mode) == 0o700
    assert f"Logged in to {service.url} as laptop (project default)." in result.stderr
    assert listed.stdout == "j\n"
    assert service.seen[-1].headers["authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_login_prints_no_secret(service: Script, config: Path, flags: list[str]) -> None:
    service.on("GET", "/v1/browser_session", IDENTITY)

    result = login(service, *flags)

    assert result.exit_code == 0
    assert SECRET not in result.stdout + result.stderr


def test_a_key_that_the_service_rejects_is_not_stored(service: Script, config: Path) -> None:
    error = {"message": "The API key is not valid.", "code": "invalid_api_key", "remedy": "Check it."}
    service.on("GET", "/v1/browser_session", Reply(status=401, body={"error": error}))

    result = login(service)

    assert result.exit_code == 1
    assert "The API key is not valid." in result.stderr
    assert not config.exists()


def test_key_argument_and_empty_key_are_rejected(service: Script, config: Path) -> None:
    argument = CliRunner().invoke(app, ["login", service.url, SECRET])
    empty = login(service, key="\n")

    assert argument.exit_code == 2
    assert (empty.exit_code, "the first line of stdin is empty" in " ".join(empty.stderr.split())) == (1, True)
    assert service.seen == []


def test_key_prompt_does_not_echo_in_a_terminal(service: Script, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service.on("GET", "/v1/browser_session", IDENTITY)
    prompts: list[dict[str, object]] = []
    monkeypatch.setattr(output, "is_interactive", lambda: True)
    monkeypatch.setattr("typer.prompt", lambda _text, **options: prompts.append(options) or SECRET)  # pyright: ignore

    assert login(service).exit_code == 0
    assert prompts == [{"hide_input": True, "err": True}]


def test_key_is_not_sent_to_an_unverified_local_service(service: Script, config: Path, tmp_path: Path) -> None:
    (tmp_path / ".lorry").mkdir()
    known = Connection(url=service.url, api_key="local", identity_secret="ab" * 32)
    connection.write(tmp_path / ".lorry", known)

    result = login(service)

    assert result.exit_code == 1
    assert service.seen == []
    assert not config.exists()


def test_login_over_plain_http_to_a_remote_host_warns(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorry.resources.sign_in.SignInLinks.identity", lambda _: IDENTITY)

    printed = CliRunner().invoke(app, ["login", "http://lorry.example"], input=f"{SECRET}\n").stderr
    quiet = CliRunner().invoke(app, ["login", "https://lorry.example"], input=f"{SECRET}\n").stderr

    assert "Warning: the connection to http://lorry.example is not encrypted." in printed
    assert "Warning" not in quiet


def test_login_names_a_variable_that_takes_precedence(
    service: Script, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.on("GET", "/v1/browser_session", IDENTITY)
    monkeypatch.setenv("LORRY_URL", "https://elsewhere.example")

    assert "LORRY_URL is set and takes precedence." in login(service).stderr


def test_rotated_key_replaces_the_stored_login(service: Script, config: Path) -> None:
    config.mkdir(parents=True)
    connection.write(config, Connection(url=service.url, api_key="lorry_key-1_old"))
    service.on("POST", "/v1/api_keys/key-1/rotate", {"id": "key-2", "value": "lorry_key-2_new"})

    result = CliRunner().invoke(app, ["keys", "rotate", "key-1"])

    assert f"Stored the new key in {config / 'connection.json'}." in result.stderr
    assert connection.read(config) == Connection(url=service.url, api_key="lorry_key-2_new")


def test_whoami_shows_scopes_but_not_the_secret(service: Script, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    service.on("GET", "/v1/browser_session", IDENTITY)
    monkeypatch.setenv("LORRY_API_KEY", SECRET)

    shown, machine = run("whoami"), run("whoami", "--json")

    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert lines == [
        f"service {service.url}",
        "key laptop",
        "key id key-1",
        "project default (proj-1)",
        "operator no",
        "scopes jobs:read jobs:write",
    ]
    assert json.loads(machine.stdout) == {**IDENTITY, "url": service.url}
    assert "very-secret" not in shown.stdout + machine.stdout


def test_status_counts_jobs_and_workers_and_shows_the_address_source(
    service: Script, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORRY_DATA_DIR", str(tmp_path))
    states = ("running", "queued", "queued")
    service.on("GET", "/v1/queue", {"jobs": [{"job_id": f"j{i}", "state": state} for i, state in enumerate(states)]})
    service.on("GET", "/v1/workers", {"data": [{"id": "w", "state": "busy"}, {"id": "v", "state": "ended"}]})

    shown, machine = run("status"), run("status", "-o", "json")

    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert lines == [
        f"service {service.url}",
        "address from the variable LORRY_URL",
        "jobs 2 queued, 1 running",
        "workers 1 busy",
        f"local service not running in {tmp_path}",
    ]
    found = json.loads(machine.stdout)
    assert (found["jobs"], found["workers"], found["data_dir_pid"]) == ({"running": 1, "queued": 2}, {"busy": 1}, None)


def test_status_of_an_unreachable_service_exits_with_1(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lorry.transport.retries.RetryPolicy.delay", lambda *_: 0)
    monkeypatch.setenv("LORRY_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("LORRY_DATA_DIR", str(tmp_path))

    assert run("status").exit_code == 1
