"""Prevents slow work in a write transaction: work whose duration clients control must not run inside one.

On SQLite, a write transaction holds the only write lock, so the heartbeats of all workers wait for it.
`catalog.db.database` marks each write transaction here. Code that compiles or matches user-supplied patterns calls
`check_outside`.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager


class _Depth(threading.local):
    """Number of write transactions that this thread has open, on any database."""

    num_open = 0


_depth = _Depth()


@contextmanager
def entered() -> Generator[None]:
    """Mark a write transaction of this thread."""
    _depth.num_open += 1
    try:
        yield
    finally:
        _depth.num_open -= 1


class WithinTransaction(RuntimeError):
    """A bug in Lorry. Not an AssertionError, because pydantic would report that as an invalid request."""


def check_outside(action: str) -> None:
    """Raises WithinTransaction if this thread holds a write transaction. action: the work to start, a gerund."""
    if _depth.num_open:
        raise WithinTransaction(f"{action} within a write transaction: do it before, then check that no input changed")
