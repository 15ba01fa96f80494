"""Fixtures of tests of batches and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from api.deps import Services
from api.inference import batch_lease, batch_lines, batch_loop
from api.inference.answer import PartialAnswer
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
def num_begun(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that returns the number of answers that have begun for their batch."""
    answers: list[PartialAnswer] = []
    deltas_of = batch_lines.deltas_of

    def noted(reply: Any, answer: PartialAnswer, **given: Any) -> Any:
        answers.append(answer)
        return deltas_of(reply, answer, **given)

    monkeypatch.setattr(batch_lines, "deltas_of", noted)
    return lambda: sum(answer.has_begun for answer in answers)


@pytest.fixture
def worker(world: World) -> None:
    world.worker()


@pytest.fixture
def connections() -> Iterator[ReplyConnections]:
    made = ReplyConnections()
    yield made
    made.close()
