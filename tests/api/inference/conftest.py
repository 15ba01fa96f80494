"""Fixtures of tests of batches and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest

from api.deps import Services
from api.inference import batch_lease, batch_lines, batch_loop
from api.inference.answer import PartialAnswer
from tests.api.fake_trainer import serving
from tests.api.inference.batch_service import BatchTrainer, strict_client
from tests.api.site import Site
from tests.catalog.world import World


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loop poll at short intervals."""
    monkeypatch.setattr(batch_loop, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(batch_lease, "KEEP_SECONDS", 0.05)
    monkeypatch.setattr(batch_lines, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(batch_lines, "PAUSE_SECONDS", 0.05)


@pytest.fixture
def batch_trainer(world: World, services: Services) -> Iterator[BatchTrainer]:
    world.worker()
    trainer = BatchTrainer(services.db, services.settings)
    with serving(trainer):
        yield trainer


@pytest.fixture
def client(site: Site, batch_trainer: BatchTrainer) -> Iterator[openai.OpenAI]:
    with strict_client(site, site.key) as client:
        yield client


@pytest.fixture
def num_begun(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that returns the number of answers that have begun for their batch."""
    answers: list[PartialAnswer] = []

    def noted() -> PartialAnswer:
        answers.append(PartialAnswer())
        return answers[-1]

    monkeypatch.setattr(batch_lines, "PartialAnswer", noted)
    return lambda: sum(answer.has_begun for answer in answers)
