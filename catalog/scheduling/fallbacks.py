"""Chooses other jobs for a worker if other workers claim its first choice. Pure functions.

Many workers may decide at the same time, from the same queue. With these fallbacks each of them gets another job
without a new snapshot. claiming.py uses them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from catalog.scheduling.ordering import QueueEntry
from catalog.scheduling.packing import for_what_is_loaded
from catalog.scheduling.snapshot import Candidate, Policy, QueueSnapshot, Share, WorkerService

MAX_FALLBACKS = 32
"""The greatest length of `fallback_order`."""


def fallback_order(
    snapshot: QueueSnapshot, entries: Sequence[QueueEntry], first: QueueEntry, policy: Policy
) -> tuple[str, ...]:
    """Ids of `first`, which was chosen first, of the job that would probably be chosen without it, and so on.

    The list ends where a job that the snapshot lacks may come before the next one.
    """
    found: list[str] = []
    read: Counter[tuple[str, int]] = Counter()
    for job in _alternatives(snapshot, entries, first, policy):
        found.append(job.job_id)
        read[job.project_id, job.priority] += 1
        if len(found) == MAX_FALLBACKS or read[job.project_id, job.priority] == snapshot.per_group:
            break
    return tuple(found)


def snapshot_without(snapshot: QueueSnapshot, passed: Collection[str]) -> QueueSnapshot:
    """The snapshot as if other workers, each like this one, had just claimed the jobs `passed`."""
    shares = dict(snapshot.shares)
    served: dict[tuple[str, int], float] = {}
    for job in {job.job_id: job for job in snapshot.candidates if job.job_id in passed}.values():
        share = shares.get(job.project_id, Share())
        shares[job.project_id] = replace(
            share, num_running=share.num_running + 1, devices_in_use=share.devices_in_use + 1.0
        )
        served[job.project_id, job.priority] = snapshot.now
    recomputes, whole = snapshot.capacity.recomputes, max(snapshot.worker_bytes, snapshot.capacity.memory_bytes_free)
    given = WorkerService(at=served, memory_bytes=whole, recomputes=recomputes, group=snapshot.capacity.group)
    return replace(snapshot, shares=shares, served=(*snapshot.served, given), taken=passed)


def _alternatives(
    snapshot: QueueSnapshot, entries: Sequence[QueueEntry], first: QueueEntry, policy: Policy
) -> Iterable[Candidate]:
    """`first`, and the jobs after it that could be chosen first in its place."""
    capacity, key = snapshot.capacity, snapshot.live_key
    if key is not None:
        after = (entry.candidate for entry in entries[first.position - 1 :])
        fit = (job for job in after if capacity.cost(job, num_before=capacity.num_jobs) <= capacity.memory_bytes_free)
        return (job for job in fit if job.pack_key == key and not job.is_suspect and capacity.may_join(job))
    fitting = [entry for entry in entries if capacity.alone(entry.candidate) <= capacity.memory_bytes_free]
    loaded = for_what_is_loaded(fitting, capacity, patience_seconds=policy.patience_seconds)
    return (entry.candidate for entry in loaded or fitting)
