"""Delivery slots are shared by project: no project uses up the slots that others need."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sqlalchemy import select

from catalog.tables.webhooks import WebhookEndpoint
from catalog.webhooks import delivery_queue, endpoints, outbox
from catalog.webhooks.delivery_queue import FAILING_SECONDS, DeliveryResult
from catalog.webhooks.outbox import EVENT_TYPES
from tests.catalog.hooks import Hooks
from tests.catalog.world import PEPPER, World


def add_endpoints(world: World, project_id: str, number: int) -> None:
    for count in range(number):
        given: dict[str, Any] = {"name": f"hook {count}", "url": f"https://example.com/{count}"}
        endpoints.create(world.db, project_id=project_id, event_types=EVENT_TYPES, pepper=PEPPER, **given)


def add_events(world: World, project_id: str, number: int) -> None:
    with world.db.write() as session:
        for count in range(number):
            about: dict[str, Any] = {"data": {"id": f"ftjob-{count}"}, "now": world.clock.now}
            outbox.add(session, project_id=project_id, event_type="fine_tuning.job.succeeded", **about)


def test_one_project_uses_at_most_a_quarter_of_the_slots(world: World) -> None:
    noisy, quiet = world.caller.project_id, world.stranger.project_id
    add_endpoints(world, noisy, endpoints.MAX_ENDPOINTS)
    add_events(world, noisy, 10)
    world.clock.advance(60)
    add_endpoints(world, quiet, 1)
    add_events(world, quiet, 10)

    claimed = delivery_queue.claim(world.db, pepper=PEPPER, limit=64, in_flight=[])
    more = delivery_queue.claim(world.db, pepper=PEPPER, limit=64 - len(claimed), in_flight=claimed)

    with world.db.read() as session:
        owners = {row.id: row.project_id for row in session.scalars(select(WebhookEndpoint))}
    taken = Counter(owners[outgoing.endpoint_id] for outgoing in claimed)
    assert taken == {noisy: 16, quiet: delivery_queue.AT_ONCE}
    assert more == [], "the noisy project has its quarter, and the quiet endpoint its four"


def test_last_free_slot_goes_to_the_project_with_the_fewest_deliveries(world: World) -> None:
    noisy, quiet = world.caller.project_id, world.stranger.project_id
    add_endpoints(world, noisy, 5)
    add_events(world, noisy, 2)
    held = delivery_queue.claim(world.db, pepper=PEPPER, limit=3, in_flight=[])
    world.clock.advance(60)
    add_endpoints(world, quiet, 1)
    add_events(world, quiet, 1)

    (last,) = delivery_queue.claim(world.db, pepper=PEPPER, limit=1, in_flight=held)

    assert {outgoing.project_id for outgoing in held} == {noisy}
    assert last.project_id == quiet


def test_resolver_failure_does_not_disable_an_endpoint(world: World) -> None:
    hooks = Hooks(world)
    resolver_failure = DeliveryResult(
        started_at=1.0, seconds=15.0, error="There was no whole answer.", concerns_endpoint=False
    )
    for _ in range(2):
        hooks.end_job()
        hooks.fail_until_it_ends(resolver_failure)
        world.clock.advance(FAILING_SECONDS)

    assert hooks.endpoint().disabled_at is None
    assert hooks.endpoint().failing_since is None
    assert {row.status for row in hooks.all()} == {"failed"}, "the attempts themselves are counted"
