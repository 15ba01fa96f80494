"""API keys and projects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal
from urllib.parse import quote
from uuid import uuid4

from lorry.models import ApiKey, Project, ProjectLimit, RevokedKey
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
        """Create a key. Only this response contains its secret, `value`. It can't have more rights than your key.

        `scopes`: for example "jobs:write"; None: all that your key can grant. `expires_at`: Unix time. `project`: id
        or name; other projects require an operator key. `highest_priority`: of its jobs; None: "normal". Other values
        require an operator key.
        """
        body: dict[str, Any] = {"name": name, "is_operator": is_operator}
        given = {"scopes": None if scopes is None else list(scopes), "expires_at": expires_at, "project": project}
        given |= {"highest_priority": highest_priority}
        body |= {field: value for field, value in given.items() if value is not None}
        # If the response is lost, the automatic retry creates no second key: it fails and names the first one.
        once = {"idempotency-key": str(uuid4())}
        return ApiKey.of(self._transport.request("POST", "api_keys", body=body, headers=once))

    def list(self, *, project: str | None = None) -> Iterator[ApiKey]:
        """Yield keys, newest first, including revoked and expired ones."""
        return (ApiKey.of(item) for item in pages.follow(self._transport, "api_keys", params={"project": project}))

    def get(self, key_id: str) -> ApiKey:
        return ApiKey.of(self._transport.get(_key(key_id)))

    def revoke(self, key_id: str, *, cancel: bool = False, with_descendants: bool = False) -> RevokedKey:
        """Revoke the key immediately. Its sweeps create no more trials; its jobs continue.

        `cancel`: cancel its unfinished work. `with_descendants`: also revoke the keys that it created,
        directly or indirectly. An interrupted call can be repeated.
        """
        body = {"cancel": cancel, "with_descendants": with_descendants}
        given = {name: True for name, is_asked in body.items() if is_asked}
        return RevokedKey.of(self._transport.request("POST", f"{_key(key_id)}/revoke", body=given or None))

    def rotate(self, key_id: str, *, overlap_seconds: int | None = None, expires_at: int | None = None) -> ApiKey:
        """Create a key with the same name and rights. Only this response contains its secret, `value`. The old key
        stays valid for `overlap_seconds` (default: one day)."""
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
        """Set the key's rate limit, its daily number of jobs, and the highest priority of its jobs. Requires an
        operator key.

        None: unchanged; "service": the service's limit; 0: no limit.
        """
        limits = {"requests_per_minute": requests_per_minute, "jobs_per_day": jobs_per_day}
        limits |= {"highest_priority": highest_priority}
        body = {name: None if value == "service" else value for name, value in limits.items() if value is not None}
        return ApiKey.of(self._transport.request("POST", f"{_key(key_id)}/limits", body=body))


class Projects:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, name: str, *, organization: str | None = None) -> Project:
        """Create a project. `organization`: id or name; None: yours. Requires an operator key."""
        body = {"name": name} if organization is None else {"name": name, "organization": organization}
        return Project.of(self._transport.request("POST", "projects", body=body))

    def list(self, *, archived: bool = False) -> Iterator[Project]:
        """Yield the key's project, or all projects with an operator key. `archived`: include archived projects."""
        params = {"archived": "true" if archived else None}
        return (Project.of(item) for item in pages.follow(self._transport, "projects", params=params))

    def get(self, project: str) -> Project:
        """Return a project by id or name."""
        return Project.of(self._transport.get(_project(project)))

    def rename(self, project: str, name: str) -> Project:
        """Rename a project. Requires an operator key."""
        return Project.of(self._transport.request("POST", _project(project), body={"name": name}))

    def weigh(self, project: str, weight: float) -> Project:
        """Set the fair-share weight relative to other projects with waiting jobs. Requires an operator key."""
        return Project.of(self._transport.request("POST", f"{_project(project)}/weight", body={"weight": weight}))

    def limits(self, project: str) -> dict[str, ProjectLimit]:
        """Return the project's quotas and usage, by the names of the arguments of `limit`."""
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
        tokens_per_day: int | Literal["none"] | None = None,
        highest_priority: Priority | None = None,
    ) -> dict[str, ProjectLimit]:
        """Set quotas. None: unchanged; "none": no limit. `highest_priority`: of its jobs, shown by `get`. Requires an
        operator key."""
        limits = {
            "concurrent_jobs": concurrent_jobs,
            "queued_jobs": queued_jobs,
            "jobs_per_day": jobs_per_day,
            "device_hours_per_month": device_hours_per_month,
            "stored_bytes": stored_bytes,
            "plans_per_day": plans_per_day,
            "tokens_per_day": tokens_per_day,
            "highest_priority": highest_priority,
        }
        body = {name: None if value == "none" else value for name, value in limits.items() if value is not None}
        return _limits(self._transport.request("POST", f"{_project(project)}/limits", body=body))

    def archive(self, project: str) -> Project:
        """Archive a project: its keys are no longer valid; its data stays. Requires an operator key."""
        return Project.of(self._transport.request("POST", f"{_project(project)}/archive"))

    def restore(self, project: str) -> Project:
        """Restore a project: its keys are valid again. Requires an operator key."""
        return Project.of(self._transport.request("POST", f"{_project(project)}/restore"))


def _limits(project: dict[str, Any]) -> dict[str, ProjectLimit]:
    return {limit.name: limit for limit in map(ProjectLimit.of, project.get("limits") or ())}


def _key(key_id: str) -> str:
    return f"api_keys/{quote(key_id, safe='')}"


def _project(project: str) -> str:
    return f"projects/{quote(project, safe='')}"
