"""Who asks, as authentication finds it. Finding it is in keys."""

from __future__ import annotations

from dataclasses import dataclass

from catalog.states import PriorityClass


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks, and what they may see."""

    api_key_id: str
    project_id: str
    project_name: str
    organization_id: str
    organization_name: str
    is_operator: bool
    name: str
    scopes: frozenset[str] = frozenset()
    """What the key may do; see catalog.tenancy.scopes."""
    is_limited: bool = False
    """Its scopes were named, so that none is added to them later."""
    expires_at: float | None = None
    """Of a browser session, its own end."""
    is_browser: bool = False
    """Asks by the cookie of a browser session."""
    requests_per_minute: int | None = None
    jobs_per_day: int | None = None
    """Of both: None: the service's; 0: without limit."""
    highest_priority: int = PriorityClass.normal
    """The highest class that the key's jobs may have; its project's holds as well."""
    service_jobs_per_day: int = 0
    """What the service says; 0: without limit."""
