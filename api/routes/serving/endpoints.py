"""/v1/serving/endpoints and /v1/adapters/{adapter}/deployments: inference servers, and the adapters on them."""

from __future__ import annotations

from api.auth.authentication import Operator, Signed
from api.deps import IsRetry, Use
from api.requests.parameters import Adapter, ServingEndpoint
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.pagination import ListPage, page_of
from api.schemas.serving.endpoints import (
    DeploymentDeleted,
    DeploymentObject,
    DeploymentRequest,
    ServingEndpointDeleted,
    ServingEndpointObject,
    ServingEndpointReport,
    ServingEndpointRequest,
    deployment_object,
    serving_endpoint_object,
)
from api.serving.adapter_files import check_folder
from catalog.serving import deployments, endpoints

router = Router(prefix="/v1", tags=["serving"], responses=SIGNED)
ENDPOINTS = "/serving/endpoints"
DEPLOYMENTS = "/adapters/{adapter}/deployments"


@router.post(ENDPOINTS, operation_id="create_serving_endpoint", responses=errors(404, 409))
def create_serving_endpoint(
    body: ServingEndpointRequest, use: Use, caller: Operator, is_retry: IsRetry
) -> ServingEndpointObject:
    """Register an inference server, which the service may reach at any address. Its base model is verified in the
    background.

    Requires an operator key with the scope `models:write`.
    """
    check_folder(body.adapter_folder)
    row = endpoints.register(
        use.db, project_id=caller.project_id, new=body.new_endpoint(), pepper=use.pepper, is_client_retry=is_retry
    )
    use.keepers.wake()
    return serving_endpoint_object(row, shows_address=True)


@router.get(ENDPOINTS, operation_id="list_serving_endpoints")
def list_serving_endpoints(use: Use, caller: Signed) -> ListPage[ServingEndpointObject]:
    """List all serving endpoints by name; their addresses only for operators. Requires the scope `adapters:read`."""
    rows = endpoints.list_all(use.db)
    return page_of([serving_endpoint_object(row, shows_address=caller.is_operator) for row in rows])


@router.get(f"{ENDPOINTS}/{{endpoint}}", operation_id="get_serving_endpoint", responses=errors(404))
def get_serving_endpoint(endpoint: ServingEndpoint, use: Use, caller: Signed) -> ServingEndpointObject:
    """Return a serving endpoint by name or ID; its address only for operators. Requires the scope `adapters:read`."""
    return serving_endpoint_object(endpoints.get(use.db, endpoint), shows_address=caller.is_operator)


@router.delete(f"{ENDPOINTS}/{{endpoint}}", operation_id="delete_serving_endpoint", responses=errors(404))
def delete_serving_endpoint(
    endpoint: ServingEndpoint, use: Use, _caller: Operator, is_retry: IsRetry
) -> ServingEndpointDeleted:
    """Remove a serving endpoint. The adapters that are deployed there are unloaded in the background.

    Requires an operator key with the scope `models:write`.
    """
    endpoint_id = endpoints.remove(use.db, endpoint, is_client_retry=is_retry)
    use.keepers.wake()
    return ServingEndpointDeleted(id=endpoint_id)


@router.post(f"{ENDPOINTS}/{{endpoint}}/report", operation_id="report_serving_endpoint", responses=errors(404))
def report_serving_endpoint(
    endpoint: ServingEndpoint, body: ServingEndpointReport, use: Use, _caller: Operator
) -> ServingEndpointObject:
    """Report that an endpoint's server can't be started, or that it is being started again. `lorry up --serve` does.

    With an error, the endpoint and its pending deployments are `failed` until the server answers or is started again.
    Requires an operator key with the scope `models:write`.
    """
    row = endpoints.report(use.db, endpoint, error=body.error)
    use.keepers.wake()
    return serving_endpoint_object(row, shows_address=True)


@router.get(f"{ENDPOINTS}/{{endpoint}}/deployments", operation_id="list_endpoint_deployments", responses=errors(404))
def list_endpoint_deployments(endpoint: ServingEndpoint, use: Use, _caller: Operator) -> ListPage[DeploymentObject]:
    """List the adapters of all projects that are deployed on an endpoint, oldest first.

    Requires an operator key with the scope `adapters:read`.
    """
    found = deployments.on_endpoint(use.db, endpoints.get(use.db, endpoint).id)
    return page_of([deployment_object(view, shows_server_text=True) for view in found])


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
