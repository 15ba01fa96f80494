"""Workers send answers over their own connection. Only the claim that holds a request may answer it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from api.deps import Services
from catalog.inference import claims
from catalog.inference.claims import InferenceClaim
from catalog.resources.pack_key import pack_key
from catalog.tables.inference import MAX_CLAIMS, InferenceRequest
from tests.api.site import Site, connect, read_to_end, until
from tests.catalog.world import LEASE, World, sha
from worker.session.reply_connections import ReplyConnections

CHAT = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(autouse=True)
def worker(world: World) -> None:
    world.worker()


@pytest.fixture
def connections() -> Iterator[ReplyConnections]:
    made = ReplyConnections()
    yield made
    made.close()


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


def test_answer_of_the_claim_reaches_the_client(site: Site, services: Services, connections: ReplyConnections) -> None:
    response = background(lambda: post(site, CHAT))
    claim = claimed(services)

    send(connections, claim, {"type": "answering", "prompt_tokens": 99}, claim_id="answer-of-another")
    send(connections, claim, *texts("Hel", "lo"))

    body = response.result(30).json()
    assert body["choices"][0]["message"]["content"] == "Hello"
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert claim.body["messages"] == CHAT["messages"]
    until(lambda: open_requests(services) == 0)


def test_worker_is_told_to_stop_a_request_that_nobody_waits_for(
    site: Site, services: Services, connections: ReplyConnections
) -> None:
    response = background(lambda: post(site, CHAT))
    claim = claimed(services)
    send(connections, claim, *texts("a"))
    response.result(30)

    send(connections, claim, *texts("again"))

    stopped: set[str] = set()

    def is_stopped() -> bool:
        stopped.update(connections.stopped())
        return claim.request_id in stopped

    until(is_stopped)


def test_request_of_a_lost_worker_is_released_and_answered_by_another(site: Site, services: Services) -> None:
    lost, other = ReplyConnections(), ReplyConnections()
    response = background(lambda: post(site, {**CHAT, "stream": True}))
    claim = claimed(services)
    send(lost, claim, *texts("Hel", "lo")[:2])
    lost.close()

    again = claimed(services)
    send(other, again, *texts("H", "ello"))

    assert again.claim_id != claim.claim_id
    text = response.result(30).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "Hello"
    assert text.endswith("data: [DONE]\n\n")
    other.close()


def test_request_fails_if_too_many_workers_are_lost(site: Site, services: Services) -> None:
    response = background(lambda: post(site, CHAT))
    for _ in range(MAX_CLAIMS):
        lost = ReplyConnections()
        send(lost, claimed(services), *texts("a", "b")[:2])
        lost.close()

    found = response.result(30)

    assert found.status_code == 503
    assert found.json()["error"]["code"] == "inference_failed"


def test_request_fails_if_its_row_was_deleted(site: Site, services: Services) -> None:
    response = background(lambda: post(site, CHAT))
    claimed(services)  # the check of open requests is due within 15 seconds

    with services.db.write() as session:
        session.query(InferenceRequest).delete()

    found = response.result(60)
    assert (found.status_code, found.json()["error"]["code"]) == (503, "inference_failed")


def test_error_after_the_first_chunk_is_sent_in_the_stream(
    site: Site, services: Services, connections: ReplyConnections
) -> None:
    response = background(lambda: post(site, {**CHAT, "stream": True}))
    claim = claimed(services)
    error = {"code": "out_of_memory", "message": "It does not fit.", "remedy": "Send less."}

    send(connections, claim, *texts("a", "b")[:2], {"type": "unanswered", "error": error})

    found = response.result(30)
    assert found.status_code == 200
    last = json.loads(found.text.strip().splitlines()[-1][6:])
    assert last["error"]["code"] == "out_of_memory"
    assert last["error"]["message"] == "It does not fit. Send less."


def test_error_before_the_first_chunk_is_an_error_response(
    site: Site, services: Services, connections: ReplyConnections
) -> None:
    response = background(lambda: post(site, {**CHAT, "stream": True}))
    claim = claimed(services)
    error = {"code": "context_length_exceeded", "message": "It is too long.", "remedy": "Shorten it."}

    send(connections, claim, {"type": "unanswered", "error": error})

    found = response.result(30)
    assert (found.status_code, found.json()["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize("line", [b"not JSON\n", b"[]\n", b'{"request_id": 1}\n', b"\xff\xfe\n", b"GET / HTTP/1.1\r\n"])
def test_connection_that_sends_no_answers_is_closed(site: Site, services: Services, line: bytes) -> None:
    host, _, port = services.replies.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(line)
        assert connection.recv(10) == b""


def test_port_listens_on_the_loopback_address_only(site: Site, services: Services) -> None:
    assert services.replies.address.startswith("127.0.0.1:")


def test_client_that_never_reads_is_abandoned(site: Site, services: Services, connections: ReplyConnections) -> None:
    body = json.dumps({**CHAT, "stream": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {site.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with connect(site) as client:
        client.sendall(head.encode() + body)
        claim = claimed(services)
        piece = {"type": "generated", "deltas": [{"index": 0, "text": "x" * 50_000}]}
        stopped: set[str] = set()

        def is_stopped() -> bool:
            send(connections, claim, piece)
            stopped.update(connections.stopped())
            return claim.request_id in stopped

        send(connections, claim, {"type": "answering", "prompt_tokens": 1})
        until(is_stopped)
        client.sendall(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        received = read_to_end(client)
    assert b"response_not_read" in received
    until(lambda: open_requests(services) == 0)


def test_server_that_stops_closes_the_connections(
    site: Site, services: Services, connections: ReplyConnections
) -> None:
    response = background(lambda: post(site, CHAT))
    claim = claimed(services)
    send(connections, claim, texts("a")[0])

    site.server.should_exit = True

    until(lambda: claim.reply_to in connections.failed())
    assert response.exception(30) is not None or response.result().status_code >= 500
