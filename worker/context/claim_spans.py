"""The tracing spans of the claims that this worker holds.

A trainer communicates only with its worker. It reports its actions with their times, and the worker creates spans from
them.
"""

from __future__ import annotations

from dataclasses import dataclass

from opentelemetry.trace import Span

from catalog import tracing
from catalog.queue.claiming import Claim
from catalog.states import EndReason
from catalog.tables.table import Json

SUCCESSFUL = frozenset({
    EndReason.COMPLETED,
    EndReason.CANCELLED_BY_USER,
    EndReason.PRUNED,
    EndReason.PAUSED_BY_USER,
    EndReason.DRAINED,
    EndReason.PREEMPTED,
})  # fmt: skip
"""Ends that are not failures."""
WHILE_TRAINING = ("checkpoint",)
"""Spans of a trainer that are children of `train`. All others are children of the claim."""


@dataclass(kw_only=True, slots=True)
class _Held:
    claim: Span
    training: Span | None = None
    """Open from the admission to the last step."""


class ClaimSpans:
    """The open spans, by claim. Calls for unknown claims are ignored, so a claim can be ended twice."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def claimed(self, claim: Claim, *, worker_id: str) -> None:
        """Record the time in the queue, and begin the span of the claim."""
        job = claim.job
        parent = tracing.of_job(job.id, job.trace)
        about = {"job": job.id, "attempt": claim.attempt}
        ended_at = job.claimed_at or claim.waited_since
        tracing.record("queue", parent=parent, began_at=claim.waited_since, ended_at=ended_at, about=about)
        held_by = {"claim": claim.claim_id, "worker": worker_id, "trainer": job.trainer_id}
        span = tracing.begin("claim", parent=parent, about={**about, **held_by})
        self._held[claim.claim_id] = _Held(claim=span)

    def of(self, claim_id: str) -> str | None:
        """Return the traceparent of the claim, or of its training while it trains."""
        held = self._held.get(claim_id)
        if held is None:
            return None
        return tracing.traceparent(held.training or held.claim)

    def admitted(self, claim_id: str, *, step: int) -> None:
        """Begin the span of the training."""
        held = self._held.get(claim_id)
        if held is not None and held.training is None:
            parent = tracing.traceparent(held.claim)
            held.training = tracing.begin("train", parent=parent, service="trainer", about={"step": step})

    def finished(self, claim_id: str) -> None:
        """End the span of the training after its last step."""
        held = self._held.get(claim_id)
        if held is not None and held.training is not None:
            held.training.end()
            held.training = None

    def reported(self, claim_id: str, event: Json) -> None:
        """Record the spans in an event of the trainer."""
        held = self._held.get(claim_id)
        if held is None:
            return
        for span in event.get("spans", ()):
            parent = tracing.traceparent((span["name"] in WHILE_TRAINING and held.training) or held.claim)
            times = {"began_at": float(span["began_at"]), "ended_at": float(span["ended_at"])}
            about = {"step": event.get("step")}
            tracing.record(span["name"], parent=parent, service="trainer", about=about, **times)

    def ended(self, claim_id: str, reason: EndReason | None) -> None:
        """End the span of the claim. reason None: another worker has the job."""
        self.finished(claim_id)
        held = self._held.pop(claim_id, None)
        if held is None:
            return
        outcome = reason.value if reason is not None else "stale"
        held.claim.set_attributes(tracing.attributes({"reason": outcome}))
        if reason not in SUCCESSFUL:
            tracing.fail(held.claim, outcome)
        held.claim.end()
