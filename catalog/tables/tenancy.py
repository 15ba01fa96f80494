"""Organizations, projects, quotas, API keys, model permissions and browser sessions."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, ForeignKey, Index, Integer, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Table

PLANS_PER_DAY = 500
"""Default of `Project.max_plans_per_day`."""


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
