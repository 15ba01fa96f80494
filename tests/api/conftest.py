"""An api over a real SQLite file and a real local store, called in process or over loopback."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.testclient import TestClient

from api.app import create_app
from api.dashboard import FOLDER
from api.deps import Services
from api.settings import ApiSettings
from api.webhooks import delivery_loop
from catalog.settings import Settings
from catalog.tenancy import authentication
from tests.api.site import PEPPER, Site, running
from tests.catalog.world import Clock, World
from tests.services.postgres import ON_POSTGRESQL


@pytest.fixture
def database() -> str:
    """sqlite or postgresql; a module that has its own fixture of this name is not asked on which it runs."""
    return "postgresql" if ON_POSTGRESQL else "sqlite"


@pytest.fixture
def settings(tmp_path: Path, database: str, request: pytest.FixtureRequest) -> Settings:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    url = None
    if database == "postgresql":
        url = request.getfixturevalue("migrated_postgres_url")
    else:
        shutil.copy(request.getfixturevalue("migrated_database"), data_dir / "lorry.db")
    return Settings(
        data_dir=data_dir,
        database_url=SecretStr(url) if url else None,
        pepper=SecretStr(PEPPER.decode()),
        max_file_bytes=2**20,
        max_line_bytes=2**16,
    )


@pytest.fixture(autouse=True)
def nothing_looks_for_webhooks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what a test asks for, unless it is about them: a look is some statements more."""
    if "receiver" not in request.fixturenames:
        monkeypatch.setattr(delivery_loop, "LOOK_SECONDS", 3600.0)


@pytest.fixture
def app(settings: Settings) -> Iterator[FastAPI]:
    """Without limits of requests: a test may send as many as it likes."""
    quick = ApiSettings(
        stream_poll_seconds=0.02, stream_heartbeat_seconds=0.2, shutdown_seconds=5, requests_per_minute=0
    )
    app = create_app(settings, quick)
    yield app
    app.state.services.db.close()  # of an app that never ran, too


@pytest.fixture
def services(app: FastAPI) -> Services:
    return app.state.services


@pytest.fixture
def world(services: Services) -> World:
    """A base, a file, and two projects, by the catalog's own verbs."""
    return World(services.db, Clock())


@pytest.fixture
def key(services: Services, world: World) -> str:
    """An ordinary key of the project that owns the world's file."""
    return new_key(services, world.caller.project_id)


@pytest.fixture
def operator_key(services: Services, world: World) -> str:
    return new_key(services, world.caller.project_id, is_operator=True)


@pytest.fixture
def stranger_key(services: Services, world: World) -> str:
    return new_key(services, world.stranger.project_id)


@pytest.fixture
def anonymous(app: FastAPI) -> Iterator[TestClient]:
    """In process, from this machine, with no key."""
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000), follow_redirects=False) as client:
        client.event_hooks = CHECKED
        yield client


@pytest.fixture
def client(app: FastAPI, anonymous: TestClient, key: str) -> TestClient:
    """In process, with the ordinary key."""
    return with_key(app, key)


@pytest.fixture
def operator(app: FastAPI, anonymous: TestClient, operator_key: str) -> TestClient:
    return with_key(app, operator_key)


@pytest.fixture
def stranger(app: FastAPI, anonymous: TestClient, stranger_key: str) -> TestClient:
    return with_key(app, stranger_key)


@pytest.fixture
def site(app: FastAPI, key: str) -> Iterator[Site]:
    """The same app behind a real server on loopback."""
    with running(app, key) as site:
        yield site


def with_key(app: FastAPI, key: str) -> TestClient:
    """Shares the lifespan of `anonymous`."""
    headers = {"authorization": f"Bearer {key}"}
    client = TestClient(app, base_url="http://127.0.0.1", headers=headers, client=("127.0.0.1", 50001))
    client.event_hooks = CHECKED
    return client


def check_error(response: httpx.Response) -> None:
    """Every error response links to an existing entry of the error reference."""
    if response.status_code < 400 or not response.headers.get("content-type", "").startswith("application/json"):
        return
    response.read()
    error = response.json()["error"]
    assert error["doc_url"].endswith(f"/dashboard/errors.html#{error['code']}")
    assert f'<section id="{error["code"]}">' in ERROR_REFERENCE, f"run `make docs`: no entry for {error['code']}"


CHECKED: dict[str, list[Callable[..., Any]]] = {"response": [check_error]}
ERROR_REFERENCE = (FOLDER / "errors.html").read_text("utf-8")


def new_key(services: Services, project_id: str, *, is_operator: bool = False) -> str:
    return authentication.create(
        services.db, project_id=project_id, name="test", pepper=services.pepper, is_operator=is_operator
    )[1]
