"""For tests of answers: clients, and workers that claim requests and send events."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from api.deps import Services
from catalog.inference import claims
from catalog.inference.claims import InferenceClaim
from catalog.resources.pack_key import pack_key
from catalog.tables.inference import InferenceRequest
from tests.api.site import Site, until
from tests.catalog.world import LEASE, sha
from worker.session.reply_connections import ReplyConnections

CHAT = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}]}


def post(site: Site, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
    with site.http() as http:
        return http.post(path, json=body, timeout=60)


def claimed(services: Services) -> InferenceClaim:
    """Wait for a request, and claim it."""
    found: list[InferenceClaim] = []

    def claim() -> bool:
        key = pack_key(sha("smol"), "bfloat16")
        found.extend(claims.claim(services.db, worker_id="w1", pack_key=key, limit=1, lease_seconds=LEASE))
        return bool(found)

    until(claim)
    return found[0]


def send(connections: ReplyConnections, claim: InferenceClaim, *events: dict[str, Any], claim_id: str = "") -> None:
    for event in events:
        connections.send(claim.reply_to, request_id=claim.request_id, claim_id=claim_id or claim.claim_id, event=event)


def texts(*pieces: str, **last: Any) -> list[dict[str, Any]]:
    """Return the events of a whole answer."""
    deltas = [{"index": 0, "text": piece} for piece in pieces]
    deltas[-1] |= {"finish": "stop", **last}
    return [
        {"type": "answering", "prompt_tokens": 2},
        *({"type": "generated", "deltas": [delta]} for delta in deltas),
        {"type": "answered", "completion_tokens": len(pieces)},
    ]


def open_requests(services: Services) -> int:
    with services.db.read() as session:
        return session.query(InferenceRequest).count()


def background(act: Callable[[], Any]) -> Any:
    """Run `act` in a thread. Returns its future."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(act)
    pool.shutdown(wait=False)
    return future


def is_answered_by(services: Services, claim: InferenceClaim) -> bool:
    reply = services.replies._open.get(claim.request_id)  # pyright: ignore[reportPrivateUsage]
    return reply is not None and reply.claim_id == claim.claim_id
