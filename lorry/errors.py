"""What can go wrong for a user of the SDK or the CLI: each has a code, a message and a remedy.

`APIError` is a refusal of the service, with its status; the others happen on this side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast


class LorryError(Exception):
    """Everything that this package raises on purpose."""

    def __init__(self, message: str, *, code: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.remedy = remedy

    def sentence(self) -> str:
        """The message and the remedy, as one text for a person."""
        return self.message if self.remedy in self.message else f"{self.message} {self.remedy}"


class NotConfigured(LorryError):
    """No service is known: neither by the environment nor by a connection file."""


class ConnectionFailed(LorryError):
    """The service did not answer, or broke off in the middle."""


class ServiceNotVerified(LorryError):
    """The program at the address did not prove that it is the user's own service. No key was sent to it."""


class BadDownload(LorryError):
    """What came over the wire is not what its manifest says. Nothing of it was kept."""


class WaitTimeout(LorryError):
    """The time given to wait is over; the job goes on."""


class APIError(LorryError):
    """The service refused. `status` is HTTP's, `param` names the field at fault."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        remedy: str,
        status: int,
        type: str = "",  # noqa: A002 - the wire's word
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, code=code, remedy=remedy)
        self.status = status
        self.type = type
        self.param = param
        self.request_id = request_id


class InvalidRequest(APIError):
    """4xx other than the ones below: the request cannot be done as it stands."""


class AuthenticationFailed(APIError):
    """401: the key is missing, unknown, expired or revoked."""


class PermissionDenied(APIError):
    """403: the key is good but may not do this."""


class NotFound(APIError):
    """404: no such thing, or it belongs to another project."""


class Conflict(APIError):
    """409: the thing is not in a state in which this can be done."""


class RateLimited(APIError):
    """429: too much at once."""


class ServerFailed(APIError):
    """5xx: the service's own trouble."""


_BY_STATUS: dict[int, type[APIError]] = {
    401: AuthenticationFailed,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    429: RateLimited,
}


def from_response(status: int, body: bytes, headers: Mapping[str, str]) -> APIError:
    """The error that a response of `status` stands for, whatever its body looks like."""
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
    )


def _error_object(body: bytes) -> dict[str, Any]:
    """The `error` of OpenAI's shape; empty where the body is something else (a proxy's page, say)."""
    try:
        parsed: object = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    error = cast("dict[str, Any]", parsed).get("error") if isinstance(parsed, dict) else None
    return cast("dict[str, Any]", error) if isinstance(error, dict) else {}


def _plain(status: int, body: bytes) -> str:
    text = " ".join(body[:200].decode("utf-8", "replace").split())
    return f"The service answered with status {status}: {text}" if text else f"The service answered {status}."


def _remedy(status: int) -> str:
    if status == 401:
        return "Check LORRY_API_KEY, or the api_key in connection.json."
    if status >= 500:
        return "Try again in a moment; if it stays, look at the service's log."
    return "Check that LORRY_URL names Lorry itself, and no other service before it."
