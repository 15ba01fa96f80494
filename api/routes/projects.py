"""/v1/projects: operators create, rename, limit and archive them; other keys see only their own."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from api.auth.authentication import Signed
from api.deps import After, IsRetry, Limit, Use
from api.requests.parameters import Project
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
Archived = Annotated[bool, Query(description="Include archived projects.")]


@router.post("", operation_id="create_project", responses=errors(404, 409))
def create_project(body: ProjectRequest, use: Use, caller: Signed, is_retry: IsRetry) -> ProjectObject:
    """Create a project. To add a key, call POST /v1/api_keys with its name as `project`.

    Requires an operator key with the scope `projects:write`.
    """
    owner = body.organization or caller.organization_id
    return project_object(projects.create(use.db, body.name, organization=owner, is_client_retry=is_retry))


@router.get("", operation_id="list_projects")
def list_projects(
    use: Use, caller: Signed, after: After = None, limit: Limit = 20, archived: Archived = False
) -> ListPage[ProjectObject]:
    """List the key's own project; with an operator key, all projects, newest first. Requires any API key."""
    page = projects.list_page(use.db, caller=caller, after=after, limit=limit, archived=archived)
    return page_of([project_object(row) for row in page.items], has_more=page.has_more)


@router.get("/{project}", operation_id="get_project", responses=errors(404))
def get_project(project: Project, use: Use, caller: Signed) -> ProjectObject:
    """Return a project by ID or name. Requires any API key."""
    return project_object(projects.get(use.db, caller=caller, project=project))


@router.post("/{project}", operation_id="rename_project", responses=errors(404, 409))
def rename_project(project: Project, body: ProjectName, use: Use, caller: Signed) -> ProjectObject:
    """Rename a project. Its existing adapters keep their names.

    Requires an operator key with the scope `projects:write`.
    """
    return project_object(projects.rename(use.db, caller=caller, project=project, name=body.name))


@router.post("/{project}/weight", operation_id="weigh_project", responses=errors(404))
def weigh_project(project: Project, body: ProjectWeight, use: Use, caller: Signed) -> ProjectObject:
    """Set the fair-share weight: the project's portion of device time relative to other projects with waiting jobs.

    Requires an operator key with the scope `projects:write`.
    """
    return project_object(projects.set_weight(use.db, caller=caller, project=project, weight=body.weight))


@router.get("/{project}/limits", operation_id="get_project_limits", responses=errors(404))
def get_project_limits(project: Project, use: Use, caller: Signed) -> ProjectLimitsObject:
    """Return the quotas of a project and its current usage. Requires any API key."""
    return limits_object(*quotas.statuses(use.db, caller=caller, project=project))


@router.post("/{project}/limits", operation_id="limit_project", responses=errors(404))
def limit_project(project: Project, body: ProjectLimits, use: Use, caller: Signed) -> ProjectLimitsObject:
    """Set the quotas of a project. Existing jobs and data are not affected.

    Requires an operator key with the scope `projects:write`.
    """
    given = body.model_dump(exclude_unset=True)
    highest = given.pop("highest_priority", None)
    quotas.limit(use.db, caller=caller, project=project, limits=given, highest_priority=highest)  # pyright: ignore
    return limits_object(*quotas.statuses(use.db, caller=caller, project=project))


@router.post("/{project}/archive", operation_id="archive_project", responses=errors(404, 409))
def archive_project(project: Project, use: Use, caller: Signed) -> ProjectObject:
    """Archive a project: its keys are no longer valid, its data stays, and its jobs run to their end.

    Requires an operator key with the scope `projects:write`.
    """
    return project_object(projects.archive(use.db, caller=caller, project=project))


@router.post("/{project}/restore", operation_id="restore_project", responses=errors(404))
def restore_project(project: Project, use: Use, caller: Signed) -> ProjectObject:
    """Restore an archived project: its keys are valid again.

    Requires an operator key with the scope `projects:write`.
    """
    return project_object(projects.restore(use.db, caller=caller, project=project))
