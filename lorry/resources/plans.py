"""Plans: what a job would come to, before it is submitted."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Unpack
from urllib.parse import quote

from lorry import requests
from lorry.errors import WaitTimeout
from lorry.models.plans import Plan
from lorry.resources import pages
from lorry.transport.http import Transport

_PATH = "plans"


class Plans:
    def __init__(self, transport: Transport, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._transport = transport
        self._clock = clock

    def create(self, *, model: str, training_file: str, **fields: Unpack[requests.JobFields]) -> Plan:
        """With a job's own arguments; nothing is trained. Ready at once where the files were prepared for that base
        before, else `computing`: `wait` for it. Raises InvalidRequest, NotFound or Conflict as the job would be
        refused."""
        body = requests.job_body(fields, model=model, training_file=training_file)
        return Plan.of(self._transport.request("POST", _PATH, body=body))

    def get(self, plan_id: str) -> Plan:
        return Plan.of(self._transport.get(_of(plan_id)))

    def list(self, *, limit: int | None = None) -> Iterator[Plan]:
        """Newest first, without sample rows."""
        return (Plan.of(wire) for wire in itertools.islice(pages.follow(self._transport, _PATH), limit))

    def delete(self, plan_id: str) -> None:
        """It goes by itself after a week; jobs that were made from it stay."""
        self._transport.request("DELETE", _of(plan_id))

    def wait(self, plan_id: str, *, timeout_seconds: float | None = None, poll_seconds: float = 1.0) -> Plan:
        """Until it is ready, or has failed: look at `status` and `error`."""
        deadline = None if timeout_seconds is None else self._clock() + timeout_seconds
        while True:
            plan = self.get(plan_id)
            if plan.status != "computing":
                return plan
            if deadline is not None and self._clock() >= deadline:
                raise WaitTimeout(
                    f"{plan_id} is still being computed after {timeout_seconds:g} s; it goes on.",
                    code="wait_timeout",
                    remedy="Wait again; where no worker is running, start one.",
                )
            self._transport.sleep(poll_seconds)


def _of(plan_id: str) -> str:
    return f"{_PATH}/{quote(plan_id, safe='')}"
