"""Sweeps: groups of jobs that differ in chosen fields, ranked by an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lorry import requests
from lorry.errors import WaitTimeout
from lorry.models import Sweep, Trial
from lorry.resources.resource import Resource, given, new_key

_PATH = "sweeps"


class Sweeps(Resource):
    def create(
        self,
        *,
        model: str,
        training_file: str,
        search: requests.Search,
        parameters: Mapping[str, requests.Parameter] | None = None,
        validation_file: str | None = None,
        objective: requests.Objective | None = None,
        keep_adapters: requests.KeepAdapters | None = None,
        max_concurrent: int | None = None,
        job: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Sweep:
        """Create a sweep. Files are ids. Retries after a lost response create no second sweep.

        `parameters`: by dotted path of a job field, for example `{"lora.rank": {"values": [4, 8]}}`. `job`: fields that
        all trials share, as for `jobs.create`. Raises InvalidRequest, NotFound or Conflict if the service rejects the
        sweep; no trial was created then.
        """
        body = given(
            model=model,
            training_file=training_file,
            validation_file=validation_file,
            parameters=parameters,
            search=search,
            objective=objective,
            keep_adapters=keep_adapters,
            max_concurrent=max_concurrent,
        )
        return self._post(Sweep, _PATH, body=body | dict(job or {}), key=idempotency_key or new_key())

    def get(self, sweep_id: str) -> Sweep:
        return self._get(Sweep, _PATH, sweep_id)

    def list(self, *, limit: int | None = None) -> Iterator[Sweep]:
        """Yield sweeps, newest first."""
        return self._list(Sweep, _PATH, limit=limit)

    def cancel(self, sweep_id: str) -> Sweep:
        """Cancel the sweep: it creates no more trials, and unfinished ones are cancelled. Adapters stay."""
        return self._post(Sweep, _PATH, sweep_id, "cancel")

    def close(self, sweep_id: str) -> Sweep:
        """Close the sweep: no more trials are created. Existing ones continue, and then the best one is promoted."""
        return self._post(Sweep, _PATH, sweep_id, "close")

    def trials(self, sweep_id: str, *, limit: int | None = None) -> Iterator[Trial]:
        """Yield the trials, the best first, those without a value last."""
        return self._list(Trial, _PATH, sweep_id, "trials", limit=limit)

    def trial(self, sweep_id: str, number: int) -> Trial:
        return self._get(Trial, _PATH, sweep_id, "trials", str(number))

    def stop_trial(self, sweep_id: str, number: int) -> Trial:
        """Stop a trial early. It produces no adapter. Raises Conflict if it has already ended."""
        return self._post(Trial, _PATH, sweep_id, "trials", str(number), "stop")

    def wait(
        self,
        sweep_id: str,
        *,
        on_progress: Callable[[Sweep], None] | None = None,
        timeout_seconds: float | None = None,
        poll_seconds: float = 2.0,
    ) -> Sweep:
        """Wait until all trials have finished and the best one is promoted."""
        return self._poll(
            lambda: self.get(sweep_id),
            lambda sweep: sweep.is_final,
            on_progress=on_progress,
            timeout_seconds=timeout_seconds,
            poll_seconds=poll_seconds,
            timeout=lambda sweep: WaitTimeout(
                "sweep_timeout", sweep_id=sweep_id, timeout_seconds=timeout_seconds or 0, state=sweep.status
            ),
        )
