"""/v1/adapters/{adapter}/deployments: adapters of a project on serving endpoints."""

from __future__ import annotations

from api.auth.authentication import Signed
from api.deps import IsRetry, Use
from api.requests.path_parameters import Adapter, ServingEndpoint
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.pagination import ListPage, page_of
from api.schemas.serving.deployments import DeploymentDeleted, DeploymentObject, DeploymentRequest, deployment_object
from catalog.serving import deployments

router = Router(prefix="/v1", tags=["serving"], responses=SIGNED)
DEPLOYMENTS = "/adapters/{adapter}/deployments"


@router.post(DEPLOYMENTS, operation_id="create_deployment", responses=errors(404, 409))
def create_deployment(adapter: Adapter, body: DeploymentRequest, use: Use, caller: Signed) -> DeploymentObject:
    """Deploy an adapter of the project on a serving endpoint. It is loaded and verified in the background: poll its
    `state`. A repeated request tries a failed deployment again at once.

    Requires the scope `adapters:write`.
    """
    view = deployments.deploy(use.db, project_id=caller.project_id, adapter=adapter, endpoint=body.endpoint)
    use.keepers.wake()
    return deployment_object(view, shows_server_text=caller.is_operator)


@router.get(DEPLOYMENTS, operation_id="list_deployments", responses=errors(404))
def list_deployments(adapter: Adapter, use: Use, caller: Signed) -> ListPage[DeploymentObject]:
    """List the serving endpoints on which an adapter is deployed, by name. Requires the scope `adapters:read`."""
    found = deployments.of_adapter(use.db, project_id=caller.project_id, adapter=adapter)
    return page_of([deployment_object(view, shows_server_text=caller.is_operator) for view in found])


@router.delete(f"{DEPLOYMENTS}/{{endpoint}}", operation_id="delete_deployment", responses=errors(404, 409))
def delete_deployment(
    adapter: Adapter, endpoint: ServingEndpoint, use: Use, caller: Signed, is_retry: IsRetry
) -> DeploymentDeleted:
    """Unload an adapter of the project from a serving endpoint, in the background. The built-in engine answers from now
    on. Requires the scope `adapters:write`."""
    ident = deployments.undeploy(
        use.db, project_id=caller.project_id, adapter=adapter, endpoint=endpoint, is_client_retry=is_retry
    )
    if ident:
        use.keepers.wake()
    return DeploymentDeleted(id=ident)
