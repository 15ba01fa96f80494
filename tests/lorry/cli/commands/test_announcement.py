"""The command that `lorry up` suggests next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorry import connection
from lorry.cli.commands import up
from lorry.connection import Connection
from tests.lorry.scripted_server import Reply, Script

ADD_MODEL = up.FIRST_MODEL
BASE = {"id": "tiny", "kind": "base", "state": "ready"}


@pytest.fixture
def known(service: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Connection:
    """The connection to a service, stored in the ~/.lorry of a user without Lorry's variables."""
    for name in ("LORRY_URL", "LORRY_API_KEY", "LORRY_DATA_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".lorry").mkdir()
    known = Connection(url=service.url, api_key="k", identity_secret=service.identity_secret)
    connection.write(tmp_path / ".lorry", known)
    return known


@pytest.mark.parametrize(
    ("answer", "command"),
    [
        ({"data": []}, ADD_MODEL),
        ({"data": [{**BASE, "state": "importing"}, {**BASE, "kind": "adapter"}]}, ADD_MODEL),
        ({"data": [BASE]}, "lorry jobs submit tiny chats.jsonl"),
        ({"data": [{**BASE, "description": {"has_chat_template": True}}]}, "lorry jobs submit tiny chats.jsonl"),
        ({"data": [{**BASE, "description": {"has_chat_template": False}}]}, "lorry jobs submit tiny texts.jsonl"),
        (Reply(status=500, body={}), ADD_MODEL),
    ],
)
def test_next_command_adds_a_base_model_then_submits_a_job(
    service: Script, known: Connection, tmp_path: Path, answer: Any, command: str
) -> None:
    service.on("GET", "/v1/models", answer)

    assert up._next_command(tmp_path / ".lorry", known) == command


def test_next_command_sets_variables_if_lorry_would_not_find_the_service(
    service: Script, known: Connection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service.on("GET", "/v1/models", {"data": []})
    folder = tmp_path / "a folder"
    folder.mkdir()
    connection.write(folder, known)
    (tmp_path / ".lorry" / "connection.json").unlink()

    assert up._next_command(folder, known) == f"LORRY_DATA_DIR='{folder}' {ADD_MODEL}"
    monkeypatch.setenv("LORRY_URL", "https://elsewhere.example")
    assert up._next_command(folder, known) == f"LORRY_URL= LORRY_DATA_DIR='{folder}' {ADD_MODEL}"
