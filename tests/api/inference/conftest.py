"""Fixtures of tests of batches and answers."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from api.deps import Services
from api.inference import batch_lease, batch_lines, batch_loop
from tests.api.inference.batch_service import BatchWorker, answering, strict_client
from tests.api.site import Site
from tests.catalog.world import World
from worker.session.reply_connections import ReplyConnections


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loop poll at short intervals."""
    monkeypatch.setattr(batch_loop, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(batch_lease, "KEEP_SECONDS", 0.05)
    monkeypatch.setattr(batch_lines, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(batch_lines, "PAUSE_SECONDS", 0.05)


@pytest.fixture
def batch_worker(world: World, services: Services) -> Iterator[BatchWorker]:
    world.worker()
    with answering(services.db) as worker:
        yield worker


@pytest.fixture
def client(site: Site, batch_worker: BatchWorker) -> Iterator[openai.OpenAI]:
    with strict_client(site, site.key) as client:
        yield client


@pytest.fixture
def worker(world: World) -> None:
    world.worker()


@pytest.fixture
def connections() -> Iterator[ReplyConnections]:
    made = ReplyConnections()
    yield made
    made.close()
