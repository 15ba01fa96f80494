"""A trainer that is ready, and an API process that waits for its answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from catalog.resources.pack_key import pack_key
from tests.catalog.world import sha
from tests.worker.inference_requests import ApiProcess
from tests.worker.pack_site import READY, PackSite, emit
from worker.session.inference import InferenceSession
from worker.session.trainer_session import TrainerSession


@pytest.fixture
def api() -> Iterator[ApiProcess]:
    process = ApiProcess()
    yield process
    process.close()


@pytest.fixture
def session(site: PackSite) -> Iterator[TrainerSession]:
    """A session without jobs, whose trainer is ready."""
    session = site.loading_session()
    session.inference = InferenceSession(site.context, pack_key(sha("smol"), "bfloat16"))
    emit(session, READY)
    session.read_events()
    yield session
    session.inference.release_all()
