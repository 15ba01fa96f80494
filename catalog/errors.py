"""Errors that users and operators can act on. Their texts are in the tables of `catalog.error_texts`.

The API server converts them to OpenAI's error format; the CLI prints them. Bugs in Lorry itself are asserts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from catalog.error_texts import ErrorText

NUM_NAMED = 3
"""How many of several objects an error names."""


def listed(items: Sequence[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    return " and ".join(part for part in (", ".join(items[:-1]), items[-1]) if part)


class LorryError(Exception):
    """Base class of errors that the user can act on. `param` names the invalid field or parameter."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"

    def __init__(self, text: str | ErrorText, /, *, param: str | None = None, **values: str | float) -> None:
        """text: a name in the tables, with `values` for its placeholders, or the text of another error."""
        if isinstance(text, str):
            text = ErrorText.of(text, param=param, **values)
        super().__init__(text.message)
        self.text = text if param is None else replace(text, param=param)
        self.message = text.message
        self.code = text.code
        self.remedy = text.remedy
        self.param = self.text.param

    def sentence(self) -> str:
        """Return the message and the remedy as one text."""
        return self.text.sentence()

    def as_job_error(self) -> dict[str, str | None]:
        """Return the error in the format of the `error` field of jobs, plans and sweeps."""
        return self.text.as_job_error()


class InvalidRequest(LorryError):
    """The request is invalid and fails again if it is repeated unchanged."""


class NotFound(LorryError):
    """The object does not exist or belongs to another project. The two cases are indistinguishable on purpose."""

    status = 404


class NoLongerKept(LorryError):
    """The object existed and was visible to the caller, but its files are no longer kept. The remedy explains why."""

    status = 404


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
        text: str | ErrorText,
        /,
        *,
        reason: RejectionReason | None = None,
        api_key_id: str | None = None,
        **values: str | float,
    ) -> None:
        super().__init__(text, param=None, **values)
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
        self,
        text: str | ErrorText,
        /,
        *,
        retry_after_seconds: float,
        headers: dict[str, str] | None = None,
        **values: str | float,
    ) -> None:
        super().__init__(text, param=None, **values)
        self.retry_after_seconds = retry_after_seconds
        self.headers = headers or {}


class QuotaExceeded(RateLimited):
    """A project has used up a quota. `quota` has name, limit, used and resets_at; a retry before that time fails."""

    def __init__(
        self,
        text: str | ErrorText,
        /,
        *,
        retry_after_seconds: float,
        quota: dict[str, Any],
        **values: str | float,
    ) -> None:
        super().__init__(text, retry_after_seconds=retry_after_seconds, headers=None, **values)
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
