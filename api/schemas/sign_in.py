"""Schemas of signing in to the dashboard."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import Deleted, IsOperator, KeyName, ProjectDisplayName, ProjectId
from catalog.settings import Settings
from catalog.spec.model_fields import Strict
from catalog.tenancy.authentication import Caller


class SignInLink(BaseModel):
    """A link that signs a browser in to the dashboard."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "sign_in_link",
                "url": "http://127.0.0.1:8000/dashboard/#/sign-in/…",
                "expires_at": 1790000900,
            }
        }
    )
    object: Literal["sign_in_link"] = "sign_in_link"
    url: str = Field(description="Page that asks for confirmation and then signs in one browser, once.")
    expires_at: int = Field(description="Time after which the link is invalid, in Unix seconds.")


class SignInToken(Strict):
    """The token of a sign-in link."""

    model_config = ConfigDict(json_schema_extra={"example": {"token": "…"}})
    token: str = Field(min_length=1, max_length=256, description="The part of the link after `#/sign-in/`.")


class SignInLinkUse(SignInToken):
    """The use of a sign-in link."""

    model_config = ConfigDict(json_schema_extra={"example": {"token": "…", "replaces_session": False}})
    replaces_session: bool = Field(default=False, description="Whether to end this browser's session with another key.")


class SignInPreview(BaseModel):
    """The project and key to which a link would sign in."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "sign_in_link.preview",
                "project_id": "proj-5e1f0a",
                "project": "default",
                "key_name": "first operator key",
                "is_operator": True,
                "expires_at": 1790000900,
            }
        }
    )
    object: Literal["sign_in_link.preview"] = "sign_in_link.preview"
    project_id: ProjectId
    project: ProjectDisplayName
    key_name: KeyName
    is_operator: IsOperator
    expires_at: int = Field(description="Time after which the link is invalid, in Unix seconds.")


class BrowserSessionRequest(Strict):
    """A sign-in with an API key."""

    model_config = ConfigDict(json_schema_extra={"example": {"api_key": "lorry_key-…"}})
    api_key: str = Field(min_length=1, max_length=512, description="Secret of an API key, `lorry_key-…`.")


class BrowserSession(BaseModel):
    """The project and key of a browser session or of an API key."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "browser_session",
                "project_id": "proj-5e1f0a",
                "project": "default",
                "key_name": "first operator key",
                "is_operator": True,
                "scopes": ["jobs:read", "jobs:write"],
                "uploads_to_hub": False,
            }
        }
    )
    object: Literal["browser_session"] = "browser_session"
    project_id: ProjectId
    project: ProjectDisplayName
    key_name: KeyName
    is_operator: IsOperator
    scopes: list[str] = Field(description="Scopes of the key.")
    uploads_to_hub: bool = Field(
        description="Whether the service allows exports to be uploaded to any repository of the Hugging Face Hub."
    )


class SignedOut(BaseModel):
    """Confirmation that a browser session has ended."""

    object: Literal["browser_session"] = "browser_session"
    deleted: Deleted = True


def browser_session(caller: Caller, settings: Settings) -> BrowserSession:
    return BrowserSession(
        project_id=caller.project_id,
        project=caller.project_name,
        key_name=caller.name,
        is_operator=caller.is_operator,
        scopes=sorted(caller.scopes),
        uploads_to_hub=bool(settings.named_hub_repositories()),
    )


def sign_in_preview(caller: Caller, *, expires_at: float) -> SignInPreview:
    return SignInPreview(
        project_id=caller.project_id,
        project=caller.project_name,
        key_name=caller.name,
        is_operator=caller.is_operator,
        expires_at=int(expires_at),
    )
