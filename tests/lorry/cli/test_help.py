"""The shape of the command line: names of verbs, help texts, examples and options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from lorry.cli.main import app

ROOT: Any = typer.main.get_command(app)
VERBS = {
    "": "up down status login whoami chat queue usage worker sign-in-link",
    "jobs": "submit list show why watch logs events metrics samples checkpoints cancel pause resume hold release move",
    "plans": "create list show delete",
    "sweeps": "run list show watch close cancel",
    "batches": "create list show cancel",
    "models": "add list show delete",
    "adapters": "list show pull verify lineage reproduce export exports cancel-export delete-export delete share "
    "shares unshare deploy undeploy",
    "serving": "add list show deployments remove",
    "files": "upload list show download report delete",
    "keys": "create list show rotate revoke update",
    "projects": "create list show update archive restore",
    "organizations": "create list show update",
    "webhooks": "create list show update test deliveries replay rotate-secret enable disable delete",
    "workers": "list show cordon uncordon drain",
    "audit": "list verify export",
}
"""All commands, by group."""
FILES = ("chats.jsonl", "valid.jsonl", "notes.pdf", "requests.jsonl")
"""Files that examples name."""


def commands(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command with its path."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands())
EACH = pytest.mark.parametrize("name", COMMANDS)


def test_commands_are_the_listed_verbs() -> None:
    found: dict[str, set[str]] = {}
    for name in COMMANDS:
        group, _, verb = name.rpartition(" ")
        found.setdefault(group, set()).add(verb)

    assert found == {group: set(verbs.split()) for group, verbs in VERBS.items()}


@EACH
def test_every_command_has_a_help_text_that_is_a_sentence(name: str) -> None:
    help_text = COMMANDS[name].help or ""

    assert re.match(r"[A-Z].*\.", help_text), help_text


@EACH
def test_every_command_has_examples_that_parse(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in FILES:
        (tmp_path / file).touch()
    lines = [line.strip() for line in (COMMANDS[name].epilog or "").splitlines()]
    examples = [line for line in lines if line.startswith("lorry ")]

    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(re.split(r" [|<>] ", example)[0])
        assert " ".join(words).startswith(f"lorry {name}"), example
        COMMANDS[name].make_context(name, words[1 + len(name.split()) :])


@EACH
def test_every_parameter_has_a_help_text_that_is_a_sentence(name: str) -> None:
    for param in COMMANDS[name].params:
        if getattr(param, "hidden", False) or param.name == "help":
            continue
        help_text = getattr(param, "help", None) or ""
        assert re.fullmatch(r"[A-Z`].*[.]", help_text, re.DOTALL), (param.name, help_text)


@EACH
def test_help_shows_output_json_and_upper_case_arguments(name: str) -> None:
    help_text = CliRunner().invoke(app, [*name.split(), "--help"]).stdout

    assert ("--json" in help_text) == ("-o, --output <json>" in help_text)
    assert not re.search(r"\{[a-z_]+\}", help_text)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.endswith((" list", " create", " submit", " run"))])
def test_every_list_and_create_command_has_quiet(name: str) -> None:
    shows_a_secret = name in {"keys create", "webhooks create"}  # with the ID alone, the secret would be lost

    assert any("--quiet" in param.opts for param in COMMANDS[name].params) is not shows_a_secret


@pytest.mark.parametrize("name", [name for name in VERBS if name])
def test_a_group_without_a_command_prints_its_help(run: Callable[..., Result], name: str) -> None:
    without_command, with_help = run(name), run(name, "--help")

    assert without_command.exit_code == 2
    assert "Commands:" in with_help.stdout
    assert with_help.stdout.strip() in (without_command.stdout + without_command.stderr)


def test_main_help_has_examples() -> None:
    assert "lorry up\n" in CliRunner().invoke(app, ["--help"]).stdout
