"""Who may do what: projects, their keys, and browsers that were signed in by one."""

from __future__ import annotations

from sqlalchemy import Boolean, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Table


class Project(Table):
    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]


class ApiKey(Table):
    """Only an HMAC of the key is kept."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)
    is_operator: Mapped[bool] = mapped_column(Boolean)
    """May add base models and see every worker; all other rights end at the project."""
    created_at: Mapped[float]
    last_used_at: Mapped[float | None]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


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
