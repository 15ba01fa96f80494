"""The audit log: who changed what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lorry.accounts import AuditEvent, AuditMisfit, AuditVerification
from lorry.resources import pages
from lorry.transport import Transport


class Audit:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(
        self,
        *,
        types: Sequence[str] = (),
        actor_ids: Sequence[str] = (),
        project_ids: Sequence[str] = (),
        since: float | None = None,
        until: float | None = None,
    ) -> Iterator[AuditEvent]:
        """Newest first: of your project, and for operators of all. Times are seconds since 1970."""
        params = {
            "event_types[]": list(types) or None,
            "actor_ids[]": list(actor_ids) or None,
            "project_ids[]": list(project_ids) or None,
            "effective_at[gte]": since,
            "effective_at[lte]": until,
        }
        return (AuditEvent.of(wire) for wire in pages.follow(self._transport, "audit_events", params=params))

    def verify(self, *, head: tuple[int, str] | None = None) -> AuditVerification:
        """For operators: have the whole chain computed anew, up to the first event that doesn't fit.

        head: a place and its digest that were noted before, which must be in the chain still.
        """
        if head is not None and (lost := self._lost(*head)):
            return lost
        number, last = 0, 0
        while True:
            found = AuditVerification.of(self._transport.get("audit_events/verify", {"after": last}))
            number, last = number + found.num_events, found.last_link
            if not found.has_more:
                return replace(found, num_events=number)

    def export(self) -> Iterator[dict[str, Any]]:
        """For operators: every sealed event in the order of the chain. `lorry.audit_chain.check` looks at them."""
        with self._transport.stream("audit_events/export", headers={"accept": "application/jsonl"}) as response:
            for line in response.iter_lines():
                yield json.loads(line)

    def _lost(self, link: int, digest: str) -> AuditVerification | None:
        """What says so where the chain has another digest at that place, or doesn't reach it."""
        found = AuditVerification.of(self._transport.get("audit_events/verify", {"after": link - 1, "limit": 1}))
        if found.misfit is None and (found.last_link, found.last_digest) == (link, digest):
            return None
        fault = "changed" if found.last_link == link else "missing"
        return replace(found, is_sound=False, misfit=found.misfit or AuditMisfit(link=link, id=None, fault=fault))
