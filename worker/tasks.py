"""The two messages. Whatever content one carries is ignored: it is a ring at the door."""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
from __future__ import annotations

from typing import Any

from catalog import recovery
from catalog.sweeps import controller
from worker.celery_app import LOOK_SECONDS, app, context, turns
from worker.supervise import anything_waits


@app.task(name="lorry.work")
def work(*_ignored: Any, **_also_ignored: Any) -> None:
    """Work until nothing is left to do."""
    turns.take()


@app.task(name="lorry.look")
def look(*_ignored: Any, **_also_ignored: Any) -> None:
    """Free what a dead worker held, take sweeps further, and ring if anything waits."""
    recovery.expire(context().db, grace_seconds=context().settings.lease_seconds)
    while controller.advance(context().db):
        pass
    if anything_waits(context()):
        app.send_task("lorry.work", expires=LOOK_SECONDS)
