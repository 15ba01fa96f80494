"""Sends requests to one service: authentication, timeouts, retries, and exceptions for errors. Knows no resources."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import httpx

from lorry import __version__
from lorry.connection import Connection, is_loopback
from lorry.errors import APIError, ConnectionFailed, from_response, text_of
from lorry.transport.retries import RetryPolicy, is_retryable
from lorry.transport.service_identity import VerifiedTransport

CONNECT_SECONDS = 5.0
READ_SECONDS = 120.0
_LONGEST_ERROR_BODY = 64 * 2**10

Params = Mapping[str, str | int | float | bool | list[str] | None]
"""A list is sent as one parameter per item."""


class Transport:
    """Thread-safe to the same extent as httpx.Client."""

    def __init__(
        self,
        connection: Connection,
        *,
        retries: RetryPolicy | None = None,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.connection = connection
        self.retries = retries or RetryPolicy()
        self.sleep = sleep
        self._has_answered = False
        headers = {"user-agent": f"lorry-python/{__version__}", "accept": "application/json"}
        if connection.api_key is not None:
            headers["authorization"] = f"Bearer {connection.api_key}"
        self._http = httpx.Client(
            base_url=f"{connection.url}/v1/",
            headers=headers,
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            transport=transport or _verifying(connection),
            trust_env=not is_loopback(connection.url),
        )

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, params: Params | None = None) -> dict[str, Any]:
        return self.request("GET", path, params=params)

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Send JSON and return the JSON object of the response. Raises APIError or ConnectionFailed."""
        return self._repeat(
            lambda: self._http.build_request(method, path, params=_given(params), json=body, headers=_plain(headers))
        )

    def upload(self, path: str, *, fields: Mapping[str, str], files: Mapping[str, Any]) -> dict[str, Any]:
        """Send a multipart form. Its files are read in pieces, and again from the start for a retry."""
        return self._repeat(
            lambda: self._http.build_request("POST", path, data=dict(fields), files=dict(files), timeout=600)
        )

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        read_seconds: float = READ_SECONDS,
    ) -> Generator[httpx.Response]:
        """Yield an open response, whose body the caller reads. Only opening it is retried. body: JSON to post; None
        sends a GET request. read_seconds: timeout of each read."""
        response = self._send(
            lambda: self._http.build_request(
                "GET" if body is None else "POST",
                path,
                headers=_plain(headers),
                json=body,
                timeout=httpx.Timeout(read_seconds, connect=CONNECT_SECONDS),
            )
        )
        try:
            yield response
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        finally:
            response.close()

    def _repeat(self, build: Callable[[], httpx.Request]) -> dict[str, Any]:
        response = self._send(build)
        try:
            parsed: object = None if response.status_code == 204 else _parsed(response, self.connection.origin)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        finally:
            response.close()
        return cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else {}

    def _send(self, build: Callable[[], httpx.Request]) -> httpx.Response:
        """Return the first successful response. x-stainless-retry-count informs the service about retries."""
        retry = 0
        while True:
            request = build()
            request.headers["x-stainless-retry-count"] = str(retry)
            failure, headers = self._attempt(request)
            if isinstance(failure, httpx.Response):
                return failure
            if headers is None or retry >= self.retries.max_retries:
                raise failure
            self.sleep(self.retries.delay(retry, headers))
            retry += 1

    def _attempt(
        self, request: httpx.Request
    ) -> tuple[httpx.Response, None] | tuple[APIError | ConnectionFailed, Mapping[str, str] | None]:
        """Return a response, or an error with the headers that control its retry (None: don't retry)."""
        try:
            response = self._http.send(request, stream=True)
        except httpx.TransportError as error:
            return self._unreachable(error), None if self._has_no_server(error) else {}
        self._has_answered = True
        if response.is_success:
            return response, None
        try:
            body = _bounded(response)
        except httpx.TransportError:
            body = b""
        finally:
            response.close()
        error = from_response(response.status_code, body, response.headers)
        return error, response.headers if is_retryable(response.status_code, response.headers) else None

    def _has_no_server(self, error: httpx.TransportError) -> bool:
        """Return whether no server listens on this machine, so that a retry is pointless. A service that has answered
        before may be restarting."""
        return not self._has_answered and is_loopback(self.connection.url) and _is_refusal(error)

    def _unreachable(self, error: httpx.TransportError) -> ConnectionFailed:
        reason = (str(error) or type(error).__name__).rstrip(".")
        name = "connection_failed"
        if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
            name = "connection_interrupted"
        elif "CERTIFICATE_VERIFY_FAILED" in reason:
            name = "certificate_invalid"
        elif isinstance(error, httpx.ProxyError):
            name = "proxy_failed"
        origin = self.connection.origin
        return ConnectionFailed(
            f"{name}_from_file" if origin else name, url=self.connection.url, reason=reason, origin=origin
        )


def _verifying(connection: Connection) -> httpx.BaseTransport | None:
    """Return the transport that verifies the service of this installation on each new connection. None: httpx's own
    transport; over https, the certificate identifies the service."""
    if connection.identity_secret is None or not connection.url.startswith("http:"):
        return None
    return VerifiedTransport(connection.identity_secret)


def _is_refusal(error: BaseException | None) -> bool:
    """Return whether the connection was refused. httpx wraps the system's error twice."""
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None


def _given(params: Params | None) -> dict[str, str | int | float | bool | list[str]]:
    return {name: value for name, value in (params or {}).items() if value is not None}


def _plain(headers: Mapping[str, str] | None) -> dict[str, str]:
    return dict(headers or {})


def _bounded(response: httpx.Response) -> bytes:
    body = b""
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > _LONGEST_ERROR_BODY:
            break
    return body


def _parsed(response: httpx.Response, origin: str) -> object:
    response.read()
    try:
        return response.json()
    except ValueError as error:
        url = str(response.url)
        text = text_of("not_lorry_from_file", url=url, origin=origin) if origin else text_of("not_lorry", url=url)
        raise APIError(**text, status=response.status_code) from error
