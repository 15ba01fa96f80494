"""Blocking endpoints run in a thread, and the rest of their request does not."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import fastapi.routing
import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from api.routing import Router
from catalog.audit import log
from catalog.audit.log import Actor, Origin


class Answer(BaseModel):
    thread: int
    actor: str | None


def test_blocking_endpoint_uses_one_thread_and_keeps_its_log_context(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the framework used its own thread pool")

    monkeypatch.setattr(fastapi.routing, "run_in_threadpool", refuse)
    app, router = FastAPI(), Router(prefix="/things")

    def thing(name: str) -> Answer:
        return Answer(thread=threading.get_ident(), actor=f"{name} by {log.actor_id()}")

    async def things() -> Answer:
        return Answer(thread=threading.get_ident(), actor=None)

    router.add_api_route("/{name}", thing)
    router.add_api_route("", things)
    app.include_router(router)

    async def ask(path: str) -> dict[str, Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            with log.attributed_to(Origin(request_id="req_1", address=None)):
                log.actor_is(Actor(type="api_key", id="key-1", name="one"))
                return (await client.get(path)).json()

    waiting, quick = asyncio.run(ask("/things/a")), asyncio.run(ask("/things"))

    assert waiting["thread"] != threading.get_ident() == quick["thread"]
    assert waiting["actor"] == "a by key-1"
