"""Schemas of organizations."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import CreatedAt, ObjectId
from api.schemas.projects import OwnerName
from catalog.spec.model_fields import Strict
from catalog.tables.tenancy import Organization

_EXAMPLE: dict[str, Any] = {
    "object": "organization",
    "id": "org-2d4c6b8a0e1f3a5b7c9d0e2f",
    "name": "research",
    "created_at": 1790000000,
    "created_by": "key-0c9d8e7f6a5b4c3d2e1f0a9b",
}


class OrganizationRequest(Strict):
    """A new organization, or a new name."""

    model_config = ConfigDict(json_schema_extra={"example": {"name": "research"}})
    name: OwnerName


class OrganizationObject(BaseModel):
    """An organization: a group of projects. Models can be shared only between projects of the same organization."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})
    object: Literal["organization"] = "organization"
    id: ObjectId
    name: str = Field(description="Unique name, which an operator can change.")
    created_at: CreatedAt
    created_by: str | None = Field(
        description="ID of the key that created it. Null: the service itself, or a command on the server."
    )


def organization_object(row: Organization) -> OrganizationObject:
    return OrganizationObject(id=row.id, name=row.name, created_at=int(row.created_at), created_by=row.created_by)
