"""Daily usage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from lorry.models import UsageBucket
from lorry.resources.resource import Resource


class Usage(Resource):
    def list(
        self,
        *,
        start_time: int | None = None,
        end_time: int | None = None,
        group_by: Sequence[Literal["organization_id", "project_id", "model"]] = ("project_id",),
        project_ids: Sequence[str] = (),
        organization_ids: Sequence[str] = (),
        models: Sequence[str] = (),
    ) -> Iterator[UsageBucket]:
        """Yield one bucket per day, earliest first: of the key's project, or of all projects with an operator key.

        Times are Unix times in seconds; days are in UTC. Without `start_time`: the last seven days.
        """
        params: dict[str, str | int | list[str] | None] = {
            "start_time": start_time,
            "end_time": end_time,
            "group_by[]": [*group_by],
            "project_ids[]": list(project_ids) or None,
            "organization_ids[]": list(organization_ids) or None,
            "models[]": list(models) or None,
            "limit": 31,
        }
        page: str | None = None
        while True:
            found = self._transport.get("usage", {**params, "page": page})
            yield from (UsageBucket.of(item) for item in found.get("data") or ())
            page = found.get("next_page")
            if not found.get("has_more") or page is None:
                return
