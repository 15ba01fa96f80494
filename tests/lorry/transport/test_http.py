"""Requests: repetition, errors, and what never leaves this machine."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from lorry import ConnectionFailed, InvalidRequest, Lorry, NotFound, ServerFailed
from lorry.errors import APIError, AuthenticationFailed, Conflict, LorryError
from lorry.transport.http import Transport
from lorry.transport.retries import RetryPolicy
from tests.lorry.scripted_server import Reply, Script

BUSY = Reply(status=503, headers={"retry-after": "3"}, body={"error": {"message": "Busy.", "code": "unavailable"}})


def test_a_busy_service_is_asked_again_when_it_says(service: Script, client: Lorry, slept: list[float]) -> None:
    service.on("GET", "/v1/queue", BUSY, BUSY, {"object": "queue"})

    assert client.queue.get() == {"object": "queue"}
    assert slept == [3.0, 3.0]
    assert [r.headers["x-stainless-retry-count"] for r in service.seen] == ["0", "1", "2"]


def test_after_enough_repetitions_the_error_is_raised(service: Script, client: Lorry, slept: list[float]) -> None:
    service.on("GET", "/v1/queue", BUSY)

    with pytest.raises(ServerFailed, match="Busy") as failed:
        client.queue.get()

    assert failed.value.status == 503
    assert failed.value.code == "unavailable"
    assert len(slept) == 4


def test_a_conflict_is_final_unless_the_service_says_otherwise(service: Script, client: Lorry) -> None:
    service.on(
        "POST", "/v1/fine_tuning/jobs/a/cancel", Reply(status=409, body={"error": {"message": "Done.", "code": "c"}})
    )
    again = Reply(status=409, headers={"x-should-retry": "true"}, body={})
    service.on("POST", "/v1/fine_tuning/jobs/b/cancel", again, {"id": "b", "status": "cancelled"})

    with pytest.raises(Conflict, match="Done"):
        client.jobs.cancel("a")

    assert client.jobs.cancel("b").status == "cancelled"


def test_a_service_that_is_not_there_is_a_sentence(slept: list[float]) -> None:
    with (
        Lorry("http://127.0.0.1:9", "k", sleep=slept.append) as lorry,
        pytest.raises(ConnectionFailed, match="does not answer") as failed,
    ):
        lorry.queue.get()

    assert "lorry up" in failed.value.remedy
    assert slept == []


def refused(_request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused") from ConnectionRefusedError()


def timed_out(_request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectTimeout("late")


@pytest.mark.parametrize(
    ("url", "answer", "num_retries"),
    [
        ("http://localhost:1", refused, 0),
        ("http://lorry.example", refused, 4),  # what is before it may be starting again
        ("http://localhost:1", timed_out, 4),
    ],
)
def test_only_a_refusal_of_this_machine_is_told_at_once(
    slept: list[float], url: str, answer: Callable[[httpx.Request], httpx.Response], num_retries: int
) -> None:
    with (
        Lorry(url, "k", sleep=slept.append, transport=httpx.MockTransport(answer)) as lorry,
        pytest.raises(ConnectionFailed),
    ):
        lorry.queue.get()

    assert len(slept) == num_retries


def test_a_local_service_that_starts_again_is_waited_for(slept: list[float]) -> None:
    answers = iter([httpx.Response(200, json={}), None, httpx.Response(200, json={"ok": True})])

    def answer(request: httpx.Request) -> httpx.Response:
        return next(answers) or refused(request)

    with Lorry("http://127.0.0.1:1", "k", sleep=slept.append, transport=httpx.MockTransport(answer)) as lorry:
        lorry.queue.get()
        assert lorry.queue.get() == {"ok": True}

    assert len(slept) == 1


def test_a_broken_connection_is_tried_again(slept: list[float]) -> None:
    answers = iter([httpx.ReadError("reset"), httpx.Response(200, json={"ok": True})])

    def answer(request: httpx.Request) -> httpx.Response:
        next_one = next(answers)
        if isinstance(next_one, Exception):
            raise next_one
        return next_one

    with Lorry("http://127.0.0.1:1", "k", sleep=slept.append, transport=httpx.MockTransport(answer)) as lorry:
        assert lorry.queue.get() == {"ok": True}

    assert len(slept) == 1


def test_every_field_of_an_error_is_kept(service: Script, client: Lorry) -> None:
    wire = {
        "message": "'rank' is 0. Make it 1.",
        "remedy": "Make it 1.",
        "type": "invalid_request_error",
        "param": "lora.rank",
        "code": "bad",
    }
    service.on("GET", "/v1/queue", Reply(status=400, headers={"x-request-id": "r1"}, body={"error": wire}))

    with pytest.raises(InvalidRequest) as failed:
        client.queue.get()

    error = failed.value
    assert (error.status, error.code, error.param, error.type) == (400, "bad", "lora.rank", "invalid_request_error")
    assert (error.request_id, error.remedy) == ("r1", "Make it 1.")
    assert error.sentence() == wire["message"]


@pytest.mark.parametrize(
    "body", [b"", b"<html>Bad Gateway</html>", b"[]", b'{"error": "x"}', b'{"detail": "x"}', b"\xff"]
)
def test_an_error_of_another_shape_is_still_a_sentence(service: Script, client: Lorry, body: bytes) -> None:
    service.on("GET", "/v1/queue", Reply(status=404, body=body))

    with pytest.raises(NotFound, match="404") as failed:
        client.queue.get()

    assert failed.value.remedy


def test_an_answer_that_is_not_json_is_not_lorry(service: Script, client: Lorry) -> None:
    service.on("GET", "/v1/queue", Reply(body=b"<html>"))

    with pytest.raises(APIError, match="not Lorry"):
        client.queue.get()


def test_an_unauthorized_answer_says_where_the_key_comes_from(service: Script, client: Lorry) -> None:
    service.on("GET", "/v1/queue", Reply(status=401, body=b""))

    with pytest.raises(AuthenticationFailed) as failed:
        client.queue.get()

    assert "LORRY_API_KEY" in failed.value.remedy


def test_the_key_follows_no_redirect(service: Script, client: Lorry) -> None:
    service.on("GET", "/v1/queue", Reply(status=302, headers={"location": "http://127.0.0.1:9/"}, body=b""))

    with pytest.raises(LorryError):
        client.queue.get()

    assert len(service.seen) == 1


def test_no_proxy_of_the_environment_is_asked_for_a_local_service(
    monkeypatch: pytest.MonkeyPatch, service: Script, client: Lorry
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    service.on("GET", "/v1/queue", {})

    with Lorry(service.url, "k") as lorry:
        assert lorry.queue.get() == {}


def test_a_body_that_breaks_off_is_an_error(service: Script, client: Lorry) -> None:
    service.on("GET", "/v1/files/f/content", Reply(body=b"half", cut=True))

    with pytest.raises(ConnectionFailed):
        list(client.files.content("f"))


def test_no_retry_policy_means_no_repetition(service: Script, slept: list[float]) -> None:
    service.on("GET", "/v1/queue", BUSY)
    from lorry.connection import Connection

    connection = Connection(url=service.url, api_key=None)
    transport = Transport(connection, retries=RetryPolicy(max_retries=0), sleep=slept.append)

    with pytest.raises(ServerFailed):
        transport.get("queue")

    transport.close()
    assert slept == []
    assert "authorization" not in service.seen[0].headers
