"""/v1/serving/endpoints: inference servers that load adapters at run time."""

from __future__ import annotations

from api.auth.authentication import Operator, Signed
from api.deps import IsRetry, Use
from api.requests.path_parameters import ServingEndpoint
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.pagination import ListPage, page_of
from api.schemas.serving.deployments import DeploymentObject, deployment_object
from api.schemas.serving.endpoints import (
    ServingEndpointDeleted,
    ServingEndpointObject,
    ServingEndpointReport,
    ServingEndpointRequest,
    serving_endpoint_object,
)
from api.serving.adapter_files import check_folder
from catalog.serving import deployments, endpoints

router = Router(prefix="/v1", tags=["serving"], responses=SIGNED)
ENDPOINTS = "/serving/endpoints"


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
