"""Schemas of the audit log."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import ObjectId
from catalog.audit.chain import ChainCheck, Fault, content
from catalog.audit.log import ActorType
from catalog.tables.tenancy import AuditEvent

_EXAMPLE: dict[str, Any] = {
    "object": "audit_event",
    "id": "audit-3f2b8c9d0a1e4f5a6b7c8d9e",
    "type": "job.cancelled",
    "effective_at": 1790000000.25,
    "actor": {"type": "api_key", "id": "key-5b7d1c0e9f3a4c2b8d6e7f01", "name": "ci"},
    "project_id": "proj-3f2b8c9d0a1e4f5a6b7c8d9e",
    "object_id": "ftjob-9a1e4f5a6b7c8d9e3f2b8c9d",
    "request_id": "req_0a1e4f5a6b7c8d9e3f2b8c9d",
    "address": "192.0.2.7",
    "details": {"from": "running"},
    "link": 42,
    "previous": "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
    "digest": "b1ac6b4b2a5a5e1d9e7c66a3f4f1f8e0a5f8d8f2a9a2d8d3b0d6f1b6a7c5e4d3",
}


class AuditActor(BaseModel):
    """The actor of a change."""

    type: ActorType = Field(description="`server`: a command on the server itself, without an API request.")
    id: str | None = Field(description="ID of the API key; for a browser, of the key that signed it in.")
    name: str | None = Field(description="Name of the API key when the change happened; null for the server.")


class AuditEventObject(BaseModel):
    """One change. An event is immutable. `link`, `previous` and `digest` are null until it is sealed into the chain."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})
    object: Literal["audit_event"] = "audit_event"
    id: ObjectId
    type: str = Field(description="Type of the change, such as `job.cancelled`.")
    effective_at: float = Field(
        description="Time of the change, in Unix seconds, with the fraction that the digest covers."
    )
    actor: AuditActor = Field(description="The API key, browser or server that made the change.")
    project_id: str | None = Field(description="Null for objects without a project, such as base models.")
    object_id: str | None = Field(description="ID of the changed object.")
    request_id: str | None = Field(description="Header `x-request-id` of the response.")
    address: str | None = Field(description="Address of the client, or of a reverse proxy that is not trusted.")
    details: dict[str, Any] = Field(description="Further facts about the change, which depend on its type.")
    link: int | None = Field(description="Position in the chain, from 1.")
    previous: str | None = Field(description="Digest of the previous event.")
    digest: str | None = Field(
        description="HMAC-SHA256 of the RFC 8785 form of the other non-null fields, with a key of the server."
    )


class AuditMisfit(BaseModel):
    """The event at which the chain is broken."""

    link: int = Field(description="Position in the chain, from 1.")
    id: str | None = Field(description="ID of the audit event; see `misfit` for missing events and anchors.")
    fault: Fault = Field(
        description="`changed`: it differs from the sealed event. `missing`: it is absent. `misplaced`: its "
        "position is "
        "wrong. `anchor_changed`: an anchor differs from the chain."
    )


class AuditVerification(BaseModel):
    """Result of verifying a part of the chain. While `has_more` is true, continue with `after` = `last_link`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "audit_verification",
                "is_sound": True,
                "num_events": 42,
                "last_link": 42,
                "last_digest": _EXAMPLE["digest"],
                "has_more": False,
                "misfit": None,
                "num_unsealed": 0,
            }
        }
    )
    object: Literal["audit_verification"] = "audit_verification"
    is_sound: bool = Field(description="Whether no event of this part breaks the chain.")
    num_events: int = Field(description="Number of events with a correct digest.")
    last_link: int = Field(description="Link of the last event with a correct digest.")
    last_digest: str = Field(description="Digest of the event at `last_link`.")
    has_more: bool = Field(description="Whether events after `last_link` are not verified yet.")
    misfit: AuditMisfit | None = Field(
        description="The first event that does not fit. Its ID is null if the event is missing; for a wrong anchor, it "
        "is the anchor's name."
    )
    num_unsealed: int = Field(description="Recent events that are not sealed into the chain yet.")


def audit_event_object(event: AuditEvent) -> AuditEventObject:
    return AuditEventObject.model_validate({**content(event), "digest": event.digest})


def verification(found: ChainCheck) -> AuditVerification:
    misfit = found.misfit
    return AuditVerification(
        is_sound=misfit is None,
        num_events=found.num_events,
        last_link=found.last_link,
        last_digest=found.last_digest,
        has_more=found.has_more,
        misfit=misfit and AuditMisfit(link=misfit.link, id=misfit.id, fault=misfit.fault),
        num_unsealed=found.num_unsealed,
    )
