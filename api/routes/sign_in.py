"""Sign-in to the dashboard: one-time links, browser sessions, and the redirect from `/`."""

from __future__ import annotations

import time
from functools import partial

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse

from api.auth.authentication import Session, Signed, cookie_name, is_https, public_address, require_same_origin
from api.commands.bootstrap import sign_in_url
from api.deps import Services, Use
from api.middleware.client_address import client_address
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.sign_in import (
    BrowserSession,
    BrowserSessionRequest,
    SignedOut,
    SignInLink,
    SignInLinkUse,
    SignInPreview,
    SignInToken,
    browser_session,
    sign_in_preview,
)
from catalog.caller import Caller
from catalog.errors import Conflict, Unauthorized
from catalog.tenancy import api_keys, authentication

router = Router(tags=["sign-in"])
LINK_SECONDS = 900
SESSION_SECONDS = 12 * 3600


@router.get("/", include_in_schema=False)
@router.get("/dashboard", include_in_schema=False)
async def to_dashboard() -> RedirectResponse:
    return RedirectResponse("/dashboard/", status_code=307)


@router.post("/v1/sign_in_links", operation_id="create_sign_in_link", responses=SIGNED)
def create_sign_in_link(request: Request, use: Use, caller: Signed) -> SignInLink:
    """Create a link that signs in one browser, once, within 15 minutes, with the rights of the requesting key.

    Not available in a browser session, which could otherwise renew itself forever. Requires any API key.
    """
    reason = "such a link could start a new session that outlasts this one"
    api_keys.refuse_browsers(caller, "create sign-in links", reason, "lorry sign-in-link")
    token = authentication.create_sign_in_link(
        use.db, api_key_id=caller.api_key_id, pepper=use.pepper, seconds=LINK_SECONDS
    )
    return SignInLink(url=sign_in_url(public_address(request, use), token), expires_at=int(time.time()) + LINK_SECONDS)


@router.post("/v1/sign_in_links/preview", operation_id="preview_sign_in_link", responses=errors(400, 401, 429))
async def preview_sign_in_link(request: Request, use: Use, body: SignInToken) -> SignInPreview:
    """Show what a link would sign in to, without using it up. Requires no API key."""
    caller, expires_at = await _read_link(request, use, body.token)
    return sign_in_preview(caller, expires_at=expires_at)


@router.post("/v1/sign_in_links/open", operation_id="open_sign_in_link", responses=errors(400, 401, 403, 409, 429))
async def open_sign_in_link(
    request: Request, response: Response, use: Use, body: SignInLinkUse, session: Session
) -> BrowserSession:
    """Sign in this browser with a link, which is used up. Only for the dashboard: requires `X-Lorry-Csrf: 1`.

    A browser that is signed in with another key gets 409 `session_exists` unless `replaces_session` is true. Otherwise
    a foreign link could replace a user's session unnoticed. A session lasts 12 hours. Requires no API key.
    """
    require_same_origin(request)
    caller, _ = await _read_link(request, use, body.token)
    current = await run_in_threadpool(_signed_in, use, session)
    if current is not None and current.api_key_id != caller.api_key_id and not body.replaces_session:
        raise Conflict("session_exists", project_name=current.project_name, current=current.name)
    secret = await run_in_threadpool(_exchange, use, token=body.token, replaced=session)
    _set_cookie(request, response, use, secret)
    return browser_session(caller, use.settings)


@router.post("/v1/browser_session", operation_id="create_browser_session", responses=errors(400, 401, 403, 429))
async def create_browser_session(
    request: Request, response: Response, use: Use, body: BrowserSessionRequest, session: Session
) -> BrowserSession:
    """Sign in with an API key, and end the browser's previous session. Only for the dashboard: requires
    `X-Lorry-Csrf: 1`. A session lasts 12 hours."""
    require_same_origin(request)
    check = partial(authentication.authenticate, use.db, secret=body.api_key, pepper=use.pepper)
    async with use.limits.guarding(client_address(request), body.api_key):
        caller = await use.key_checks.run(check)
    secret = await run_in_threadpool(_sign_in, use, caller, replaced=session)
    _set_cookie(request, response, use, secret)
    return browser_session(caller, use.settings)


@router.get("/v1/browser_session", operation_id="get_browser_session", responses=SIGNED)
def get_browser_session(use: Use, caller: Signed) -> BrowserSession:
    """Return the project, key and scopes of the browser session or of the API key. Requires any API key."""
    return browser_session(caller, use.settings)


@router.delete("/v1/browser_session", operation_id="delete_browser_session", responses=errors(401, 403))
def delete_browser_session(
    request: Request, use: Use, _caller: Signed, response: Response, session: Session
) -> SignedOut:
    """Sign out: end the browser session and delete its cookie. Requires a browser session or any API key."""
    if session is not None:
        authentication.end_browser(use.db, secret=session, pepper=use.pepper)
    response.delete_cookie(
        cookie_name(request, use), path="/", httponly=True, samesite="strict", secure=is_https(request, use)
    )
    return SignedOut()


def _signed_in(use: Services, session: str | None) -> Caller | None:
    """Return the caller of the browser's session; None if it has no valid one."""
    if session is None:
        return None
    try:
        return authentication.authenticate_browser(use.db, secret=session, pepper=use.pepper)
    except Unauthorized:
        return None


async def _read_link(request: Request, use: Services, token: str) -> tuple[Caller, float]:
    """Return the caller that the link would sign in, and its expiry. Raises Unauthorized and RateLimited."""
    read = partial(authentication.read_sign_in_link, use.db, token=token, pepper=use.pepper)
    async with use.limits.guarding(client_address(request), token):
        return await use.key_checks.run(read)


def _sign_in(use: Services, caller: Caller, *, replaced: str | None) -> str:
    """Return the secret of a new session for the holder of a key, and end the browser's previous session."""
    token = authentication.create_sign_in_link(use.db, api_key_id=caller.api_key_id, pepper=use.pepper, seconds=60)
    return _exchange(use, token=token, replaced=replaced)


def _exchange(use: Services, *, token: str, replaced: str | None) -> str:
    """Exchange a link's token for the secret of a session, and end the browser's previous session."""
    secret = authentication.exchange_sign_in(use.db, token=token, pepper=use.pepper, seconds=SESSION_SECONDS)
    if replaced is not None:
        authentication.end_browser(use.db, secret=replaced, pepper=use.pepper)
    return secret


def _set_cookie(request: Request, response: Response, use: Services, secret: str) -> None:
    response.set_cookie(
        cookie_name(request, use),
        secret,
        max_age=SESSION_SECONDS,
        path="/",
        httponly=True,
        samesite="strict",
        secure=is_https(request, use),
    )
