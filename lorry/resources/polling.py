"""Waits for an object of the service by requesting it repeatedly."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from lorry.errors import WaitTimeout
from lorry.transport.http import Transport

Object = TypeVar("Object")


def poll_until(
    transport: Transport,
    get: Callable[[], Object],
    is_done: Callable[[Object], bool],
    *,
    on_progress: Callable[[Object], None] | None = None,
    timeout_seconds: float | None,
    poll_seconds: float,
    timeout: Callable[[Object], WaitTimeout],
) -> Object:
    """Request the object every `poll_seconds` until it is done, and return it.

    `on_progress` gets each response. `timeout` returns the error to raise if the object is not done after
    `timeout_seconds`.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while True:
        found = get()
        if on_progress is not None:
            on_progress(found)
        if is_done(found):
            return found
        if deadline is not None and time.monotonic() >= deadline:
            raise timeout(found)
        transport.sleep(poll_seconds)
