"""Workers send answers over their own connection. Only the claim that holds a request may answer it."""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import ExitStack
from typing import Any

import openai
import pytest

from api.deps import Services
from api.inference import replies
from catalog.tables.inference import MAX_CLAIMS, InferenceRequest
from tests.api.inference.reply_service import (
    CHAT,
    background,
    claimed,
    is_answered_by,
    open_requests,
    post,
    send,
    texts,
)
from tests.api.site import Site, connect, read_to_end, until
from tests.catalog.world import World
from worker.session.reply_connections import ReplyConnections

pytestmark = pytest.mark.usefixtures("worker")


def test_answer_of_the_claim_reaches_the_client(site: Site, services: Services, connections: ReplyConnections) -> None:
    response = background(lambda: post(site, CHAT))
    claim = claimed(services)

    send(connections, claim, {"type": "answering", "prompt_tokens": 99}, claim_id="answer-of-another")
    send(connections, claim, *texts("Hel", "lo"))

    body = response.result(30).json()
    assert body["choices"][0]["message"]["content"] == "Hello"
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert claim.body is not None
    assert claim.body["messages"] == CHAT["messages"]
    until(lambda: open_requests(services) == 0)


def test_tools_that_the_template_does_not_render_are_refused_without_a_worker(
    site: Site, services: Services, world: World
) -> None:
    world.base("plain", renders_tools=False)
    tools = [{"type": "function", "function": {"name": "paint", "parameters": {}}}]

    response = post(site, {**CHAT, "model": "plain", "tools": tools})

    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "template_without_tools", "tools")
    assert "--chat-template" in error["message"]
    assert open_requests(services) == 0


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


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ECONNRESET])
def test_request_of_a_worker_whose_machine_is_lost_is_released(
    site: Site, services: Services, connections: ReplyConnections, number: int
) -> None:
    """The system reports an error to the event loop, which gives it to the protocol."""
    response = background(lambda: post(site, CHAT))
    claim = claimed(services)
    send(connections, claim, *texts("Hel", "lo")[:2])
    until(lambda: is_answered_by(services, claim))
    (writer,) = services.replies._connections  # pyright: ignore[reportPrivateUsage]
    watching = services.replies._watching  # pyright: ignore[reportPrivateUsage]
    assert watching is not None

    lose = writer.transport.get_protocol().connection_lost
    watching.get_loop().call_soon_threadsafe(lose, OSError(number, os.strerror(number)))

    again = claimed(services)
    other = ReplyConnections()
    send(other, again, *texts("H", "ello"))
    assert response.result(30).json()["choices"][0]["message"]["content"] == "Hello"
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


@pytest.mark.parametrize(
    ("code", "num_requests"), [("logits_not_finite", 1), ("unsupported_adapter", 1), ("disk_error", 2)]
)
def test_openai_client_repeats_only_errors_that_another_worker_may_not_have(
    site: Site, services: Services, connections: ReplyConnections, code: str, num_requests: int
) -> None:
    client = openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key, max_retries=1)
    messages: Any = CHAT["messages"]
    failing = background(lambda: client.chat.completions.create(model="smol", messages=messages))
    error = {"code": code, "message": "It fails.", "remedy": "Change it."}

    for _ in range(num_requests):
        send(connections, claimed(services), {"type": "unanswered", "error": error})

    raised = failing.exception(60)
    assert isinstance(raised, openai.APIStatusError)
    assert (raised.status_code, raised.code) == (503, code)


def test_error_of_a_text_completion_names_its_prompt(
    site: Site, services: Services, connections: ReplyConnections
) -> None:
    response = background(lambda: post(site, {"model": "smol", "prompt": "Hi"}, "/v1/completions"))
    claim = claimed(services)
    error = {"code": "context_length_exceeded", "message": "It is too long.", "remedy": "Shorten it."}

    send(connections, claim, {"type": "unanswered", "error": error})

    found = response.result(30)
    assert (found.status_code, found.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("line", [b"not JSON\n", b"[]\n", b'{"request_id": 1}\n', b"\xff\xfe\n", b"GET / HTTP/1.1\r\n"])
def test_connection_that_sends_no_answers_is_closed(site: Site, services: Services, line: bytes) -> None:
    token, place = address_of(services)
    with socket.create_connection(place, timeout=30) as connection:
        connection.sendall(token + b"\n" + line)
        assert is_closed(connection)


def address_of(services: Services) -> tuple[bytes, tuple[str, int]]:
    """Return the token, and the address of the port."""
    token, _, place = services.replies.address.partition("@")
    host, _, port = place.rpartition(":")
    return token.encode(), (host, int(port))


def is_closed(connection: socket.socket) -> bool:
    """Wait until the peer closes the connection."""
    try:
        return connection.recv(10) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", b"x" * 10, b"0" * 32 + b"\n", b"GET / HTTP/1.1\r\n" * 4])
def test_connection_without_the_token_is_closed_soon(
    site: Site, services: Services, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(replies, "TOKEN_SECONDS", 0.2)
    with socket.create_connection(address_of(services)[1], timeout=30) as connection:
        connection.sendall(sent)
        assert is_closed(connection)


def test_connections_without_the_token_take_no_place_of_a_worker(
    site: Site, services: Services, connections: ReplyConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(replies, "MAX_STRANGERS", 2)
    monkeypatch.setattr(replies, "TOKEN_SECONDS", 600.0)
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address_of(services)[1], timeout=30)) for _ in range(3)]
        assert is_closed(silent[0])
        response = background(lambda: post(site, CHAT))

        send(connections, claimed(services), *texts("Hi"))

        assert response.result(30).status_code == 200
        assert is_closed(silent[1])
        silent[2].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[2].recv(10)


def test_number_of_workers_is_limited(site: Site, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "MAX_CONNECTIONS", 1)
    token, place = address_of(services)
    with socket.create_connection(place, timeout=30) as first, socket.create_connection(place, timeout=30) as second:
        first.sendall(token + b"\n")
        until(lambda: services.replies._connections)  # pyright: ignore[reportPrivateUsage]
        second.sendall(token + b"\n")
        assert is_closed(second)


def test_port_listens_on_the_loopback_address_only(site: Site, services: Services) -> None:
    server = services.replies._server  # pyright: ignore[reportPrivateUsage]
    assert server is not None
    assert {listening.getsockname()[0] for listening in server.sockets} == {"127.0.0.1"}
    assert address_of(services)[1][0] == "127.0.0.1"


def test_answer_that_is_too_large_fails_and_is_stopped(
    site: Site, services: Services, connections: ReplyConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.inference.answer.MAX_KEPT_BYTES", 2000)
    token = {"token": "x", "logprob": -1.0, "bytes": [120]}
    body = {**CHAT, "logprobs": True, "top_logprobs": 20}
    response = background(lambda: post(site, body))
    claim = claimed(services)
    piece = {"index": 0, "text": "x", "logprobs": [{**token, "top_logprobs": [token] * 20}]}
    stopped: set[str] = set()

    def is_stopped() -> bool:
        send(connections, claim, {"type": "generated", "deltas": [piece], "completion_tokens": 3})
        stopped.update(connections.stopped())
        return claim.request_id in stopped

    send(connections, claim, {"type": "answering", "prompt_tokens": 1})
    until(is_stopped)

    error = response.result(30).json()["error"]
    assert (response.result().status_code, error["code"], error["param"]) == (400, "answer_too_large", "logprobs")
    assert "number of log-probabilities" in error["message"]


@pytest.mark.parametrize("leaves", [True, False])
def test_client_that_never_reads_is_abandoned(
    site: Site, services: Services, connections: ReplyConnections, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """Its request ends, even if the client stays connected."""
    monkeypatch.setattr("api.routes.inference.SEND_SECONDS", 600.0 if leaves else 0.5)
    monkeypatch.setattr(replies, "CATCH_UP_SECONDS", 0.0)
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
        if not leaves:
            until(lambda: open_requests(services) == 0)
            return
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
