"""Webhooks from the end of a job to a receiver on loopback, verified by the real openai client."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.app import create_app
from api.deps import Services
from api.settings import ApiSettings
from api.webhooks.http_sender import WebhookSender
from catalog.jobs import commands
from catalog.settings import Settings
from catalog.webhooks import delivery_queue
from catalog.webhooks.delivery_queue import DeliveryResult
from catalog.webhooks.outbox import EVENT_TYPES
from catalog.webhooks.url_policy import OPENED
from tests.api.hook_receiver import WAIT_SECONDS, Answer, Received, Receiver, receiving
from tests.api.site import error_of
from tests.catalog.world import World

HOOKS = "/v1/webhook_endpoints"
ENDS = [name for name in EVENT_TYPES if name.startswith("fine_tuning")]


@pytest.fixture
def hook(client: TestClient, receiver: Receiver) -> dict[str, Any]:
    return made(client, receiver.url)


def made(client: TestClient, url: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(HOOKS, json={"name": "ops", "url": url, "event_types": ENDS, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def end_job(world: World) -> str:
    job = world.submit()
    commands.cancel(world.db, **world.of(job.id))
    return job.id


def unwrap(got: Received, hook: dict[str, Any]) -> Any:
    with openai.OpenAI(api_key="none", webhook_secret=hook["signing_secret"]) as client:
        return client.webhooks.unwrap(got.body, got.headers)


def newest(client: TestClient, hook: dict[str, Any], is_right: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until the newest delivery satisfies `is_right`, and return it."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        found = client.get(f"{HOOKS}/{hook['id']}/deliveries").json()["data"]
        if found and is_right(found[0]):
            return found[0]
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def test_job_event_is_delivered_and_verified_by_the_openai_client(
    client: TestClient, receiver: Receiver, hook: dict[str, Any], world: World
) -> None:
    job_id = end_job(world)

    got = receiver.take()
    event = unwrap(got, hook)

    assert (event.type, event.data.id, event.object) == ("fine_tuning.job.cancelled", job_id, "event")
    assert event.id == got.headers["webhook-id"]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrap(Received(path="/", headers=got.headers, body=got.body.replace(b"cancelled", b"succeeded")), hook)
    reported = newest(client, hook, lambda one: one["status"] == "delivered")
    assert (reported["event_id"], [one["status_code"] for one in reported["tries"]]) == (event.id, [204])


def test_event_committed_before_a_crash_is_sent_after_restart(
    app: FastAPI, settings: Settings, services: Services, world: World, receiver: Receiver, key: str
) -> None:
    """Only the committed state of the first API server remains."""
    from catalog.webhooks import endpoints

    given = {"project_id": world.caller.project_id, "name": "ops", "url": receiver.url, "event_types": EVENT_TYPES}
    _, secret = endpoints.create(services.db, pepper=services.pepper, **given)  # pyright: ignore[reportArgumentType]
    job_id = end_job(world)
    assert receiver.is_quiet()

    with TestClient(create_app(settings, services.api_settings)):
        event = unwrap(receiver.take(), {"signing_secret": secret})

    assert event.data.id == job_id


def test_failed_attempt_is_recorded_and_retried_with_the_same_id(
    client: TestClient, receiver: Receiver, hook: dict[str, Any], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_queue, "wait_seconds", lambda *_, **__: 0.0)
    answers = [Answer(status=500, body=b"no\x00t now"), Answer()]
    receiver.answer = lambda _: answers.pop(0)
    end_job(world)

    first, second = receiver.take(), receiver.take()

    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body
    reported = newest(client, hook, lambda one: one["status"] == "delivered")
    assert [(one["status_code"], one["reply"]) for one in reported["tries"]] == [(500, "no\\x00t now"), (204, "")]


def test_slow_endpoint_does_not_delay_other_endpoints(
    client: TestClient, receiver: Receiver, hook: dict[str, Any], world: World
) -> None:
    ended = threading.Event()

    def wait(_: Received) -> Answer:
        ended.wait(WAIT_SECONDS)
        return Answer()

    try:
        with receiving() as slow:
            slow.answer = wait
            made(client, slow.url)
            sent = {end_job(world) for _ in range(10)}
            assert {unwrap(receiver.take(), hook).data.id for _ in range(10)} == sent
            ended.set()
    finally:
        ended.set()


def test_one_delivery_or_all_failed_deliveries_can_be_replayed(
    client: TestClient, receiver: Receiver, hook: dict[str, Any], world: World
) -> None:
    receiver.answer = lambda _: Answer(status=410)
    end_job(world)
    first = receiver.take()
    reported = newest(client, hook, lambda one: one["status"] == "failed")
    path = f"{HOOKS}/{hook['id']}"
    assert client.get(path).json()["disabled_reason"] == "gone"
    assert error_of(client.post(f"{path}/replay", json={"since": 0}))["code"] == "invalid_transition"

    receiver.answer = lambda _: Answer()
    assert client.post(path, json={"enabled": True}).json()["status"] == "enabled"
    assert client.post(f"{path}/replay", json={"since": 0}).json()["replayed"] == 1
    second = receiver.take()
    newest(client, hook, lambda one: one["status"] == "delivered")
    again = client.post(f"/v1/webhook_deliveries/{reported['id']}/replay")
    third = receiver.take()

    assert again.json()["status"] == "pending"
    assert {got.headers["webhook-id"] for got in (first, second, third)} == {reported["event_id"]}


def test_test_event_is_sent_immediately_and_returns_the_response(
    client: TestClient, receiver: Receiver, hook: dict[str, Any]
) -> None:
    receiver.answer = lambda _: Answer(status=418, body=b"a teapot")
    body = {"event_type": "fine_tuning.job.succeeded"}

    reported = client.post(f"{HOOKS}/{hook['id']}/test", json=body).json()
    receiver.answer = lambda _: Answer(status=200)

    event = unwrap(receiver.take(), hook)
    assert (reported["status_code"], reported["reply"], reported["success"]) == (418, "a teapot", True)
    assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", "ftjob-of-a-test")
    logged = client.get(f"/v1/webhook_deliveries/{reported['delivery_id']}").json()
    assert (logged["is_test"], logged["status"], len(logged["tries"])) == (True, "failed", 1)
    assert client.post(f"{HOOKS}/{hook['id']}/replay", json={"since": 0}).json()["replayed"] == 0


def test_unanswered_test_event_returns_the_reason(client: TestClient) -> None:
    hook = made(client, "http://127.0.0.1:1025/")

    refused = client.post(f"{HOOKS}/{hook['id']}/test", json={"event_type": "fine_tuning.job.failed"})

    assert error_of(refused)["code"] == "webhook_endpoint_unreachable"
    assert f"The test of webhook endpoint {hook['id']} failed. " in error_of(refused)["message"]
    (reported,) = client.get(f"{HOOKS}/{hook['id']}/deliveries?status=failed").json()["data"]
    assert reported["tries"][0]["status_code"] is None


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (f"Nothing was sent. {OPENED}", OPENED),
        ("The request failed: [SSL: CERTIFICATE_VERIFY_FAILED] x.", "certificate"),
        ("The host x has no address.", "URL is correct"),
    ],
)
def test_failed_test_event_has_the_remedy_of_its_cause(
    client: TestClient, hook: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: str, remedy: str
) -> None:
    async def send(*_: Any, **__: Any) -> DeliveryResult:
        return DeliveryResult(started_at=time.time(), seconds=0.1, error=error)

    monkeypatch.setattr(WebhookSender, "send", send)
    refused = error_of(client.post(f"{HOOKS}/{hook['id']}/test", json={"event_type": "fine_tuning.job.failed"}))

    assert remedy in refused["remedy"]
    assert refused["message"].count(OPENED) == (remedy == OPENED)


def test_rotated_secret_overlaps_with_the_old_one_only_on_request(
    client: TestClient, receiver: Receiver, hook: dict[str, Any], world: World
) -> None:
    path = f"{HOOKS}/{hook['id']}/rotate_secret"
    new = client.post(path, json={"keep_old_secret_active_for_24_hours": True}).json()
    end_job(world)
    got = receiver.take()
    assert unwrap(got, hook) == unwrap(got, new)
    assert new["old_secret_until"]

    newest_one = client.post(path).json()
    end_job(world)
    got = receiver.take()

    assert newest_one["old_secret_until"] is None
    assert unwrap(got, newest_one)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrap(got, new)
    both = client.post(path, json={"keep_old_secret_active_for_24_hours": True, "overlap_seconds": 5})
    assert "not both" in error_of(both)["message"]


def test_signing_secret_is_shown_once_and_is_in_no_log_or_file(
    client: TestClient,
    receiver: Receiver,
    hook: dict[str, Any],
    world: World,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = hook["signing_secret"]
    with caplog.at_level(logging.DEBUG):
        end_job(world)
        receiver.take()
        newest(client, hook, lambda one: one["status"] == "delivered")
        shown = [client.get(path).text for path in (HOOKS, f"{HOOKS}/{hook['id']}", f"{HOOKS}/{hook['id']}/deliveries")]

    kept = b"".join(path.read_bytes() for path in settings.data_dir.rglob("*") if path.is_file())
    assert "httpcore" in caplog.text  # so the log contains debug messages
    assert secret.removeprefix("whsec_") not in caplog.text + "".join(shown) + kept.decode("latin-1")
    assert hook["signing_secret_hint"].endswith(secret[-4:])


def test_endpoint_url_is_in_no_later_response_or_file(
    client: TestClient, receiver: Receiver, world: World, settings: Settings
) -> None:
    hook = made(client, f"{receiver.url}/services/T0AB/k3yIn7heP4th-z9Xq")
    assert hook["url"] == f"{receiver.url}/services/T0AB/k3yIn7heP4th-z9Xq"
    path = f"{HOOKS}/{hook['id']}"
    shown = [client.get(HOOKS).text, client.get(path).text, client.post(path, json={"name": "new"}).text]

    end_job(world)

    assert receiver.take().path == "/services/T0AB/k3yIn7heP4th-z9Xq"
    kept = b"".join(file.read_bytes() for file in settings.data_dir.rglob("*") if file.is_file()).decode("latin-1")
    assert "k3yIn7" not in "".join(shown) + kept
    assert client.get(path).json()["url"] == f"{receiver.url}/…z9Xq"


@pytest.mark.parametrize("url", ["https://10.0.0.1/", "https://[::1]/", "ftp://x/", "https://user:pw@example.com/"])
def test_internal_and_invalid_endpoint_urls_are_rejected(client: TestClient, hook: dict[str, Any], url: str) -> None:
    before = client.get(f"{HOOKS}/{hook['id']}").json()["url"]
    body = {"name": "x", "url": url, "event_types": ENDS}
    answers = [client.post(HOOKS, json=body), client.post(f"{HOOKS}/{hook['id']}", json={"url": url})]

    assert {error_of(answer)["param"] for answer in answers} == {"url"}
    assert client.get(f"{HOOKS}/{hook['id']}").json()["url"] == before


def test_loopback_and_http_endpoints_are_rejected_by_default(settings: Settings, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"}
    with TestClient(create_app(settings, ApiSettings()), base_url="http://127.0.0.1", headers=headers) as client:
        codes = [
            error_of(client.post(HOOKS, json={"name": "x", "url": url, "event_types": ENDS}))["code"]
            for url in ("http://example.com/", "https://127.0.0.1/")
        ]

    assert codes == ["invalid_webhook_url", "invalid_webhook_url"]


def test_unknown_event_type_error_lists_the_known_types(client: TestClient, receiver: Receiver) -> None:
    refused = client.post(HOOKS, json={"name": "x", "url": receiver.url, "event_types": ["batch.completed"]})

    assert "fine_tuning.job.succeeded" in error_of(refused)["message"]
    assert client.get("/v1/webhook_event_types").json() == {"object": "list", "data": list(EVENT_TYPES)}


def test_endpoint_is_changed_and_deleted(client: TestClient, hook: dict[str, Any], stranger: TestClient) -> None:
    path = f"{HOOKS}/{hook['id']}"

    changed = client.post(path, json={"name": "new", "event_types": ["webhook_endpoint.disabled"] * 2}).json()
    off = client.post(path, json={"enabled": False}).json()
    deleted = client.delete(path).json()

    assert (changed["name"], changed["event_types"]) == ("new", ["webhook_endpoint.disabled"])
    assert (off["status"], off["disabled_reason"]) == ("disabled", "by_request")
    assert deleted == {"id": hook["id"], "object": "webhook_endpoint.deleted", "deleted": True}
    assert client.get(path).status_code == 404
    assert json.loads(client.get(HOOKS).text)["data"] == []
