"""Who may do what: projects, their keys, and browsers that were signed in by one."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Table


class Project(Table):
    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    archived_at: Mapped[float | None]
    """Since then its keys open nothing. All that it has stays."""


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
    last_used_at: Mapped[float | None]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    replaced_by: Mapped[str | None]
    """The key that a rotation made; this one is good until it expires."""
    requests_per_minute: Mapped[int | None]
    jobs_per_day: Mapped[int | None]
    """Of both: None: the service's; 0: without limit."""
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)


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
