"""/v1/plans: dry runs that estimate a job before it is submitted."""

from __future__ import annotations

from typing import Annotated

from fastapi import Body

from api.auth.authentication import Signed
from api.deps import After, Limit, Use
from api.requests.parameters import PlanId
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.jobs import JOB_REQUEST_EXAMPLES
from api.schemas.pagination import ListPage, page_of
from api.schemas.plans import PlanDeleted, PlanObject, plan_object
from catalog.plans import plans
from catalog.spec.job import JobRequest
from catalog.tables.jobs import Plan
from catalog.tenancy.authentication import Caller

router = Router(prefix="/v1/plans", tags=["plans"], responses=SIGNED)
EXAMPLES = {name: example for name, example in JOB_REQUEST_EXAMPLES.items() if name != "planned"}


@router.post("", operation_id="create_plan", responses=errors(404, 409, 413))
def create_plan(body: Annotated[JobRequest, Body(openapi_examples=EXAMPLES)], use: Use, caller: Signed) -> PlanObject:
    """Create a plan: a dry run of the job with this body. It trains nothing.

    The plan is ready immediately if the project's files were already prepared for this base model. Otherwise a worker
    prepares them within seconds or minutes; poll until the state changes. A project may have at most 16 such plans at
    once. Sample rows are shown only to a key with the scope `files:read`. Requires the scope `jobs:write`, or
    `jobs:read` if the files are already prepared.
    """
    plan = plans.create(use.db, caller=caller, request=body, settings=use.settings)
    if plan.state == "computing":
        use.notifier.wake_workers()
    return _shown(use, caller, plan)


@router.get("", operation_id="list_plans")
def list_plans(use: Use, caller: Signed, after: After = None, limit: Limit = 20) -> ListPage[PlanObject]:
    """List the project's plans, newest first, without sample rows. Requires the scope `jobs:read`."""
    page = plans.list_page(use.db, project_id=caller.project_id, after=after, limit=limit)
    return page_of([plan_object(row) for row in page.items], has_more=page.has_more)


@router.get("/{plan_id}", operation_id="get_plan", responses=errors(404))
def get_plan(plan_id: PlanId, use: Use, caller: Signed) -> PlanObject:
    """Return a plan. Sample rows are shown only to a key with the scope `files:read`.

    Requires the scope `jobs:read`.
    """
    return _shown(use, caller, plans.get(use.db, project_id=caller.project_id, plan_id=plan_id))


@router.delete("/{plan_id}", operation_id="delete_plan", responses=errors(404))
def delete_plan(plan_id: PlanId, use: Use, caller: Signed) -> PlanDeleted:
    """Delete a plan. Jobs created from it stay. Plans expire automatically after seven days.

    Requires the scope `jobs:write`.
    """
    plans.delete(use.db, project_id=caller.project_id, plan_id=plan_id)
    return PlanDeleted(id=plan_id)


def _shown(use: Use, caller: Caller, plan: Plan) -> PlanObject:
    may_read = "files:read" in caller.scopes
    return plan_object(plan, plans.details(use.db, plan) if may_read else None)
