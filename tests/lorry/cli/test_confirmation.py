"""Irreversible commands ask for confirmation in a terminal, and require --yes without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from lorry.cli.main import app
from lorry.cli.render import output
from tests.lorry.cli.test_help import COMMANDS
from tests.lorry.scripted_server import Script

Run = Callable[..., Result]
IRREVERSIBLE = {
    "jobs cancel": ("j", ("POST", "/v1/fine_tuning/jobs/j/cancel")),
    "files delete": ("f", ("DELETE", "/v1/files/f")),
    "models delete": ("m", ("DELETE", "/v1/models/m")),
    "adapters delete": ("a", ("DELETE", "/v1/adapters/a")),
    "adapters delete-export": ("a e", ("DELETE", "/v1/adapters/a/exports/e")),
    "plans delete": ("p", ("DELETE", "/v1/plans/p")),
    "sweeps cancel": ("s", ("POST", "/v1/sweeps/s/cancel")),
    "sweeps close": ("s", ("POST", "/v1/sweeps/s/close")),
    "batches cancel": ("b", ("POST", "/v1/batches/b/cancel")),
    "keys revoke": ("k", ("POST", "/v1/api_keys/k/revoke")),
    "projects archive": ("p", ("POST", "/v1/projects/p/archive")),
    "webhooks delete": ("w", ("DELETE", "/v1/webhook_endpoints/w")),
    "serving remove": ("e", ("DELETE", "/v1/serving/endpoints/e")),
}
EACH = pytest.mark.parametrize("name", IRREVERSIBLE)


@pytest.fixture(autouse=True)
def answers(service: Script) -> None:
    service.on("GET", "/v1/adapters/a", {"id": "a", "name": "a"})
    for ident, request in IRREVERSIBLE.values():
        service.on(*request, {"id": ident, "name": ident})


def is_done(service: Script, name: str) -> bool:
    return bool(service.requests(*IRREVERSIBLE[name][1]))


def test_exactly_the_irreversible_commands_ask_for_confirmation() -> None:
    asking = {
        name
        for name, command in COMMANDS.items()
        if any("--yes" in param.opts and not param.hidden for param in command.params)
    }

    assert asking == set(IRREVERSIBLE)


@EACH
def test_without_a_terminal_yes_is_required(service: Script, run: Run, name: str) -> None:
    result = run(*name.split(), *IRREVERSIBLE[name][0].split())

    assert result.exit_code == 2
    assert "Confirmation required. Pass --yes to run non-interactively." in result.stderr
    assert not is_done(service, name)


@EACH
@pytest.mark.parametrize("flag", ["--yes", "-y"])
def test_yes_skips_the_prompt(service: Script, run: Run, name: str, flag: str) -> None:
    result = run(*name.split(), *IRREVERSIBLE[name][0].split(), flag)

    assert result.exit_code == 0, result.stderr
    assert "[y/N]" not in result.stderr
    assert is_done(service, name)


@EACH
@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("Yes\n", 0), ("\n", 1), ("no\n", 1), ("", 1)])
def test_prompt_accepts_only_yes(
    service: Script, monkeypatch: pytest.MonkeyPatch, name: str, answer: str, code: int
) -> None:
    monkeypatch.setattr(output, "is_interactive", lambda: True)

    result = CliRunner().invoke(app, [*name.split(), *IRREVERSIBLE[name][0].split()], input=answer)

    assert result.exit_code == code
    assert "? " in result.stderr or "." in result.stderr
    assert is_done(service, name) is (code == 0)
    assert ("Aborted." in result.stderr) is (code == 1)


def test_prompt_shows_the_full_id(service: Script, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = "ftjob-3f2b8c9d0a1e4f5a6b7c8d9e"
    service.on("GET", "/v1/fine_tuning/jobs", {"data": [{"id": job_id}], "has_more": False})
    monkeypatch.setattr(output, "is_interactive", lambda: True)

    result = CliRunner().invoke(app, ["jobs", "cancel", "ftjob-3f"], input="n\n")

    assert f"Cancel job {job_id}? It can't be resumed. [y/N]" in result.stderr
