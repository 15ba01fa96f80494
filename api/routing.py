"""Routers whose synchronous endpoints make only one trip to a thread."""

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
    """Runs a synchronous endpoint in a thread, but validates its response on the event loop. FastAPI would dispatch the
    validation to a thread again, which takes longer than the validation."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **given: Any) -> None:
        super().__init__(path, endpoint if iscoroutinefunction(endpoint) else _in_a_thread(endpoint), **given)


def _in_a_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(endpoint)
    async def called(**arguments: Any) -> Any:
        caller = next((value for value in arguments.values() if isinstance(value, Caller)), None)
        return await run_route(None if caller is None else caller.project_id, partial(endpoint, **arguments))

    return called
