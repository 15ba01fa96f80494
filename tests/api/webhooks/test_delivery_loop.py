"""The loop that sends webhooks ends when the API server stops."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from api.app import Services

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
