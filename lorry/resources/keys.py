"""API keys and projects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lorry.models import ApiKey, Project, ProjectLimit, RevokedKey
from lorry.requests import Priority
from lorry.resources.resource import Resource, given, new_key, url

_KEYS, _PROJECTS = "api_keys", "projects"


class Keys(Resource):
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
        body = given(
            name=name,
            is_operator=is_operator,
            scopes=None if scopes is None else list(scopes),
            expires_at=expires_at,
            project=project,
            highest_priority=highest_priority,
        )
        # If the response is lost, the automatic retry creates no second key: it fails and names the first one.
        return self._post(ApiKey, _KEYS, body=body, key=new_key())

    def list(self, *, project: str | None = None) -> Iterator[ApiKey]:
        """Yield keys, newest first, including revoked and expired ones."""
        return self._list(ApiKey, _KEYS, params={"project": project})

    def get(self, key_id: str) -> ApiKey:
        return self._get(ApiKey, _KEYS, key_id)

    def revoke(self, key_id: str, *, cancel: bool = False, with_descendants: bool = False) -> RevokedKey:
        """Revoke the key immediately. Its sweeps create no more trials; its jobs continue.

        `cancel`: cancel its unfinished work. `with_descendants`: also revoke the keys that it created,
        directly or indirectly. An interrupted call can be repeated.
        """
        body = given(cancel=cancel or None, with_descendants=with_descendants or None)
        return self._post(RevokedKey, _KEYS, key_id, "revoke", body=body or None)

    def rotate(self, key_id: str, *, overlap_seconds: int | None = None, expires_at: int | None = None) -> ApiKey:
        """Create a key with the same name and rights. Only this response contains its secret, `value`. The old key
        stays valid for `overlap_seconds` (default: one day)."""
        body = given(overlap_seconds=overlap_seconds, expires_at=expires_at)
        return self._post(ApiKey, _KEYS, key_id, "rotate", body=body)

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
        limits = given(
            requests_per_minute=requests_per_minute, jobs_per_day=jobs_per_day, highest_priority=highest_priority
        )
        body = {name: None if value == "service" else value for name, value in limits.items()}
        return self._post(ApiKey, _KEYS, key_id, "limits", body=body)


class Projects(Resource):
    def create(self, name: str, *, organization: str | None = None) -> Project:
        """Create a project. `organization`: id or name; None: yours. Requires an operator key."""
        return self._post(Project, _PROJECTS, body=given(name=name, organization=organization))

    def list(self, *, archived: bool = False) -> Iterator[Project]:
        """Yield the key's project, or all projects with an operator key. `archived`: include archived projects."""
        return self._list(Project, _PROJECTS, params={"archived": "true" if archived else None})

    def get(self, project: str) -> Project:
        """Return a project by id or name."""
        return self._get(Project, _PROJECTS, project)

    def rename(self, project: str, name: str) -> Project:
        """Rename a project. Requires an operator key."""
        return self._post(Project, _PROJECTS, project, body={"name": name})

    def weigh(self, project: str, weight: float) -> Project:
        """Set the fair-share weight relative to other projects with waiting jobs. Requires an operator key."""
        return self._post(Project, _PROJECTS, project, "weight", body={"weight": weight})

    def limits(self, project: str) -> dict[str, ProjectLimit]:
        """Return the project's quotas and usage, by the names of the arguments of `limit`."""
        return _limits(self._transport.get(url(_PROJECTS, project, "limits")))

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
        limits = given(
            concurrent_jobs=concurrent_jobs,
            queued_jobs=queued_jobs,
            jobs_per_day=jobs_per_day,
            device_hours_per_month=device_hours_per_month,
            stored_bytes=stored_bytes,
            plans_per_day=plans_per_day,
            tokens_per_day=tokens_per_day,
            highest_priority=highest_priority,
        )
        body = {name: None if value == "none" else value for name, value in limits.items()}
        return _limits(self._transport.request("POST", url(_PROJECTS, project, "limits"), body=body))

    def archive(self, project: str) -> Project:
        """Archive a project: its keys are no longer valid; its data stays. Requires an operator key."""
        return self._post(Project, _PROJECTS, project, "archive")

    def restore(self, project: str) -> Project:
        """Restore a project: its keys are valid again. Requires an operator key."""
        return self._post(Project, _PROJECTS, project, "restore")


def _limits(project: dict[str, Any]) -> dict[str, ProjectLimit]:
    return {limit.name: limit for limit in map(ProjectLimit.of, project.get("limits") or ())}
