"""Errors that users and operators can act on: a code for programs, a message, and a remedy.

The API server converts them to OpenAI's error format; the CLI prints them. Bugs in Lorry itself are asserts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

NUM_NAMED = 3
"""How many of several objects an error names."""


def listed(items: Sequence[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    return " and ".join(part for part in (", ".join(items[:-1]), items[-1]) if part)


class LorryError(Exception):
    """Base class of errors that the user can act on. `param` names the invalid field or parameter."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"

    def __init__(self, message: str, *, code: str, remedy: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.remedy = remedy
        self.param = param

    def sentence(self) -> str:
        """Return the message and the remedy as one text."""
        return f"{self.message} {self.remedy}".strip()

    def as_job_error(self) -> dict[str, str | None]:
        """Return the error in the format of the `error` field of jobs, plans and sweeps."""
        return {"code": self.code, "message": self.sentence(), "param": self.param}


class InvalidRequest(LorryError):
    """The request is invalid and fails again if it is repeated unchanged."""


class NotFound(LorryError):
    """The object does not exist or belongs to another project. The two cases are indistinguishable on purpose."""

    status = 404

    def __init__(
        self,
        resource: str,
        ident: str,
        *,
        message: str | None = None,
        param: str | None = None,
        remedy: str | None = None,
    ) -> None:
        """message: None: that there is no such id."""
        super().__init__(
            message or f"No {resource} with the ID {ident!r}.",
            code=f"{resource.replace(' ', '_')}_not_found",
            remedy=remedy or f"Check the ID, and that the API key belongs to the project that owns the {resource}.",
            param=param,
        )


class NoLongerKept(LorryError):
    """The object existed and was visible to the caller, but its files are no longer kept. The remedy explains why."""

    status = 404

    def __init__(self, resource: str, ident: str, *, remedy: str, param: str | None = None) -> None:
        message = f"The files for {resource} {ident!r} have been deleted."
        super().__init__(message, code=f"{resource}_expired", remedy=remedy, param=param)


class Conflict(LorryError):
    """The object exists, but its current state does not allow the operation."""

    status = 409


class UnfitWorker(Conflict):
    """The worker's version is incompatible with the service, so it claims nothing."""


RejectionReason = Literal[
    "missing", "malformed", "unknown", "expired", "revoked", "project_archived", "session_ended", "sign_in_link"
]


class Unauthorized(LorryError):
    """The request has no valid API key or browser session.

    `reason` and `api_key_id` are for logs and metrics. The response does not reveal whether a key is unknown, expired
    or revoked. `api_key_id` is set only if the complete key is or was valid.
    """

    status = 401
    type = "authentication_error"

    def __init__(
        self,
        message: str,
        *,
        code: str,
        remedy: str,
        reason: RejectionReason | None = None,
        api_key_id: str | None = None,
    ) -> None:
        super().__init__(message, code=code, remedy=remedy)
        self.reason: RejectionReason | None = reason
        self.api_key_id = api_key_id


class Forbidden(LorryError):
    """The key is valid but lacks the permission for this operation."""

    status = 403
    type = "permission_error"


class TooLarge(LorryError):
    """The request body or file exceeds its size limit."""

    status = 413


class RateLimited(LorryError):
    """A rate limit is exceeded. `retry_after_seconds` is infinite if waiting does not help.

    `headers` are added to the response.
    """

    status = 429
    type = "rate_limit_error"

    def __init__(
        self, message: str, *, code: str, remedy: str, retry_after_seconds: float, headers: dict[str, str]
    ) -> None:
        super().__init__(message, code=code, remedy=remedy)
        self.retry_after_seconds = retry_after_seconds
        self.headers = headers


class QuotaExceeded(RateLimited):
    """A project has used up a quota. `quota` has name, limit, used and resets_at; a retry before that time fails."""

    def __init__(
        self, message: str, *, code: str, remedy: str, retry_after_seconds: float, quota: dict[str, Any]
    ) -> None:
        super().__init__(message, code=code, remedy=remedy, retry_after_seconds=retry_after_seconds, headers={})
        self.quota = quota


class OutOfSpace(LorryError):
    """The disk under the data folder is full. Nothing of the request was saved."""

    status = 507
    type = "server_error"


class Unavailable(LorryError):
    """The database or the store does not respond. Retry after `retry_after_seconds`."""

    status = 503
    type = "server_error"
    retry_after_seconds: ClassVar[int] = 5


class StaleClaim(Exception):
    """The claim is no longer valid; another worker may hold the job. The caller stops work on it and writes nothing."""
