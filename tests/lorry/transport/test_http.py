"""Requests: retries and their delays, errors, redirects and proxies."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import httpx
import pytest

from lorry import ConnectionFailed, InvalidRequest, Lorry, NotFound, ServerFailed
from lorry.errors import APIError, AuthenticationFailed, Conflict, LorryError
from lorry.transport.http import Transport
from lorry.transport.retries import RetryPolicy, is_retryable
from tests.lorry.scripted_server import Reply, Script

BUSY = Reply(status=503, headers={"retry-after": "3"}, body={"error": {"message": "Busy.", "code": "unavailable"}})


def test_busy_service_is_retried_after_its_retry_after(service: Script, client: Lorry, slept: list[float]) -> None:
    service.on("GET", "/v1/queue", BUSY, BUSY, {"object": "queue"})

    assert client.queue.get() == {"object": "queue"}
    assert slept == [3.0, 3.0]
    assert [r.headers["x-stainless-retry-count"] for r in service.seen] == ["0", "1", "2"]


def test_error_is_raised_after_the_last_retry(service: Script, client: Lorry, slept: list[float]) -> None:
    service.on("GET", "/v1/queue", BUSY)

    with pytest.raises(ServerFailed, match="Busy") as failed:
        client.queue.get()

    assert failed.value.status == 503
    assert failed.value.code == "unavailable"
    assert len(slept) == 4


def test_conflict_is_not_retried_unless_the_service_allows_it(service: Script, client: Lorry) -> None:
    service.on(
        "POST", "/v1/fine_tuning/jobs/a/cancel", Reply(status=409, body={"error": {"message": "Done.", "code": "c"}})
    )
    again = Reply(status=409, headers={"x-should-retry": "true"}, body={})
    service.on("POST", "/v1/fine_tuning/jobs/b/cancel", again, {"id": "b", "status": "cancelled"})

    with pytest.raises(Conflict, match="Done"):
        client.jobs.cancel("a")

    assert client.jobs.cancel("b").status == "cancelled"


def test_unreachable_service_is_a_clear_error(slept: list[float]) -> None:
    with (
        Lorry("http://127.0.0.1:9", "k", sleep=slept.append) as lorry,
        pytest.raises(ConnectionFailed, match="Could not connect") as failed,
    ):
        lorry.queue.get()

    assert "lorry up" in failed.value.remedy
    assert slept == []


@pytest.mark.parametrize(
    ("error", "message", "remedy"),
    [
        (httpx.ReadTimeout("late"), "The connection to the service at http://lorry.test was interrupted: late", "log"),
        (httpx.ReadError("reset"), "The connection to the service at http://lorry.test was interrupted: reset", "log"),
        (httpx.RemoteProtocolError("No response."), r"was interrupted: No response\.$", "log"),
        (httpx.ProxyError("407 Unauthorized"), "The proxy did not connect .*: 407 Unauthorized", "NO_PROXY"),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] x"), "Could not connect to the service", "SSL_CERT_FILE"),
    ],
)
def test_interrupted_and_untrusted_connections_have_their_own_remedy(
    error: httpx.TransportError, message: str, remedy: str
) -> None:
    def fail(_request: httpx.Request) -> httpx.Response:
        raise error

    with (
        Lorry("http://lorry.test", "k", sleep=lambda _: None, transport=httpx.MockTransport(fail)) as lorry,
        pytest.raises(ConnectionFailed, match=message) as failed,
    ):
        lorry.queue.get()

    assert remedy in failed.value.remedy


def refused(_request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused") from ConnectionRefusedError()


def timed_out(_request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectTimeout("late")


@pytest.mark.parametrize(
    ("url", "answer", "num_retries"),
    [
        ("http://localhost:1", refused, 0),
        ("http://lorry.example", refused, 4),  # a proxy in front of it may be restarting
        ("http://localhost:1", timed_out, 4),
    ],
)
def test_only_a_local_connection_refusal_is_not_retried(
    slept: list[float], url: str, answer: Callable[[httpx.Request], httpx.Response], num_retries: int
) -> None:
    with (
        Lorry(url, "k", sleep=slept.append, transport=httpx.MockTransport(answer)) as lorry,
        pytest.raises(ConnectionFailed),
    ):
        lorry.queue.get()

    assert len(slept) == num_retries


@pytest.mark.parametrize("failure", [httpx.ReadError("reset"), httpx.ConnectError("refused")])
def test_restarting_local_service_and_broken_connection_are_retried(
    slept: list[float], failure: httpx.TransportError
) -> None:
    failure.__cause__ = ConnectionRefusedError() if isinstance(failure, httpx.ConnectError) else None
    answers = iter([httpx.Response(200, json={}), failure, httpx.Response(200, json={"ok": True})])

    def answer(_request: httpx.Request) -> httpx.Response:
        next_one = next(answers)
        if isinstance(next_one, Exception):
            raise next_one
        return next_one

    with Lorry("http://127.0.0.1:1", "k", sleep=slept.append, transport=httpx.MockTransport(answer)) as lorry:
        lorry.queue.get()
        assert lorry.queue.get() == {"ok": True}

    assert len(slept) == 1


def test_every_field_of_an_error_is_kept(service: Script, client: Lorry) -> None:
    wire = {
        "message": "'rank' is 0. Make it 1.",
        "remedy": "Make it 1.",
        "type": "invalid_request_error",
        "param": "lora.rank",
        "code": "bad",
        "doc_url": "http://lorry/dashboard/errors.html#bad",
    }
    service.on("GET", "/v1/queue", Reply(status=400, headers={"x-request-id": "r1"}, body={"error": wire}))

    with pytest.raises(InvalidRequest) as failed:
        client.queue.get()

    error = failed.value
    assert (error.status, error.code, error.param, error.type) == (400, "bad", "lora.rank", "invalid_request_error")
    assert (error.request_id, error.remedy, error.doc_url) == ("r1", "Make it 1.", wire["doc_url"])
    assert error.sentence() == wire["message"]


@pytest.mark.parametrize(
    "body", [b"", b"<html>Bad Gateway</html>", b"[]", b'{"error": "x"}', b'{"detail": "x"}', b"\xff"]
)
def test_error_of_unknown_shape_has_a_message_and_remedy(service: Script, client: Lorry, body: bytes) -> None:
    service.on("GET", "/v1/queue", Reply(status=404, body=body))

    with pytest.raises(NotFound, match="404") as failed:
        client.queue.get()

    assert failed.value.remedy


def test_response_without_json_is_reported_as_not_lorry(service: Script, client: Lorry) -> None:
    service.on("GET", "/v1/queue", Reply(body=b"<html>"))

    with pytest.raises(APIError, match="probably not a Lorry server"):
        client.queue.get()


def test_unauthorized_error_names_the_source_of_the_key(service: Script, client: Lorry) -> None:
    service.on("GET", "/v1/queue", Reply(status=401, body=b""))

    with pytest.raises(AuthenticationFailed) as failed:
        client.queue.get()

    assert "LORRY_API_KEY" in failed.value.remedy


def test_key_is_not_sent_to_redirects(service: Script, client: Lorry) -> None:
    service.on("GET", "/v1/queue", Reply(status=302, headers={"location": "http://127.0.0.1:9/"}, body=b""))

    with pytest.raises(LorryError):
        client.queue.get()

    assert len(service.seen) == 1


def test_proxies_of_the_environment_are_ignored_for_local_services(
    monkeypatch: pytest.MonkeyPatch, service: Script, client: Lorry
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    service.on("GET", "/v1/queue", {})

    with Lorry(service.url, "k") as lorry:
        assert lorry.queue.get() == {}


def test_truncated_body_is_an_error(service: Script, client: Lorry) -> None:
    service.on("GET", "/v1/files/f/content", Reply(body=b"half", cut=True))

    with pytest.raises(ConnectionFailed):
        list(client.files.content("f"))


def test_policy_without_retries_does_not_retry(service: Script, slept: list[float]) -> None:
    service.on("GET", "/v1/queue", BUSY)
    from lorry.connection import Connection

    connection = Connection(url=service.url, api_key=None)
    transport = Transport(connection, retries=RetryPolicy(max_retries=0), sleep=slept.append)

    with pytest.raises(ServerFailed):
        transport.get("queue")

    transport.close()
    assert slept == []
    assert "authorization" not in service.seen[0].headers


POLICY = RetryPolicy(uniform=lambda: 0.0, now=lambda: datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 507])
def test_transient_statuses_are_retried(status: int) -> None:
    assert is_retryable(status, {})


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422])
def test_permanent_statuses_are_not_retried(status: int) -> None:
    assert not is_retryable(status, {})


def test_x_should_retry_takes_precedence() -> None:
    assert is_retryable(409, {"x-should-retry": "true"})
    assert not is_retryable(507, {"x-should-retry": "false"})


def test_delay_doubles_up_to_a_limit() -> None:
    assert [POLICY.delay(retry) for retry in range(6)] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert POLICY.delay(10_000) == 8.0


def test_jitter_only_shortens_the_delay() -> None:
    assert RetryPolicy(uniform=lambda: 0.999).delay(0) == pytest.approx(0.375, abs=0.001)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("Thu, 01 Jan 2026 00:00:09 GMT", 9.0),
        ("Wed, 31 Dec 2025 00:00:00 GMT", 0),
    ],
)
def test_retry_after_is_honored(value: str, seconds: float) -> None:
    assert POLICY.delay(3, {"retry-after": value}) == seconds


@pytest.mark.parametrize("value", ["", "soon", "-5", "86400", "nan", "inf", "Thu, 01 Jan 2126 00:00:00 GMT"])
def test_invalid_retry_after_is_ignored(value: str) -> None:
    assert POLICY.delay(0, {"retry-after": value}) == 0.5
