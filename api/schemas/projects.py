"""Projects."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from catalog.spec import LABEL_PATTERN
from catalog.strict import Strict
from catalog.tables import Project

_EXAMPLE: dict[str, Any] = {
    "object": "project",
    "id": "proj-3f2b8c9d0a1e4f5a6b7c8d9e",
    "name": "search",
    "status": "active",
    "weight": 1.0,
    "created_at": 1790000000,
    "created_by": "key-0c9d8e7f6a5b4c3d2e1f0a9b",
    "archived_at": None,
}


class ProjectRequest(Strict):
    """A project to make, or its new name."""

    model_config = ConfigDict(json_schema_extra={"example": {"name": "search"}})
    name: str = Field(
        min_length=1,
        max_length=64,
        description="Letters, digits, '.', '_' and '-'.",
        json_schema_extra={"pattern": LABEL_PATTERN},
    )


class ProjectWeight(Strict):
    """A project's part of the devices."""

    model_config = ConfigDict(json_schema_extra={"example": {"weight": 2}})
    weight: float = Field(gt=0, le=1e6, allow_inf_nan=False, description="1 is that of a project that was given none.")


class ProjectObject(BaseModel):
    """Whose files, jobs and adapters are whose."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})
    object: Literal["project"] = "project"
    id: str
    name: str
    status: Literal["active", "archived"] = Field(description="archived: its keys open nothing.")
    weight: float = Field(description="Its part of the devices, beside those of others whose jobs wait.")
    created_at: int
    created_by: str | None = Field(description="The key that made it; null: a command on the server itself.")
    archived_at: int | None


def project_object(row: Project) -> ProjectObject:
    return ProjectObject(
        id=row.id,
        name=row.name,
        status="active" if row.archived_at is None else "archived",
        weight=row.weight,
        created_at=int(row.created_at),
        created_by=row.created_by,
        archived_at=None if row.archived_at is None else int(row.archived_at),
    )
