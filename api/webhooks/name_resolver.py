"""Resolves the host names of webhooks in dedicated threads, of which each project gets a few.

The system's resolver may take half a minute for a name whose servers do not answer, and can't be interrupted. Such
names block only the threads of their own project. A name without an address is not resolved again for a minute.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future

from api.rate_limits.project_slots import ProjectSlots

MAX_LOOKUPS = 32
LOOKUPS_OF_PROJECT = 4
ABSENT_SECONDS = 60.0
MAX_ABSENT = 4096
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
_Name = tuple[str, str, int]
"""Project, host, port. Projects share no results, so that none can observe or delay the lookups of another."""


class NoAddress(Exception):
    """The host has no address."""


async def system_lookup(host: str, port: int) -> Sequence[str]:
    """Return all addresses of a host from the system's resolver. Raises OSError, UnicodeError.

    The thread is a daemon, so that the process does not wait for it at exit, as it would for an executor's thread.
    """
    future: Future[list[str]] = Future()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            future.set_result(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except Exception as error:  # noqa: BLE001  (raised where the future is awaited)
            future.set_exception(error)

    threading.Thread(target=look_up, name="name lookup", daemon=True).start()
    return await asyncio.wrap_future(future)


class NameResolver:
    """Resolves names. In tests, `lookup` replaces the system's resolver, and `clock` replaces time.monotonic."""

    def __init__(self, lookup: Lookup = system_lookup, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lookup = lookup
        self._clock = clock
        self._slots = ProjectSlots(MAX_LOOKUPS, per_project=LOOKUPS_OF_PROJECT)
        self._running: dict[_Name, asyncio.Task[Sequence[str]]] = {}
        self._absent_until: dict[_Name, float] = {}

    async def resolve(self, host: str, port: int, *, project_id: str) -> Sequence[str]:
        """Return the host's addresses, at least one. Raises NoAddress.

        If a caller gives up, the lookup keeps running in its slot and serves the next caller with the same name.
        """
        name = (project_id, host, port)
        if self._absent_until.get(name, 0.0) > self._clock():
            raise NoAddress
        task = self._running.get(name)
        if task is None:
            task = self._running[name] = asyncio.create_task(self._ask(name))
            task.add_done_callback(lambda _: self._running.pop(name, None))
        found = await asyncio.shield(task)
        if not found:
            raise NoAddress
        return found

    def is_saturated(self, project_id: str) -> bool:
        """Return whether another lookup of the project would have to wait."""
        return self._slots.is_full(project_id)

    async def _ask(self, name: _Name) -> Sequence[str]:
        """Return the addresses; empty if the name has none."""
        project_id, host, port = name
        async with self._slots.slot(project_id):
            try:
                found = await self._lookup(host, port)
            except (OSError, UnicodeError):
                found = ()
        if not found:
            self._note_absent(name)
        return found

    def _note_absent(self, name: _Name) -> None:
        """Remember that the name has no address. If there are too many names, the oldest are dropped."""
        now = self._clock()
        self._absent_until = {name: until for name, until in self._absent_until.items() if until > now}
        while len(self._absent_until) >= MAX_ABSENT:
            del self._absent_until[next(iter(self._absent_until))]
        self._absent_until[name] = now + ABSENT_SECONDS
