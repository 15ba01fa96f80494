"""Sweeps: groups of jobs that differ in chosen fields, ranked by an objective."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from lorry import requests
from lorry.errors import WaitTimeout
from lorry.models import Sweep, Trial
from lorry.resources import pages
from lorry.resources.polling import poll_until
from lorry.transport.http import Transport

_PATH = "sweeps"


class Sweeps:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

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
        fields: dict[str, Any] = {
            "model": model,
            "training_file": training_file,
            "validation_file": validation_file,
            "parameters": parameters,
            "search": search,
            "objective": objective,
            "keep_adapters": keep_adapters,
            "max_concurrent": max_concurrent,
        }
        body = {name: value for name, value in fields.items() if value is not None} | dict(job or {})
        headers = {"idempotency-key": idempotency_key or str(uuid.uuid4())}
        return Sweep.of(self._transport.request("POST", _PATH, body=body, headers=headers))

    def get(self, sweep_id: str) -> Sweep:
        return Sweep.of(self._transport.get(_of(sweep_id)))

    def list(self, *, limit: int | None = None) -> Iterator[Sweep]:
        """Yield sweeps, newest first."""
        return (Sweep.of(item) for item in itertools.islice(pages.follow(self._transport, _PATH), limit))

    def cancel(self, sweep_id: str) -> Sweep:
        """Cancel the sweep: it creates no more trials, and unfinished ones are cancelled. Adapters stay."""
        return Sweep.of(self._transport.request("POST", _of(sweep_id, "cancel")))

    def close(self, sweep_id: str) -> Sweep:
        """Close the sweep: no more trials are created. Existing ones continue, and then the best one is promoted."""
        return Sweep.of(self._transport.request("POST", _of(sweep_id, "close")))

    def trials(self, sweep_id: str, *, limit: int | None = None) -> Iterator[Trial]:
        """Yield the trials, the best first, those without a value last."""
        found = pages.follow(self._transport, _of(sweep_id, "trials"))
        return (Trial.of(item) for item in itertools.islice(found, limit))

    def trial(self, sweep_id: str, number: int) -> Trial:
        return Trial.of(self._transport.get(_of(sweep_id, "trials", str(number))))

    def stop_trial(self, sweep_id: str, number: int) -> Trial:
        """Stop a trial early. It produces no adapter. Raises Conflict if it has already ended."""
        return Trial.of(self._transport.request("POST", _of(sweep_id, "trials", str(number), "stop")))

    def wait(
        self,
        sweep_id: str,
        *,
        on_progress: Callable[[Sweep], None] | None = None,
        timeout_seconds: float | None = None,
        poll_seconds: float = 2.0,
    ) -> Sweep:
        """Wait until all trials have finished and the best one is promoted."""
        return poll_until(
            self._transport,
            lambda: self.get(sweep_id),
            lambda sweep: sweep.is_final,
            on_progress=on_progress,
            timeout_seconds=timeout_seconds,
            poll_seconds=poll_seconds,
            timeout=lambda sweep: WaitTimeout(
                f"Sweep {sweep_id} did not finish within {timeout_seconds:g} s. Its status is {sweep.status!r}.",
                code="wait_timeout",
                remedy=f"Wait again, check the sweep with `lorry sweeps show {sweep_id}`, or cancel it with "
                f"`lorry sweeps cancel {sweep_id}`.",
            ),
        )


def _of(sweep_id: str, *rest: str) -> str:
    return "/".join((_PATH, quote(sweep_id, safe=""), *rest))
