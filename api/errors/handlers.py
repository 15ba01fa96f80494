"""Turns every failure of a request into {"error": {message, remedy, type, param, code, doc_url}}.

Errors that a client can act on come from catalog.errors. No response reveals internals of the service.
"""

from __future__ import annotations

import difflib
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api.errors import validation
from api.errors.links import doc_url
from api.errors.validation import AGAIN, explain
from api.rate_limits.limits import retry_headers
from api.requests.strict_json import too_deep
from catalog.disk import is_full, out_of_space
from catalog.error_texts import ErrorText
from catalog.errors import LorryError, QuotaExceeded, RateLimited, Unauthorized, Unavailable
from catalog.inference.requests import AnswerFailed

log = logging.getLogger("lorry.api")


def error_response(
    status: int,
    text: ErrorText,
    *,
    type: str = "invalid_request_error",  # noqa: A002  (the field's name in the response)
    headers: Mapping[str, str] | None = None,
    quota: Mapping[str, Any] | None = None,
) -> Response:
    """Return an error response. The body is ASCII, because a message may quote a lone surrogate."""
    error: dict[str, Any] = {
        "message": text.sentence(),
        "remedy": text.remedy,
        "type": type,
        "param": text.param,
        "code": text.code,
        "doc_url": doc_url(text.code),
    }
    if quota is not None:
        error["quota"] = quota
    content = json.dumps({"error": error}).encode("ascii")
    return Response(content, status_code=status, media_type="application/json", headers=dict(headers or {}))


def refusal(error: LorryError) -> Response:
    """Return the response for a LorryError, with the headers that make clients retry or not retry."""
    headers: dict[str, str] = {}
    if error.status in (409, 507) or isinstance(error, AnswerFailed):
        headers["x-should-retry"] = "false"
    if isinstance(error, Unavailable):
        headers["retry-after"] = str(error.retry_after_seconds)
    if isinstance(error, RateLimited):
        headers |= retry_headers(error)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = 'Bearer realm="lorry"'
    return error_response(
        error.status,
        error.text,
        type=error.type,
        headers=headers,
        quota=error.quota if isinstance(error, QuotaExceeded) else None,
    )


def internal_error(request_id: str) -> Response:
    """Return the response to a crash. It contains only the request id, with which an operator finds the log lines."""
    return error_response(500, ErrorText.of("request_crashed", request_id=request_id), type="server_error")


def install(app: FastAPI) -> None:
    app.add_exception_handler(LorryError, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(OSError, _on_os_error)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, LorryError)
    if isinstance(error, Unauthorized):
        request.state.rejection = error  # the request gate logs and counts it
    return refusal(error)


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return refusal(explain(list(error.errors()), body=error.body, route=request.scope.get("route")))


async def _on_os_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    if is_full(error):
        return refusal(out_of_space())
    raise error


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _unknown_route(request)
    if error.status_code == 405:
        error.headers = {"allow": _allowed(request)}
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return error_response(error.status_code, _text(request, error), type=kind, headers=error.headers)


def _text(request: Request, error: HTTPException) -> ErrorText:
    match error.status_code:
        case 400:
            return _unreadable_body(error.__cause__)
        case 405:
            allowed = " or ".join((error.headers or {}).get("allow", "another method").split(", "))
            path = _quoted(request.url.path)
            return ErrorText.of("method_not_allowed", path=path, method=request.method, allowed=allowed)
        case 413:
            return ErrorText.of("body_too_large", detail=str(error.detail))
        case status:
            return ErrorText(code=f"http_{status}", message=str(error.detail), remedy=AGAIN)


def _unreadable_body(cause: BaseException | None) -> ErrorText:
    """Return the error of a body that FastAPI could not parse. It reports JSON's syntax errors itself."""
    match cause:
        case UnicodeDecodeError():
            return ErrorText.of("body_not_utf8", start=cause.start)
        case RecursionError():
            return too_deep().text
        case ValueError():
            return ErrorText.of("body_integer_too_long", num_digits=sys.get_int_max_str_digits())
        case _:
            return ErrorText.of("body_unreadable")


def _unknown_route(request: Request) -> Response:
    route = {"method": request.method, "path": _quoted(request.url.path)}
    name = validation.find(request.url.path)
    if name is not None:
        return error_response(404, ErrorText.of(name, **route))
    templates: list[str] = list(request.app.methods)
    similar = difflib.get_close_matches(request.url.path, templates, n=1, cutoff=0.75)
    if similar:
        return error_response(404, ErrorText.of("unknown_route_like", **route, similar=similar[0]))
    return error_response(404, ErrorText.of("unknown_route", **route))


def _allowed(request: Request) -> str:
    """Return the methods of all handlers of the path. FastAPI lists only those of the handler that matched."""
    template = getattr(request.scope.get("route"), "path_format", "")  # same spelling as in the OpenAPI document
    return ", ".join(sorted(request.app.methods.get(template, {"GET"})))


def _quoted(path: str) -> str:
    return json.dumps(path[:200])[1:-1]
