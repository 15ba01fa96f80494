"""/v1/plans: what a job would come to, before it is submitted."""

from __future__ import annotations

from typing import Annotated

from fastapi import Body

from api.auth.authentication import Signed
from api.deps import After, Limit, Use
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.jobs import JOB_REQUEST_EXAMPLES
from api.schemas.pagination import ListPage, page_of
from api.schemas.plans import PlanDeleted, PlanObject, plan_object
from catalog.plans import plans
from catalog.spec.job import JobRequest
from catalog.tables.plans import Plan
from catalog.tenancy.authentication import Caller

router = Router(prefix="/v1/plans", tags=["plans"], responses=SIGNED)
EXAMPLES = {name: example for name, example in JOB_REQUEST_EXAMPLES.items() if name != "planned"}


@router.post("", operation_id="create_plan", responses=errors(404, 409, 413))
def create_plan(body: Annotated[JobRequest, Body(openapi_examples=EXAMPLES)], use: Use, caller: Signed) -> PlanObject:
    """What the job with this very body would come to. It trains nothing, and is ready at once where the project had
    the files prepared for that base before. Otherwise a worker prepares them, within seconds or minutes: look again.
    That needs jobs:write; for a plan of files that are prepared, jobs:read is enough.

    Sample rows are shown to a key that may read files."""
    plan = plans.create(use.db, caller=caller, request=body, settings=use.settings)
    if plan.state == "computing":
        use.doorbell.ring()
    return _shown(use, caller, plan)


@router.get("", operation_id="list_plans")
def list_plans(use: Use, caller: Signed, after: After = None, limit: Limit = 20) -> ListPage[PlanObject]:
    """The project's plans, newest first, without sample rows."""
    page = plans.list_page(use.db, project_id=caller.project_id, after=after, limit=limit)
    return page_of([plan_object(row) for row in page.items], has_more=page.has_more)


@router.get("/{plan_id}", operation_id="get_plan", responses=errors(404))
def get_plan(plan_id: str, use: Use, caller: Signed) -> PlanObject:
    """Sample rows are shown to a key that may read files."""
    return _shown(use, caller, plans.get(use.db, project_id=caller.project_id, plan_id=plan_id))


@router.delete("/{plan_id}", operation_id="delete_plan", responses=errors(404))
def delete_plan(plan_id: str, use: Use, caller: Signed) -> PlanDeleted:
    """A plan goes by itself after a week. Jobs that were made from it stay."""
    plans.delete(use.db, project_id=caller.project_id, plan_id=plan_id)
    return PlanDeleted(id=plan_id)


def _shown(use: Use, caller: Caller, plan: Plan) -> PlanObject:
    may_read = "files:read" in caller.scopes
    return plan_object(plan, plans.details(use.db, plan) if may_read else None)
