"""Thread limits per kind of work, so that no kind of work can starve another.

Routes share ROUTE_THREADS, of which one project gets a few. Checks of API keys have their own threads: a valid key is
recognized even if all route threads are busy. Work that reads or writes whole files has its own threads too, of which
one project also gets a few.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar
from starlette.requests import Request

from api.requests.disconnects import watched
from catalog.errors import Unavailable

ROUTE_THREADS = 20
ROUTE_THREADS_OF_PROJECT = 2
"""A project with many concurrent requests waits for its own. Python runs one thread at a time: more threads would slow
down the requests of other projects without finishing those of the project sooner."""
KEY_CHECK_THREADS = 8
SLOW_THREADS = 8
"""Together with the threads of routes and key checks, fewer than the database's connections (POOL in
catalog/db/database.py)."""
SLOW_THREADS_OF_PROJECT = 2
WAIT_SECONDS = 60.0
"""Maximum wait of slow work for a thread; after that, the client is asked to try again."""
T = TypeVar("T")


class ProjectSlots:
    """Slots for one event loop. A project that waits for one of its own slots occupies none of the common ones."""

    def __init__(self, total: int, *, per_project: int) -> None:
        self._total = asyncio.Semaphore(total)
        self._per_project = per_project
        self._of_project: dict[str, asyncio.Semaphore] = {}
        self._users: Counter[str] = Counter()

    @asynccontextmanager
    async def slot(self, project_id: str) -> AsyncGenerator[None]:
        own = self._of_project.setdefault(project_id, asyncio.Semaphore(self._per_project))
        self._users[project_id] += 1
        try:
            async with own, self._total:
                yield
        finally:
            self._users[project_id] -= 1
            if not self._users[project_id]:
                del self._users[project_id], self._of_project[project_id]

    def is_full(self, project_id: str) -> bool:
        """Return whether the project would have to wait now."""
        own = self._of_project.get(project_id)
        return self._total.locked() or (own is not None and own.locked())


class KeyChecks:
    """The threads that look up API keys and sessions."""

    def __init__(self) -> None:
        self._limiter = anyio.CapacityLimiter(KEY_CHECK_THREADS)

    async def run(self, check: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(check, limiter=self._limiter)


@dataclass(kw_only=True, slots=True)
class _Project:
    limiter: anyio.CapacityLimiter
    num_users: int = 0


@dataclass(kw_only=True)
class SlowWork:
    """Work that takes seconds or minutes, first come, first served within a project."""

    num_threads: int = SLOW_THREADS
    per_project: int = SLOW_THREADS_OF_PROJECT
    wait_seconds: float = WAIT_SECONDS
    _projects: dict[str, _Project] = field(default_factory=dict[str, _Project], init=False)
    _closing: threading.Event = field(default_factory=threading.Event, init=False)

    def __post_init__(self) -> None:
        self._places = anyio.CapacityLimiter(self.num_threads)
        self._threads = anyio.CapacityLimiter(self.num_threads)

    def close(self) -> None:
        """Abandon running work: the function that `run_for` passes to `work` returns True from now on."""
        self._closing.set()

    async def run(self, project_id: str, work: Callable[[], T]) -> T:
        """Run `work` in a thread. Raises Unavailable if no thread becomes free for the project in time."""
        async with self._place(project_id):
            return await anyio.to_thread.run_sync(work, limiter=self._threads)

    async def run_for(self, request: Request, project_id: str, work: Callable[[Callable[[], bool]], T]) -> T:
        """Run `work` with a function that returns True once the result is no longer needed: the client has
        disconnected, or this process is stopping. The request's body must have been read."""
        async with watched(request.receive) as gone:
            return await self.run(project_id, lambda: work(lambda: gone.is_set() or self._closing.is_set()))

    @asynccontextmanager
    async def _place(self, project_id: str) -> AsyncGenerator[None]:
        project = self._projects.setdefault(project_id, _Project(limiter=anyio.CapacityLimiter(self.per_project)))
        project.num_users += 1
        try:
            async with AsyncExitStack() as held:
                owner, maximum = f"project {project_id}", self.per_project
                try:
                    with anyio.fail_after(self.wait_seconds):
                        await held.enter_async_context(project.limiter)
                        owner, maximum = "the API server", self.num_threads
                        await held.enter_async_context(self._places)
                except TimeoutError as error:
                    raise Unavailable(
                        "files_busy", wait_seconds=self.wait_seconds, owner=owner, maximum=maximum
                    ) from error
                yield
        finally:
            project.num_users -= 1
            if not project.num_users:
                del self._projects[project_id]


_route_slots: RunVar[ProjectSlots | None] = RunVar("route_slots")
"""The slots of the event loop."""


async def run_route(project_id: str | None, work: Callable[[], T]) -> T:
    """Run `work` in a route thread, as soon as the project has one. None: a request without a project."""
    if project_id is None:
        return await anyio.to_thread.run_sync(work)
    slots = _route_slots.get(None)
    if slots is None:
        _route_slots.set(slots := ProjectSlots(ROUTE_THREADS, per_project=ROUTE_THREADS_OF_PROJECT))
    async with slots.slot(project_id):
        return await anyio.to_thread.run_sync(work)
