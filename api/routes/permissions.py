"""/v1/fine_tuning/checkpoints/{model}/permissions: other projects that may read an adapter or a checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query

from api.auth.authentication import Signed
from api.deps import After, IsRetry, Use
from api.requests.parameters import FineTunedModel, PermissionId
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.adapters import PermissionDeleted, PermissionObject, PermissionRequest, permission_object
from api.schemas.pagination import ListPage, page_of
from catalog.registry import permissions

router = Router(
    prefix="/v1/fine_tuning/checkpoints/{fine_tuned_model}/permissions",
    tags=["permissions"],
    responses={**SIGNED, **errors(404)},
)
Order = Annotated[Literal["ascending", "descending"], Query(description="Order by creation time.")]
OfProject = Annotated[
    str | None, Query(description="Return only the permission of the project with this ID.", max_length=128)
]
Limit = Annotated[int, Query(description="Maximum number of items to return, 1 to 100.", ge=1, le=100)]


@router.get("", operation_id="list_model_permissions")
def list_model_permissions(
    fine_tuned_model: FineTunedModel,
    use: Use,
    _caller: Signed,
    *,
    after: After = None,
    limit: Limit = 10,
    order: Order = "descending",
    project_id: OfProject = None,
) -> ListPage[PermissionObject]:
    """List the projects that may read an adapter or checkpoint of another project, by the model's name.

    Requires an operator key with the scope `permissions:read`.
    """
    page = permissions.list_page(
        use.db,
        model=fine_tuned_model,
        project_id=project_id,
        after=after,
        limit=limit,
        order="asc" if order == "ascending" else "desc",
    )
    return page_of([permission_object(row) for row in page.items], has_more=page.has_more)


@router.post("", operation_id="create_model_permissions")
def create_model_permissions(
    fine_tuned_model: FineTunedModel, body: PermissionRequest, use: Use, caller: Signed
) -> ListPage[PermissionObject]:
    """Allow other projects of the same organization to read, download and continue a model.

    They see nothing else of its job. A project of another organization is not found. A project that already has a
    permission keeps it. Either all permissions are created, or none. Requires an operator key with the scope
    `permissions:write`.
    """
    rows = permissions.grant(use.db, caller=caller, model=fine_tuned_model, projects_named=body.project_ids)
    return page_of([permission_object(row) for row in rows])


@router.delete("/{permission_id}", operation_id="delete_model_permission")
def delete_model_permission(
    fine_tuned_model: FineTunedModel, permission_id: PermissionId, use: Use, _caller: Signed, is_retry: IsRetry
) -> PermissionDeleted:
    """Revoke a permission. Jobs that already use the model continue; no new job can use it.

    Requires an operator key with the scope `permissions:write`.
    """
    permissions.revoke(use.db, model=fine_tuned_model, permission_id=permission_id, is_client_retry=is_retry)
    return PermissionDeleted(id=permission_id)
