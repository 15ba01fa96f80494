"""Fixtures: an API server with a real database and local store, called in process or over loopback."""

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
from api.inference import batch_loop
from api.serving import keeper
from api.settings import ApiSettings
from api.webhooks import delivery_loop
from catalog.settings import Settings
from catalog.tables.storage import Adapter
from catalog.tenancy import authentication
from tests.api.hook_receiver import Receiver, receiving
from tests.api.site import PEPPER, Site, running
from tests.api.trained import trained
from tests.catalog.world import Clock, World
from tests.services.postgres import ON_POSTGRESQL


@pytest.fixture
def database() -> str:
    """Return the database of this test run: sqlite or postgresql. A module can override this fixture."""
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
def no_polls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable polls of webhooks and serving endpoints, which execute additional statements, except in tests that use
    `receiver` or `vllm`."""
    if "receiver" not in request.fixturenames:
        monkeypatch.setattr(delivery_loop, "LOOK_SECONDS", 3600.0)
    seconds = 0.05 if "vllm" in request.fixturenames else 3600.0
    monkeypatch.setattr(keeper, "LOOK_SECONDS", seconds)


@pytest.fixture(autouse=True)
def no_batch_polls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable polls for batches, which execute additional statements, except in tests that use `batch_trainer`."""
    if "batch_trainer" not in request.fixturenames:
        monkeypatch.setattr(batch_loop, "LOOK_SECONDS", 3600.0)
        monkeypatch.setattr(batch_loop.BatchRunner, "wake", lambda _: None)


@pytest.fixture
def app(settings: Settings) -> Iterator[FastAPI]:
    """Return an app without a request limit, which sends webhooks to loopback too."""
    quick = ApiSettings(
        stream_poll_seconds=0.02,
        stream_heartbeat_seconds=0.2,
        shutdown_seconds=5,
        requests_per_minute=0,
        webhook_allowed_networks="127.0.0.1/32",
        webhook_allow_http=True,
    )
    app = create_app(settings, quick)
    yield app
    app.state.services.db.close()  # also for an app that never started


@pytest.fixture
def services(app: FastAPI) -> Services:
    return app.state.services


@pytest.fixture
def world(services: Services) -> World:
    """Return a base model, a file and two projects, created through the catalog."""
    return World(services.db, Clock())


@pytest.fixture
def adapter(services: Services, world: World, tmp_path: Path) -> Adapter:
    """Return the adapter of a succeeded job."""
    return trained(services, world, tmp_path / "adapter")


@pytest.fixture
def key(services: Services, world: World) -> str:
    """Return a non-operator key of the project that owns the world's file."""
    return new_key(services, world.caller.project_id)


@pytest.fixture
def operator_key(services: Services, world: World) -> str:
    return new_key(services, world.caller.project_id, is_operator=True)


@pytest.fixture
def stranger_key(services: Services, world: World) -> str:
    return new_key(services, world.stranger.project_id)


@pytest.fixture
def anonymous(app: FastAPI) -> Iterator[TestClient]:
    """Return an in-process client at 127.0.0.1 without a key."""
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000), follow_redirects=False) as client:
        client.event_hooks = CHECKED
        yield client


@pytest.fixture
def client(app: FastAPI, anonymous: TestClient, key: str) -> TestClient:
    """Return an in-process client with the non-operator key."""
    return with_key(app, key)


@pytest.fixture
def operator(app: FastAPI, anonymous: TestClient, operator_key: str) -> TestClient:
    return with_key(app, operator_key)


@pytest.fixture
def stranger(app: FastAPI, anonymous: TestClient, stranger_key: str) -> TestClient:
    return with_key(app, stranger_key)


@pytest.fixture
def site(app: FastAPI, key: str) -> Iterator[Site]:
    """Serve the app with a real server on loopback."""
    with running(app, key) as site:
        yield site


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Return a receiver of webhooks on loopback."""
    with receiving() as receiver:
        yield receiver


def with_key(app: FastAPI, key: str) -> TestClient:
    """Return a client that shares the lifespan of `anonymous`."""
    headers = {"authorization": f"Bearer {key}"}
    client = TestClient(app, base_url="http://127.0.0.1", headers=headers, client=("127.0.0.1", 50001))
    client.event_hooks = CHECKED
    return client


def check_error(response: httpx.Response) -> None:
    """Every error response links to an existing entry of the error reference."""
    if response.status_code < 400 or not response.headers.get("content-type", "").startswith("application/json"):
        return
    response.read()
    error = response.json().get("error")
    if error is None:  # the report of a health check
        return
    assert error["doc_url"].endswith(f"/dashboard/errors.html#{error['code']}")
    assert f'<section id="{error["code"]}">' in ERROR_REFERENCE, f"run `make docs`: no entry for {error['code']}"


CHECKED: dict[str, list[Callable[..., Any]]] = {"response": [check_error]}
ERROR_REFERENCE = (FOLDER / "errors.html").read_text("utf-8")


def new_key(services: Services, project_id: str, *, is_operator: bool = False) -> str:
    return authentication.create(
        services.db, project_id=project_id, name="test", pepper=services.pepper, is_operator=is_operator
    )[1]
