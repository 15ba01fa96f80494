"""How long a job whose attempt ended badly lets others be tried first: so a bad node is told from a bad job before any
job has used up its attempts."""

from __future__ import annotations

from typing import get_args

from sqlalchemy.orm import Session

from catalog.lifecycle import candidates
from catalog.lifecycle.candidates import Such
from catalog.resources.sharding import group_told
from catalog.spec.job import Quantisation
from catalog.tables import Job, Worker
from catalog.tables.living import has_gpu, quantisations_on

MAX_SECONDS = 600.0


def seconds(session: Session, job: Job, *, now: float) -> float:
    """Twice what the attempt took, for a trainer to start and end meanwhile; 0 where nothing else would be tried: no
    job that ended badly no oftener, comes due by then, and fits the worker."""
    wait = min(MAX_SECONDS, 2 * (now - (job.claimed_at or now)))
    worker = session.get(Worker, job.worker_id) if job.worker_id is not None else None
    if worker is None:
        return 0.0
    missing = tuple(name for name in get_args(Quantisation) if name not in quantisations_on(worker.devices))
    others = candidates.waiting(
        session,
        Such(alone=True, recomputes=has_gpu(worker.devices), not_held_as=missing, tried_less=True),
        now=now + wait,
        per_group=1,
        num_bytes=worker.memory_bytes,
        group=group_told(worker.devices, worker.memory_bytes),
        num_ends=job.counted_attempts,
    )
    return wait if others else 0.0
