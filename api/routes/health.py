"""Liveness, readiness, the proof of the service's identity, and metrics."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field

from api.auth.authentication import bearer, require_operator
from api.auth.service_identity import NONCE_PATTERN, proof
from api.deps import Services, Use
from api.middleware.http import host_name, is_loopback
from api.routes import errors
from api.routing import Router
from catalog.db.database import read_clock
from catalog.errors import LorryError, Unauthorized
from catalog.fleet import metrics
from catalog.tenancy import authentication

router = Router(tags=["health"])
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


class Alive(BaseModel):
    """The process answers requests."""

    status: Literal["ok"] = Field(default="ok", description="Always `ok`: the process answers.")


class ServiceIdentity(BaseModel):
    """Proof that the server has the key of this service."""

    model_config = ConfigDict(json_schema_extra={"example": {"object": "service_identity", "proof": "9f2c…"}})
    object: Literal["service_identity"] = "service_identity"
    proof: str = Field(description="HMAC-SHA256 over the nonce and the address and port that accepted this connection.")


class Ready(BaseModel):
    """`status` is ok if both the database and the store answer."""

    status: Literal["ok", "unavailable"] = Field(description="`ok` if database and store both answer.")
    database: Literal["ok", "unavailable"] = Field(description="Whether the database answers.")
    store: Literal["ok", "unavailable"] = Field(description="Whether the artifact store answers.")


@router.get("/healthz", operation_id="get_health")
async def get_health() -> Alive:
    """Return 200 while the process answers. Requires no API key."""
    return Alive()


@router.get("/readyz", operation_id="get_readiness", responses={503: {"model": Ready, "description": "Not ready."}})
def get_readiness(use: Use, response: Response) -> Ready:
    """Return 200 if the database and the store answer, else 503. Requires no API key."""
    database, store = _database_answers(use), _store_answers(use)
    if not (database and store):
        response.status_code = 503
        response.headers["retry-after"] = "5"
    return Ready(status=_status(database and store), database=_status(database), store=_status(store))


@router.get("/v1/service_identity", operation_id="get_service_identity", responses=errors(400))
async def get_service_identity(
    request: Request,
    use: Use,
    nonce: Annotated[str, Query(pattern=NONCE_PATTERN, description="32 random bytes as hexadecimal digits.")],
) -> ServiceIdentity:
    """Return proof that this server is the expected service, for a client that has the installation's identity secret.

    `lorry` requests it on each new connection to the service of `connection.json`, before it sends an API key. Requires
    no API key.
    """
    server: tuple[str, int | None] | None = request.scope.get("server")
    host, port = server or ("", None)
    return ServiceIdentity(proof=proof(use.pepper.current, nonce=nonce, host=host, port=port or 0))


@router.get(
    "/metrics",
    operation_id="get_prometheus_metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus text format."}, **errors(401, 403)},
)
def get_prometheus_metrics(
    request: Request, use: Use, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]
) -> Response:
    """Return Prometheus metrics of this process and of the fleet.

    Requires an operator key. Without a public URL, requests from this machine require no key.
    """
    if credentials is not None:
        require_operator(authentication.authenticate(use.db, secret=credentials.credentials, pepper=use.pepper))
    elif use.api_settings.public_url or not _is_from_this_machine(request):
        raise Unauthorized(
            "metrics_key_missing_at_public_url" if use.api_settings.public_url else "metrics_key_missing"
        )
    return Response(use.telemetry.expose(metrics.read(use.db)), media_type=CONTENT_TYPE_LATEST)


def _is_from_this_machine(request: Request) -> bool:
    """Return whether the request comes from this machine. A request that a proxy forwarded does not, even if the proxy
    is on this machine."""
    peer = request.client.host if request.client else ""
    if any(name in request.headers for name in FORWARDED):
        return False
    return is_loopback(peer) and is_loopback(host_name(request.headers.get("host", "")))


def _database_answers(use: Services) -> bool:
    try:
        with use.db.read() as session:
            return read_clock(session) > 0
    except LorryError:
        return False


def _store_answers(use: Services) -> bool:
    try:
        use.store.check_reachable()
    except LorryError:
        return False
    return True


def _status(answers: bool) -> Literal["ok", "unavailable"]:
    return "ok" if answers else "unavailable"
