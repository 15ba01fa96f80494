"""The audit log: changes and their actors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lorry.models import AuditEvent, AuditVerification
from lorry.resources.resource import Resource


class Audit(Resource):
    def list(
        self,
        *,
        types: Sequence[str] = (),
        actor_ids: Sequence[str] = (),
        project_ids: Sequence[str] = (),
        since: float | None = None,
        until: float | None = None,
    ) -> Iterator[AuditEvent]:
        """Yield events, newest first: of the key's project, or of all projects with an operator key. Times are Unix
        times in seconds."""
        params = {
            "event_types[]": list(types) or None,
            "actor_ids[]": list(actor_ids) or None,
            "project_ids[]": list(project_ids) or None,
            "effective_at[gte]": since,
            "effective_at[lte]": until,
        }
        return self._list(AuditEvent, "audit_events", params=params)

    def verify(self) -> AuditVerification:
        """Make the server verify the whole chain and its anchors, up to the first event that does not fit. Requires an
        operator key."""
        number, last = 0, 0
        while True:
            found = AuditVerification.of(self._transport.get("audit_events/verify", {"after": last}))
            number, last = number + found.num_events, found.last_link
            if not found.has_more:
                return replace(found, num_events=number)

    def export(self) -> Iterator[dict[str, Any]]:
        """Yield every sealed event in the order of the chain. Requires an operator key. On the server,
        `python -m api verify-export` verifies a file of these events."""
        with self._transport.stream("audit_events/export", headers={"accept": "application/jsonl"}) as response:
            for line in response.iter_lines():
                yield json.loads(line)
