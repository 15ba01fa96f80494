"""Fine-tuning jobs: create, list, wait for and control them. `lorry.resources.follow` streams their updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

from lorry import requests
from lorry.errors import WaitTimeout
from lorry.models import Attempt, Checkpoint, Job, JobEvent, LogLine
from lorry.resources import follow as live
from lorry.resources.follow import JobUpdate
from lorry.resources.resource import PAGE_SIZE, Resource, given, new_key, url
from lorry.view import View

_PATH = "fine_tuning/jobs"


@dataclass(frozen=True, kw_only=True)
class Sample(View):
    """A job's completion of one of its sample prompts."""

    step: int = 0
    """Optimizer steps of the job before the evaluation."""
    prompt: str = ""
    """Prompt of the job's `evaluation.samples`."""
    answer: str = ""
    """Text that the model generated."""
    num_tokens: int = 0
    """Number of tokens of the answer."""
    is_complete: bool = False
    """Whether the answer ended within the token limit."""


class Jobs(Resource):
    def create(
        self,
        *,
        model: str | None = None,
        training_file: str | None = None,
        plan: str | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[requests.JobFields],
    ) -> Job:
        """Create a job. Files are ids. Omitted fields use the service's defaults. Retries after a lost response create
        no second job.

        `hyperparameters` are those of the method, which is "supervised" by default. `parent_adapter`: id or name of an
        adapter to continue from. `plan`: id of a plan; the job is then created from it, without further fields.
        `extra_body`: raw fields of the body for a newer service; they override the arguments. Raises InvalidRequest,
        NotFound or Conflict if the service rejects the job.
        """
        body = job_body(fields, model=model, training_file=training_file, plan=plan)
        return self._post(Job, _PATH, body=body, key=idempotency_key or new_key())

    def get(self, job_id: str) -> Job:
        return self._get(Job, _PATH, job_id)

    def list(
        self,
        *,
        limit: int | None = None,
        metadata: Mapping[str, str] | None = None,
        tags: Sequence[str] = (),
    ) -> Iterator[Job]:
        """Yield jobs, newest first. `metadata` and `tags`: only jobs that have all of them."""
        params: dict[str, Any] = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        params |= {"tag": [*tags]} if tags else {}
        return self._list(Job, _PATH, limit=limit, params=params)

    def cancel(self, job_id: str) -> Job:
        """Cancel the job. A waiting job is cancelled immediately, a running one within seconds."""
        return self._post(Job, _PATH, job_id, "cancel")

    def pause(self, job_id: str) -> Job:
        return self._post(Job, _PATH, job_id, "pause")

    def resume(self, job_id: str) -> Job:
        return self._post(Job, _PATH, job_id, "resume")

    def hold(self, job_id: str) -> Job:
        """Keep the job in the queue without starting it, until it is released."""
        return self._post(Job, _PATH, job_id, "hold")

    def release(self, job_id: str) -> Job:
        return self._post(Job, _PATH, job_id, "release")

    def move(
        self,
        job_id: str,
        *,
        before: str | None = None,
        after: str | None = None,
        to: Literal["first", "last"] | None = None,
    ) -> Job:
        """Move the job among the project's waiting jobs of the same priority. Pass exactly one argument."""
        return self._post(Job, _PATH, job_id, "move", body=given(before=before, after=after, to=to))

    def events(
        self,
        job_id: str,
        *,
        type: Literal["message", "metrics"] | None = None,  # noqa: A002 - the parameter's name in the API
        limit: int | None = None,
    ) -> Iterator[JobEvent]:
        """Yield events, newest first. `type`: only events of this type."""
        page_size = min(limit or PAGE_SIZE, PAGE_SIZE)
        params = {"type": type}
        return self._list(JobEvent, _PATH, job_id, "events", limit=limit, params=params, page_size=page_size)

    def samples(self, job_id: str) -> Iterator[Sample]:
        """Yield the completions of `evaluation.samples`, those of the latest evaluation first."""
        for event in self.events(job_id, type="message"):
            given: list[dict[str, Any]] = event.data.get("samples") or []
            yield from (Sample.of({"step": event.data.get("step"), **sample}) for sample in given)

    def checkpoints(self, job_id: str) -> Iterator[Checkpoint]:
        return self._list(Checkpoint, _PATH, job_id, "checkpoints")

    def attempts(self, job_id: str) -> list[Attempt]:
        return [*self._items(Attempt, _PATH, job_id, "attempts")]

    def metrics(self, job_id: str, *, kind: str = "train") -> list[dict[str, Any]]:
        """Return the points of the curve `kind`: train or valid."""
        return self._transport.get(url(_PATH, job_id, "metrics"), {"kind": kind}).get("data") or []

    def why(self, job_id: str) -> dict[str, Any]:
        """Explain the job's state."""
        return self._transport.get(url(_PATH, job_id, "why"))

    def data_report(self, job_id: str) -> dict[str, Any]:
        """Return the data reports of the job's files."""
        return self._transport.get(url(_PATH, job_id, "data_report"))

    def wait(
        self,
        job_id: str,
        *,
        on_progress: Callable[[Job], None] | None = None,
        timeout_seconds: float | None = None,
        poll_seconds: float = 1.0,
    ) -> Job:
        """Wait until the job is final, and return it. Check `status` and `error`. A paused job is waited for, too."""
        return self._poll(
            lambda: self.get(job_id),
            lambda job: job.is_final,
            on_progress=on_progress,
            timeout_seconds=timeout_seconds,
            poll_seconds=poll_seconds,
            timeout=lambda job: WaitTimeout(
                "job_timeout", job_id=job_id, timeout_seconds=timeout_seconds or 0, state=job.status
            ),
        )

    def logs(
        self, job_id: str, *, attempt: int | None = None, rank: int | None = None, contains: str | None = None
    ) -> Iterator[LogLine]:
        """Yield the log lines of the job's trainers, oldest attempt first. `rank`: only lines of this trainer process.
        `contains`: only lines with this text, ignoring case. Lines of a running job appear within a minute; logs are
        kept for 30 days after the job's end."""
        params: dict[str, Any] = {"attempt": attempt, "rank": rank, "contains": contains}
        return self._list(LogLine, _PATH, job_id, "logs", params=params, page_size=1000)

    def stream(self, job_id: str, *, last_event_id: str | None = None) -> Iterator[JobUpdate]:
        """Yield the live updates of one connection, until the service ends it. `follow` reconnects."""
        return live.stream(self._transport, url(_PATH, job_id, "stream"), last_event_id)

    def follow(
        self,
        job_id: str,
        *,
        after_event: str | None = None,
        poll_seconds: float = 1.0,
        patience_seconds: float = 60.0,
    ) -> Iterator[JobUpdate]:
        """Yield live updates until the job is final. If the stream is interrupted, poll and resume the stream.

        `after_event`: id of the last event already seen. Without it, all events of the job are sent first.
        """
        return live.follow(
            lambda last_event_id: self.stream(job_id, last_event_id=last_event_id),
            lambda: self.get(job_id),
            last_event_id=after_event and after_event.removeprefix("ftevent-"),
            sleep=self._transport.sleep,
            clock=time.monotonic,
            poll_seconds=poll_seconds,
            patience_seconds=patience_seconds,
        )


def job_body(fields: requests.JobFields, **named: str | None) -> dict[str, Any]:
    """Return the body of a request for a job or a plan."""
    body: dict[str, Any] = {**named, **fields}
    extra, method, numbers = (body.pop(name, None) for name in ("extra_body", "method", "hyperparameters"))
    if method or numbers:
        chosen = method or "supervised"
        body["method"] = {"type": chosen, **({chosen: {"hyperparameters": numbers}} if numbers else {})}
    return {name: value for name, value in body.items() if value is not None} | dict(extra or {})
