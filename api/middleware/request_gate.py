"""The outermost middleware: assigns a request id, checks the host and the body size, adds security headers, logs one
line per request, and turns a crash into a 500 response."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.deps import Services
from api.errors.handlers import error_response, internal_error, refusal
from api.errors.links import serving
from api.middleware import client_address
from api.middleware.http import HostPolicy, RequestBody, security_headers
from api.telemetry import Telemetry, route_template
from catalog import logs, tracing
from catalog.audit import log as audit
from catalog.caller import Caller
from catalog.error_texts import ErrorText
from catalog.errors import Unauthorized, Unavailable

UPLOADS = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts")
"""Paths whose POST handler enforces its own limit: the route counts the bytes of the file."""
HEALTH_CHECKS = ("/healthz", "/readyz")
"""Paths that a container engine requests every few seconds. Successful ones are logged at the level debug."""
log = logging.getLogger("lorry.api")


@dataclass(kw_only=True, slots=True)
class _Exchange:
    """One request and its outcome."""

    scope: Scope
    request_id: str
    address: str | None
    """The client's address: behind a trusted proxy, the one that the proxy reports."""
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    trace: str | None = None
    """Its traceparent."""

    @property
    def path(self) -> str:
        return self.scope["path"]

    @property
    def caller(self) -> Caller | None:
        """The caller, once the key or the session was accepted."""
        return self.scope["state"].get("caller")

    @property
    def rejection(self) -> Unauthorized | None:
        """The reason why the key or the session was rejected."""
        return self.scope["state"].get("rejection")

    @property
    def key_id(self) -> str | None:
        """Id of the accepted key, or of a rejected one that was valid earlier."""
        if self.caller is not None:
            return self.caller.api_key_id
        return self.rejection.api_key_id if self.rejection else None


class Gate:
    """The outermost middleware. It is pure ASGI, so that streams pass through unbuffered."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: HostPolicy,
        max_body_bytes: int,
        telemetry: Telemetry,
        trusted_proxies: Sequence[client_address.Network] = (),
    ) -> None:
        self._app = app
        self._trusted_proxies = trusted_proxies
        self._hosts = hosts
        self._max_body_bytes = max_body_bytes
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = client_address.resolve(scope, self._trusted_proxies)
        exchange = _Exchange(scope=scope, request_id=f"req_{secrets.token_hex(12)}", address=address)
        scope.setdefault("state", {}).update(request_id=exchange.request_id, client_address=address)
        body = RequestBody(scope, receive, max_bytes=self._max_body_bytes if _is_bounded(scope) else None)
        sender = _decorated(send, exchange, body)
        with logs.about({"request": exchange.request_id}), serving(self._url(scope)):
            await self._answer(exchange, body, receive, sender)

    async def _answer(self, exchange: _Exchange, body: RequestBody, receive: Receive, sender: Send) -> None:
        scope = exchange.scope
        try:
            refused = self._refusal(scope)
            if refused is not None:
                await refused(scope, receive, sender)
            else:
                with _traced(exchange), audit.attributed_to(_origin(exchange)):
                    await self._app(scope, body.receive, sender)
        except Exception:  # the only place that turns a crash into a 500
            with logs.about(_subjects(exchange)):
                log.exception("crash request_id=%s path=%s", exchange.request_id, _logged(exchange.path))
            if exchange.status:  # the response has begun: the only option is to cut it off
                raise
            await internal_error(exchange.request_id)(scope, receive, sender)
        except asyncio.CancelledError:  # only uvicorn cancels this task, when its shutdown timeout has expired
            if exchange.status:
                raise
            await refusal(_shutting_down())(scope, receive, sender)
        finally:
            self._note(exchange)

    def _url(self, scope: Scope) -> str | None:
        """Return the service's URL for links in the response; None if the Host header is not a name of the service."""
        services: Services = scope["app"].state.services
        if services.api_settings.public_url:
            return services.api_settings.public_url
        return str(Request(scope).base_url) if self._hosts.admits(Headers(scope=scope).get("host", "")) else None

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._hosts.admits(host):
            return error_response(421, ErrorText.of("unknown_host", host=host[:80]))
        if "\0" in scope["path"]:
            return error_response(400, ErrorText.of("nul_in_path"))
        if b"%00" in scope.get("query_string", b""):
            return error_response(400, ErrorText.of("nul_in_query_string"))
        declared = headers.get("content-length", "0")
        if _is_bounded(scope) and declared.isdecimal() and int(declared) > self._max_body_bytes:
            return self._too_large(int(declared))
        return _limited(scope, headers)

    def _too_large(self, declared_bytes: int) -> Response:
        text = ErrorText.of("request_too_large", declared_bytes=declared_bytes, maximum=self._max_body_bytes)
        return error_response(413, text)

    def _note(self, exchange: _Exchange) -> None:
        seconds = time.monotonic() - exchange.began
        self._telemetry.observe(exchange.scope, status=exchange.status, seconds=seconds)
        rejected = exchange.rejection.reason if exchange.rejection else None
        if rejected is not None:
            self._telemetry.count_rejected_key(rejected)
        with logs.about(_subjects(exchange)):
            log.log(
                logging.DEBUG if exchange.path in HEALTH_CHECKS and exchange.status < 400 else logging.INFO,
                "request id=%s method=%s path=%s status=%d seconds=%.4f key=%s project=%s address=%s%s",
                exchange.request_id,
                exchange.scope["method"],
                _logged(exchange.path),
                exchange.status,
                seconds,
                exchange.key_id or "-",
                exchange.caller.project_id if exchange.caller else "-",
                exchange.address or "-",
                f" rejected={rejected}" if rejected else "",
            )


def _limited(scope: Scope, headers: Headers) -> Response | None:
    """Return the response to a key without requests left. It is sent before routing, because such clients send many."""
    credential = _credential(scope, headers)
    services: Services = scope["app"].state.services
    limited = None if credential is None else services.limits.refusal(credential)
    return None if limited is None else refusal(limited)


def _known_headers(scope: Scope) -> dict[str, str]:
    """Return the rate-limit headers of a response that was sent before authentication."""
    credential = _credential(scope, Headers(scope=scope))
    services: Services = scope["app"].state.services
    return {} if credential is None else services.limits.known_headers(credential)


def _credential(scope: Scope, headers: Headers) -> str | None:
    """Return the key of a request to the API, which is not checked."""
    scheme, _, credential = headers.get("authorization", "").partition(" ")
    return credential if scope["path"].startswith("/v1/") and scheme.lower() == "bearer" else None


def _shutting_down() -> Unavailable:
    return Unavailable("shutting_down")


@contextmanager
def _traced(exchange: _Exchange) -> Generator[None]:
    """Open a span for a request of the API, within the trace that the client may have started."""
    parent = tracing.well_formed(Headers(scope=exchange.scope).get("traceparent"))
    if not exchange.path.startswith("/v1/"):
        yield
        return
    method = exchange.scope["method"]
    with tracing.span(method, parent=parent, is_server=True, about={"request": exchange.request_id}) as span:
        exchange.trace = tracing.traceparent(span)
        try:
            yield
        finally:
            route, status = route_template(exchange.scope), exchange.status
            span.update_name(f"{method} {route}")
            known = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
            span.set_attributes(known)
            if status >= 500:
                tracing.fail(span, str(status))


def _subjects(exchange: _Exchange) -> logs.Subjects:
    """Return the ids of the objects that the log lines are about, as far as they are known."""
    job_id: str | None = exchange.scope.get("path_params", {}).get("job_id")
    caller = exchange.caller
    return {
        "trace": tracing.trace_id(exchange.trace),
        "job": job_id,
        "key": exchange.key_id,
        "project": caller.project_id if caller else None,
        "address": exchange.address,
    }


def _origin(exchange: _Exchange) -> audit.Origin:
    return audit.Origin(request_id=exchange.request_id, address=exchange.address)


def _is_bounded(scope: Scope) -> bool:
    return not (scope["method"] == "POST" and UPLOADS.fullmatch(scope["path"]))


def _decorated(send: Send, exchange: _Exchange, body: RequestBody) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            exchange.status = message["status"]
            if exchange.status >= 400:
                await body.drain()
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = exchange.request_id
            of_caller: dict[str, str] | None = exchange.scope["state"].get("headers")
            if of_caller is None:
                of_caller = _known_headers(exchange.scope)
            for name, value in {**of_caller, **security_headers(exchange.path)}.items():
                headers.setdefault(name, value)
        await send(message)

    return with_headers


def _logged(path: str) -> str:
    """Return the path in a form that fits one log line. Queries are never logged: one may contain a sign-in token."""
    return path[:200].encode("unicode_escape").decode("ascii")
