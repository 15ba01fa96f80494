"""Which workers live, and what their records say of their devices: read from the tables alone."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, and_

from catalog.tables import Worker

SILENT_SECONDS = 60.0
"""A worker that was not heard from for so long is shown as lost."""


def is_live(*, now: float) -> ColumnElement[bool]:
    """In a query: the worker has not ended, and was heard from lately."""
    return and_(Worker.ended_at.is_(None), Worker.heartbeat_at > now - SILENT_SECONDS)


def quantisations_on(devices: list[Any]) -> frozenset[str]:
    """none, and what else the worker said at its start; older workers say nothing."""
    return frozenset({"none"}).union(*(device.get("quantisations", ()) for device in devices))


def has_gpu(devices: list[Any]) -> bool:
    return any(device.get("kind") == "cuda" for device in devices)
