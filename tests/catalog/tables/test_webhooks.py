"""The webhook outbox: written in the transaction of its event, delivered at least once, and unchanged on retries."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from catalog.errors import Conflict, NotFound
from catalog.history import events
from catalog.jobs import commands
from catalog.pepper import Pepper
from catalog.queue import claims
from catalog.states import EndReason
from catalog.tables.tenancy import AuditEvent
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint, WebhookTry
from catalog.webhooks import delivery_log, delivery_queue, endpoints, signing
from catalog.webhooks.delivery_queue import DeliveryResult
from catalog.webhooks.endpoints import EndpointChange
from catalog.webhooks.outbox import EVENT_TYPES
from tests.catalog.hooks import BAD, OK, Hooks
from tests.catalog.world import PEPPER, World

DAY = 86_400.0


@pytest.fixture
def hooks(world: World) -> Hooks:
    return Hooks(world)


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_job_end_is_written_for_subscribed_endpoints_of_its_project_only(hooks: Hooks, world: World, end: str) -> None:
    elsewhere, _ = hooks.more("webhook_endpoint.disabled")
    theirs = endpoints.create(
        world.db,
        project_id=world.stranger.project_id,
        name="x",
        url="https://example.com/",
        event_types=EVENT_TYPES,
        pepper=PEPPER,
    )[0]
    world.worker()
    claim = world.running()

    if end == "succeeded":
        world.complete(claim.claim_id)
    elif end == "failed":
        claims.end(world.db, claim.claim_id, reason=EndReason.USER_ERROR, detail="no good")
    else:
        commands.cancel(world.db, **world.of(claim.job.id))
        claims.end(world.db, claim.claim_id, reason=EndReason.CANCELLED_BY_USER, detail="asked for")

    (claimed,) = hooks.claim()
    body = json.loads(claimed.body)
    assert body == {
        "object": "event",
        "id": claimed.message_id,
        "type": f"fine_tuning.job.{end}",
        "created_at": body["created_at"],
        "data": {"id": claim.job.id},
    }
    with world.db.read() as session:
        written = session.scalars(select(WebhookDelivery.endpoint_id)).all()
    assert written == [hooks.row.id]
    assert elsewhere.id != theirs.id


def test_uncommitted_end_notifies_no_endpoint(hooks: Hooks, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.submit()

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("before the commit")

    with monkeypatch.context() as broken:
        broken.setattr(events, "add", crash)
        with pytest.raises(RuntimeError):
            commands.cancel(world.db, **world.of(job.id))

    assert (world.job(job.id).state, hooks.all()) == ("validating_files", [])


def test_no_webhook_secret_is_stored(hooks: Hooks, world: World) -> None:
    _, rotated = endpoints.rotate(world.db, **hooks.ident, overlap_seconds=60, pepper=PEPPER)
    hooks.end_job()

    with world.db.read() as session:
        tables = (WebhookEndpoint, WebhookDelivery, WebhookTry)
        stored = [str(vars(row)) for table in tables for row in session.scalars(select(table))]

    assert stored
    for secret in (hooks.secret, rotated):
        assert not [text for text in stored if secret[6:] in text]


def test_another_pepper_signs_nothing(hooks: Hooks, world: World) -> None:
    hooks.end_job()

    turn = delivery_queue.claim(world.db, pepper=Pepper(current=b"another" * 5))

    assert turn is not None
    assert [claimed.signed_with for claimed in turn.deliveries] == [[]]
    with pytest.raises(Conflict, match="can't be recovered") as refused:
        signing.current(hooks.row, Pepper(current=b"another" * 5))
    assert f"`lorry webhooks rotate-secret {hooks.row.id} --overlap 0s`" in refused.value.remedy


def test_lost_secret_is_replaced_by_a_rotation_without_overlap(hooks: Hooks, world: World) -> None:
    another = Pepper(current=b"another" * 5)
    endpoints.rotate(world.db, **hooks.ident, overlap_seconds=60, pepper=another)
    with pytest.raises(Conflict, match="can't be recovered"):
        signing.good(hooks.endpoint(), another, now=world.clock.now)

    _, new = endpoints.rotate(world.db, **hooks.ident, overlap_seconds=0, pepper=another)

    assert signing.good(hooks.endpoint(), another, now=world.clock.now) == [new]


def test_rotation_signs_with_both_secrets_during_the_overlap(hooks: Hooks, world: World) -> None:
    _, new = endpoints.rotate(world.db, **hooks.ident, overlap_seconds=3600, pepper=PEPPER)
    _, repeated = endpoints.rotate(world.db, **hooks.ident, overlap_seconds=3600, pepper=PEPPER, is_client_retry=True)
    hooks.end_job()
    (both,) = hooks.claim()
    world.clock.advance(3600)
    hooks.end_turns()
    hooks.end_job()
    after = [one for one in hooks.claim() if one.message_id != both.message_id]
    endpoints.rotate(world.db, **hooks.ident, overlap_seconds=0, pepper=PEPPER)

    assert repeated == new
    assert both.signed_with == [new, hooks.secret]
    assert [one.signed_with for one in after] == [[new]]
    assert len(signing.good(hooks.endpoint(), PEPPER, now=world.clock.now)) == 1


def test_message_of_a_dead_sender_is_sent_again_with_the_same_id(hooks: Hooks, world: World) -> None:
    hooks.end_job()
    (first,) = hooks.claim()
    meanwhile = hooks.claim()

    world.clock.advance(delivery_queue.TURN_LEASE_SECONDS)
    (second,) = hooks.claim()
    delivery_queue.record(world.db, first, BAD)  # the first sender was only late
    delivery_queue.record(world.db, second, OK)

    assert meanwhile == []
    assert (first.message_id, first.body) == (second.message_id, second.body)
    (row,) = hooks.all()
    assert (row.status, row.num_tries) == ("delivered", 1)
    assert [one.status_code for one in delivery_log.tries(world.db, [row.id])[row.id]] == [503, 204]
    assert hooks.endpoint().failing_since is None


@pytest.mark.both_databases
def test_concurrent_processes_send_each_message_once(hooks: Hooks) -> None:
    for _ in range(3):
        hooks.more()
    for _ in range(6):
        hooks.end_job()

    with ThreadPoolExecutor(4) as pool:
        found = [one.delivery_id for sent in pool.map(lambda _: hooks.send(OK), range(4)) for one in sent]

    assert len(found) == len(set(found)) == 24


def test_slow_endpoint_delays_only_itself(hooks: Hooks, world: World) -> None:
    other, _ = hooks.more()
    for _ in range(20):
        hooks.end_job()

    taken = [one.endpoint_id for one in hooks.claim()]
    hooks.turns = [turn for turn in hooks.turns if turn.task.subject == other.id]
    slow_taken = taken.count(hooks.row.id)
    while taken.count(other.id) < 20:
        for turn in hooks.turns:
            for outgoing in turn.deliveries:
                delivery_queue.record(world.db, outgoing, OK)
        hooks.end_turns()
        taken += [one.endpoint_id for one in hooks.claim()]

    assert slow_taken == taken.count(hooks.row.id) == delivery_queue.MAX_AT_ONCE
    assert taken.count(other.id) == 20


def test_failing_endpoint_is_tried_with_one_message_at_a_time(hooks: Hooks, world: World) -> None:
    for _ in range(8):
        hooks.end_job()
    for claimed in hooks.claim():
        delivery_queue.record(world.db, claimed, BAD)
    hooks.end_turns()

    assert len(hooks.claim()) == 1


def test_delivery_is_retried_for_a_day_with_one_id_and_then_fails(hooks: Hooks, world: World) -> None:
    hooks.end_job()
    begun = world.clock.now

    tried = hooks.fail_until_it_ends()

    assert len(tried) == len(delivery_queue.WAITS_SECONDS) + 1
    assert len(set(tried)) == 1
    assert 0.8 * DAY < world.clock.now - begun < 1.4 * DAY
    (row,) = hooks.all(status="failed")
    recorded = delivery_log.tries(world.db, [row.id])[row.id]
    assert {(one.status_code, one.reply) for one in recorded} == {(503, "busy")}


def test_retry_waits_have_jitter_and_limited_retry_after() -> None:
    assert [delivery_queue.wait_seconds(1, chance=chance) for chance in (0.0, 0.5, 1.0)] == [4.0, 5.0, 6.0]
    assert delivery_queue.wait_seconds(1, retry_after=90.0, chance=0.5) == 90.0
    assert delivery_queue.wait_seconds(4, retry_after=1.0, chance=0.5) == 600.0
    assert delivery_queue.wait_seconds(1, retry_after=1e9, chance=0.5) == delivery_queue.LONGEST_ASKED_SECONDS
    assert delivery_queue.wait_seconds(len(delivery_queue.WAITS_SECONDS) + 1) is None


def test_gone_endpoint_is_disabled_at_once_and_others_are_notified(hooks: Hooks, world: World) -> None:
    watcher, _ = hooks.more("webhook_endpoint.disabled")
    hooks.end_job()
    hooks.end_job()
    claimed = hooks.claim()[0]

    delivery_queue.record(world.db, claimed, DeliveryResult(started_at=1.0, seconds=0.1, status_code=410))
    hooks.end_turns()
    kept = hooks.end_job()

    assert (hooks.endpoint().disabled_reason, [row.status for row in hooks.all()]) == ("gone", ["failed"] * 3)
    assert hooks.all()[0].data == {"id": kept}
    (recorded,) = hooks.claim()
    assert (recorded.endpoint_id, json.loads(recorded.body)["data"]) == (watcher.id, {"id": hooks.row.id})


def test_endpoint_is_disabled_after_days_of_failures_without_a_success(hooks: Hooks, world: World) -> None:
    for days in (0, 3, 3):
        world.clock.advance(days * DAY)
        hooks.end_job()
        delivery_queue.record(world.db, hooks.claim()[0], BAD)
        hooks.end_turns()
        if days == 0:
            world.clock.advance(6)
            delivery_queue.record(world.db, hooks.claim()[0], OK)
            hooks.end_turns()
    assert hooks.endpoint().disabled_at is None

    world.clock.advance(3 * DAY)
    delivery_queue.record(world.db, hooks.claim()[0], BAD)

    assert hooks.endpoint().disabled_reason == "failing"


def test_failed_deliveries_are_replayed_with_their_attempts(hooks: Hooks, world: World) -> None:
    hooks.end_job()
    hooks.fail_until_it_ends()
    since = world.clock.now
    hooks.end_job()
    hooks.end_job()
    hooks.fail_until_it_ends()
    newest, middle, oldest = hooks.all()

    assert delivery_log.replay_failed(world.db, **hooks.ident, since=since) == 2
    again = hooks.send(OK)
    delivery_log.replay(world.db, **hooks.owner, delivery_id=oldest.id)
    (last,) = hooks.claim()
    delivery_queue.record(world.db, last, BAD)

    ids = {row.event_id for row in (newest, middle)}
    assert {claimed.message_id for claimed in again} == ids
    assert last.message_id == oldest.event_id
    row = delivery_log.get(world.db, **hooks.owner, delivery_id=oldest.id)
    assert (row.status, row.num_tries) == ("pending", len(delivery_queue.WAITS_SECONDS) + 2)
    assert delivery_log.replay_failed(world.db, **hooks.ident, since=0) == 0


def test_replay_does_not_duplicate_a_delivery_in_flight(hooks: Hooks, world: World) -> None:
    hooks.end_job()
    (claimed,) = hooks.claim()

    delivery_log.replay(world.db, **hooks.owner, delivery_id=claimed.delivery_id)
    meanwhile = hooks.claim()
    delivery_queue.record(world.db, claimed, OK)
    hooks.end_turns()

    assert meanwhile == hooks.claim() == []
    assert [row.status for row in hooks.all()] == ["delivered"]


def test_events_of_a_disabled_endpoint_are_kept_for_replay(hooks: Hooks, world: World) -> None:
    hooks.end_job()
    endpoints.change(world.db, **hooks.ident, changes=EndpointChange(enabled=False), pepper=PEPPER)
    hooks.end_job()
    assert hooks.claim() == []
    for refused in (
        lambda: delivery_log.replay_failed(world.db, **hooks.ident, since=0),
        lambda: delivery_log.replay(world.db, **hooks.owner, delivery_id=hooks.all()[0].id),
    ):
        with pytest.raises(Conflict, match="is disabled"):
            refused()

    endpoints.change(
        world.db, **hooks.ident, changes=EndpointChange(enabled=True, url="https://new.example.com/"), pepper=PEPPER
    )

    assert delivery_log.replay_failed(world.db, **hooks.ident, since=0) == 2
    assert {claimed.url for claimed in hooks.claim()} == {"https://new.example.com/"}


def test_event_written_while_its_endpoint_was_disabled_fails(hooks: Hooks, world: World) -> None:
    hooks.end_job()
    with world.db.write() as session:
        session.get_one(WebhookEndpoint, hooks.row.id).disabled_at = 1.0

    assert hooks.claim() == []
    assert [row.status for row in hooks.all()] == ["failed"]


def test_deleted_endpoint_receives_nothing(hooks: Hooks, world: World) -> None:
    hooks.end_job()
    (delivery,) = hooks.all()

    endpoints.delete(world.db, **hooks.ident)
    endpoints.delete(world.db, **hooks.ident, is_client_retry=True)
    hooks.end_job()

    assert hooks.claim() == []
    for gone in (
        hooks.all,
        lambda: endpoints.delete(world.db, **hooks.ident),
        lambda: delivery_log.get(world.db, **hooks.owner, delivery_id=delivery.id),
    ):
        with pytest.raises(NotFound):
            gone()


def test_endpoint_creation_is_idempotent_and_limited_in_number(hooks: Hooks, world: World) -> None:
    given: dict[str, Any] = {**hooks.owner, "name": "ops", "url": "https://example.com/", "pepper": PEPPER}

    again = endpoints.create(world.db, **given, event_types=EVENT_TYPES, is_client_retry=True)
    for _ in range(endpoints.MAX_ENDPOINTS - 1):
        hooks.more()
    with pytest.raises(Conflict, match="has reached its limit of"):
        hooks.more()

    assert (again[0].id, again[1]) == (hooks.row.id, hooks.secret)
    assert len(endpoints.list_page(world.db, **hooks.owner, limit=100).items) == endpoints.MAX_ENDPOINTS


def test_delivery_log_is_kept_for_a_month_and_pending_ones_longer(hooks: Hooks, world: World) -> None:
    hooks.end_job()
    delivery_queue.record(world.db, hooks.claim()[0], OK)
    hooks.end_job()
    gone, _ = hooks.more()
    endpoints.delete(world.db, **hooks.owner, endpoint_id=gone.id)

    world.clock.advance(31 * DAY)
    delivery_log.forget(world.db)

    assert [row.status for row in hooks.all()] == ["pending"]
    with world.db.read() as session:
        assert session.scalars(select(WebhookTry)).all() == []
        assert session.get(WebhookEndpoint, gone.id) is None


def test_endpoint_changes_are_audited_without_secret_and_address(hooks: Hooks, world: World) -> None:
    hooks.end_job()
    hooks.fail_until_it_ends()
    (delivery,) = hooks.all()
    row, secret = hooks.more(url="https://example.com/t0ken")
    mine: dict[str, Any] = {**hooks.owner, "endpoint_id": row.id}

    endpoints.change(world.db, **mine, changes=EndpointChange(name="new"), pepper=PEPPER)
    endpoints.change(world.db, **mine, changes=EndpointChange(name="new"), pepper=PEPPER)
    endpoints.rotate(world.db, **mine, overlap_seconds=5, pepper=PEPPER)
    test = delivery_queue.new_test(row, "fine_tuning.job.failed", subject="ftjob-x", now=world.clock.now)
    delivery_queue.record_test(world.db, row, test, OK)
    delivery_log.replay_failed(world.db, **mine, since=0)
    delivery_log.replay(world.db, **hooks.owner, delivery_id=delivery.id)
    endpoints.delete(world.db, **mine)

    with world.db.read() as session:
        found = list(
            session.scalars(select(AuditEvent).where(AuditEvent.type.like("webhook%")).order_by(AuditEvent.seq))
        )
    recorded = [(event.type.partition(".")[2], event.object_id) for event in found]
    verbs = ("created", "updated", "secret_rotated", "tested", "replayed")
    assert recorded == [
        ("created", hooks.row.id),
        *((verb, row.id) for verb in verbs),
        ("replayed", delivery.id),
        ("deleted", row.id),
    ]
    text = str([event.details for event in found])
    assert "example.com" in text
    assert not [part for part in ("t0ken", secret[6:], row.salt) if part in text]
