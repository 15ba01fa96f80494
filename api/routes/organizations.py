"""/v1/organizations: operators create and rename them; other keys see only their own."""

from __future__ import annotations

from api.auth.authentication import Signed
from api.deps import After, IsRetry, Limit, Use
from api.requests.parameters import Organization
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.organizations import OrganizationObject, OrganizationRequest, organization_object
from api.schemas.pagination import ListPage, page_of
from catalog.tenancy import organizations

router = Router(prefix="/v1/organizations", tags=["projects and keys"], responses={**SIGNED, **errors(403)})


@router.post("", operation_id="create_organization", responses=errors(409))
def create_organization(body: OrganizationRequest, use: Use, _caller: Signed, is_retry: IsRetry) -> OrganizationObject:
    """Create an organization. To add a project, call POST /v1/projects with its name as `organization`.

    Requires an operator key with the scope `organizations:write`.
    """
    return organization_object(organizations.create(use.db, body.name, is_client_retry=is_retry))


@router.get("", operation_id="list_organizations")
def list_organizations(
    use: Use, caller: Signed, after: After = None, limit: Limit = 20
) -> ListPage[OrganizationObject]:
    """List the key's own organization; with an operator key, all organizations, newest first. Requires any API key."""
    page = organizations.list_page(use.db, caller=caller, after=after, limit=limit)
    return page_of([organization_object(row) for row in page.items], has_more=page.has_more)


@router.get("/{organization}", operation_id="get_organization", responses=errors(404))
def get_organization(organization: Organization, use: Use, caller: Signed) -> OrganizationObject:
    """Return an organization by ID or name. Requires any API key."""
    return organization_object(organizations.get(use.db, caller=caller, organization=organization))


@router.post("/{organization}", operation_id="rename_organization", responses=errors(404, 409))
def rename_organization(
    organization: Organization, body: OrganizationRequest, use: Use, caller: Signed
) -> OrganizationObject:
    """Rename an organization. Its projects keep their names.

    Requires an operator key with the scope `organizations:write`.
    """
    row = organizations.rename(use.db, caller=caller, organization=organization, name=body.name)
    return organization_object(row)
