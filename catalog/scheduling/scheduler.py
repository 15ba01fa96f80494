"""The scheduling decision: what a worker with free capacity does next, and why. `decide` is a pure function.

1. Order the candidates by priority class, fair share and waiting time (ordering.py).
2. A new trainer takes the first job that fits, the anchor, and fills up with packmates of its pack key (packing.py).
3. A live trainer admits jobs of its pack key while they delay no job that is ahead of them.
4. If a job of another base model has waited too long, nothing joins: the trainer drains, and the job starts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from catalog.scheduling import ordering
from catalog.scheduling.ordering import QueueEntry, order
from catalog.scheduling.packing import Choice, choose_joiners, choose_pack
from catalog.scheduling.snapshot import Policy, QueueSnapshot

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """A new or empty trainer starts with these jobs, the anchor first."""

    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Join:
    """These jobs join those that train already."""

    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """No job is claimed. `choices` is empty."""

    reason: str
    choices: tuple[Choice, ...] = ()


Action = Start | Join | Wait


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """An action with its reasons. `trace` may be shown to the project: it names no job of another project."""

    action: Action
    trace: Json

    def why(self, choice: Choice) -> Json:
        """The reasons for one chosen job, as stored with its attempt and shown by `…/why`."""
        entry = choice.entry
        return {
            "role": choice.role,
            "reason": choice.reason,
            "position": entry.position,
            "position_reason": entry.reason,
            "waited_seconds": entry.waited_seconds,
            "effective_priority": entry.effective_priority,
            "normalized_usage": entry.level,
            "effective_level": entry.effective_level,
            "share": self.trace["shares"][entry.candidate.project_id],
            **{name: value for name, value in self.trace.items() if name != "shares"},
        }


def decide(snapshot: QueueSnapshot, policy: Policy) -> Decision:
    """The action of the worker whose capacity `snapshot` has."""
    entries = ordered(snapshot, policy)
    action, waits_for = _action(snapshot, policy, entries)
    capacity = snapshot.capacity
    trace: Json = {
        "as_of": snapshot.now,
        "looked_at": len(entries),
        "capacity": {
            "max_jobs": capacity.max_jobs,
            "memory_bytes_free": capacity.memory_bytes_free,
            "num_jobs": capacity.num_jobs,
        },
        "resident_key": capacity.resident_key,
        "is_draining_for_other_base": waits_for is not None and waits_for.waited_seconds >= policy.patience_seconds,
        "awaits_preemption": waits_for is not None and waits_for.awaits_preemption,
        "policy": asdict(policy),
        "shares": {
            project_id: ordering.describe_share(snapshot.shares, project_id, policy)
            for project_id in {choice.entry.candidate.project_id for choice in action.choices}
        },
    }
    return Decision(action=action, trace=trace)


def ordered(snapshot: QueueSnapshot, policy: Policy) -> list[QueueEntry]:
    """The candidates without duplicates, in the order of the queue."""
    once = {job.job_id: job for job in snapshot.candidates}
    return order(once.values(), snapshot.now, shares=snapshot.shares, served=snapshot.served, policy=policy)


def _action(snapshot: QueueSnapshot, policy: Policy, entries: list[QueueEntry]) -> tuple[Action, QueueEntry | None]:
    """Returns the action, and the job for which nothing more joins, if there is one."""
    if snapshot.has_suspect:
        return Wait(reason="a job in the trainer failed twice and trains alone"), None
    patience = policy.patience_seconds
    if snapshot.live_key is None:
        chosen = choose_pack(entries, snapshot.capacity, patience_seconds=patience)
        return (Start(choices=tuple(chosen)) if chosen else _nothing(entries)), None
    chosen, waits_for = choose_joiners(
        entries, snapshot.capacity, snapshot.live_key, worker_bytes=snapshot.worker_bytes, patience_seconds=patience
    )
    if chosen:
        return Join(choices=tuple(chosen)), waits_for
    if waits_for is not None:
        reason = "a job that can't join has waited too long, so the trainer drains"
        if waits_for.awaits_preemption:
            reason = "jobs are being preempted for another job, and no job joins before it"
        return Wait(reason=reason), waits_for
    return _nothing(entries), None


def _nothing(entries: list[QueueEntry]) -> Wait:
    return Wait(reason="no queued job fits" if entries else "no job is queued")
