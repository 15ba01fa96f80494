"""Plans: dry runs that estimate a job before it is submitted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack

from lorry import requests
from lorry.errors import WaitTimeout
from lorry.models import Plan
from lorry.resources.jobs import job_body
from lorry.resources.resource import Resource

_PATH = "plans"


class Plans(Resource):
    def create(self, *, model: str, training_file: str, **fields: Unpack[requests.JobFields]) -> Plan:
        """Create a plan from the arguments of a job, without training. It is ready immediately if the files were
        already prepared for this base model; else its status is `computing`, and `wait` waits for it. Raises
        InvalidRequest, NotFound or Conflict if the service would reject the job."""
        body = job_body(fields, model=model, training_file=training_file)
        return self._post(Plan, _PATH, body=body)

    def get(self, plan_id: str) -> Plan:
        return self._get(Plan, _PATH, plan_id)

    def list(self, *, limit: int | None = None) -> Iterator[Plan]:
        """Yield plans, newest first, without sample rows."""
        return self._list(Plan, _PATH, limit=limit)

    def delete(self, plan_id: str) -> None:
        """Delete the plan. Jobs created from it stay. Plans expire automatically after seven days."""
        self._delete(_PATH, plan_id)

    def wait(self, plan_id: str, *, timeout_seconds: float | None = None, poll_seconds: float = 1.0) -> Plan:
        """Wait until the plan is ready or has failed, and return it. Check `status` and `error`."""
        return self._poll(
            lambda: self.get(plan_id),
            lambda plan: plan.status != "computing",
            timeout_seconds=timeout_seconds,
            poll_seconds=poll_seconds,
            timeout=lambda _: WaitTimeout("plan_timeout", plan_id=plan_id, timeout_seconds=timeout_seconds or 0),
        )
