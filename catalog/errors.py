"""What can go wrong for a person: a code to program against, a sentence to read, a remedy to try.

The api turns these into the OpenAI error shape; the CLI prints them. Our own mistakes are asserts.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal


class LorryError(Exception):
    """A refusal that somebody can act on. `param` names the field or place that is at fault."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"

    def __init__(self, message: str, *, code: str, remedy: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.remedy = remedy
        self.param = param

    def sentence(self) -> str:
        """The message and the remedy, as one text for a person."""
        return f"{self.message} {self.remedy}".strip()

    def as_job_error(self) -> dict[str, str | None]:
        """As the `error` of a job, a plan or a sweep holds it."""
        return {"code": self.code, "message": self.sentence(), "param": self.param}


class InvalidRequest(LorryError):
    """The request says something that cannot be done as it stands."""


class NotFound(LorryError):
    """No such thing, or it belongs to another project: the two look the same on purpose."""

    status = 404

    def __init__(self, what: str, ident: str, *, param: str | None = None, remedy: str | None = None) -> None:
        super().__init__(
            f"No {what} with the id {ident!r}.",
            code=f"{what.replace(' ', '_')}_not_found",
            remedy=remedy or f"Check the id, and that the API key belongs to the project that owns the {what}.",
            param=param,
        )


class NoLongerKept(LorryError):
    """It was there, and the caller might see it; its files are gone, as the remedy says."""

    status = 404

    def __init__(self, what: str, ident: str, *, remedy: str, param: str | None = None) -> None:
        message = f"The files of the {what} {ident!r} are no longer kept."
        super().__init__(message, code=f"{what}_expired", remedy=remedy, param=param)


class Conflict(LorryError):
    """The thing exists but is not in a state in which this can be done."""

    status = 409


class UnfitWorker(Conflict):
    """A worker of another version than the service can work with: it claims nothing."""


RejectionReason = Literal[
    "missing", "malformed", "unknown", "expired", "revoked", "project_archived", "session_ended", "sign_in_link"
]


class Unauthorized(LorryError):
    """No valid API key or browser session came with the request.

    `reason` and `api_key_id` are for logs and metrics. A client is not told whether a key is unknown, expired or
    revoked. `api_key_id` is set only if the whole key was right once.
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
    """The key is valid but may not do this."""

    status = 403
    type = "permission_error"


class TooLarge(LorryError):
    """More bytes than the limit."""

    status = 413


class RateLimited(LorryError):
    """Too much at once. `retry_after_seconds` is infinite where waiting doesn't help; `headers` go with the answer."""

    status = 429
    type = "rate_limit_error"

    def __init__(
        self, message: str, *, code: str, remedy: str, retry_after_seconds: float, headers: dict[str, str]
    ) -> None:
        super().__init__(message, code=code, remedy=remedy)
        self.retry_after_seconds = retry_after_seconds
        self.headers = headers


class QuotaExceeded(RateLimited):
    """A project has what it may have. `quota` tells name, limit, used and resets_at; waiting helps only after that."""

    def __init__(
        self, message: str, *, code: str, remedy: str, retry_after_seconds: float, quota: dict[str, Any]
    ) -> None:
        super().__init__(message, code=code, remedy=remedy, retry_after_seconds=retry_after_seconds, headers={})
        self.quota = quota


class OutOfSpace(LorryError):
    """The disk under the data folder is full. Nothing of the request was kept."""

    status = 507
    type = "server_error"


class Unavailable(LorryError):
    """The database or the store does not answer now. Retry after `retry_after_seconds`."""

    status = 503
    type = "server_error"
    retry_after_seconds: ClassVar[int] = 5


class StaleClaim(Exception):
    """Another worker holds this job now. Whoever gets this stops work on the job and writes nothing more."""
