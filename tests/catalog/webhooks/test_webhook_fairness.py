"""Delivery slots are shared by project: no project uses up the slots that others need."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from catalog.tables.tasks import Task
from catalog.tables.webhooks import WebhookDelivery
from catalog.webhooks import delivery_queue, endpoints, outbox
from catalog.webhooks.delivery_queue import FAILING_SECONDS, DeliveryResult
from catalog.webhooks.outbox import EVENT_TYPES
from tests.catalog.hooks import OK, Hooks
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


def test_projects_take_turns_and_full_ones_are_skipped(world: World) -> None:
    noisy, quiet = world.caller.project_id, world.stranger.project_id
    add_endpoints(world, noisy, endpoints.MAX_ENDPOINTS)
    add_events(world, noisy, 10)
    world.clock.advance(60)
    add_endpoints(world, quiet, 1)
    add_events(world, quiet, 10)

    turns = [delivery_queue.claim(world.db, pepper=PEPPER) for _ in range(3)]
    others = delivery_queue.claim(world.db, pepper=PEPPER, full_projects=[noisy])

    assert [turn and turn.project_id for turn in turns] == [noisy, quiet, noisy]
    assert others is None


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


@pytest.mark.both_databases
def test_concurrent_events_of_several_projects_do_not_deadlock(world: World) -> None:
    projects = [world.caller.project_id, world.stranger.project_id]
    for project_id in projects:
        add_endpoints(world, project_id, 3)

    def add_and_send(order: list[str]) -> None:
        for number in range(15):
            about: dict[str, Any] = {"data": {"id": f"ftjob-{number}"}, "now": world.clock.now}
            with world.db.write() as session:
                for project_id in order:
                    outbox.add(session, project_id=project_id, event_type="fine_tuning.job.succeeded", **about)
            while turn := delivery_queue.claim(world.db, pepper=PEPPER):
                for outgoing in turn.deliveries:
                    delivery_queue.record(world.db, outgoing, OK)
                delivery_queue.release(world.db, turn)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(add_and_send, order) for order in (projects, projects[::-1]) * 2]:
            done.result()
    add_and_send([])

    with world.db.read() as session:
        assert set(session.scalars(select(WebhookDelivery.status))) == {"delivered"}
        assert session.scalars(select(Task.subject)).all() == []
