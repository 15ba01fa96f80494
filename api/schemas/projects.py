"""Schemas of projects, their weights and their quotas."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import CreatedAt, ObjectId, ProjectId, changes_schema
from catalog.spec.model_fields import LABEL_PATTERN, WITHOUT_NUL, Strict
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
        description="Letters, digits, '.', '_' and '-'. Must not start with 'proj-' or 'org-', like an ID.",
        json_schema_extra={"pattern": LABEL_PATTERN},
    ),
]
"""Name of a project or an organization."""


class ProjectRequest(Strict):
    """A new project."""

    model_config = ConfigDict(json_schema_extra={"example": {"name": "search"}})
    name: OwnerName
    organization: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Organization ID or name. Null: your organization.",
        json_schema_extra=WITHOUT_NUL,
    )


class ProjectName(Strict):
    """The new name of a project."""

    model_config = ConfigDict(json_schema_extra={"example": {"name": "search"}})
    name: OwnerName


class ProjectWeight(Strict):
    """The fair-share weight of a project."""

    model_config = ConfigDict(json_schema_extra={"example": {"weight": 2}})
    weight: float = Field(gt=0, le=1e6, allow_inf_nan=False, description="Fair-share weight. New projects have 1.")


class ProjectObject(BaseModel):
    """A project, the owner of files, jobs and adapters."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})
    object: Literal["project"] = "project"
    id: ObjectId
    organization_id: str = Field(description="Organization of the project. It can't be changed.")
    name: str = Field(description="Unique name, which an operator can change.")
    status: Literal["active", "archived"] = Field(description="`archived`: the project's keys are not valid.")
    weight: float = Field(description="Fair-share weight relative to other projects with waiting jobs.")
    highest_priority: Priority = Field(description="Highest priority of the project's jobs.")
    created_at: CreatedAt
    created_by: str | None = Field(description="ID of the key that created it. Null: a command on the server itself.")
    archived_at: int | None = Field(
        description="Time at which it was archived, in Unix seconds; null while it is active."
    )


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
"""Largest integer in the canonical form of the audit log, which records changes of limits."""


class ProjectLimits(Strict):
    """Changes of a project's quotas. Omitted fields stay unchanged; null removes a limit."""

    model_config = ConfigDict(json_schema_extra=changes_schema({"device_hours_per_month": 100}))
    concurrent_jobs: int | None = Field(
        default=None, ge=0, le=MOST, description="Jobs that train at the same time; more jobs wait."
    )
    queued_jobs: int | None = Field(
        default=None, ge=0, le=MOST, description="Jobs that wait or whose files are being prepared."
    )
    jobs_per_day: int | None = Field(default=None, ge=0, le=MOST, description="Jobs created per day (UTC).")
    device_hours_per_month: float | None = Field(
        default=None,
        ge=0,
        le=1e9,
        allow_inf_nan=False,
        description="Device-hours per calendar month (UTC); beyond it, jobs wait.",
    )
    stored_bytes: int | None = Field(
        default=None, ge=0, le=MOST, description="Stored bytes of files, adapters, checkpoints, token caches and logs."
    )
    plans_per_day: int | None = Field(
        default=None, ge=0, le=MOST, description="Plans created per day (UTC). 500 for a new project."
    )
    tokens_per_day: int | None = Field(
        default=None, ge=0, le=MOST, description="Tokens of prompts and answers of inference requests per day (UTC)."
    )
    highest_priority: Priority = Field(
        default="normal",
        description="Highest priority of the project's jobs. The limits of its keys apply too.",
    )


class ProjectLimit(BaseModel):
    """A quota and its current usage."""

    name: Limit = Field(description="Name of the quota, with its unit.")
    limit: float | None = Field(description="Null: no limit.")
    used: float = Field(description="Current usage, in the unit of the quota.")
    resets_at: int | None = Field(
        description="Time at which `used` resets, in Unix seconds. Null: it falls over time, or never."
    )


class ProjectLimitsObject(BaseModel):
    """The quotas of a project and its current usage."""

    model_config = ConfigDict(json_schema_extra={"example": _LIMITS})
    object: Literal["project.limits"] = "project.limits"
    project_id: ProjectId
    limits: list[ProjectLimit] = Field(description="All quotas, also those without a limit.")
    highest_priority: Priority = Field(description="Highest priority of the project's jobs.")


def limits_object(row: Project, statuses: list[QuotaStatus]) -> ProjectLimitsObject:
    objects = [ProjectLimit(**status.values()) for status in statuses]
    highest = PriorityClass(row.highest_priority).name
    return ProjectLimitsObject(project_id=row.id, limits=objects, highest_priority=highest)
