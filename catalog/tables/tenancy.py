"""Organizations, projects with quotas and usage, API keys, model permissions, browser sessions, and the audit log.

Usage is recorded as it happens, by day and month, so that reports need not sum jobs and attempts. Audit events are only
appended, and a hash chain seals them.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, Boolean, ForeignKey, Index, Integer, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import AutoKey, Json, Table

PLANS_PER_DAY = 500
"""Default of `Project.max_plans_per_day`."""
UNSEALED = text("link IS NULL")
of_the_unsealed: dict[str, Any] = {"sqlite_where": UNSEALED, "postgresql_where": UNSEALED}


class Organization(Table):
    __tablename__ = "organizations"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    created_by: Mapped[str | None]
    """Id of the API key. None: created on the server itself."""


class Project(Table):
    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    """Never changes, because models are shared within an organization."""
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    created_by: Mapped[str | None]
    """Id of the API key. None: created on the server itself."""
    archived_at: Mapped[float | None]
    """Since this time the keys of the project are not valid. Its data is kept."""
    weight: Mapped[float] = mapped_column(default=1.0, server_default="1")
    """Fair-share weight, relative to the weights of other projects."""
    highest_priority: Mapped[int] = mapped_column(Integer, default=1, server_default="1")
    """Number of the highest `PriorityClass` that its jobs may have; 0 is the highest class."""
    max_concurrent_jobs: Mapped[int | None]
    """This and the next six: quotas, see catalog/usage/quotas.py. None: no limit."""
    max_queued_jobs: Mapped[int | None]
    max_jobs_per_day: Mapped[int | None]
    max_device_hours_per_month: Mapped[float | None]
    max_stored_bytes: Mapped[int | None]
    max_plans_per_day: Mapped[int | None] = mapped_column(default=PLANS_PER_DAY, server_default=str(PLANS_PER_DAY))
    max_tokens_per_day: Mapped[int | None]


class ProjectUsage(Table):
    """Decayed device usage of a project: the sum of the rows of all slots, each decayed from its own `as_of`."""

    __tablename__ = "project_usage"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Spreads concurrent writers over several rows, so that they don't wait for each other."""
    device_seconds: Mapped[float]
    as_of: Mapped[float]


NOT_REVOKED = text("revoked_at IS NULL")


class ApiKey(Table):
    """An API key. Only an HMAC of the key is stored."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)
    is_operator: Mapped[bool] = mapped_column(Boolean)
    """Whether the key may act beyond its project, within its scopes."""
    scopes: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """None: every scope that such a key can have, including scopes that later versions add."""
    ending: Mapped[str]
    """The last characters of the key, by which users recognize it."""
    created_at: Mapped[float]
    created_by: Mapped[str | None]
    """Id of the API key. None: created on the server itself."""
    last_used_at: Mapped[float | None]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    replaced_by: Mapped[str | None]
    """Id of the key that a rotation created. This key stays valid until it expires."""
    requests_per_minute: Mapped[int | None]
    jobs_per_day: Mapped[int | None]
    """This and `requests_per_minute`: None: the default of the service; 0: no limit."""
    highest_priority: Mapped[int] = mapped_column(Integer, default=1, server_default="1")
    """As for a project. The lower of the two limits applies."""
    idempotency_key: Mapped[str | None]
    """Idempotency key of the request that created it. The same caller can't create a second key with it."""
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "created_by", "created_at"),
        Index("ix_api_keys_valid", "project_id", sqlite_where=NOT_REVOKED, postgresql_where=NOT_REVOKED),
    )


class ModelPermission(Table):
    """Permission for a project to read an adapter or a checkpoint of another project of its organization."""

    __tablename__ = "model_permissions"
    id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str]
    """Id of the adapter or of the checkpoint."""
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    """The project that may read it."""
    created_at: Mapped[float]
    created_by: Mapped[str]
    __table_args__ = (
        Index(None, "model_id", "project_id", unique=True),
        Index(None, "project_id", "created_at", "model_id"),
    )


class SignIn(Table):
    """A one-time sign-in link, and later the browser session that it was exchanged for. Only digests are stored."""

    __tablename__ = "sign_ins"
    id: Mapped[str] = mapped_column(primary_key=True)
    api_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    link_digest: Mapped[str | None] = mapped_column(unique=True)
    """None once the link is used."""
    browser_digest: Mapped[str | None] = mapped_column(unique=True)
    created_at: Mapped[float]
    expires_at: Mapped[float]


class UsageDay(Table):
    """Usage of a base model by a project on one day: the sum of the rows of all slots."""

    __tablename__ = "usage_days"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    day: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Days since 1970-01-01 UTC."""
    base_model: Mapped[str] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Spreads concurrent writers over several rows, so that they don't wait for each other."""
    device_seconds: Mapped[float] = mapped_column(default=0.0)
    trained_tokens: Mapped[int] = mapped_column(default=0)
    """Trained tokens of the jobs that succeeded on this day."""
    num_created: Mapped[int] = mapped_column(default=0)
    num_succeeded: Mapped[int] = mapped_column(default=0)
    num_failed: Mapped[int] = mapped_column(default=0)
    num_cancelled: Mapped[int] = mapped_column(default=0)
    num_plans: Mapped[int] = mapped_column(default=0, server_default="0")
    num_completions: Mapped[int] = mapped_column(default=0, server_default="0")
    """This and the next two: inference requests that were answered on this day, and their tokens."""
    prompt_tokens: Mapped[int] = mapped_column(default=0, server_default="0")
    completion_tokens: Mapped[int] = mapped_column(default=0, server_default="0")
    __table_args__ = (Index(None, "day"),)


class UsageMonth(Table):
    """Device-seconds of a project in one month, for all base models: the sum of the rows of all slots."""

    __tablename__ = "usage_months"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    month: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Months since year 0: 12 * year + month - 1, in UTC."""
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    device_seconds: Mapped[float]


class StoredDay(Table):
    """Bytes that a project stored at the end of a day on which they changed. The latest row holds the current value."""

    __tablename__ = "stored_days"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    day: Mapped[int] = mapped_column(Integer, primary_key=True)
    num_bytes: Mapped[int]


class StoredBytes(Table):
    """Bytes that a project stores now; stored_bytes.py lists the parts."""

    __tablename__ = "stored_bytes"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    num_bytes: Mapped[int]


class ServiceCounter(Table):
    """A counter of the service: the sum of the rows of all slots. See catalog/usage/ledger.py."""

    __tablename__ = "tallies"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    label: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Label value of the counter, such as an `EndReason`; empty for a counter without labels."""
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Spreads concurrent writers over several rows, so that they don't wait for each other."""
    number: Mapped[int]


class AuditEvent(Table):
    """One audit event, written in the transaction of the change that it describes. Only sealing updates it."""

    __tablename__ = "audit_events"
    seq: Mapped[int] = mapped_column(AutoKey, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    type: Mapped[str]
    effective_at: Mapped[float]
    project_id: Mapped[str | None]
    """The project that owns the object. None: no single project owns it, for example a base model."""
    object_id: Mapped[str | None]
    actor_type: Mapped[str]
    actor_id: Mapped[str | None]
    """The API key; for a browser session, the key that signed in. None: an administrator on the server itself."""
    actor_name: Mapped[str | None]
    request_id: Mapped[str | None]
    address: Mapped[str | None]
    details: Mapped[Json]
    link: Mapped[int | None] = mapped_column(unique=True)
    """Position in the chain, from 1. Sealing sets this and the next two columns, once."""
    previous: Mapped[str | None]
    """Digest of the previous event."""
    digest: Mapped[str | None]
    """HMAC-SHA256 of the event (`seal_of` in catalog/audit/chain.py), in hex."""
    __table_args__ = (
        Index(None, "effective_at", "id"),
        Index(None, "project_id", "effective_at", "id"),
        Index(None, "actor_id", "effective_at", "id"),
        Index(None, "type", "effective_at", "id"),
        Index("ix_audit_events_unsealed", "seq", **of_the_unsealed),
    )


class AuditHead(Table):
    """One row: the last link of the chain. The process that seals events locks it."""

    __tablename__ = "audit_head"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    link: Mapped[int]
    digest: Mapped[str]


class RetiredKey(Table):
    """The keys that were derived from one replaced pepper (derived_keys)."""

    __tablename__ = "retired_keys"
    WIRE_OBJECT: ClassVar = "retired_key"
    """The `object` value of a retired key in an export of the audit log."""
    id: Mapped[str] = mapped_column(primary_key=True)
    sealed: Mapped[str] = mapped_column(Text)
    """Base64; AES-256-GCM under the current pepper."""
