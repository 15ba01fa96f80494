"""The authenticated caller of a request. Authentication itself is in catalog.tenancy.authentication."""

from __future__ import annotations

from dataclasses import dataclass

from catalog.states import PriorityClass


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """The API key or browser session behind a request, with its project, scopes and limits."""

    api_key_id: str
    project_id: str
    project_name: str
    organization_id: str
    organization_name: str
    is_operator: bool
    name: str
    scopes: frozenset[str] = frozenset()
    """Permissions of the key; see catalog.tenancy.scopes."""
    is_limited: bool = False
    """The key was created with explicit scopes: scopes of later versions are not added to them."""
    expires_at: float | None = None
    """For a browser session, the time at which the session ends."""
    is_browser: bool = False
    """The request is authenticated by the cookie of a browser session."""
    requests_per_minute: int | None = None
    jobs_per_day: int | None = None
    """For both limits, None means the service's default and 0 means unlimited."""
    highest_priority: int = PriorityClass.normal
    """Highest priority class for jobs of the key. The project's own limit applies as well."""
    service_jobs_per_day: int = 0
    """The service's default limit; 0 means unlimited."""
