"""A worker on a freshly migrated database, and small chat bases to prepare data for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tiny_base
from tests.worker.chat_bases import Base, train_tokenizer
from tests.worker.pack_site import READY, PackSite, emit, pack_site
from tests.worker.scripted_trainer import FakeTrainer, Script
from worker import supervisor
from worker.background import base_models
from worker.node import devices
from worker.protocol.mailbox import TrainerDirectory
from worker.session.trainer_session import TrainerSession


@pytest.fixture
def site(tmp_path: Path, migrated_database: Path) -> Iterator[PackSite]:
    with pack_site(tmp_path, migrated_database) as site:
        yield site


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny base model. Tests do not write into it."""
    return tiny_base.make(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """Return a tokenizer trained on the texts of the tests."""
    return train_tokenizer()


@pytest.fixture
def make_base(tmp_path: Path, tokenizer_json: str) -> Callable[[str | None], Base]:
    """Return make_base(template), which makes a base with that chat template, or with none."""
    return lambda template: Base(tmp_path / "base", tokenizer_json, template)


@pytest.fixture
def run(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], list[FakeTrainer]]:
    """Return run(script), which supervises until no work is left and returns the trainers, which follow the script."""
    trainers: list[FakeTrainer] = []
    site.context.scratch_dir().mkdir(parents=True, exist_ok=True)

    def launch(
        directory: TrainerDirectory,
        _device: devices.Device,
        *,
        silence_seconds: float,
        bases_dir: Path,
        num_processes: int,
        in_gang: bool,
    ) -> FakeTrainer:
        trainers.append(FakeTrainer(directory, scripts[0]))
        return trainers[-1]

    def run(script: Script) -> list[FakeTrainer]:
        scripts.append(script)
        supervisor.supervise(site.context)
        return trainers

    scripts: list[Script] = []
    monkeypatch.setattr(supervisor, "launch", launch)
    monkeypatch.setattr(base_models, "ensure", lambda *_, **__: Path("/nowhere"))
    monkeypatch.setattr(devices, "free_bytes", lambda _: 10**12)
    return run


@pytest.fixture
def session(site: PackSite) -> Iterator[TrainerSession]:
    """A session without jobs, whose trainer is ready."""
    session = site.loading_session()
    emit(session, READY)
    session.read_events()
    yield session
    session.inference.close()
