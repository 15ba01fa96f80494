"""Authenticates a request by an API key in the Authorization header, or by the dashboard's cookie with a CSRF check."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import HTTPConnection

from api.auth.scopes import check_operation, operator_required
from api.deps import Services, Use
from api.middleware.client_address import client_address
from catalog.audit import log
from catalog.audit.log import Actor
from catalog.errors import Forbidden, Unauthorized
from catalog.tenancy import authentication
from catalog.tenancy.authentication import Caller

COOKIE = "lorry_session"
SECURE_COOKIE = "__Host-lorry_session"
"""Name of the cookie over https. Browsers accept a cookie with this prefix only from this very host and over https. So
no other host of the domain, and no page over http, can plant a session."""
CSRF_HEADER = "x-lorry-csrf"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

bearer = HTTPBearer(
    auto_error=False, scheme_name="apiKey", description="An API key: `Authorization: Bearer lorry_key-…`."
)


class SessionCookie(APIKeyCookie):
    """The secret of the dashboard's session, read from the one cookie that this service sets at its address."""

    async def __call__(self, request: HTTPConnection) -> str | None:
        return request.cookies.get(cookie_name(request, request.app.state.services))


cookie = SessionCookie(
    name=COOKIE,
    auto_error=False,
    scheme_name="browser",
    description="The dashboard's session. Over https the cookie's name is `__Host-lorry_session`. Unsafe methods also "
    "need `X-Lorry-Csrf: 1` and a same-origin request.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Authenticates the sender of a request again later, for responses that last."""

    holder: Hashable = field(repr=False)
    """Equal for requests with the same key or session. It contains the secret, so it is never logged."""
    identify: Callable[[], Caller] = field(repr=False)
    """Raises Unauthorized."""


async def caller_of(
    request: Request,
    use: Use,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    session: Annotated[str | None, Security(cookie)],
) -> Caller:
    """Return the project and the rights of the request. Raises Unauthorized, RateLimited, or Forbidden if the scope
    that the route requires is missing."""
    given = credentials.credentials if credentials is not None else session
    async with use.limits.guarding(client_address(request), given):
        found = await use.key_checks.run(partial(_identify, request, use, credentials, session))
    caller = replace(found, service_jobs_per_day=use.limits.jobs_per_day)
    _check_owners(request, caller)
    request.state.headers = {"openai-organization": caller.organization_name}
    request.state.headers |= use.limits.count_request(caller, given)
    check_operation(caller, getattr(request.scope.get("route"), "operation_id", None))
    request.state.caller = caller
    log.actor_is(Actor(type="browser" if caller.is_browser else "api_key", id=caller.api_key_id, name=caller.name))
    return caller


async def operator_of(caller: Annotated[Caller, Depends(caller_of)]) -> Caller:
    require_operator(caller)
    return caller


async def recheck_of(
    request: Request,
    use: Use,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    session: Annotated[str | None, Security(cookie)],
) -> Identity:
    given = credentials.credentials if credentials is not None else None
    return Identity(holder=(given, session), identify=lambda: _identify(request, use, credentials, session))


def require_operator(caller: Caller) -> None:
    if not caller.is_operator:
        raise operator_required(caller)


def public_address(request: HTTPConnection, use: Services) -> str:
    """Return the address of the service as the browser reaches it."""
    return use.api_settings.public_url or str(request.base_url)


def is_https(request: HTTPConnection, use: Services) -> bool:
    return public_address(request, use).startswith("https:")


def cookie_name(request: HTTPConnection, use: Services) -> str:
    return SECURE_COOKIE if is_https(request, use) else COOKIE


async def session_of(request: Request, use: Use) -> str | None:
    """Return the unchecked secret of the session cookie. Not a security scheme: the routes that use it are open."""
    return request.cookies.get(cookie_name(request, use))


Session = Annotated[str | None, Depends(session_of)]
Signed = Annotated[Caller, Depends(caller_of)]
Operator = Annotated[Caller, Depends(operator_of)]
Recheck = Annotated[Identity, Depends(recheck_of)]


def require_same_origin(request: Request) -> None:
    """Reject requests of other origins. A page of another origin can neither set our header nor hide its origin."""
    if (reason := _foreign(request)) is not None:
        raise Forbidden("cross_site_request", reason=reason)


def _foreign(request: Request) -> str | None:
    """Return why the request may come from another origin; None if it comes from the dashboard."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    host = request.headers.get("host", "")
    if request.headers.get(CSRF_HEADER) != "1":
        return "it does not contain the header `X-Lorry-Csrf: 1`"
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        return f"the Origin header is {origin[:80]!a}, but the Host header is {host[:80]!a}"
    if site is not None and site != "same-origin":
        return f"the Sec-Fetch-Site header is {site[:80]!a}, not 'same-origin'"
    if origin is None and site is None:
        return "it contains neither an Origin header nor a Sec-Fetch-Site header"
    return None


def _identify(
    request: Request, use: Services, credentials: HTTPAuthorizationCredentials | None, session: str | None
) -> Caller:
    if credentials is not None:
        return authentication.authenticate(use.db, secret=credentials.credentials, pepper=use.pepper)
    if session is not None:
        caller = authentication.authenticate_browser(use.db, secret=session, pepper=use.pepper)
        if request.method not in SAFE_METHODS:
            require_same_origin(request)
        return caller
    raise Unauthorized(
        "malformed_authorization" if request.headers.get("authorization") else "missing_api_key", reason="missing"
    )


def _check_owners(request: Request, caller: Caller) -> None:
    """Reject an `OpenAI-Organization` or `OpenAI-Project` header that names, by id or name, another than the key's."""
    own = {
        "organization": (caller.organization_id, caller.organization_name),
        "project": (caller.project_id, caller.project_name),
    }
    for kind, (own_id, own_name) in own.items():
        named = request.headers.get(f"openai-{kind}")
        if named and named not in (own_id, own_name):
            raise Unauthorized(
                f"mismatched_{kind}",
                header=named[:80],
                own_name=own_name,
                own_id=own_id,  # one entry for each kind
            )
