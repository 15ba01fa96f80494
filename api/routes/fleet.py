"""/v1/queue and /v1/workers: what waits, what runs, and where."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from api.auth import Recheck, Signed, require_operator
from api.deps import Use
from api.feed import Found, while_signed
from api.routes import SIGNED, errors
from api.schemas.fleet import QueueObject, WorkerObject, worker_object
from api.schemas.pages import ListPage, page_of
from api.sse import event_stream, message
from catalog import fleet, queue
from catalog.db import Database
from catalog.keys import Caller
from catalog.scheduling.picture import Policy

router = APIRouter(prefix="/v1", tags=["queue and workers"], responses={**SIGNED, **errors(403)})
All = Annotated[bool, Query(alias="all", description="Every project's jobs; for operators.")]


@router.get("/queue", operation_id="get_queue")
def get_queue(use: Use, caller: Signed, everything: All = False) -> QueueObject:
    """The project's unfinished jobs, those with a turn first. Positions are those in the whole queue."""
    return QueueObject.model_validate(
        queue.snapshot(use.db, project_id=_scope(caller, everything), policy=Policy.of(use.settings))
    )


@router.get(
    "/queue/stream",
    operation_id="stream_queue",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Messages named queue."}},
)
async def stream_queue(use: Use, caller: Signed, recheck: Recheck, everything: All = False) -> StreamingResponse:
    """The queue whenever it changes."""
    watch = _QueueWatch(use.db, _scope(caller, everything), Policy.of(use.settings))
    first = await run_in_threadpool(watch.look)
    return event_stream(use.feed.stream(first, while_signed(watch.look, recheck)))


@router.get("/workers", operation_id="list_workers")
def list_workers(use: Use, caller: Signed) -> ListPage[WorkerObject]:
    """Those that live, and those that went away in the last hour."""
    shown = [
        worker_object(view.worker, state=view.state, base_names=view.base_names, shows_host=caller.is_operator)
        for view in fleet.workers(use.db)
    ]
    return page_of(shown)


class _QueueWatch:
    def __init__(self, db: Database, project_id: str | None, policy: Policy) -> None:
        self._policy = policy
        self._db = db
        self._project_id = project_id
        self._told: str | None = None

    def look(self) -> Found:
        snapshot = queue.snapshot(self._db, project_id=self._project_id, policy=self._policy)
        gist = json.dumps(_without_clock(snapshot), sort_keys=True)
        if gist == self._told:
            return Found()
        self._told = gist
        return Found(messages=[message("queue", QueueObject.model_validate(snapshot).model_dump_json())])


def _without_clock(snapshot: dict[str, Any]) -> dict[str, Any]:
    """Waiting longer is no news."""
    jobs = [{**entry, "waited_seconds": None, "reason": None} for entry in snapshot["jobs"]]
    return {**snapshot, "as_of": None, "jobs": jobs}


def _scope(caller: Caller, everything: bool) -> str | None:
    if not everything:
        return caller.project_id
    require_operator(caller)
    return None
