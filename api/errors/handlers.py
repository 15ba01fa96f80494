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

from api.errors import unsupported
from api.errors.links import doc_url
from api.errors.validation import AGAIN, explain
from api.rate_limits.limits import retry_headers
from api.requests.strict_json import too_deep
from catalog.disk import is_full, out_of_space
from catalog.errors import LorryError, QuotaExceeded, RateLimited, Unauthorized, Unavailable
from catalog.inference.requests import AnswerFailed

log = logging.getLogger("lorry.api")


def error_response(
    status: int,
    *,
    message: str,
    code: str,
    type: str = "invalid_request_error",  # noqa: A002  (the field's name in the response)
    param: str | None = None,
    remedy: str,
    headers: Mapping[str, str] | None = None,
    quota: Mapping[str, Any] | None = None,
) -> Response:
    """Return an error response. The body is ASCII, because a message may quote a lone surrogate."""
    error: dict[str, Any] = {
        "message": f"{message} {remedy}".strip(),
        "remedy": remedy,
        "type": type,
        "param": param,
        "code": code,
        "doc_url": doc_url(code),
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
        message=error.message,
        remedy=error.remedy,
        type=error.type,
        param=error.param,
        code=error.code,
        headers=headers,
        quota=error.quota if isinstance(error, QuotaExceeded) else None,
    )


def internal_error(request_id: str) -> Response:
    """Return the response to a crash. It contains only the request id, with which an operator finds the log lines."""
    return error_response(
        500,
        message="The request failed because of an internal error in the service.",
        remedy=f"Try again. If the error persists, report request ID {request_id} to the operator.",
        type="server_error",
        code="internal_error",
    )


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
    message, remedy, code = _sentence(request, error)
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return error_response(
        error.status_code, message=message, remedy=remedy, type=kind, code=code, headers=error.headers
    )


def _sentence(request: Request, error: HTTPException) -> tuple[str, str, str]:
    """(message, remedy, code)"""
    allowed = " or ".join((error.headers or {}).get("allow", "another method").split(", "))
    wrong_method = f"{_quoted(request.url.path)} does not accept {request.method} requests."
    known: dict[int, tuple[str, str, str]] = {
        400: (*_unreadable_body(error.__cause__), "invalid_json"),
        405: (wrong_method, f"Use {allowed} instead.", "method_not_allowed"),
        413: (
            str(error.detail),
            "Send a smaller body, or upload the data as a file with POST /v1/files.",
            "request_too_large",
        ),
    }
    return known.get(error.status_code, (str(error.detail), AGAIN, f"http_{error.status_code}"))


def _unreadable_body(cause: BaseException | None) -> tuple[str, str]:
    """Return (message, remedy) for a body that FastAPI could not parse. It reports JSON's syntax errors itself."""
    match cause:
        case UnicodeDecodeError():
            return f"The request body is not UTF-8 text: byte {cause.start:,} is invalid.", "Encode the JSON as UTF-8."
        case RecursionError():
            error = too_deep()
            return error.message, error.remedy
        case ValueError():
            digits = sys.get_int_max_str_digits()
            return f"The request body contains an integer with more than {digits:,} digits.", "Send a smaller number."
        case _:
            return "The request body can't be read.", "Send one complete JSON object, encoded as UTF-8."


def _unknown_route(request: Request) -> Response:
    path = request.url.path
    known_elsewhere = unsupported.find(path)
    if known_elsewhere is not None:
        return error_response(
            404,
            message=f"There is no route {request.method} {_quoted(path)}. {known_elsewhere.message}",
            remedy=known_elsewhere.remedy,
            code="not_supported",
        )
    templates: list[str] = list(request.app.methods)
    similar = difflib.get_close_matches(path, templates, n=1, cutoff=0.75)
    return error_response(
        404,
        message=f"There is no route {request.method} {_quoted(path)}.",
        remedy=f"Did you mean {similar[0]}?" if similar else "See /openapi.json for a list of all routes.",
        code="unknown_route",
    )


def _allowed(request: Request) -> str:
    """Return the methods of all handlers of the path. FastAPI lists only those of the handler that matched."""
    template = getattr(request.scope.get("route"), "path_format", "")  # same spelling as in the OpenAPI document
    return ", ".join(sorted(request.app.methods.get(template, {"GET"})))


def _quoted(path: str) -> str:
    return json.dumps(path[:200])[1:-1]
