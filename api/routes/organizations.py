"""/v1/organizations: operators make and rename them; who has a key of one sees that one."""

from __future__ import annotations

from api.auth.authentication import Signed
from api.deps import After, IsRetry, Limit, Use
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.organizations import OrganizationObject, OrganizationRequest, organization_object
from api.schemas.pagination import ListPage, page_of
from catalog.tenancy import organizations

router = Router(prefix="/v1/organizations", tags=["projects and keys"], responses={**SIGNED, **errors(403)})


@router.post("", operation_id="create_organization", responses=errors(409))
def create_organization(body: OrganizationRequest, use: Use, _caller: Signed, is_retry: IsRetry) -> OrganizationObject:
    """For operators. Then give it a project: POST /v1/projects with its name as `organization`."""
    return organization_object(organizations.create(use.db, body.name, is_client_retry=is_retry))


@router.get("", operation_id="list_organizations")
def list_organizations(
    use: Use, caller: Signed, after: After = None, limit: Limit = 20
) -> ListPage[OrganizationObject]:
    """Newest first: yours, and for operators all."""
    page = organizations.list_page(use.db, caller=caller, after=after, limit=limit)
    return page_of([organization_object(row) for row in page.items], has_more=page.has_more)


@router.get("/{organization}", operation_id="get_organization", responses=errors(404))
def get_organization(organization: str, use: Use, caller: Signed) -> OrganizationObject:
    """By id or by name."""
    return organization_object(organizations.get(use.db, caller=caller, organization=organization))


@router.post("/{organization}", operation_id="rename_organization", responses=errors(404, 409))
def rename_organization(organization: str, body: OrganizationRequest, use: Use, caller: Signed) -> OrganizationObject:
    """For operators. Its projects keep their names."""
    row = organizations.rename(use.db, caller=caller, organization=organization, name=body.name)
    return organization_object(row)
