"""The only Celery task. Its arguments are ignored: the message only means that there may be work."""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
from __future__ import annotations

from typing import Any

from worker.entrypoints.celery_app import app, poller


@app.task(name="lorry.work")
def work(*_ignored: Any, **_also_ignored: Any) -> None:
    """Work until nothing is left to do."""
    poller.work()
