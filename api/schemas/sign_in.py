"""Signing in to the dashboard."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from catalog.keys import Caller
from catalog.strict import Strict


class SignInLink(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "sign_in_link",
                "url": "http://127.0.0.1:8000/sign-in?token=…",
                "expires_at": 1790000900,
            }
        }
    )
    object: Literal["sign_in_link"] = "sign_in_link"
    url: str = Field(description="Opens one browser session, once.")
    expires_at: int


class BrowserSessionRequest(Strict):
    model_config = ConfigDict(json_schema_extra={"example": {"api_key": "lorry_key-…"}})
    api_key: str = Field(min_length=1, max_length=512)


class BrowserSession(BaseModel):
    """Who is signed in."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "browser_session",
                "project_id": "proj-5e1f0a",
                "project": "default",
                "key_name": "first operator key",
                "is_operator": True,
                "scopes": ["jobs:read", "jobs:write"],
            }
        }
    )
    object: Literal["browser_session"] = "browser_session"
    project_id: str
    project: str
    key_name: str
    is_operator: bool
    scopes: list[str] = Field(description="What the key may do.")


class SignedOut(BaseModel):
    object: Literal["browser_session"] = "browser_session"
    deleted: bool = True


def browser_session(caller: Caller) -> BrowserSession:
    return BrowserSession(
        project_id=caller.project_id,
        project=caller.project_name,
        key_name=caller.name,
        is_operator=caller.is_operator,
        scopes=sorted(caller.scopes),
    )
