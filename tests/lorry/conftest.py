"""Fixtures: a scripted service, a client that does not sleep, and the command line connected to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lorry import Lorry
from lorry.cli.main import app
from tests.lorry.scripted_server import Script, serving


@pytest.fixture
def service() -> Iterator[Script]:
    with serving() as script:
        yield script


@pytest.fixture
def slept() -> list[float]:
    """Return the list of seconds that the client asked to sleep."""
    return []


@pytest.fixture
def client(service: Script, slept: list[float]) -> Iterator[Lorry]:
    with Lorry(service.url, "lorry_key", sleep=slept.append) as lorry:
        yield lorry


@pytest.fixture
def run(service: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Return `run("jobs", "list", …, input="…")`: the command line with the scripted service, in an empty directory."""
    monkeypatch.setenv("LORRY_URL", service.url)
    monkeypatch.setenv("LORRY_API_KEY", "k")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments, **given: CliRunner().invoke(app, [str(argument) for argument in arguments], **given)


@pytest.fixture
def submit(run: Callable[..., Result], service: Script, tmp_path: Path) -> Callable[..., Result]:
    """Return `submit("m", "train.jsonl", …)`: `lorry jobs submit` with a base model and two data files."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "valid.jsonl").write_text("{}\n")
    service.on("GET", "/v1/models/m", {"id": "m", "state": "ready"})
    service.on("POST", "/v1/files", {"id": "file-1"}, {"id": "file-2"})
    return partial(run, "jobs", "submit")
