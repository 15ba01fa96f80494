"""Sweeps: several jobs that differ in stated fields, and which of them is best."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from lorry import requests
from lorry.errors import WaitTimeout
from lorry.models.sweeps import Sweep, Trial
from lorry.resources import pages
from lorry.transport.http import Transport

_PATH = "sweeps"


class Sweeps:
    def __init__(self, transport: Transport, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._transport = transport
        self._clock = clock

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
        """Files are ids. Repetitions after a lost answer make one sweep.

        parameters: by the dotted path of a job's field, `{"lora.rank": {"values": [4, 8]}}`. job: further fields of
        the job that all trials share, as `jobs.create` takes them. Raises InvalidRequest, NotFound or Conflict where
        it is refused, and then no trial was made.
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
        """Newest first."""
        return (Sweep.of(wire) for wire in itertools.islice(pages.follow(self._transport, _PATH), limit))

    def cancel(self, sweep_id: str) -> Sweep:
        """No further trial, and those that have not ended are cancelled. What is trained stays."""
        return Sweep.of(self._transport.request("POST", _of(sweep_id, "cancel")))

    def close(self, sweep_id: str) -> Sweep:
        """No further trial; those that there are go on, and then the best is promoted."""
        return Sweep.of(self._transport.request("POST", _of(sweep_id, "close")))

    def trials(self, sweep_id: str, *, limit: int | None = None) -> Iterator[Trial]:
        """The best first, those without a value last."""
        found = pages.follow(self._transport, _of(sweep_id, "trials"))
        return (Trial.of(wire) for wire in itertools.islice(found, limit))

    def trial(self, sweep_id: str, number: int) -> Trial:
        return Trial.of(self._transport.get(_of(sweep_id, "trials", str(number))))

    def add_trial(self, sweep_id: str, parameters: Mapping[str, Any]) -> Trial:
        """To an ask_tell sweep, with parameters of one's own choice."""
        return Trial.of(self._transport.request("POST", _of(sweep_id, "trials"), body={"parameters": dict(parameters)}))

    def stop_trial(self, sweep_id: str, number: int) -> Trial:
        """End one that does badly. It leaves no adapter. Raises Conflict where it has ended."""
        return Trial.of(self._transport.request("POST", _of(sweep_id, "trials", str(number), "stop")))

    def sleep(self, seconds: float) -> None:
        """As the client sleeps between two looks."""
        self._transport.sleep(seconds)

    def wait(
        self,
        sweep_id: str,
        *,
        on_progress: Callable[[Sweep], None] | None = None,
        timeout_seconds: float | None = None,
        poll_seconds: float = 2.0,
    ) -> Sweep:
        """Until all trials have ended and the best is promoted."""
        deadline = None if timeout_seconds is None else self._clock() + timeout_seconds
        while True:
            sweep = self.get(sweep_id)
            if on_progress is not None:
                on_progress(sweep)
            if sweep.is_final:
                return sweep
            if deadline is not None and self._clock() >= deadline:
                raise WaitTimeout(
                    f"{sweep_id} is {sweep.status} after {timeout_seconds:g} s; it goes on.",
                    code="wait_timeout",
                    remedy="Wait again, or cancel it.",
                )
            self._transport.sleep(poll_seconds)


def _of(sweep_id: str, *rest: str) -> str:
    return "/".join((_PATH, quote(sweep_id, safe=""), *rest))
