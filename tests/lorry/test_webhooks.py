"""`lorry webhooks`, and the SDK's `Lorry.webhooks`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from typer.testing import Result

from tests.lorry.scripted_server import Reply, Script

Run = Callable[..., Result]
HOOKS = "/v1/webhook_endpoints"
HOOK: dict[str, Any] = {
    "id": "webhook-1",
    "name": "ops",
    "url": "https://example.com/hooks",
    "event_types": ["fine_tuning.job.failed"],
    "signing_secret_hint": "whsec_…x9Qz",
    "status": "enabled",
    "created_at": 1790000000,
}
DELIVERY: dict[str, Any] = {
    "id": "delivery-1",
    "status": "failed",
    "event_type": "fine_tuning.job.failed",
    "data": {"id": "ftjob-1"},
    "created_at": 1790000000,
    "tries": [{"status_code": 500}, {"status_code": None, "error": "There was no whole answer."}],
}


def sent(service: Script, path: str, method: str = "POST") -> list[Any]:
    return [json.loads(one.body or b"null") for one in service.requests(method, path)]


def test_new_endpoint_prints_only_its_secret_on_stdout(service: Script, run: Run) -> None:
    service.on("POST", HOOKS, {**HOOK, "signing_secret": "whsec_abc"})

    all_ends = run("webhooks", "create", "https://example.com/hooks")
    run("webhooks", "create", "https://example.com/hooks", "--events", "fine_tuning.job.failed", "--name", "ops")

    assert all_ends.stdout == "whsec_abc\n"
    assert "not shown again" in all_ends.stderr
    assert "lorry webhooks test webhook-1" in all_ends.stderr
    first, second = sent(service, HOOKS)
    ends = [f"fine_tuning.job.{end}" for end in ("succeeded", "failed", "cancelled")]
    assert first == {"url": HOOK["url"], "name": "example.com", "event_types": ends}
    assert second == {"url": HOOK["url"], "name": "ops", "event_types": ["fine_tuning.job.failed"]}


def test_lists_show_problems_of_endpoints_and_deliveries(service: Script, run: Run) -> None:
    gone = {**HOOK, "id": "webhook-2", "status": "disabled", "disabled_reason": "gone", "disabled_at": 1790000000}
    failing = {**HOOK, "id": "webhook-3", "failing_since": 1790000000}
    service.on("GET", HOOKS, {"data": [HOOK, gone, failing], "has_more": False})
    service.on("GET", f"{HOOKS}/webhook-1/deliveries", {"data": [DELIVERY], "has_more": False})

    listed, log = (
        run("webhooks", "list").stdout,
        run("webhooks", "deliveries", "webhook-1", "--status", "failed").stdout,
    )

    assert "disabled (gone)" in listed
    assert "enabled (failing)" in listed
    assert "There was no whole answer." in log
    assert "ftjob-1" in log
    assert "status=failed" in service.seen[-1].path


def test_test_command_prints_the_response_and_sets_the_exit_code(service: Script, run: Run) -> None:
    answer = {"webhook_endpoint_id": "webhook-1", "status_code": 204, "reply": ""}
    refusal = {"message": "It did not answer.", "code": "webhook_endpoint_unreachable", "remedy": "Look."}
    path = f"{HOOKS}/webhook-1/test"
    service.on("POST", path, answer, {**answer, "status_code": 500, "reply": "oh no"})
    service.on("POST", path, Reply(status=409, headers={"x-should-retry": "false"}, body={"error": refusal}))

    good, bad, none = (run("webhooks", "test", "webhook-1") for _ in range(3))

    assert (good.exit_code, "responded with 204." in good.stderr) == (0, True)
    assert (bad.exit_code, "responded with 500: oh no." in bad.stderr) == (1, True)
    assert (none.exit_code, "did not answer" in none.stderr) == (1, True)


def test_one_delivery_or_all_failed_deliveries_are_replayed(service: Script, run: Run) -> None:
    service.on("POST", "/v1/webhook_deliveries/delivery-1/replay", DELIVERY)
    service.on("POST", f"{HOOKS}/webhook-1/replay", {"replayed": 3})

    one = run("webhooks", "replay", "delivery-1").stderr
    many = run("webhooks", "replay", "webhook-1", "--failed-since", "12h").stderr

    assert "Replaying delivery-1." in one
    assert "Replaying 3 deliveries." in many
    (replay_body,) = sent(service, f"{HOOKS}/webhook-1/replay")
    assert isinstance(replay_body["since"], int)


def test_rotation_overlaps_for_a_day_by_default(service: Script, run: Run) -> None:
    path = f"{HOOKS}/webhook-1/rotate_secret"
    service.on("POST", path, {**HOOK, "signing_secret": "whsec_new", "old_secret_until": 1790086400})

    output = run("webhooks", "rotate-secret", "webhook-1")
    run("webhooks", "rotate-secret", "webhook-1", "--overlap", "0s")

    assert output.stdout == "whsec_new\n"
    assert "also signed with the old secret until" in output.stderr
    assert sent(service, path) == [{"overlap_seconds": 86400}, {"overlap_seconds": 0}]


def test_endpoint_is_changed_disabled_enabled_and_removed(service: Script, run: Run) -> None:
    path = f"{HOOKS}/webhook-1"
    service.on("POST", path, HOOK)
    service.on("DELETE", path, {"id": "webhook-1", "deleted": True})

    output = [
        run("webhooks", "update", "webhook-1", "--url", "https://new.example.com/").stderr,
        run("webhooks", "disable", "webhook-1").stderr,
        run("webhooks", "enable", "webhook-1").stderr,
        run("webhooks", "delete", "webhook-1", "--yes").stderr,
    ]

    assert sent(service, path) == [{"url": "https://new.example.com/"}, {"enabled": False}, {"enabled": True}]
    words = (
        "receives fine_tuning.job.failed",
        "webhooks enable webhook-1",
        "--failed-since 1d",
        "Deleted webhook webhook-1.",
    )
    assert [word in text for word, text in zip(words, output, strict=True)] == [True] * 4
    assert run("webhooks", "delete", "webhook-1").exit_code != 0  # there is no terminal to ask at
