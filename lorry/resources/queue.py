"""The queue and the workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lorry.models import Worker
from lorry.resources.resource import Resource
from lorry.transport import sse


class Queue(Resource):
    def get(self, *, all_projects: bool = False) -> dict[str, Any]:
        """Return running and queued jobs in scheduling order."""
        return self._transport.get("queue", {"all": "true" if all_projects else None})

    def stream(self) -> Iterator[dict[str, Any]]:
        """Yield a snapshot after each change, until the service ends the stream."""
        with self._transport.stream("queue/stream", headers={"accept": "text/event-stream"}) as response:
            for event in sse.parse(response.iter_bytes(), url=str(response.url)):
                yield json.loads(event.data)


class Workers(Resource):
    def list(self) -> Iterator[Worker]:
        return self._items(Worker, "workers")

    def cordon(self, worker_id: str, *, reason: str | None = None) -> Worker:
        """Cordon a worker: it finishes its jobs and claims no new ones. A replacement on the same host and devices
        inherits the cordon. Requires an operator key."""
        return self._post(Worker, "workers", worker_id, "cordon", body={"reason": reason} if reason else {})

    def uncordon(self, worker_id: str) -> Worker:
        """Uncordon a worker, so that it claims jobs again. Requires an operator key."""
        return self._post(Worker, "workers", worker_id, "uncordon")

    def drain(self, worker_id: str) -> Worker:
        """Drain a worker: it saves and releases its jobs, and exits. A replacement on the same host and devices is
        cordoned. Requires an operator key."""
        return self._post(Worker, "workers", worker_id, "drain")
