"""Typed responses about organizations, projects, keys, the audit log and usage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorry.models.jobs import View


@dataclass(frozen=True, kw_only=True)
class ApiKey(View):
    """An API key. `value`, the secret, is set only in the response that creates or rotates the key."""

    id: str = ""
    name: str = ""
    redacted_value: str = ""
    value: str = field(default="", repr=False)
    project_id: str = ""
    status: str = ""
    scopes: list[str] = field(default_factory=list[str])
    is_operator: bool = False
    created_at: int = 0
    created_by: str | None = None
    """Id of the key that created it."""
    expires_at: int | None = None
    last_used_at: int | None = None
    revoked_at: int | None = None
    replaced_by: str | None = None
    """Id of the key that replaced it. Both are valid until `expires_at`."""
    requests_per_minute: int | None = None
    jobs_per_day: int | None = None
    """For both limits: None is the service's limit, 0 is no limit."""
    highest_priority: str = ""
    """Highest priority of its jobs; its project's limit applies too. Empty if the service has no such limit."""


@dataclass(frozen=True, kw_only=True)
class RevokedKey(ApiKey):
    """A revoked key, and the unfinished work of the revoked keys."""

    revoked_keys: list[str] = field(default_factory=list[str])
    """Ids of the key and, if requested, of its descendants: the keys that it created, directly or indirectly."""
    valid_descendants: int = 0
    """Number of descendants that are still valid."""
    unfinished_jobs: int = 0
    unfinished_sweeps: int = 0
    unfinished_batches: int = 0
    unfinished_exports: int = 0
    """These numbers count what the revoked keys created, except work whose cancellation is requested."""


@dataclass(frozen=True, kw_only=True)
class Organization(View):
    """An organization: a group of projects."""

    id: str = ""
    name: str = ""
    created_at: int = 0
    created_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class Project(View):
    """A project, the owner of files, jobs and adapters. The keys of an archived project are not valid."""

    id: str = ""
    organization_id: str = ""
    name: str = ""
    status: str = ""
    weight: float = 1.0
    """Fair-share weight relative to other projects with waiting jobs."""
    highest_priority: str = ""
    """Highest priority of its jobs. Empty if the service has no such limit."""
    created_at: int = 0
    created_by: str | None = None
    archived_at: int | None = None


@dataclass(frozen=True, kw_only=True)
class ProjectLimit(View):
    """A quota of a project. `limit` None: no limit. `resets_at`: Unix time at which `used` resets."""

    name: str = ""
    limit: float | None = None
    used: float = 0.0
    resets_at: int | None = None


@dataclass(frozen=True, kw_only=True)
class AuditEvent(View):
    """A change and its actor. `link`, `previous` and `digest` are set once it is sealed into the chain."""

    id: str = ""
    type: str = ""
    effective_at: float = 0.0
    actor: dict[str, Any] = field(default_factory=dict[str, Any])
    """type: api_key, browser or server. id and name are those of the key."""
    project_id: str | None = None
    object_id: str | None = None
    request_id: str | None = None
    address: str | None = None
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    link: int | None = None
    previous: str | None = None
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class AuditMisfit(View):
    """The event at which the chain is broken. fault: changed, missing, misplaced or anchor_changed."""

    link: int = 0
    id: str | None = None
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class AuditVerification(View):
    """Result of the server's verification of the chain."""

    is_sound: bool = False
    num_events: int = 0
    last_link: int = 0
    last_digest: str = ""
    has_more: bool = False
    misfit: AuditMisfit | None = field(default=None, metadata={"view": AuditMisfit})
    num_unsealed: int = 0


@dataclass(frozen=True, kw_only=True)
class UsageResult(View):
    """Usage of one day by an organization, a project or a base model."""

    organization_id: str | None = None
    project_id: str | None = None
    model: str | None = None
    device_seconds: float = 0.0
    trained_tokens: int = 0
    num_jobs: dict[str, int] = field(default_factory=dict[str, int])
    """Keys: created, and of the finished jobs succeeded, failed and cancelled."""
    completions: dict[str, int] = field(default_factory=dict[str, int])
    """Keys: requests, prompt_tokens and completion_tokens of answered inference requests."""
    stored_bytes: int | None = None
    """Bytes stored at the end of the day; None if grouped by base model."""


@dataclass(frozen=True, kw_only=True)
class UsageBucket(View):
    """One day, in UTC."""

    start_time: int = 0
    end_time: int = 0

    @property
    def results(self) -> list[UsageResult]:
        results: list[dict[str, Any]] = self.raw.get("results") or []
        return [UsageResult.of(result) for result in results]
