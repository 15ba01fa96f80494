"""Draws the faults of a soak and their times from a seed, before the first fault, so that a run can be repeated.

The target of a fault is drawn, too, as a position among the targets that exist at its time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

FaultKind = Literal[
    "trainer-killed",
    "trainer-stopped",
    "worker-killed",
    "worker-stopped",
    "worker-drained",
    "failpoint",
    "checkpoint-truncated",
    "job-paused",
    "api-killed",
    "api-restarted",
    "redis-flushed",
    "redis-restarted",
    "postgres-restarted",
    "postgres-killed",
    "store-failing",
]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
SAYS: dict[FaultKind, str] = {
    "trainer-killed": "SIGKILL of a trainer",
    "trainer-stopped": "SIGSTOP of a trainer, then SIGCONT",
    "worker-killed": "SIGKILL of a worker, then a new one",
    "worker-stopped": "SIGSTOP of a worker, then SIGCONT, half of them longer than a lease",
    "worker-drained": "SIGTERM of a worker, then a new one",
    "failpoint": "SIGKILL of the next process that passes a failpoint",
    "checkpoint-truncated": "a running job's newest checkpoint truncated, then SIGKILL of its trainer",
    "job-paused": "a running job paused and resumed over HTTP",
    "api-killed": "SIGKILL of the API server, then a new one",
    "api-restarted": "SIGTERM of the API server, then a new one",
    "redis-flushed": "FLUSHALL",
    "redis-restarted": "Redis killed, and empty after its restart",
    "postgres-restarted": "PostgreSQL stopped and restarted",
    "postgres-killed": "PostgreSQL killed and restarted",
    "store-failing": "the store responds with 500 to every request",
}
WEIGHTS: dict[FaultKind, int] = {
    "trainer-killed": 7,
    "trainer-stopped": 5,
    "worker-killed": 6,
    "worker-stopped": 5,
    "worker-drained": 5,
    "failpoint": 10,
    "checkpoint-truncated": 5,
    "job-paused": 10,
    "api-killed": 3,
    "api-restarted": 3,
    "redis-flushed": 4,
    "redis-restarted": 3,
    "postgres-restarted": 3,
    "postgres-killed": 2,
    "store-failing": 5,
}
LASTS: dict[FaultKind, tuple[float, float]] = {
    "trainer-stopped": (1.0, 20.0),
    "worker-stopped": (1.0, 30.0),
    "job-paused": (1.0, 12.0),
    "redis-restarted": (0.5, 8.0),
    "postgres-restarted": (0.5, 5.0),
    "postgres-killed": (0.0, 2.0),
    "store-failing": (2.0, 10.0),
}
"""Minimum and maximum seconds until the fault is reverted. Other faults don't last."""
FAILPOINTS = (
    *("before_claim", "after_claim", "uploading", "before_complete", "in_complete", "after_complete"),
    *("loading", "step_20", "step_75", "step_130", "in_checkpoint"),
    *("submit_before_commit", "submit_after_commit"),
)
GAP_SECONDS = (2.0, 6.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A fault. at: seconds after the faults begin. place: in [0, 1), the position of its target among all targets."""

    at: float
    kind: FaultKind
    place: float
    lasts: float = 0.0
    failpoint: str | None = None


def draw(seed: int, *, seconds: float) -> list[Fault]:
    """Return all faults of a run, in their order."""
    choose = random.Random(seed)
    faults: list[Fault] = []
    at = choose.uniform(*GAP_SECONDS)
    while at < seconds:
        faults.append(_one(choose, at))
        at += choose.uniform(*GAP_SECONDS)
    return faults


def _one(choose: random.Random, at: float) -> Fault:
    (kind,) = choose.choices(FAULT_KINDS, [WEIGHTS[each] for each in FAULT_KINDS])
    place, part, failpoint = choose.random(), choose.random(), choose.choice(FAILPOINTS)
    least, most = LASTS.get(kind, (0.0, 0.0))
    is_failpoint = kind == "failpoint"
    return Fault(
        at=at,
        kind=kind,
        place=place,
        lasts=least + part * (most - least),
        failpoint=failpoint if is_failpoint else None,
    )
