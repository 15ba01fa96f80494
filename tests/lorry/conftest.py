"""A scripted service, and clients that never sleep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lorry import Lorry
from tests.lorry.scripted_server import Script, serving


@pytest.fixture
def service() -> Iterator[Script]:
    with serving() as script:
        yield script


@pytest.fixture
def slept() -> list[float]:
    """Seconds that the client wanted to sleep."""
    return []


@pytest.fixture
def client(service: Script, slept: list[float]) -> Iterator[Lorry]:
    with Lorry(service.url, "lorry_key", sleep=slept.append) as lorry:
        yield lorry
