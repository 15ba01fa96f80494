"""What the service answers of organizations, projects and keys: who may do what, who did what, what was used. As in
models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorry.models.jobs import View


@dataclass(frozen=True, kw_only=True)
class ApiKey(View):
    """A key of the service. `value`, the key itself, is told once, to who made or rotated it."""

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
    """The key that made it."""
    expires_at: int | None = None
    last_used_at: int | None = None
    revoked_at: int | None = None
    replaced_by: str | None = None
    """Id of the key that took its place; until `expires_at` both are good."""
    requests_per_minute: int | None = None
    jobs_per_day: int | None = None
    """Of both: None: the service's; 0: without limit."""
    highest_priority: str = ""
    """Of its jobs; its project's holds as well. Empty: of a service that has no such limit."""


@dataclass(frozen=True, kw_only=True)
class RevokedKey(ApiKey):
    """A key that was revoked, and what is left of its work."""

    revoked_keys: list[str] = field(default_factory=list[str])
    """Ids of the key and, if requested, of its descendants: the keys that it created, and theirs, and so on."""
    valid_descendants: int = 0
    """Its descendants that are still valid."""
    unfinished_jobs: int = 0
    unfinished_sweeps: int = 0
    """Both count what the revoked keys created, unless its cancellation is requested."""


@dataclass(frozen=True, kw_only=True)
class Organization(View):
    """Whose projects are whose."""

    id: str = ""
    name: str = ""
    created_at: int = 0
    created_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class Project(View):
    """Whose files, jobs and adapters are whose. The keys of an archived one open nothing."""

    id: str = ""
    organization_id: str = ""
    name: str = ""
    status: str = ""
    weight: float = 1.0
    """Its part of the devices, beside those of others whose jobs wait."""
    highest_priority: str = ""
    """Of its jobs. Empty: of a service that has no such limit."""
    created_at: int = 0
    created_by: str | None = None
    archived_at: int | None = None


@dataclass(frozen=True, kw_only=True)
class ProjectLimit(View):
    """What a project may use at most; `limit` None: without. `resets_at`: when `used` begins anew."""

    name: str = ""
    limit: float | None = None
    used: float = 0.0
    resets_at: int | None = None


@dataclass(frozen=True, kw_only=True)
class AuditEvent(View):
    """Who changed what. `link`, `previous` and `digest` are its place in the chain, once it is sealed."""

    id: str = ""
    type: str = ""
    effective_at: float = 0.0
    actor: dict[str, Any] = field(default_factory=dict[str, Any])
    """type: api_key, browser or server; id and name of the key."""
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
    """Where the chain breaks. fault: changed, missing, misplaced or anchor_changed."""

    link: int = 0
    id: str | None = None
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class AuditVerification(View):
    """What the server's verification of the chain found."""

    is_sound: bool = False
    num_events: int = 0
    last_link: int = 0
    last_digest: str = ""
    has_more: bool = False
    misfit: AuditMisfit | None = field(default=None, metadata={"view": AuditMisfit})
    num_unsealed: int = 0


@dataclass(frozen=True, kw_only=True)
class UsageResult(View):
    """What was used on a day, by an organization or a project, or of a base model."""

    organization_id: str | None = None
    project_id: str | None = None
    model: str | None = None
    device_seconds: float = 0.0
    trained_tokens: int = 0
    num_jobs: dict[str, int] = field(default_factory=dict[str, int])
    """created, and of those that ended succeeded, failed and cancelled."""
    stored_bytes: int | None = None
    """Of files and adapters at the end of the day; None by base model."""


@dataclass(frozen=True, kw_only=True)
class UsageBucket(View):
    """A day, in UTC."""

    start_time: int = 0
    end_time: int = 0

    @property
    def results(self) -> list[UsageResult]:
        wires: list[dict[str, Any]] = self.raw.get("results") or []
        return [UsageResult.of(wire) for wire in wires]
