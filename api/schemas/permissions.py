"""Schemas of permissions of other projects to read a model, compatible with OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import CreatedAt, Deleted, ObjectId
from catalog.spec.strict import WITHOUT_NUL, Strict
from catalog.tables.tenancy import ModelPermission

ProjectName = Annotated[str, Field(min_length=1, max_length=128, json_schema_extra=WITHOUT_NUL)]


class PermissionRequest(Strict):
    """Projects that may read the model. They must belong to the model's organization."""

    model_config = ConfigDict(json_schema_extra={"example": {"project_ids": ["proj-3f2b8c9d0a1e"]}})
    project_ids: Annotated[list[ProjectName], Field(min_length=1, max_length=100, description="Project IDs or names.")]


class PermissionObject(BaseModel):
    """The permission of one project."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "checkpoint.permission",
                "id": "cp-0a1b2c3d4e5f60718293a4b5",
                "created_at": 1790000300,
                "project_id": "proj-3f2b8c9d0a1e4f5a6b7c8d9e",
            }
        }
    )
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    id: ObjectId
    created_at: CreatedAt
    project_id: str = Field(description="Project that may read the model.")


class PermissionDeleted(BaseModel):
    """Confirmation that a permission is deleted."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"object": "checkpoint.permission", "id": "cp-0a1b2c3d4e5f60718293a4b5", "deleted": True}
        }
    )
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    id: ObjectId
    deleted: Deleted = True


def permission_object(row: ModelPermission) -> PermissionObject:
    return PermissionObject(id=row.id, created_at=int(row.created_at), project_id=row.project_id)
