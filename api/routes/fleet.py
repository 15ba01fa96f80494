"""/v1/queue and /v1/workers: queued and running jobs; workers, which operators cordon, uncordon and drain."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Query
from starlette.responses import StreamingResponse

from api.auth.authentication import Recheck, Signed, require_operator
from api.deps import Use
from api.rate_limits.threads import run_route
from api.requests.parameters import WorkerId
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.fleet import CordonRequest, QueueObject, WorkerObject, worker_object
from api.schemas.pagination import ListPage, page_of
from api.streaming.hub import LiveStream, Subscription
from catalog.fleet import cordons, views
from catalog.queue import listing
from catalog.scheduling.snapshot import Policy
from catalog.tenancy.authentication import Caller

router = Router(prefix="/v1", tags=["queue and workers"], responses={**SIGNED, **errors(403)})
All = Annotated[bool, Query(alias="all", description="Include the jobs of all projects. Requires an operator key.")]


@router.get("/queue", operation_id="get_queue")
def get_queue(use: Use, caller: Signed, everything: All = False) -> QueueObject:
    """Return the project's unfinished jobs, those with a queue position first. Positions count the whole queue.

    Requires the scope `jobs:read`.
    """
    return QueueObject.model_validate(
        listing.snapshot(use.db, project_id=_scope(caller, everything), policy=Policy.of(use.settings))
    )


@router.get(
    "/queue/stream",
    operation_id="stream_queue",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Server-sent events named `queue`."}},
)
async def stream_queue(use: Use, caller: Signed, recheck: Recheck, everything: All = False) -> LiveStream:
    """Stream the queue as server-sent events, one each time it changes. Requires the scope `jobs:read`."""
    project_id = _scope(caller, everything)
    first = await run_route(caller.project_id, partial(use.queue_source.begin, project_id))
    poll = partial(use.queue_source.begin, project_id)
    listener = Subscription(source=use.queue_source, key=project_id, poll=poll, signed=recheck.holder)
    return LiveStream(use.feed, listener, first, recheck.identify)


@router.get("/workers", operation_id="list_workers")
def list_workers(use: Use, caller: Signed) -> ListPage[WorkerObject]:
    """List the live workers, and those that exited within the last hour. Requires the scope `jobs:read`."""
    return page_of([worker_object(view, shows_all=caller.is_operator) for view in views.workers(use.db)])


@router.post("/workers/{worker_id}/cordon", operation_id="cordon_worker", responses=errors(404, 409))
def cordon_worker(worker_id: WorkerId, use: Use, caller: Signed, body: CordonRequest | None = None) -> WorkerObject:
    """Cordon a worker: it finishes the jobs it holds and claims no new ones.

    A worker that replaces it on the same host and devices inherits the cordon. Requires an operator key with the scope
    `workers:write`.
    """
    row = cordons.cordon(use.db, worker_id, reason=body.reason if body else None)
    return worker_object(views.view(use.db, row), shows_all=caller.is_operator)


@router.post("/workers/{worker_id}/uncordon", operation_id="uncordon_worker", responses=errors(404))
def uncordon_worker(worker_id: WorkerId, use: Use, caller: Signed) -> WorkerObject:
    """Uncordon a worker, so that it claims jobs again. Requires an operator key with the scope `workers:write`."""
    return worker_object(views.view(use.db, cordons.uncordon(use.db, worker_id)), shows_all=caller.is_operator)


@router.post("/workers/{worker_id}/drain", operation_id="drain_worker", responses=errors(404, 409))
def drain_worker(worker_id: WorkerId, use: Use, caller: Signed) -> WorkerObject:
    """Drain a worker: it saves and releases its jobs, and exits.

    A worker that replaces it on the same host and devices is cordoned. Requires an operator key with the scope
    `workers:write`.
    """
    return worker_object(views.view(use.db, cordons.drain(use.db, worker_id)), shows_all=caller.is_operator)


def _scope(caller: Caller, everything: bool) -> str | None:
    if not everything:
        return caller.project_id
    require_operator(caller)
    return None
