"""Routers whose endpoints cost one way to a thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from inspect import iscoroutinefunction
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute

from api.rate_limits.threads import run_route
from catalog.tenancy.authentication import Caller


class Router(APIRouter):
    def __init__(self, **given: Any) -> None:
        super().__init__(route_class=_Route, **given)


class _Route(APIRoute):
    """An endpoint that waits for the database is run in a thread. Its answer is checked without one: the framework
    would go to a thread again, which takes longer than the check."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **given: Any) -> None:
        super().__init__(path, endpoint if iscoroutinefunction(endpoint) else _in_a_thread(endpoint), **given)


def _in_a_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(endpoint)
    async def called(**arguments: Any) -> Any:
        caller = next((value for value in arguments.values() if isinstance(value, Caller)), None)
        return await run_route(None if caller is None else caller.project_id, partial(endpoint, **arguments))

    return called
