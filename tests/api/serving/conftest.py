"""Fixtures: a registered endpoint on a server with vLLM's routes, a trained adapter, and a trainer that answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from api.deps import Services
from api.serving import held_lease, keeper
from catalog.serving import keeping
from catalog.tables.storage import Adapter
from tests.api import fake_trainer
from tests.api.conftest import new_key
from tests.api.serving_engines import FakeVllm, ReferenceTrainer, serving
from tests.api.serving_site import ServingSite
from tests.api.site import Site
from tests.catalog.world import World


@pytest.fixture
def vllm() -> Iterator[FakeVllm]:
    with serving(FakeVllm()) as fake:
        yield fake


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "WAITS_SECONDS", (0.05,))
    monkeypatch.setattr(keeper, "REJECTED_SECONDS", 0.05)
    monkeypatch.setattr(keeper, "NOTE_SECONDS", 0.1)
    monkeypatch.setattr(held_lease, "RENEW_SECONDS", 0.05)


@pytest.fixture
def trainer(services: Services, adapter: Adapter) -> Iterator[ReferenceTrainer]:
    made = ReferenceTrainer(services.db, services.settings, digest=adapter.base_digest)
    with fake_trainer.serving(made):
        yield made


@pytest.fixture
def place(
    site: Site, services: Services, world: World, vllm: FakeVllm, adapter: Adapter, operator_key: str, tmp_path: Path
) -> Iterator[ServingSite]:
    """Return the service without a registered endpoint."""
    folder = tmp_path / "served"
    folder.mkdir()
    stranger_key = new_key(services, world.stranger.project_id)
    with ServingSite(
        site=site, services=services, vllm=vllm, adapter=adapter, folder=folder,
        operator_key=operator_key, stranger_key=stranger_key,
    ) as made:  # fmt: skip
        yield made
