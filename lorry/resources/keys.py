"""API keys and projects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal
from urllib.parse import quote
from uuid import uuid4

from lorry.models.accounts import ApiKey, Project, ProjectLimit, RevokedKey
from lorry.requests import Priority
from lorry.resources import pages
from lorry.transport.http import Transport


class Keys:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        name: str,
        *,
        scopes: Sequence[str] | None = None,
        expires_at: int | None = None,
        is_operator: bool = False,
        project: str | None = None,
        highest_priority: Priority | None = None,
    ) -> ApiKey:
        """A key whose `value` is told this once. It can't have more than the key that asks.

        scopes: what it may do, such as "jobs:write"; None: all that yours can give. expires_at: seconds since 1970.
        project: by id or name, another than yours for operators. highest_priority: of its jobs, for operators; None:
        "normal".
        """
        body: dict[str, Any] = {"name": name, "is_operator": is_operator}
        given = {"scopes": None if scopes is None else list(scopes), "expires_at": expires_at, "project": project}
        given |= {"highest_priority": highest_priority}
        body |= {field: value for field, value in given.items() if value is not None}
        # If the response is lost, the automatic retry creates no second key: it fails and names the first one.
        once = {"idempotency-key": str(uuid4())}
        return ApiKey.of(self._transport.request("POST", "api_keys", body=body, headers=once))

    def list(self, *, project: str | None = None) -> Iterator[ApiKey]:
        """Newest first, those that open nothing any more too."""
        return (ApiKey.of(wire) for wire in pages.follow(self._transport, "api_keys", params={"project": project}))

    def get(self, key_id: str) -> ApiKey:
        return ApiKey.of(self._transport.get(_key(key_id)))

    def revoke(self, key_id: str, *, cancel: bool = False, with_descendants: bool = False) -> RevokedKey:
        """The key is not valid any more. Its sweeps create no more trials; its jobs continue.

        cancel: cancel its unfinished jobs and sweeps. with_descendants: also revoke the keys that it created, and those
        that these created, and so on. A call that was interrupted can be repeated.
        """
        body = {"cancel": cancel, "with_descendants": with_descendants}
        given = {name: True for name, is_asked in body.items() if is_asked}
        return RevokedKey.of(self._transport.request("POST", f"{_key(key_id)}/revoke", body=given or None))

    def rotate(self, key_id: str, *, overlap_seconds: int | None = None, expires_at: int | None = None) -> ApiKey:
        """A key with the same name and rights, whose `value` is told this once. The old one is good for
        `overlap_seconds` more: a day where nothing is said."""
        given = {"overlap_seconds": overlap_seconds, "expires_at": expires_at}
        body = {field: value for field, value in given.items() if value is not None}
        return ApiKey.of(self._transport.request("POST", f"{_key(key_id)}/rotate", body=body))

    def limit(
        self,
        key_id: str,
        *,
        requests_per_minute: int | Literal["service"] | None = None,
        jobs_per_day: int | Literal["service"] | None = None,
        highest_priority: Priority | None = None,
    ) -> ApiKey:
        """For operators: how often the key may ask, how many jobs it may create, and their highest priority.

        None: as it was; "service": as the service says; 0: without limit.
        """
        asked = {"requests_per_minute": requests_per_minute, "jobs_per_day": jobs_per_day}
        asked |= {"highest_priority": highest_priority}
        body = {name: None if value == "service" else value for name, value in asked.items() if value is not None}
        return ApiKey.of(self._transport.request("POST", f"{_key(key_id)}/limits", body=body))


class Projects:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, name: str, *, organization: str | None = None) -> Project:
        """For operators. organization: whose it is, by id or by name; None: yours."""
        body = {"name": name} if organization is None else {"name": name, "organization": organization}
        return Project.of(self._transport.request("POST", "projects", body=body))

    def list(self, *, archived: bool = False) -> Iterator[Project]:
        """Yours, and for operators all. archived: those that were put away, too."""
        params = {"archived": "true" if archived else None}
        return (Project.of(wire) for wire in pages.follow(self._transport, "projects", params=params))

    def get(self, project: str) -> Project:
        """By id or by name."""
        return Project.of(self._transport.get(_project(project)))

    def rename(self, project: str, name: str) -> Project:
        """For operators."""
        return Project.of(self._transport.request("POST", _project(project), body={"name": name}))

    def weigh(self, project: str, weight: float) -> Project:
        """For operators: its part of the devices, beside the weights of others whose jobs wait."""
        return Project.of(self._transport.request("POST", f"{_project(project)}/weight", body={"weight": weight}))

    def limits(self, project: str) -> dict[str, ProjectLimit]:
        """What it may use at most and what it has used, by the names that `limit` takes."""
        return _limits(self._transport.get(f"{_project(project)}/limits"))

    def limit(
        self,
        project: str,
        *,
        concurrent_jobs: int | Literal["none"] | None = None,
        queued_jobs: int | Literal["none"] | None = None,
        jobs_per_day: int | Literal["none"] | None = None,
        device_hours_per_month: float | Literal["none"] | None = None,
        stored_bytes: int | Literal["none"] | None = None,
        plans_per_day: int | Literal["none"] | None = None,
        highest_priority: Priority | None = None,
    ) -> dict[str, ProjectLimit]:
        """For operators. None: as it was; "none": without limit. highest_priority: of its jobs; `get` shows it."""
        asked = {
            "concurrent_jobs": concurrent_jobs,
            "queued_jobs": queued_jobs,
            "jobs_per_day": jobs_per_day,
            "device_hours_per_month": device_hours_per_month,
            "stored_bytes": stored_bytes,
            "plans_per_day": plans_per_day,
            "highest_priority": highest_priority,
        }
        body = {name: None if value == "none" else value for name, value in asked.items() if value is not None}
        return _limits(self._transport.request("POST", f"{_project(project)}/limits", body=body))

    def archive(self, project: str) -> Project:
        """For operators: its keys open nothing from now on; what it has stays."""
        return Project.of(self._transport.request("POST", f"{_project(project)}/archive"))

    def restore(self, project: str) -> Project:
        """For operators: its keys open it again."""
        return Project.of(self._transport.request("POST", f"{_project(project)}/restore"))


def _limits(wire: dict[str, Any]) -> dict[str, ProjectLimit]:
    return {limit.name: limit for limit in map(ProjectLimit.of, wire.get("limits") or ())}


def _key(key_id: str) -> str:
    return f"api_keys/{quote(key_id, safe='')}"


def _project(project: str) -> str:
    return f"projects/{quote(project, safe='')}"
