"""The loop that sends webhooks shares its slots between projects, and ends when the API server stops."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest

from api.app import Services
from api.webhooks.delivery_loop import MAX_ENDPOINTS_OF_PROJECT, WebhookDeliverer
from catalog.webhooks import endpoints, outbox
from catalog.webhooks.delivery_queue import DeliveryResult
from catalog.webhooks.outbox import EVENT_TYPES
from tests.catalog.world import World

PATIENCE_SECONDS = 60.0


@pytest.mark.parametrize("num_passes", range(5))
def test_loop_ends_if_a_delivery_ends_at_the_same_moment(services: Services, num_passes: int) -> None:
    """num_passes: passes of the event loop between the signal and the cancellation."""
    deliverer = services.deliverer

    async def scenario() -> None:
        running = asyncio.create_task(deliverer.run())
        await asyncio.sleep(0.3)  # the loop has polled and is waiting
        deliverer.wake()
        for _ in range(num_passes):
            await asyncio.sleep(0)
        running.cancel()
        with suppress(asyncio.CancelledError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                await asyncio.shield(running)

    asyncio.run(scenario())


def test_one_project_uses_at_most_a_quarter_of_the_slots(services: Services, world: World) -> None:
    noisy, quiet = world.caller.project_id, world.stranger.project_id
    for project_id, number in ((noisy, 2 * MAX_ENDPOINTS_OF_PROJECT), (quiet, 1)):
        for count in range(number):
            given: dict[str, Any] = {"name": f"hook {count}", "url": "https://example.com/", "pepper": services.pepper}
            endpoints.create(services.db, project_id=project_id, event_types=EVENT_TYPES, **given)
        with services.db.write() as session:
            about: dict[str, Any] = {"data": {"id": "ftjob"}, "now": 1.0}
            outbox.add(session, project_id=project_id, event_type="fine_tuning.job.succeeded", **about)
    sender = StuckSender()
    deliverer = WebhookDeliverer(
        services.db,
        sender,  # pyright: ignore[reportArgumentType]
        pepper=services.pepper,
        telemetry=services.telemetry,
    )

    async def scenario() -> None:
        running = asyncio.create_task(deliverer.run())
        async with asyncio.timeout(PATIENCE_SECONDS):
            while sender.of_projects[quiet] == 0 or sender.of_projects[noisy] < MAX_ENDPOINTS_OF_PROJECT:
                await asyncio.sleep(0.01)
        deliverer.wake()
        await asyncio.sleep(0.3)  # another poll
        sender.is_stuck = False
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())

    assert sender.most == {noisy: MAX_ENDPOINTS_OF_PROJECT, quiet: 1}


class StuckSender:
    """Sends nothing and waits while `is_stuck`."""

    def __init__(self) -> None:
        self.is_stuck = True
        self.of_projects, self.most = Counter[str](), Counter[str]()

    async def send(self, url: str, *, project_id: str, body: bytes, headers: Mapping[str, str]) -> DeliveryResult:
        self.of_projects[project_id] += 1
        self.most |= self.of_projects
        while self.is_stuck:
            await asyncio.sleep(0.01)
        self.of_projects[project_id] -= 1
        return DeliveryResult(started_at=1.0, seconds=0.1, status_code=204)
