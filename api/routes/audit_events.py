"""/v1/audit_events: changes and their actors. Operators can also verify and export the whole chain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Annotated

from fastapi import Query
from starlette.responses import StreamingResponse

from api.auth.authentication import Operator, Signed
from api.deps import After, Limit, Use
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.audit import AuditEventObject, AuditVerification, audit_event_object, verification
from api.schemas.pagination import ListPage, page_of
from catalog.audit import chain, log
from catalog.audit.log import AuditType, Filters
from catalog.db.database import Database
from catalog.maintenance import audit_anchors
from catalog.spec.model_fields import LAST_SECOND

router = Router(prefix="/v1/audit_events", tags=["audit log"], responses={**SIGNED, **errors(403)})
MOST_NAMED = 50
Ids = list[Annotated[str, Query(max_length=64)]]
Types = Annotated[
    list[AuditType] | None,
    Query(
        alias="event_types[]", max_length=MOST_NAMED, description="Return only changes of these types. Omitted: all."
    ),
]
Actors = Annotated[
    Ids | None,
    Query(
        alias="actor_ids[]",
        max_length=MOST_NAMED,
        description="Return only changes by API keys with these IDs. Omitted: all.",
    ),
]
Projects = Annotated[
    Ids | None,
    Query(
        alias="project_ids[]",
        max_length=MOST_NAMED,
        description="Return only changes in these projects, by ID. Omitted: all.",
    ),
]
Moment = float | None


@router.get("", operation_id="list_audit_events")
def list_audit_events(
    use: Use,
    caller: Signed,
    *,
    after: After = None,
    limit: Limit = 20,
    event_types: Types = None,
    actor_ids: Actors = None,
    project_ids: Projects = None,
    gt: Annotated[
        Moment,
        Query(
            alias="effective_at[gt]",
            ge=0,
            le=LAST_SECOND,
            description="Return only changes after this time, in Unix seconds.",
        ),
    ] = None,
    gte: Annotated[
        Moment,
        Query(
            alias="effective_at[gte]",
            ge=0,
            le=LAST_SECOND,
            description="Return only changes at or after this time, in Unix seconds.",
        ),
    ] = None,
    lt: Annotated[
        Moment,
        Query(
            alias="effective_at[lt]",
            ge=0,
            le=LAST_SECOND,
            description="Return only changes before this time, in Unix seconds.",
        ),
    ] = None,
    lte: Annotated[
        Moment,
        Query(
            alias="effective_at[lte]",
            ge=0,
            le=LAST_SECOND,
            description="Return only changes at or before this time, in Unix seconds.",
        ),
    ] = None,
) -> ListPage[AuditEventObject]:
    """List audit events of the key's project, newest first. Operator keys list events of all projects.

    Requires the scope `audit:read`.
    """
    filters = Filters(
        types=event_types or (),
        actor_ids=actor_ids or (),
        project_ids=project_ids or (),
        after=gt,
        since=gte,
        before=lt,
        until=lte,
    )
    page = log.list_page(use.db, caller=caller, filters=filters, after=after, limit=limit)
    return page_of([audit_event_object(event) for event in page.items], has_more=page.has_more)


@router.get("/verify", operation_id="verify_audit_events")
async def verify_audit_events(
    use: Use,
    caller: Operator,
    after: Annotated[int, Query(ge=0, le=2**53, description="Link (position in the chain) to start after.")] = 0,
    limit: Annotated[
        int, Query(ge=1, le=chain.CHECKED_AT_ONCE, description="Maximum number of events to verify.")
    ] = chain.CHECKED_AT_ONCE,
) -> AuditVerification:
    """Verify up to 5,000 events of the hash chain after the link `after`, and the anchors of these events.

    Requires an operator key with the scope `audit:read`.
    """
    work = partial(audit_anchors.verify, use.db, use.store.objects, peppers=use.pepper.all(), after=after, limit=limit)
    return verification(await use.slow_work.run(caller.project_id, work))


@router.get(
    "/export",
    operation_id="export_audit_events",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {"application/jsonl": {}},
            "description": "One JSON object per line: retired keys, then the events of the chain.",
        }
    },
)
def export_audit_events(use: Use, caller: Operator) -> StreamingResponse:
    """Export every sealed event as a file that `python -m api verify-export` verifies.

    Requires an operator key with the scope `audit:read`.
    """
    use.read_audit.record("audit.exported", caller=caller)
    headers = {"content-disposition": 'attachment; filename="audit.jsonl"'}
    return StreamingResponse(_lines(use.db), media_type="application/jsonl", headers=headers)


def _lines(db: Database) -> Iterator[bytes]:
    for line in chain.lines(db):
        yield json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
