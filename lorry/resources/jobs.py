"""Fine-tuning jobs: create, look, wait, steer. Following one live is in `live`."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack
from urllib.parse import quote

from lorry import requests
from lorry.errors import WaitTimeout
from lorry.models.jobs import Attempt, Checkpoint, Job, JobEvent, JobUpdate, LogLine, Sample
from lorry.resources import follow as live
from lorry.resources import pages
from lorry.transport.http import Transport

_PATH = "fine_tuning/jobs"


class Jobs:
    def __init__(self, transport: Transport, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._transport = transport
        self._clock = clock

    def create(
        self,
        *,
        model: str | None = None,
        training_file: str | None = None,
        plan: str | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[requests.JobFields],
    ) -> Job:
        """Files are ids. What is not given is the service's default. Repetitions after a lost answer make one job.

        hyperparameters: of the method, "supervised" where none is named; the others compare answers. parent_adapter:
        id or name of one to continue. plan: id of one; the job is then just as planned, and nothing else need be said.
        extra_body: fields of the body as they go over the wire, for a service newer than this client, in place of the
        arguments' own. Raises InvalidRequest, NotFound or Conflict where it is refused.
        """
        body = requests.job_body(fields, model=model, training_file=training_file, plan=plan)
        headers = {"idempotency-key": idempotency_key or str(uuid.uuid4())}
        return Job.of(self._transport.request("POST", _PATH, body=body, headers=headers))

    def get(self, job_id: str) -> Job:
        return Job.of(self._transport.get(_of(job_id)))

    def list(
        self,
        *,
        limit: int | None = None,
        metadata: Mapping[str, str] | None = None,
        tags: Sequence[str] = (),
    ) -> Iterator[Job]:
        """Newest first. metadata, tags: only jobs that have all of these."""
        params: dict[str, Any] = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        params |= {"tag": [*tags]} if tags else {}
        found = pages.follow(self._transport, _PATH, params=params)
        return (Job.of(wire) for wire in itertools.islice(found, limit))

    def cancel(self, job_id: str) -> Job:
        """At once where it waits; a running one is marked, and its worker obeys within some seconds."""
        return self._verb(job_id, "cancel")

    def pause(self, job_id: str) -> Job:
        return self._verb(job_id, "pause")

    def resume(self, job_id: str) -> Job:
        return self._verb(job_id, "resume")

    def hold(self, job_id: str) -> Job:
        """Keep it in the queue, and out of every trainer, until it is released."""
        return self._verb(job_id, "hold")

    def release(self, job_id: str) -> Job:
        return self._verb(job_id, "release")

    def move(
        self,
        job_id: str,
        *,
        before: str | None = None,
        after: str | None = None,
        to: Literal["first", "last"] | None = None,
    ) -> Job:
        """Give it another place among the project's jobs of its class that wait: exactly one of the three."""
        target = {name: value for name, value in {"before": before, "after": after, "to": to}.items() if value}
        return Job.of(self._transport.request("POST", _of(job_id, "move"), body=target))

    def events(
        self,
        job_id: str,
        *,
        type: Literal["message", "metrics"] | None = None,  # noqa: A002 - the wire's word
        limit: int | None = None,
    ) -> Iterator[JobEvent]:
        """Newest first; only those of one type, if it is named."""
        page_size = min(limit or pages.PAGE_SIZE, pages.PAGE_SIZE)
        found = pages.follow(self._transport, _of(job_id, "events"), params={"type": type}, page_size=page_size)
        return (JobEvent.of(wire) for wire in itertools.islice(found, limit))

    def samples(self, job_id: str) -> Iterator[Sample]:
        """Answers to the prompts of `evaluation.samples`, the latest evaluation's first."""
        for event in self.events(job_id, type="message"):
            given: list[dict[str, Any]] = event.data.get("samples") or []
            yield from (Sample.of({"step": event.data.get("step"), **sample}) for sample in given)

    def checkpoints(self, job_id: str) -> Iterator[Checkpoint]:
        return (Checkpoint.of(wire) for wire in pages.follow(self._transport, _of(job_id, "checkpoints")))

    def attempts(self, job_id: str) -> list[Attempt]:
        data: list[dict[str, Any]] = self._transport.get(_of(job_id, "attempts")).get("data") or []
        return [Attempt.of(wire) for wire in data]

    def metrics(self, job_id: str, *, kind: str = "train") -> list[dict[str, Any]]:
        """Points of the loss curve, `kind` train or valid."""
        return self._transport.get(_of(job_id, "metrics"), {"kind": kind}).get("data") or []

    def why(self, job_id: str) -> dict[str, Any]:
        """Why the job waits."""
        return self._transport.get(_of(job_id, "why"))

    def data_report(self, job_id: str) -> dict[str, Any]:
        """What preparation found in the job's files."""
        return self._transport.get(_of(job_id, "data_report"))

    def wait(
        self,
        job_id: str,
        *,
        on_progress: Callable[[Job], None] | None = None,
        timeout_seconds: float | None = None,
        poll_seconds: float = 1.0,
    ) -> Job:
        """Until the job is final, whichever way: look at `status` and `error`. A paused job is waited for."""
        deadline = None if timeout_seconds is None else self._clock() + timeout_seconds
        while True:
            job = self.get(job_id)
            if on_progress is not None:
                on_progress(job)
            if job.is_final:
                return job
            if deadline is not None and self._clock() >= deadline:
                raise WaitTimeout(
                    f"{job_id} is {job.status} after {timeout_seconds:g} s; it goes on.",
                    code="wait_timeout",
                    remedy="Wait again, or cancel it.",
                )
            self._transport.sleep(poll_seconds)

    def logs(
        self, job_id: str, *, attempt: int | None = None, rank: int | None = None, contains: str | None = None
    ) -> Iterator[LogLine]:
        """What its trainers printed, oldest attempt first. rank: of one of their processes. contains: in whichever
        case. Of a running job at most a minute old; kept for 30 days after its end."""
        params: dict[str, Any] = {"attempt": attempt, "rank": rank, "contains": contains}
        found = pages.follow(self._transport, _of(job_id, "logs"), params=params, page_size=1000)
        return (LogLine.of(wire) for wire in found)

    def stream(self, job_id: str, *, last_event_id: str | None = None) -> Iterator[JobUpdate]:
        """One connection's live updates. It ends when the service ends it; `follow` goes on over breaks."""
        return live.stream(self._transport, _of(job_id, "stream"), last_event_id)

    def follow(
        self,
        job_id: str,
        *,
        after_event: str | None = None,
        poll_seconds: float = 1.0,
        patience_seconds: float = 60.0,
    ) -> Iterator[JobUpdate]:
        """Live updates until the job is final. Over a broken stream it polls, and takes up where it was.

        after_event: id of the last event that was seen already; else every event of the job is told first.
        """
        return live.follow(
            lambda last_event_id: self.stream(job_id, last_event_id=last_event_id),
            lambda: self.get(job_id),
            last_event_id=after_event and after_event.removeprefix("ftevent-"),
            sleep=self._transport.sleep,
            clock=self._clock,
            poll_seconds=poll_seconds,
            patience_seconds=patience_seconds,
        )

    def _verb(self, job_id: str, verb: str) -> Job:
        return Job.of(self._transport.request("POST", _of(job_id, verb)))


def _of(job_id: str, *rest: str) -> str:
    return "/".join((_PATH, quote(job_id, safe=""), *rest))
