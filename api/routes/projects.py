"""/v1/projects: operators make, rename and archive them; who has a key of one sees that one."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from api.auth.authentication import Signed
from api.deps import After, IsRetry, Limit, Use
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.pagination import ListPage, page_of
from api.schemas.projects import (
    ProjectLimits,
    ProjectLimitsObject,
    ProjectName,
    ProjectObject,
    ProjectRequest,
    ProjectWeight,
    limits_object,
    project_object,
)
from catalog.tenancy import projects
from catalog.usage import quotas

router = Router(prefix="/v1/projects", tags=["projects and keys"], responses={**SIGNED, **errors(403)})
Archived = Annotated[bool, Query(description="Those that were archived, too.")]


@router.post("", operation_id="create_project", responses=errors(404, 409))
def create_project(body: ProjectRequest, use: Use, caller: Signed, is_retry: IsRetry) -> ProjectObject:
    """For operators. Then give it a key: POST /v1/api_keys with its name as `project`."""
    owner = body.organization or caller.organization_id
    return project_object(projects.create(use.db, body.name, organization=owner, is_client_retry=is_retry))


@router.get("", operation_id="list_projects")
def list_projects(
    use: Use, caller: Signed, after: After = None, limit: Limit = 20, archived: Archived = False
) -> ListPage[ProjectObject]:
    """Newest first: yours, and for operators all."""
    page = projects.list_page(use.db, caller=caller, after=after, limit=limit, archived=archived)
    return page_of([project_object(row) for row in page.items], has_more=page.has_more)


@router.get("/{project}", operation_id="get_project", responses=errors(404))
def get_project(project: str, use: Use, caller: Signed) -> ProjectObject:
    """By id or by name."""
    return project_object(projects.get(use.db, caller=caller, project=project))


@router.post("/{project}", operation_id="rename_project", responses=errors(404, 409))
def rename_project(project: str, body: ProjectName, use: Use, caller: Signed) -> ProjectObject:
    """For operators. Adapters that it has keep their names."""
    return project_object(projects.rename(use.db, caller=caller, project=project, name=body.name))


@router.post("/{project}/weight", operation_id="weigh_project", responses=errors(404))
def weigh_project(project: str, body: ProjectWeight, use: Use, caller: Signed) -> ProjectObject:
    """For operators: its part of the devices, beside the weights of other projects whose jobs wait."""
    return project_object(projects.weigh(use.db, caller=caller, project=project, weight=body.weight))


@router.get("/{project}/limits", operation_id="get_project_limits", responses=errors(404))
def get_project_limits(project: str, use: Use, caller: Signed) -> ProjectLimitsObject:
    """What the project may use at most, and what it has used."""
    return limits_object(*quotas.standings(use.db, caller=caller, project=project))


@router.post("/{project}/limits", operation_id="limit_project", responses=errors(404))
def limit_project(project: str, body: ProjectLimits, use: Use, caller: Signed) -> ProjectLimitsObject:
    """For operators: what the project may use at most. What it has already stays."""
    given = body.model_dump(exclude_unset=True)
    highest = given.pop("highest_priority", None)
    quotas.limit(use.db, caller=caller, project=project, limits=given, highest_priority=highest)  # pyright: ignore
    return limits_object(*quotas.standings(use.db, caller=caller, project=project))


@router.post("/{project}/archive", operation_id="archive_project", responses=errors(404, 409))
def archive_project(project: str, use: Use, caller: Signed) -> ProjectObject:
    """For operators. Its keys open nothing from now on; what it has stays, and its jobs go on to their end."""
    return project_object(projects.archive(use.db, caller=caller, project=project))


@router.post("/{project}/restore", operation_id="restore_project", responses=errors(404))
def restore_project(project: str, use: Use, caller: Signed) -> ProjectObject:
    """For operators. Its keys open it again."""
    return project_object(projects.restore(use.db, caller=caller, project=project))
