"""Exceptions of the SDK and the CLI, each with a code, a message and a remedy.

`APIError` is an error response of the service, with its status. The other exceptions are raised locally, with texts of
errors.toml.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Self, TypedDict, cast


class ErrorFields(TypedDict):
    """The texts of an error."""

    code: str
    message: str
    remedy: str


@cache
def templates() -> dict[str, dict[str, str]]:
    """Return the texts of errors that are raised locally, by name, with their placeholders."""
    return tomllib.loads(Path(__file__).with_name("errors.toml").read_text(encoding="utf-8"))


def text_of(name: str, /, **values: str | float) -> ErrorFields:
    """Return the text with this name in errors.toml, with `values` for its placeholders."""
    text = templates()[name]
    message, remedy = text["message"].format(**values), text["remedy"].format(**values)
    return {"code": text.get("code", name), "message": message, "remedy": remedy}


class LorryError(Exception):
    """Base class of all exceptions that this package raises."""

    def __init__(self, name: str, /, **values: str | float) -> None:
        """name: of the text in errors.toml, with `values` for its placeholders."""
        self._set(**text_of(name, **values))

    @classmethod
    def from_report(cls, *, code: str, message: str, remedy: str) -> Self:
        """Return the error with the texts of an object of the service, such as a failed export."""
        error = cls.__new__(cls)
        error._set(code=code, message=message, remedy=remedy)
        return error

    def _set(self, *, code: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.remedy = remedy

    def sentence(self) -> str:
        """Return the message followed by the remedy."""
        return self.message if self.remedy in self.message else f"{self.message} {self.remedy}"


class NotConfigured(LorryError):
    """No service is configured, neither by the environment nor by a connection file."""


class ConnectionFailed(LorryError):
    """The service did not answer, or the connection was interrupted."""


class ServiceNotVerified(LorryError):
    """The program at the address did not prove that it is the user's own service. No key was sent to it."""


class BadDownload(LorryError):
    """The downloaded data does not match its manifest. None of it was kept."""


class WaitTimeout(LorryError):
    """The time limit of a wait has expired. The job itself is not affected."""


class APIError(LorryError):
    """The service returned an error.

    `status` is the HTTP status, `param` the invalid field, `doc_url` the entry of the code in the error reference.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        remedy: str,
        status: int,
        type: str = "",  # noqa: A002 - the field's name in the API
        param: str | None = None,
        request_id: str | None = None,
        doc_url: str | None = None,
    ) -> None:
        self._set(code=code, message=message, remedy=remedy)
        self.status = status
        self.type = type
        self.param = param
        self.request_id = request_id
        self.doc_url = doc_url


class InvalidRequest(APIError):
    """Any other 4xx: the request is invalid."""


class AuthenticationFailed(APIError):
    """401: the key is missing, unknown, expired or revoked."""


class PermissionDenied(APIError):
    """403: the key is valid but does not have the required rights."""


class NotFound(APIError):
    """404: the object does not exist, or it belongs to another project."""


class Conflict(APIError):
    """409: the state of the object does not allow this operation."""


class RateLimited(APIError):
    """429: a rate limit or a quota is exceeded."""


class ServerFailed(APIError):
    """5xx: the service failed."""


_BY_STATUS: dict[int, type[APIError]] = {
    401: AuthenticationFailed,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    429: RateLimited,
}


def from_response(status: int, body: bytes, headers: Mapping[str, str]) -> APIError:
    """Return the error for a response with the status `status`, whatever its body contains."""
    error = _error_object(body)
    kind = _BY_STATUS.get(status, ServerFailed if status >= 500 else InvalidRequest)
    return kind(
        str(error.get("message") or _plain(status, body)),
        code=str(error.get("code") or f"http_{status}"),
        remedy=str(error.get("remedy") or ("" if error.get("message") else _remedy(status))),
        status=status,
        type=str(error.get("type") or ""),
        param=None if error.get("param") is None else str(error["param"]),
        request_id=headers.get("x-request-id"),
        doc_url=None if error.get("doc_url") is None else str(error["doc_url"]),
    )


def _error_object(body: bytes) -> dict[str, Any]:
    """Return the `error` object of a response in OpenAI's format; empty for any other body, such as a proxy's page."""
    try:
        parsed: object = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    error = cast("dict[str, Any]", parsed).get("error") if isinstance(parsed, dict) else None
    return cast("dict[str, Any]", error) if isinstance(error, dict) else {}


def _plain(status: int, body: bytes) -> str:
    text = " ".join(body[:200].decode("utf-8", "replace").split())
    return f"The service returned status {status}: {text}" if text else f"The service returned status {status}."


def _remedy(status: int) -> str:
    if status == 401:
        return "Check LORRY_API_KEY, or 'api_key' in connection.json."
    if status >= 500:
        return "Try again in a moment. If the error persists, check the service's log."
    return "Check that the configured address is that of a Lorry server, and not of another service in front of it."
