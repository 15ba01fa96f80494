"""Limits concurrent operations in one process, with a smaller limit per project."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


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
