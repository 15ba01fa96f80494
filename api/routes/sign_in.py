"""The dashboard's door: one-time links, browser sessions, and where / leads."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import Cookie, Query, Request, Response
from starlette.responses import RedirectResponse

from api.auth import COOKIE, Signed, require_same_origin
from api.client_address import client_address
from api.deps import Services, Use
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.sign_in import BrowserSession, BrowserSessionRequest, SignedOut, SignInLink, browser_session
from catalog import issuing, keys
from catalog.errors import Unauthorized

router = Router(tags=["sign-in"])
LINK_SECONDS = 900
SESSION_SECONDS = 12 * 3600


@router.get("/", include_in_schema=False)
@router.get("/dashboard", include_in_schema=False)
async def to_dashboard() -> RedirectResponse:
    return RedirectResponse("/dashboard/", status_code=307)


@router.post("/v1/sign_in_links", operation_id="create_sign_in_link", responses=SIGNED)
def create_sign_in_link(request: Request, use: Use, caller: Signed) -> SignInLink:
    """A link that signs one browser in, once, within 15 minutes, with the rights of the key that asks. Not for a
    browser session, which would never end then."""
    issuing.refuse_browsers(caller)
    token = keys.create_sign_in_link(use.db, api_key_id=caller.api_key_id, pepper=use.pepper, seconds=LINK_SECONDS)
    return SignInLink(url=sign_in_url(_address(request, use), token), expires_at=int(time.time()) + LINK_SECONDS)


@router.get(
    "/sign-in",
    operation_id="sign_in",
    response_class=RedirectResponse,
    status_code=303,
    responses={303: {"description": "To the dashboard, with the cookie set."}, **errors(400, 401, 429)},
)
def sign_in(request: Request, use: Use, token: Annotated[str, Query(max_length=256)]) -> Response:
    """Opens a one-time link. A link that is used up leads a browser to the dashboard's own sign-in."""
    try:
        with use.limits.guarding(client_address(request), token):
            secret = keys.exchange_sign_in(use.db, token=token, pepper=use.pepper, seconds=SESSION_SECONDS)
    except Unauthorized:
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/dashboard/?sign_in=expired", status_code=303)
        raise
    response = RedirectResponse("/dashboard/", status_code=303)
    _set_cookie(response, secret, is_https=_is_https(request, use))
    return response


@router.post("/v1/browser_session", operation_id="create_browser_session", responses=errors(400, 401, 403, 429))
def create_browser_session(
    request: Request, response: Response, use: Use, body: BrowserSessionRequest
) -> BrowserSession:
    """Sign in with an API key. From the dashboard only: `X-Lorry-Csrf: 1` is needed."""
    require_same_origin(request)
    with use.limits.guarding(client_address(request), body.api_key):
        caller = keys.authenticate(use.db, secret=body.api_key, pepper=use.pepper)
    token = keys.create_sign_in_link(use.db, api_key_id=caller.api_key_id, pepper=use.pepper, seconds=60)
    secret = keys.exchange_sign_in(use.db, token=token, pepper=use.pepper, seconds=SESSION_SECONDS)
    _set_cookie(response, secret, is_https=_is_https(request, use))
    return browser_session(caller)


@router.get("/v1/browser_session", operation_id="get_browser_session", responses=SIGNED)
def get_browser_session(caller: Signed) -> BrowserSession:
    """Who is signed in, or whose key this is."""
    return browser_session(caller)


@router.delete("/v1/browser_session", operation_id="delete_browser_session", responses=errors(401, 403))
def delete_browser_session(
    use: Use, _caller: Signed, response: Response, session: Annotated[str | None, Cookie(alias=COOKIE)] = None
) -> SignedOut:
    """Sign out."""
    if session is not None:
        keys.end_browser(use.db, secret=session, pepper=use.pepper)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return SignedOut()


def sign_in_url(address: str, token: str) -> str:
    return f"{address.rstrip('/')}/sign-in?token={token}"


def _address(request: Request, use: Services) -> str:
    return use.api_settings.public_url or str(request.base_url)


def _is_https(request: Request, use: Services) -> bool:
    return _address(request, use).startswith("https:")


def _set_cookie(response: Response, secret: str, *, is_https: bool) -> None:
    response.set_cookie(
        COOKIE, secret, max_age=SESSION_SECONDS, path="/", httponly=True, samesite="strict", secure=is_https
    )
