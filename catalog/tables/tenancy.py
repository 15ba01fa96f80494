"""Who may do what: organizations, their projects, the keys of those, and browsers that were signed in by one."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, ForeignKey, Index, Integer, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Table

PLANS_PER_DAY = 500
"""Of a project whose limit nobody has changed."""


class Organization(Table):
    __tablename__ = "organizations"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    created_by: Mapped[str | None]
    """The key; None where it was made on the server itself, or is that of projects of before."""


class Project(Table):
    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    """For good: what is shared within an organization stays within it."""
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    created_by: Mapped[str | None]
    """The key; None where it was made on the server itself."""
    archived_at: Mapped[float | None]
    """Since then its keys open nothing. All that it has stays."""
    weight: Mapped[float] = mapped_column(default=1.0, server_default="1")
    """Its part of the devices beside others'."""
    highest_priority: Mapped[int] = mapped_column(Integer, default=1, server_default="1")
    """The highest `spec.PriorityClass` that its jobs may have, as its number."""
    max_concurrent_jobs: Mapped[int | None]
    """This and the next five: see quotas. None: without limit."""
    max_queued_jobs: Mapped[int | None]
    max_jobs_per_day: Mapped[int | None]
    max_device_hours_per_month: Mapped[float | None]
    max_stored_bytes: Mapped[int | None]
    max_plans_per_day: Mapped[int | None] = mapped_column(default=PLANS_PER_DAY, server_default=str(PLANS_PER_DAY))
    preparing_at: Mapped[float | None]
    """When a worker last took files of one of its jobs to prepare them: projects take turns."""
    class_prepared_at: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """The same by class, as text."""


class ProjectUsage(Table):
    """What a project has used of devices, decayed: its rows together, each decayed from its own `as_of`."""

    __tablename__ = "project_usage"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Of those who charge it: so that they don't wait for each other."""
    device_seconds: Mapped[float]
    as_of: Mapped[float]


NOT_REVOKED = text("revoked_at IS NULL")


class ApiKey(Table):
    """Only an HMAC of the key is kept."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)
    is_operator: Mapped[bool] = mapped_column(Boolean)
    """May do what reaches beyond the project, as far as its scopes go."""
    scopes: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """None: all that such a key can do, and what is added to that later."""
    ending: Mapped[str | None]
    """The last characters of the key, to tell it from others by; unknown of the oldest ones."""
    created_at: Mapped[float]
    created_by: Mapped[str | None]
    """The key; None where it was made on the server itself."""
    last_used_at: Mapped[float | None]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    replaced_by: Mapped[str | None]
    """The key that a rotation made; this one is good until it expires."""
    requests_per_minute: Mapped[int | None]
    jobs_per_day: Mapped[int | None]
    """Of both: None: the service's; 0: without limit."""
    highest_priority: Mapped[int] = mapped_column(Integer, default=1, server_default="1")
    """As of a project: the lower of the two holds."""
    idempotency_key: Mapped[str | None]
    """Of the request that created it: the same caller can't create a second key with it."""
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "created_by", "created_at"),
        Index("ix_api_keys_valid", "project_id", sqlite_where=NOT_REVOKED, postgresql_where=NOT_REVOKED),
    )


class ModelPermission(Table):
    """A project may read an adapter, or a checkpoint, of another of its organization."""

    __tablename__ = "model_permissions"
    id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str]
    """Id of the adapter or of the checkpoint."""
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    """Who may read it."""
    created_at: Mapped[float]
    created_by: Mapped[str]
    __table_args__ = (
        Index(None, "model_id", "project_id", unique=True),
        Index(None, "project_id", "created_at", "model_id"),
    )


class SignIn(Table):
    """A one-time sign-in link, then the browser session that it was exchanged for. Digests only."""

    __tablename__ = "sign_ins"
    id: Mapped[str] = mapped_column(primary_key=True)
    api_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    link_digest: Mapped[str | None] = mapped_column(unique=True)
    """None once it was used."""
    browser_digest: Mapped[str | None] = mapped_column(unique=True)
    created_at: Mapped[float]
    expires_at: Mapped[float]
