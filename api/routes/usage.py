"""/v1/usage: device-seconds, tokens, jobs and stored bytes per day, in the format of OpenAI's usage API."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query

from api.auth.authentication import Signed
from api.deps import Use
from api.routes import SIGNED
from api.routing import Router
from api.schemas.usage import UsagePage, usage_page
from catalog.db.database import read_clock
from catalog.spec.model_fields import LAST_SECOND
from catalog.usage import report as usage_report
from catalog.usage.ledger import DAY_SECONDS
from catalog.usage.report import MOST_DAYS, GroupBy, UsageQuery

router = Router(prefix="/v1/usage", tags=["usage"], responses=SIGNED)
USUAL_DAYS = 7
Names = list[Annotated[str, Query(max_length=256)]]


@router.get("", operation_id="get_usage")
def get_usage(
    use: Use,
    caller: Signed,
    *,
    start_time: Annotated[
        int | None,
        Query(
            ge=0,
            le=LAST_SECOND,
            description=f"First day, in Unix seconds. Omitted: {USUAL_DAYS - 1} days before the end.",
        ),
    ] = None,
    end_time: Annotated[
        int | None, Query(ge=0, le=LAST_SECOND, description="End of the period, in Unix seconds. Omitted: now.")
    ] = None,
    bucket_width: Annotated[Literal["1d"], Query(description="Period of one bucket: a day.")] = "1d",
    group_by: Annotated[
        list[GroupBy] | None,
        Query(alias="group_by[]", max_length=3, description="Fields to group by. Omitted: by project."),
    ] = None,
    project_ids: Annotated[
        Names | None,
        Query(
            alias="project_ids[]",
            max_length=100,
            description="IDs or names of projects. Omitted: all that you may see.",
        ),
    ] = None,
    organization_ids: Annotated[
        Names | None,
        Query(
            alias="organization_ids[]",
            max_length=100,
            description="IDs or names of organizations. Omitted: all that you may see.",
        ),
    ] = None,
    models: Annotated[
        Names | None, Query(max_length=100, alias="models[]", description="Names of base models. Omitted: all.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_DAYS, description="Days per page, 1 to 31.")] = USUAL_DAYS,
    page: Annotated[str | None, Query(pattern=r"^\d{1,7}$", description="`next_page` of the previous page.")] = None,
) -> UsagePage:
    """Return daily usage of the key's project; with an operator key, of all projects.

    Covers the last seven days unless `start_time` is set. Days are in UTC and always complete, even if the range covers
    them in part. Results are grouped by project unless `group_by[]` is set. Requires the scope `usage:read`.
    """
    if start_time is None:
        with use.db.read() as session:
            until = int(read_clock(session)) if end_time is None else end_time
            start_time = max(0, until - (USUAL_DAYS - 1) * DAY_SECONDS)
    query = UsageQuery(
        start_time=start_time,
        end_time=end_time,
        group_by=group_by or ("project_id",),
        project_ids=project_ids or (),
        organization_ids=organization_ids or (),
        models=models or (),
        num_days=limit,
        page=None if page is None else int(page),
    )
    return usage_page(usage_report.report(use.db, caller=caller, query=query))
