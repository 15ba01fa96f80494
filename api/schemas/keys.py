"""Schemas of API keys. Only the response that creates a key contains its secret."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import CreatedAt, IsOperator, KeyName, ObjectId, ProjectId, changes_schema
from catalog.revocation import Revocation
from catalog.spec.model_fields import LAST_SECOND, WITHOUT_NUL, Strict
from catalog.states import Priority, PriorityClass
from catalog.tables.tenancy import ApiKey
from catalog.tenancy.authentication import is_live
from catalog.tenancy.scopes import SCOPES, Scope, granted

NAME = r"^[^\x00-\x1f\x7f]+$"
DAY = 86_400
_EXAMPLE: dict[str, Any] = {
    "object": "api_key",
    "id": "key-5b7d1c0e9f3a4c2b8d6e7f01",
    "name": "ci",
    "redacted_value": "lorry_key-5b7d1c0e9f3a4c2b8d6e7f01_…x9Qz",
    "project_id": "proj-3f2b8c9d0a1e4f5a6b7c8d9e",
    "status": "active",
    "scopes": ["files:write", "jobs:read", "jobs:write"],
    "is_operator": False,
    "created_at": 1790000000,
    "created_by": "key-0c9d8e7f6a5b4c3d2e1f0a9b",
    "expires_at": 1797776000,
    "last_used_at": 1790003600,
    "revoked_at": None,
    "replaced_by": None,
    "requests_per_minute": None,
    "jobs_per_day": None,
    "highest_priority": "normal",
}
MOST = 1_000_000_000
_REQUESTS = "Requests per minute. Null: the service's limit; 0: no limit."
_HIGHEST = "Highest priority of the key's jobs. The project's limit applies too."
_JOBS = "Jobs that the key may create per day. Null: the service's limit; 0: no limit."


class ApiKeyRequest(Strict):
    """A new API key. It can't have more rights than the key that creates it."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"name": "ci", "scopes": _EXAMPLE["scopes"], "expires_at": 1797776000}},
    )
    name: str = Field(min_length=1, max_length=64, pattern=NAME, description="Purpose of the key.")
    scopes: list[Scope] | None = Field(
        default=None, min_length=1, max_length=len(SCOPES), description="Scopes. Null: all that your key can grant."
    )
    expires_at: int | None = Field(
        default=None, gt=0, le=LAST_SECOND, description="Expiry, in Unix seconds. Null: that of your key, if any."
    )
    is_operator: bool = Field(
        default=False, description="Whether it may act beyond a project. Requires an operator key."
    )
    project: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Project ID or name. Null: your project. Other projects require an operator key.",
        json_schema_extra=WITHOUT_NUL,
    )
    requests_per_minute: int | None = Field(
        default=None,
        ge=0,
        le=MOST,
        description="Requests per minute. Null: the limit of your key; 0: no limit. Other values require an "
        "operator key.",
    )
    jobs_per_day: int | None = Field(
        default=None,
        ge=0,
        le=MOST,
        description="Jobs per day. Null: the limit of your key; 0: no limit. Other values require an operator key.",
    )
    highest_priority: Priority | None = Field(
        default=None,
        description=f"{_HIGHEST} Null: normal, or that of your key if lower. Other values require an operator key.",
    )


class RotateRequest(Strict):
    """The rotation of a key."""

    model_config = ConfigDict(json_schema_extra={"example": {"overlap_seconds": DAY}})
    overlap_seconds: int = Field(
        default=DAY, ge=0, le=90 * DAY, description="Time that the old key stays valid, in seconds."
    )
    expires_at: int | None = Field(
        default=None,
        gt=0,
        le=LAST_SECOND,
        description="Expiry of the new key, in Unix seconds. Null: that of the old key.",
    )


class RevokeRequest(Strict):
    """Objects to revoke and cancel together with a key."""

    model_config = ConfigDict(json_schema_extra={"example": {"cancel": True, "with_descendants": True}})
    cancel: bool = Field(
        default=False,
        description="Cancel the unfinished jobs, sweeps, batches and exports that the revoked keys created. Requires "
        "`jobs:write`.",
    )
    with_descendants: bool = Field(
        default=False, description="Also revoke the keys that this key created, directly or through other keys."
    )


class LimitsRequest(Strict):
    """Changes of a key's limits. Omitted fields stay unchanged."""

    model_config = ConfigDict(json_schema_extra=changes_schema({"requests_per_minute": 600}))
    requests_per_minute: int | None = Field(default=None, ge=0, le=MOST, description=_REQUESTS)
    jobs_per_day: int | None = Field(default=None, ge=0, le=MOST, description=_JOBS)
    highest_priority: Priority = Field(default="normal", description=_HIGHEST)


class ApiKeyObject(BaseModel):
    """An API key, without its secret."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})
    object: Literal["api_key"] = "api_key"
    id: ObjectId
    name: KeyName
    redacted_value: str = Field(description="The first and last characters of the secret, to distinguish keys.")
    project_id: ProjectId
    status: Literal["active", "expired", "revoked"] = Field(
        description="`active`: valid. `expired`: past `expires_at`. `revoked`: revoked by a user."
    )
    scopes: list[str] = Field(description="Scopes of the key.")
    is_operator: IsOperator
    created_at: CreatedAt
    created_by: str | None = Field(description="ID of the key that created it. Null: a command on the server itself.")
    expires_at: int | None = Field(description="Expiry, in Unix seconds; null if the key does not expire.")
    last_used_at: int | None = Field(description="Last use, in Unix seconds, accurate to the minute; null before.")
    revoked_at: int | None = Field(description="Time of the revocation, in Unix seconds; null if it is not revoked.")
    replaced_by: str | None = Field(description="ID of the key that replaced it. Both are valid until `expires_at`.")
    requests_per_minute: int | None = Field(description=_REQUESTS)
    jobs_per_day: int | None = Field(description=_JOBS)
    highest_priority: Priority = Field(description=_HIGHEST)


class ApiKeyCreated(ApiKeyObject):
    """A new API key with its secret."""

    model_config = ConfigDict(
        json_schema_extra={"example": {**_EXAMPLE, "value": "lorry_key-5b7d1c0e9f3a4c2b8d6e7f01_…"}}
    )
    value: str = Field(description="The secret. No other response contains it.")


class ApiKeyRevoked(ApiKeyObject):
    """A revoked key, and the unfinished work of the revoked keys."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                **_EXAMPLE,
                "status": "revoked",
                "revoked_at": 1790007200,
                "revoked_keys": [_EXAMPLE["id"]],
                "valid_descendants": 0,
                "unfinished_jobs": 3,
                "unfinished_sweeps": 1,
                "unfinished_batches": 0,
                "unfinished_exports": 0,
            }
        }
    )
    revoked_keys: list[str] = Field(description="IDs of the key and, if requested, of its descendants.")
    valid_descendants: int = Field(description="Number of valid keys that the key created, directly or indirectly.")
    unfinished_jobs: int = Field(
        description="Unfinished jobs that the revoked keys created and whose cancellation is not requested."
    )
    unfinished_sweeps: int = Field(
        description="Unfinished sweeps that the revoked keys created and whose cancellation is not requested."
    )
    unfinished_batches: int = Field(
        description="Unfinished batches that the revoked keys created and whose cancellation is not requested."
    )
    unfinished_exports: int = Field(description="Unfinished exports that the revoked keys created.")


def revoked_object(found: Revocation, *, now: float) -> ApiKeyRevoked:
    keys = {"revoked_keys": list(found.revoked), "valid_descendants": found.num_valid_descendants}
    return ApiKeyRevoked.model_validate({**_fields(found.key, now), **keys, **found.left.counts()})


def key_object(row: ApiKey, *, now: float) -> ApiKeyObject:
    return ApiKeyObject.model_validate(_fields(row, now))


def created_object(row: ApiKey, value: str, *, now: float) -> ApiKeyCreated:
    return ApiKeyCreated.model_validate({**_fields(row, now), "value": value})


def _fields(row: ApiKey, now: float) -> dict[str, Any]:
    ended = "expired" if row.revoked_at is None else "revoked"
    return {
        "id": row.id,
        "name": row.name,
        "redacted_value": f"lorry_{row.id}_…{row.ending}",
        "project_id": row.project_id,
        "status": "active" if is_live(row, now) else ended,
        "scopes": sorted(granted(row.scopes, is_operator=row.is_operator)),
        "is_operator": row.is_operator,
        "created_at": int(row.created_at),
        "created_by": row.created_by,
        "expires_at": _second(row.expires_at),
        "last_used_at": _second(row.last_used_at),
        "revoked_at": _second(row.revoked_at),
        "replaced_by": row.replaced_by,
        "requests_per_minute": row.requests_per_minute,
        "jobs_per_day": row.jobs_per_day,
        "highest_priority": PriorityClass(row.highest_priority).name,
    }


def _second(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
