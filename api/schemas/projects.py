"""Projects."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import changes_schema
from catalog.spec.strict import LABEL_PATTERN, WITHOUT_NUL, Strict
from catalog.states import Priority, PriorityClass
from catalog.tables.tenancy import Project
from catalog.usage.quotas import Limit, QuotaStatus

_EXAMPLE: dict[str, Any] = {
    "object": "project",
    "id": "proj-3f2b8c9d0a1e4f5a6b7c8d9e",
    "organization_id": "org-2d4c6b8a0e1f3a5b7c9d0e2f",
    "name": "search",
    "status": "active",
    "weight": 1.0,
    "highest_priority": "normal",
    "created_at": 1790000000,
    "created_by": "key-0c9d8e7f6a5b4c3d2e1f0a9b",
    "archived_at": None,
}


OwnerName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=64,
        description="Letters, digits, '.', '_' and '-'; not beginning as its ids do, with 'proj-' or 'org-'.",
        json_schema_extra={"pattern": LABEL_PATTERN},
    ),
]
"""Of a project or an organization."""


class ProjectRequest(Strict):
    """A project to make."""

    model_config = ConfigDict(json_schema_extra={"example": {"name": "search"}})
    name: OwnerName
    organization: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Whose it is, by id or name. null: yours.",
        json_schema_extra=WITHOUT_NUL,
    )


class ProjectName(Strict):
    """A project's new name."""

    model_config = ConfigDict(json_schema_extra={"example": {"name": "search"}})
    name: OwnerName


class ProjectWeight(Strict):
    """A project's part of the devices."""

    model_config = ConfigDict(json_schema_extra={"example": {"weight": 2}})
    weight: float = Field(gt=0, le=1e6, allow_inf_nan=False, description="1 is that of a project that was given none.")


class ProjectObject(BaseModel):
    """Whose files, jobs and adapters are whose."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})
    object: Literal["project"] = "project"
    id: str
    organization_id: str = Field(description="Whose it is, for good.")
    name: str
    status: Literal["active", "archived"] = Field(description="archived: its keys open nothing.")
    weight: float = Field(description="Its part of the devices, beside those of others whose jobs wait.")
    highest_priority: Priority = Field(description="The highest priority that its jobs may have.")
    created_at: int
    created_by: str | None = Field(description="The key that made it; null: a command on the server itself.")
    archived_at: int | None


def project_object(row: Project) -> ProjectObject:
    return ProjectObject(
        id=row.id,
        organization_id=row.organization_id,
        name=row.name,
        status="active" if row.archived_at is None else "archived",
        weight=row.weight,
        highest_priority=PriorityClass(row.highest_priority).name,
        created_at=int(row.created_at),
        created_by=row.created_by,
        archived_at=None if row.archived_at is None else int(row.archived_at),
    )


_LIMITS: dict[str, Any] = {
    "object": "project.limits",
    "project_id": _EXAMPLE["id"],
    "limits": [{"name": "device_hours_per_month", "limit": 100.0, "used": 12.5, "resets_at": 1790812800}],
    "highest_priority": "normal",
}
MOST = 2**53 - 1
"""The audit log, which tells of it, is sealed in a form that has no larger integer."""


class ProjectLimits(Strict):
    """What is left out stays as it is; null: without limit."""

    model_config = ConfigDict(json_schema_extra=changes_schema({"device_hours_per_month": 100}))
    concurrent_jobs: int | None = Field(default=None, ge=0, le=MOST, description="That train at once; more wait.")
    queued_jobs: int | None = Field(default=None, ge=0, le=MOST, description="That wait, or whose files are prepared.")
    jobs_per_day: int | None = Field(default=None, ge=0, le=MOST, description="Created in a day of UTC.")
    device_hours_per_month: float | None = Field(
        default=None, ge=0, le=1e9, allow_inf_nan=False, description="Of a calendar month of UTC; then jobs wait."
    )
    stored_bytes: int | None = Field(
        default=None, ge=0, le=MOST, description="Of files, adapters, checkpoints, token caches and logs."
    )
    plans_per_day: int | None = Field(
        default=None, ge=0, le=MOST, description="Created in a day of UTC. 500 in a new project."
    )
    highest_priority: Priority = Field(
        default="normal",
        description="The highest priority that its jobs may have: its keys' own limits hold as well.",
    )


class ProjectLimit(BaseModel):
    """One of them, and how much of it is used."""

    name: Limit
    limit: float | None = Field(description="null: without.")
    used: float
    resets_at: int | None = Field(description="When `used` begins anew; null where it goes down by itself, or never.")


class ProjectLimitsObject(BaseModel):
    """What a project may use at most, and what it has used."""

    model_config = ConfigDict(json_schema_extra={"example": _LIMITS})
    object: Literal["project.limits"] = "project.limits"
    project_id: str
    limits: list[ProjectLimit]
    highest_priority: Priority = Field(description="The highest priority that its jobs may have.")


def limits_object(row: Project, standings: list[QuotaStatus]) -> ProjectLimitsObject:
    told = [
        ProjectLimit(
            name=one.name,
            limit=one.limit,
            used=one.used,
            resets_at=None if one.resets_at is None else int(one.resets_at),
        )
        for one in standings
    ]
    highest = PriorityClass(row.highest_priority).name
    return ProjectLimitsObject(project_id=row.id, limits=told, highest_priority=highest)
